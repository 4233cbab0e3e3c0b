"""Text <-> token ids.

load() reads a tokenizer from a model folder. A Tokenizer (special_tokens.py) is an engine that
knows plain text, and the special tokens around it. There are three kinds of files: SentencePiece's
tokenizer.model (spm.py), Hugging Face's tokenizer.json (bpe.py), and files in tiktoken's format or
like it: Llama 3's tokenizer.model, qwen.tiktoken and tekken.json (tiktoken.py). The files beside it
say which tokens were added, which are special, and which end a sequence."""

import os
import re
from typing import NamedTuple

from nanosafe.adapter_base import find_base, find_whole_model, is_adapter
from nanosafe.errors import one_line_errors, stop
from nanosafe.hub import find_model
from nanosafe.storage import read_json
from nanosafe.tokenizer import bpe, tiktoken
from nanosafe.tokenizer.chat_template import SHIPPED, read_shipped, read_template, read_text
from nanosafe.tokenizer.special_tokens import (
    SPECIAL_KEYS,
    Token,
    Tokenizer,
    read_added_token,
    read_added_tokens,
    read_token_text,
)
from nanosafe.tokenizer.spm import SentencePieceEngine

MOST_IDS = 2**24  # an id beyond is a mistake: no model has so many rows


class EosIds(NamedTuple):
    """The end-of-sequence ids of a model folder. last_resort counts where there is no other."""

    stated: list
    last_resort: list


def find_tokenizer_file(path):
    """The tokenizer file of a model folder, or of a model file; None where there is none."""
    path = find_model(path, weights=False)
    if os.path.isfile(path) and path.endswith((".model", ".json", ".tiktoken")):
        return path
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    for name in ("tokenizer.model", "tokenizer.json", "qwen.tiktoken", "tekken.json"):
        file = os.path.join(folder, name)
        if os.path.isfile(file):
            return file
    return find_tokenizer_file(find_base(folder)) if is_adapter(folder) else None


def load(path, template="auto"):
    """The Tokenizer of a model folder, or of a tokenizer.model or tokenizer.json file.

    template  its chat template: "auto", the folder's own, or Safe-RLHF's where it has none;
              "own", the folder's or none; a file in Jinja; or a name of chat_template.SHIPPED"""
    file = find_tokenizer_file(path)
    if file is None and not os.path.exists(path):
        stop(f"no tokenizer at {os.fspath(path)!r}: there is no such folder; name a model's")
    if file is None:
        stop(
            f"no tokenizer at {os.fspath(path)!r}: give a folder with a tokenizer.model or "
            "tokenizer.json, or that file"
        )
    folder = os.path.dirname(file)
    with one_line_errors(file):
        names = read_names(folder)
        eos_ids = read_eos_ids(find_whole_model(folder))
    engine = load_engine(file, names)
    with one_line_errors(file):
        added = gather_added_tokens(file, engine, names)
    tokenizer = Tokenizer(engine, added, names, eos_ids.stated, file)
    if tokenizer.eos_id < 0:
        tokenizer = Tokenizer(engine, added, names, eos_ids.last_resort, file)
    if tokenizer.eos_id < 0:
        stop(
            f"{file!r} has no end-of-sequence token: name one as eos_token in tokenizer_config.json"
        )
    add_template(tokenizer, folder, names, template)
    return tokenizer


def add_template(tokenizer, folder, names, template):
    """Give a tokenizer the chat template that load() was asked for."""
    begins_with_bos = tokenizer.engine.adds_bos and tokenizer.bos_id >= 0
    if template in SHIPPED:
        tokenizer.use_template(read_shipped(template, begins_with_bos), template)
        return
    if template not in ("auto", "own"):
        if not os.path.isfile(template):
            choices = ", ".join(("auto", *SHIPPED))
            stop(
                f"template={template!r} is not a file; else choose one of {choices} (sample.py and "
                "bigbench also take none)"
            )
        with one_line_errors(template):
            source = read_text(template)
        tokenizer.use_template(source, repr(template))
        return
    with one_line_errors(folder):
        source = read_template(folder, names)
    if source is not None:
        tokenizer.use_template(source, repr(folder))
    elif template == "auto":
        note = (
            f"{folder}: no chat template there, so that Safe-RLHF's is used; template=NAME or FILE "
            "names another one"
        )
        tokenizer.use_template(read_shipped("safe_rlhf", begins_with_bos), "safe_rlhf", note)


def load_engine(file, names):
    """The engine of a tokenizer file."""
    if os.path.basename(file).startswith("tekken"):
        return tiktoken.load_tekken(file, names)
    if file.endswith(".json"):
        return bpe.load(file, names)
    with one_line_errors(file), open(file, "rb") as f:
        content = f.read()
    # tiktoken's format is text, "<token in base64> <rank>" in each line.
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return tiktoken.load(content, names, file)
    return SentencePieceEngine(content, names, file)


def read_names(folder):
    """What tokenizer_config.json says, and special_tokens_map.json where the former is silent.

    Raises ValueError where a special token is neither a text nor an object with one."""
    names = read_json(folder, "special_tokens_map.json")
    names.update(read_json(folder, "tokenizer_config.json"))
    for key in SPECIAL_KEYS:
        read_token_text(names.get(key))
    return names


def gather_added_tokens(file, engine, names):
    """{text: Token}: the special and added tokens of a folder, from four sources.

    Raises ValueError where a file has something else in their place."""
    folder = os.path.dirname(file)

    # 1. The engine's own: SentencePiece's control pieces, or what a tokenizer.json adds.
    added = dict(engine.added)

    # 2. added_tokens.json has only ids. A token in it is special if tokenizer_config.json names it.
    special = list_special_texts(names)
    for text, id in read_json(folder, "added_tokens.json").items():
        if not isinstance(id, int):
            raise ValueError(f"added_tokens.json gives {text!r} the id {id!r}")
        if text not in added:
            added[text] = Token(id, special=text in special)

    # 3. added_tokens_decoder, in tokenizer_config.json, is {id: description}.
    decoder = names.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"added_tokens_decoder is {decoder!r}, not an object")
    for id, entry in decoder.items():
        if isinstance(entry, dict):
            entry = {**entry, "id": int(id)}
        text, token = read_added_token(entry, "tokenizer_config.json")
        added[text] = token

    # 4. transformers 5 adds tokens in tokenizer.json only, also beside a tokenizer.model.
    spec = engine.spec if file.endswith(".json") else read_json(folder, "tokenizer.json")
    added.update(read_added_tokens(spec, first_id=engine.size))

    for text in special:  # these are, whatever their own description says
        if text in added:
            added[text] = added[text]._replace(special=True)
    for text, token in added.items():
        if not 0 <= token.id < MOST_IDS:
            raise ValueError(f"the added token {text!r} has the id {token.id}, too high or too low")
    return added


def list_special_texts(names):
    """The texts of the special tokens that tokenizer_config.json names."""
    further = names.get("additional_special_tokens") or []
    if not isinstance(further, list):
        raise ValueError(f"additional_special_tokens is {further!r}, not a list")
    values = [names.get(key) for key in SPECIAL_KEYS]
    return [read_token_text(value) for value in [*values, *further]]


def read_eos_ids(folder):
    """The end-of-sequence ids that generation_config.json and config.json state.

    A number in config.json may be a wrong default (decapoda's LLaMA names 1, which is BOS), so that
    it counts only where nothing else names an end of sequence. A list there is deliberate."""
    generation = read_json(folder, "generation_config.json").get("eos_token_id")
    config = read_json(folder, "config.json").get("eos_token_id")
    if isinstance(config, list):
        return EosIds(list_ids(generation) + list_ids(config), [])
    return EosIds(list_ids(generation), list_ids(config))


def list_ids(value):
    """The ids in an eos_token_id, which is a number, a list of numbers, null or nonsense."""
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int)]
