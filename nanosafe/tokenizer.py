"""
Text <-> token ids, for SentencePiece models as LLaMA has them (tokenizer.model).

SentencePiece never finds a control token in text, so special tokens are split out first and each
piece between them is encoded on its own, with a space in front (Hugging Face's "legacy" behaviour,
which Alpaca and Beaver were trained with).
"""

import hashlib
import json
import os
import re
import shutil
from functools import cached_property

import sentencepiece

# protobuf for normalizer_spec {add_dummy_prefix: false}: appended to a model, it overrides
NO_PREFIX = b"\x1a\x02\x18\x00"


def load(path):
    """The tokenizer of a model folder, or of a tokenizer.model file.

    Reads beside it: added_tokens.json and tokenizer_config.json (added tokens, `legacy`),
    generation_config.json and config.json (further end-of-sequence ids).
    """
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    file = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise SystemExit(
            f"error: no tokenizer at {path!r}: give a folder with a tokenizer.model, or that file")
    config = read_json(folder, "tokenizer_config.json")
    added = dict(read_json(folder, "added_tokens.json"))
    for id, token in config.get("added_tokens_decoder", {}).items():
        added.setdefault(token["content"], int(id))
    eos = read_json(folder, "generation_config.json").get("eos_token_id") or read_json(
        folder, "config.json").get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else []
    return Tokenizer(file, added, eos_ids, legacy=config.get("legacy", True))


class Tokenizer:
    """encode and decode for one SentencePiece model plus added tokens, {content: id}."""
    def __init__(self, file, added=None, eos_ids=(), legacy=True):
        self.file, self.legacy = file, legacy
        with open(file, "rb") as f:
            proto = f.read()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self.sp_no_prefix = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_PREFIX)
        except RuntimeError:
            raise SystemExit(f"error: {file!r} is not a SentencePiece model") from None
        control = range(min(self.sp.vocab_size(), 1000))
        self.specials = {
            self.sp.id_to_piece(i): i
            for i in control
            if self.sp.is_control(i) or self.sp.is_unknown(i)
        }
        self.added = {
            token: id for token, id in (added or {}).items() if id >= self.sp.vocab_size()
        }
        self.specials.update(self.added)
        self.special_ids = set(self.specials.values())
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        self.pad_id = self.specials.get(
            "<pad>", self.sp.pad_id())  # -1 where a model has none: nothing here needs one
        self.eos_ids = sorted({self.eos_id, *eos_ids})
        self.vocab_size = max([self.sp.vocab_size() - 1, *self.added.values()]) + 1

    def encode(self, text, bos=False, eos=False, allow_special=True):
        """Token ids of `text`. With allow_special=False the text of a special token, "</s>" say,
        stays text: for user input."""
        ids = [self.bos_id] if bos else []
        first = True
        for piece in self.split(text) if allow_special else [text]:
            if allow_special and piece in self.specials:
                ids.append(self.specials[piece])
            elif piece:
                ids += (self.sp if first or self.legacy else self.sp_no_prefix).encode(piece)
            first = first and not piece
        return ids + [self.eos_id] if eos else ids

    def encode_batch(self, texts):
        """Ids of many plain texts at once, with allow_special=False, on all cores."""
        return self.sp.encode(texts, num_threads=os.cpu_count() or 1)

    def encode_suffix(self, text):
        """Ids of plain text that continues a text: no space is put in front."""
        return self.sp_no_prefix.encode(text)

    def decode(self, ids):
        """The text of `ids`, special tokens left out."""
        return self.sp.decode(
            [i for i in map(int, ids) if i not in self.special_ids and i < self.sp.vocab_size()])

    @cached_property
    def fingerprint(self):
        """Equal for tokenizers that are the same: pieces, added tokens and way with spaces."""
        added = json.dumps([sorted(self.added.items()), self.legacy]).encode()
        return hashlib.blake2b(self.sp.serialized_model_proto() + added).hexdigest()

    def save(self, path):
        """Write the tokenizer's files to the folder `path`, as transformers reads them."""
        os.makedirs(path, exist_ok=True)
        target = os.path.join(path, "tokenizer.model")
        if os.path.abspath(self.file) != os.path.abspath(target):
            shutil.copyfile(self.file, target)
        config = {
            "tokenizer_class": "LlamaTokenizer", "legacy": self.legacy, "add_bos_token": True,
            "add_eos_token": False, "bos_token": self.sp.id_to_piece(self.bos_id),
            "eos_token": self.sp.id_to_piece(self.eos_id),
            "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
            "clean_up_tokenization_spaces": False,
        }
        if self.pad_id >= 0:
            config["pad_token"] = "<pad>"
        write_json(config, path, "tokenizer_config.json")
        if self.added:
            write_json(self.added, path, "added_tokens.json")


def train(texts, vocab_size, path):
    """Train a SentencePiece BPE with LLaMA's settings (bytes as fallback, split digits) and write
    path/tokenizer.model."""
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "tokenizer.model"), "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, model_type="bpe",
            vocab_size=vocab_size, byte_fallback=True, split_digits=True,
            allow_whitespace_only_pieces=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2,
            hard_vocab_limit=False,
        )
    tokenizer = load(path)
    tokenizer.save(path)
    return tokenizer


def read_json(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}  # Llama-3.2 was published with a generation_config.json that is not JSON


def write_json(value, folder, name):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
