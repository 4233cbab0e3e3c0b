"""Vocabularies in tiktoken's format: Llama 3's and 4's tokenizer.model, Qwen's qwen.tiktoken; and
Mistral's tekken.json.

In tiktoken's format, each line is a token in base64 and its rank, which is also its id. The file
says neither whose it is, nor how texts are cut into words, nor which special tokens follow. It is
recognized by the number of its ranks, and the rest is written here
(github.com/meta-llama/llama-models, github.com/QwenLM/Qwen). Files of other models are refused.

tekken.json (github.com/mistralai/mistral-common) says all of it. Its special tokens come first.

Each becomes a tokenizer.json as Hugging Face has it for the same tokenizer, so that bpe.py can
encode with it, and save it for others."""

import base64
import os
from typing import Callable, NamedTuple

from nanosafe.errors import one_line_errors, stop
from nanosafe.storage import read_json
from nanosafe.tokenizer.bpe import QWEN2, BPEEngine, describe_beginning, spell_bytes
from nanosafe.tokenizer.special_tokens import read_added_tokens

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEAD = r"[^\r\n\p{L}\p{N}]?"
CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWERCASE = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LOWERCASE_WORD = LEAD + CAPITALS + "*" + LOWERCASE + "+" + CONTRACTION
CAPITALIZED_WORD = LEAD + CAPITALS + "+" + LOWERCASE + "*" + CONTRACTION
NO_WORD = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA4 = "|".join([LOWERCASE_WORD, CAPITALIZED_WORD, NO_WORD])


def reserve(prefix, first, last):
    """The special tokens of Meta's that have a number in place of a name of their own."""
    return [f"<|{prefix}reserved_special_token_{i}|>" for i in range(first, last + 1)]


def list_llama3_tokens(folder):
    """The 256 special tokens of Llama 3, in the order of their ids."""
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }
    if is_llama_3_1(folder):
        named[4] = "<|finetune_right_pad_id|>"
        named[8] = "<|eom_id|>"
        named[10] = "<|python_tag|>"
    texts = reserve("", 0, 255 - len(named))
    for place, text in sorted(named.items()):
        texts.insert(place, text)
    return texts


def is_llama_3_1(folder):
    """Whether the model beside the tokenizer is Llama 3.1 or later: its RoPE is scaled."""
    params = read_json(folder, "params.json")
    model = params.get("model", params)
    if not isinstance(model, dict):
        raise ValueError(f"params.json: model is {model!r}, not an object")
    return bool(model.get("use_scaled_rope"))


def list_llama4_tokens(folder):
    """The 2,048 special tokens of Llama 4, in the order of their ids."""
    basic = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    turns = ["header_start", "header_end", "eom", "eot", "step"]
    texts = [f"<|{name}|>" for name in [*basic, *turns]]
    texts += reserve("text_post_train_", 0, 5)
    texts += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    texts += reserve("text_post_train_", 8, 68)
    texts += ["<|image_start|>", "<|image_end|>"]
    texts += reserve("vision_", 0, 1)
    texts += ["<|tile_x_separator|>", "<|tile_y_separator|>"]
    texts += reserve("vision_", 2, 5)
    texts += ["<|image|>", *reserve("vision_", 6, 6), "<|patch|>"]
    texts += reserve("vision_", 7, 1047)
    texts += reserve("reasoning_", 0, 7)
    texts += ["<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    return texts + reserve("", 0, 2047 - len(texts))


def list_qwen_tokens(folder):
    """The special tokens that all of Qwen's models have. tokenizer_config.json names the others."""
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


class Published(NamedTuple):
    """A published vocabulary in tiktoken's format."""

    name: str
    pattern: str  # how texts are cut
    list_special_tokens: Callable  # of the folder, in the order of their ids
    has_bos: bool = True  # the first special token begins a text
    normalizer: dict = None


BY_RANKS = {
    128000: Published("Llama 3", LLAMA3, list_llama3_tokens),
    200000: Published("Llama 4", LLAMA4, list_llama4_tokens),
    151643: Published("Qwen", QWEN2, list_qwen_tokens, has_bos=False, normalizer={"type": "NFC"}),
}
# tekken.json, of before it listed them (mistral-common 1.13).
TEKKEN_TOKENS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
MOST_SPECIAL_TOKENS = 2**16  # more are a mistake


def load(content, names, file):
    """The engine of a file in tiktoken's format. names: what tokenizer_config.json says."""
    with one_line_errors(file):
        vocab = read_vocab(content)
    published = BY_RANKS.get(len(vocab))
    if published is None or set(vocab.values()) != set(range(len(vocab))):
        known = ", ".join(f"{each.name} ({ranks:,})" for ranks, each in sorted(BY_RANKS.items()))
        stop(
            f"{file!r} has {len(vocab):,} tokens with ranks. How texts are cut is known for {known}"
            ": for another model, use its tokenizer.json, in a folder without this file"
        )
    with one_line_errors(file):
        special_tokens = published.list_special_tokens(os.path.dirname(file))
    added_tokens = []
    for id, text in enumerate(special_tokens, start=len(vocab)):
        added_tokens.append(describe_token(id, text))
    bos = added_tokens[0] if published.has_bos else None
    return make_engine(vocab, added_tokens, bos, published.pattern, published.normalizer, names)


def load_tekken(file, names):
    """The engine of a tekken.json."""
    with one_line_errors(file):
        tekken = read_json(*os.path.split(file))
        config = check_type(tekken["config"], dict)
        pattern = check_type(config["pattern"], str)
        special_count = check_type(config["default_num_special_tokens"], int)
        token_count = check_type(config["default_vocab_size"], int) - special_count
        if not 0 < special_count <= MOST_SPECIAL_TOKENS:
            raise ValueError(f"default_num_special_tokens is {special_count}")
        added_tokens = list_tekken_tokens(tekken.get("special_tokens"), special_count)
        vocab = read_tekken_vocab(tekken["vocab"], special_count, token_count)
    beginnings = [token for token in added_tokens if token["content"] == "<s>"]
    bos = beginnings[0] if beginnings else None
    engine = make_engine(vocab, added_tokens, bos, pattern, None, names)
    # What is written as tokenizer.json is not a copy of tekken.json.
    engine.files = [name for name in engine.files if name != "tokenizer.json"]
    return engine


def read_tekken_vocab(entries, special_count, token_count):
    """{token: id} of the first tokens in a tekken.json; the others are not used."""
    vocab = {}
    for entry in check_type(entries, list):
        rank = check_type(check_type(entry, dict)["rank"], int)
        if rank < token_count:
            token = base64.b64decode(check_type(entry["token_bytes"], str))
            vocab[spell_bytes(token)] = rank + special_count
    ids = sorted(vocab.values())
    if len(ids) != token_count or ids != list(range(special_count, special_count + token_count)):
        raise ValueError(f"the vocabulary has not each of the first {token_count} ranks once")
    return vocab


def list_tekken_tokens(entries, count):
    """The descriptions of a tekken.json's special tokens, which have the ids below `count`.

    entries  its special_tokens, or None in an older file. Ids without an entry get a name."""
    if entries is None:
        entries = [{"rank": id, "token_str": text} for id, text in enumerate(TEKKEN_TOKENS)]
    described = {id: describe_token(id, f"<SPECIAL_{id}>") for id in range(count)}
    for entry in check_type(entries, list):
        id = check_type(check_type(entry, dict)["rank"], int)
        text = check_type(entry["token_str"], str)
        if id not in described:
            raise ValueError(f"the special token {text!r} has the rank {id}, of {count}")
        described[id] = describe_token(id, text, special=entry.get("is_control", True))
    return list(described.values())


def check_type(value, kind):
    """The value. Raises ValueError where it is not of that kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{str(value)[:80]!r} stands where {kind.__name__} is expected")
    return value


def read_vocab(content):
    """{token: id}, the tokens in the characters that stand for their bytes."""
    vocab = {}
    for line in content.splitlines():
        if line:
            token, rank = line.split()
            vocab[spell_bytes(base64.b64decode(token))] = int(rank)
    return vocab


def find_merges(vocab):
    """The pairs of tokens that merge, the first to merge first: all that make a token together.

    The token with the lowest rank is made first. Of its pairs, the one whose halves have the lowest
    ranks comes first, as in the tokenizer.json that Hugging Face publishes."""
    merges = []
    for token in sorted(vocab, key=vocab.get):
        pairs = []
        for i in range(1, len(token)):
            left = token[:i]
            right = token[i:]
            if left in vocab and right in vocab:
                pairs.append((vocab[left], vocab[right], left, right))
        for _, _, left, right in sorted(pairs):
            merges.append((left, right))
    return merges


def describe_token(id, text, special=True):
    """An added token as tokenizer.json describes it."""
    return {
        "id": id,
        "content": text,
        "special": bool(special),
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }


def make_engine(vocab, added_tokens, bos, pattern, normalizer, names):
    """The engine of a vocabulary, from its tokenizer.json as Hugging Face's tokenizers writes it.

    bos         the added token that begins a text, or None
    pattern     how texts are cut
    normalizer  as tokenizer.json has it, or None
    names       what tokenizer_config.json says"""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    merges = find_merges(vocab)
    spec = {
        "version": "1.0",
        "normalizer": normalizer,
        "decoder": byte_level,
        "added_tokens": added_tokens,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    added = read_added_tokens(spec)
    if bos:
        spec["post_processor"] = describe_beginning(added, bos["content"])
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return BPEEngine(spec, ranks, added, names)
