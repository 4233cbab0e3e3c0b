"""python -m nanosafe.checkpoint: write any model that opens as a Hugging Face folder; mix two."""

import os
import shutil
from dataclasses import fields
from typing import NamedTuple

import torch
from tqdm import tqdm

from nanosafe import tokenizer
from nanosafe.adapter_base import find_whole_model
from nanosafe.checkpoint.exports import check_can_be_a_classifier
from nanosafe.checkpoint.folder import (
    Folder,
    check_tensors,
    choose_head,
    copy_weights,
    list_shapes,
    make_config,
    map_tensors,
    open_folder,
)
from nanosafe.checkpoint.model_folder import write_model_folder
from nanosafe.errors import stop
from nanosafe.model import Config
from nanosafe.printing import print_once
from nanosafe.storage import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("hf", "classifier")
SYNOPSIS = (
    f"python -m nanosafe.checkpoint SOURCE TARGET [--to={'|'.join(LAYOUTS)}] "
    f"[--dtype={'|'.join(DTYPES)}]"
)
MERGE_SYNOPSIS = "python -m nanosafe.checkpoint A B --merge=Q TARGET [--dtype=..], Q from 0 to 1"
# What the two models of a merge may state differently; the first one's is written.
MAY_DIFFER = (
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "do_normalize",
    "normalizer_type",
    "momentum",
    "mean",
    "var",
)
HELP = f"""{SYNOPSIS}
{MERGE_SYNOPSIS}

Write any model that opens as a Hugging Face folder, with its tokenizer.

SOURCE   a model folder of a family in docs/formats.md, one of Meta's, or a name on the hub
TARGET   the folder to write, which must not exist
--to     the class to write a score model as: hf (Safe-RLHF's, by default), or
         classifier (transformers' classifier with one label, which vLLM opens too)
--dtype  of the tensors to write; SOURCE's, or A's, by default
--merge  write (1 - Q) A + Q B, parameter by parameter: two trainings of one model"""


def main(arguments):
    if "-h" in arguments or "--help" in arguments:
        print_once(HELP)
        return
    paths = []
    flags = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            flags[name] = value
        else:
            paths.append(argument)
    share = flags.pop("merge", None)
    choices = {"to": LAYOUTS, "dtype": DTYPES}
    for name, value in flags.items():
        if value not in choices.get(name, ()):
            stop(SYNOPSIS)
    if share is not None:
        if len(paths) != 3 or "to" in flags:
            stop(MERGE_SYNOPSIS)
        merge(*paths, parse_share(share), DTYPES.get(flags.get("dtype")))
        return
    if len(paths) != 2:
        stop(SYNOPSIS)
    source, target = paths
    convert(source, target, DTYPES.get(flags.get("dtype")), flags.get("to", "hf"))


def convert(source, target, dtype=None, layout="hf"):
    """Write a model folder, tensor by tensor.

    In memory are the file that is read and the file to be written, at most. The weights are the
    source's, so that what its generation_config.json says about sampling is kept."""
    temporary = target.rstrip("/") + ".tmp"
    check_target(target, temporary)
    folder, head, config, shapes, ranges = open_source(source)
    dtype = dtype or folder.dtype()
    tok = load_own_tokenizer(source, config)

    def read_weights():
        for name, shape in tqdm(shapes.items(), unit="tensor", desc=target):
            whole = torch.empty(shape, dtype=dtype)
            copy_weights({name: whole}, folder, ranges)
            if not torch.isfinite(whole).all():
                stop(f"{name} is not finite in {dtype}; {source!r} has it in {folder.dtype()}")
            yield name, whole

    if layout == "classifier":
        check_can_be_a_classifier(source, config, head, tok)
        head = "classifier"
    sampling = read_json(find_whole_model(folder.path), "generation_config.json")
    try:
        write_model_folder(target, config, head, read_weights(), tok, dtype, sampling)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    count = sum(shape.numel() for shape in shapes.values())
    dtype_name = str(dtype).removeprefix("torch.")
    which_tokenizer = "its" if tok else "no"
    print_once(
        f"{target}: {config.num_hidden_layers} layers, {count:,} parameters, {dtype_name}, with "
        f"{which_tokenizer} tokenizer"
    )


def load_own_tokenizer(source, config):
    """The tokenizer of a folder with its own chat template, or None where there is none."""
    if not tokenizer.find_tokenizer_file(source):
        return None
    tok = tokenizer.load(source, template="own")
    if tok.vocab_size > config.vocab_size:
        print_once(
            f"note: the tokenizer has {tok.vocab_size} tokens, {source!r} has rows for "
            f"{config.vocab_size}; training adds the missing rows"
        )
    return tok


def check_target(target, temporary):
    """Stop unless writing the folder overwrites nothing."""
    has_a_name = target.strip("/.")
    old = target.rstrip("/") + ".old"  # replace_folder() would delete it
    for path in (target, temporary, old):
        if os.path.lexists(path) or not has_a_name:
            stop(f"{path!r} is there already: choose another TARGET, or remove it")


# ---- merging ----


class Source(NamedTuple):
    """A model folder that is read."""

    folder: Folder
    head: str
    config: Config
    shapes: dict  # parameter -> its shape
    ranges: dict  # parameter -> where it lies in the folder, [RowRange]

    def read(self, name):
        """A whole parameter, in float32."""
        whole = torch.empty(self.shapes[name], dtype=torch.float32)
        copy_weights({name: whole}, self.folder, self.ranges)
        return whole


def merge(first, second, target, share, dtype=None):
    """Write the folder of (1 - share) first + share second, heads and embeddings included.

    It is made for two trainings of one model: of others the mixture means nothing. The parameters
    are mixed in float32, one at a time, and written in dtype, the first one's by default. The
    tokenizer and the moments of scores are the first one's."""
    temporary = target.rstrip("/") + ".tmp"
    check_target(target, temporary)
    a = open_source(first)
    b = open_source(second)
    check_same_shape(a, b)
    tok = check_same_tokenizer(first, second)
    dtype = dtype or a.folder.dtype()

    def mix_weights():
        for name in tqdm(a.shapes, unit="tensor", desc=target):
            mixed = mix(a.read(name), b.read(name), share).to(dtype)
            if not torch.isfinite(mixed).all():
                stop(f"{name} is not finite in {dtype} after the mixing")
            yield name, mixed

    try:
        write_model_folder(target, a.config, a.head, mix_weights(), tok, dtype)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print_once(f"{target}: {1 - share:.12g} of {first} and {share:.12g} of {second}")


def mix(first, second, share):
    """(1 - share) first + share second, of two tensors: one of them if the share is 0 or 1."""
    return (1 - share) * first + share * second


def parse_share(text):
    """The number from 0 to 1 that --merge is."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        stop(f"--merge={text} must be a number from 0 to 1, the share of the second model")
    return share


def open_source(path):
    """The Source at a path. No weights are read yet."""
    folder = open_folder(path)
    head = choose_head(folder, "auto")
    config = make_config(folder)
    shapes = list_shapes(config, head)
    ranges = map_tensors(shapes, config, folder.family)
    check_tensors(folder, head, shapes, ranges)
    return Source(folder, head, config, shapes, ranges)


def check_same_shape(a, b):
    """Stop unless two Sources are of one architecture, with one kind of head."""
    what = f"{a.folder.path!r} and {b.folder.path!r} cannot be merged"
    if a.head != b.head:
        stop(f"{what}: the heads are {a.head} and {b.head}")
    for field in fields(Config):
        first = getattr(a.config, field.name)
        second = getattr(b.config, field.name)
        if field.name not in MAY_DIFFER and first != second:
            stop(f"{what}: {field.name} is {first!r} and {second!r}")


def check_same_tokenizer(first, second):
    """The tokenizer of two model folders, None if neither has one. Stops if they differ."""
    tokenizers = []
    for path in (first, second):
        has_one = tokenizer.find_tokenizer_file(path)
        tokenizers.append(tokenizer.load(path, template="own") if has_one else None)
    identities = {tok and tok.identity for tok in tokenizers}
    if len(identities) > 1:
        stop(f"{first!r} and {second!r} cannot be merged: their tokenizers or templates differ")
    return tokenizers[0]
