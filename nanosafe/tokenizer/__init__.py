"""Text <-> token ids.

A tokenizer is an engine that knows plain text, and special tokens around it. The engine here is
SentencePiece (tokenizer.model); bpe.py has tokenizer.json's, and that of Llama 3's tokenizer.model.

Special tokens are split out first, and what stands between them is encoded piece by piece.
SentencePiece puts a space in front of each ("legacy": Alpaca, Beaver), or of the first only."""

import os
import re

from nanosafe.errors import stop, one_line_errors
from nanosafe.storage import read_json
from nanosafe.tokenizer import bpe, llama3
from nanosafe.tokenizer.special_tokens import SPECIAL, Token, Tokenizer, text_of, read_added_token
from nanosafe.tokenizer.spm import SentencePieceEngine


def find_tokenizer_file(path):
    """The tokenizer file of a model folder, or of a model file; None where there is none."""
    path = os.fspath(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    names = [os.path.join(folder, name) for name in ("tokenizer.model", "tokenizer.json")]
    if os.path.isfile(path) and path.endswith((".model", ".json")):
        names = [path]
    return next(filter(os.path.isfile, names), None)


def load(path):
    """The tokenizer of a model folder, or of a tokenizer.model or tokenizer.json file.
    Beside it stands which tokens were added or are special, and further end-of-sequence ids."""
    file = find_tokenizer_file(path)
    if not file:
        stop(
            f"no tokenizer at {os.fspath(path)!r}: give a folder with a tokenizer.model or "
            "tokenizer.json, or that file"
        )
    with one_line_errors(file):
        return read_tokenizer(file)


def read_tokenizer(file):
    folder = os.path.dirname(file)
    config = read_json(folder, "tokenizer_config.json")
    names = {**read_json(folder, "special_tokens_map.json"), **config}
    with open(file, "rb") as f:
        proto = f.read()
    if file.endswith(".json"):
        engine = bpe.load(file, names)
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", proto):
        engine = llama3.load(file, names)
    else:
        engine = SentencePieceEngine(proto, names, file)
    added = dict(engine.added)
    special = {text_of(value) for key, value in names.items() if key in SPECIAL}
    special |= set(map(text_of, names.get("additional_special_tokens") or ()))
    for text, id in read_json(folder, "added_tokens.json").items():
        added.setdefault(text, Token(int(id), text in special))
    decoder = (config.get("added_tokens_decoder") or {}).items()
    fast = engine.spec if file.endswith(".json") else read_json(folder, "tokenizer.json")
    later = fast.get("added_tokens") or ()  # transformers 5 adds there, beside a tokenizer.model
    added.update(read_added_token({**t, "id": int(id)}, repr(file)) for id, t in decoder)
    added.update(read_added_token(t, repr(file)) for t in later if t["id"] >= engine.size)
    if not all(0 <= t.id < 2**24 for t in added.values()):
        stop(f"{file!r}: an added token has an id that no model has a row for")
    stated = [
        read_json(folder, name).get("eos_token_id")
        for name in ("generation_config.json", "config.json")
    ]
    lists = [x if isinstance(x, list) else [x] for x in stated]
    sure = lists[0] + (lists[1] if isinstance(stated[1], list) else [])
    for ids in (sure, sure + lists[1]):  # a number in config.json only where nothing else is said
        tokenizer = Tokenizer(engine, added, names, [i for i in ids if isinstance(i, int)], file)
        if tokenizer.eos_id >= 0:
            return tokenizer
    stop(f"{file!r} has no end-of-sequence token: name one as eos_token in tokenizer_config.json")
