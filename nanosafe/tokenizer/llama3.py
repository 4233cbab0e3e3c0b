"""Llama 3's own tokenizer.model (github.com/meta-llama/llama3), in tiktoken's format.

Each line is a token in base64 and its rank, which is also its id. The file says neither how texts
are cut into words nor which special tokens follow: that is written here, as the tokenizer.json that
Hugging Face has for the same tokenizer. So bpe.py can encode with it, and save it for others. Other
models' files look the same, and are refused."""

import base64
import os

from nanosafe.errors import one_line_errors, stop
from nanosafe.storage import read_json
from nanosafe.tokenizer.bpe import BPEEngine, describe_beginning, spell_bytes
from nanosafe.tokenizer.special_tokens import Token, read_added_tokens

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The file does not say whose it is. Llama 4's, with about 200,000 ranks, cuts texts in another way.
RANKS = 128000
# 256 special tokens follow the others. Those without a name of their own are "reserved".
SPECIAL_COUNT = 256
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
SINCE_LLAMA_3_1 = {
    4: "<|finetune_right_pad_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
}


def load(content, names, file):
    """The engine of a tokenizer.model with these bytes. names: what tokenizer_config.json says."""
    with one_line_errors(file):
        vocab = read_vocab(content)
        special_tokens = name_special_tokens(is_llama_3_1(os.path.dirname(file)))
    if set(vocab.values()) != set(range(RANKS)):
        stop(
            f"{file!r} has {len(vocab)} tokens with ranks, but Llama 3's tokenizer.model has "
            f"{RANKS}. How texts are cut for another model is not known: use its tokenizer.json, "
            "in a folder without tokenizer.model"
        )
    ranks = find_merges(vocab)
    spec = make_tokenizer_json(vocab, ranks, special_tokens)
    return BPEEngine(spec, ranks, read_added_tokens(spec), names)


def read_vocab(content):
    """{token: id}, the tokens in the characters that stand for their bytes."""
    vocab = {}
    for line in content.splitlines():
        if line:
            token, rank = line.split()
            vocab[spell_bytes(base64.b64decode(token))] = int(rank)
    return vocab


def is_llama_3_1(folder):
    """Whether the model beside the tokenizer is Llama 3.1 or later: its RoPE is scaled."""
    params = read_json(folder, "params.json")
    model = params.get("model", params)
    if not isinstance(model, dict):
        raise ValueError(f"params.json: model is {model!r}, not an object")
    return bool(model.get("use_scaled_rope"))


def name_special_tokens(since_3_1):
    """The texts of the 256 special tokens, in the order of their ids."""
    known = dict(SPECIAL_TOKENS)
    if since_3_1:
        known.update(SINCE_LLAMA_3_1)
    texts = []
    reserved = 0
    for i in range(SPECIAL_COUNT):
        if i in known:
            texts.append(known[i])
        else:
            texts.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return texts


def find_merges(vocab):
    """{(left, right): rank}: two tokens that make a token merge, and the rank is that token's."""
    ranks = {}
    for token, rank in vocab.items():
        for i in range(1, len(token)):
            left = token[:i]
            right = token[i:]
            if left in vocab and right in vocab:
                ranks[left, right] = rank
    return ranks


def make_tokenizer_json(vocab, ranks, special_tokens):
    """The tokenizer.json of a vocabulary, as Hugging Face's tokenizers writes it."""
    bos = special_tokens[0]
    bos_id = len(vocab)
    added_tokens = []
    for id, text in enumerate(special_tokens, start=bos_id):
        added_tokens.append(
            {
                "id": id,
                "content": text,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA3},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "normalizer": None,
        "decoder": byte_level,
        "added_tokens": added_tokens,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": describe_beginning({bos: Token(bos_id)}, bos),
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [list(pair) for pair in sorted(ranks, key=ranks.get)],
        },
    }
