"""python -m nanosafe.checkpoint: write any model that opens as a Hugging Face folder."""

import os
import shutil

import torch
from tqdm import tqdm

from nanosafe import tokenizer
from nanosafe.adapter_base import find_whole_model
from nanosafe.checkpoint.exports import check_can_be_a_classifier
from nanosafe.checkpoint.folder import (
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
from nanosafe.printing import print_once
from nanosafe.storage import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("hf", "classifier")
SYNOPSIS = (
    f"python -m nanosafe.checkpoint SOURCE TARGET [--to={'|'.join(LAYOUTS)}] "
    f"[--dtype={'|'.join(DTYPES)}]"
)
HELP = f"""{SYNOPSIS}

Write any model that opens as a Hugging Face folder, with its tokenizer.

SOURCE   a model folder of a family in docs/formats.md, one of Meta's, or a name on the hub
TARGET   the folder to write, which must not exist
--to     the class to write a score model as: hf (Safe-RLHF's, by default), or
         classifier (transformers' classifier with one label, which vLLM opens too)
--dtype  of the tensors to write; SOURCE's by default"""


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
    choices = {"to": LAYOUTS, "dtype": DTYPES}
    for name, value in flags.items():
        if value not in choices.get(name, ()):
            stop(SYNOPSIS)
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
    folder = open_folder(source)
    head = choose_head(folder, "auto")
    config = make_config(folder)
    shapes = list_shapes(config, head)
    ranges = map_tensors(shapes, config, folder.family)
    check_tensors(folder, head, shapes, ranges)
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
