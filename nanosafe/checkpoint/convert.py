"""python -m nanosafe.checkpoint: whatever opens -> a Hugging Face folder."""

import os
import shutil

import torch
from tqdm import tqdm

from nanosafe import tokenizer
from nanosafe.checkpoint.folder import Folder, copy_weights, map_tensors, read_config
from nanosafe.checkpoint.model_folder import write_model_folder
from nanosafe.errors import stop, one_line_errors
from nanosafe.model import LLaMA


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments):
    paths = [arg for arg in arguments if not arg.startswith("--")]
    flags = dict(arg[2:].partition("=")[::2] for arg in arguments if arg.startswith("--"))
    known = {"to": ("hf",), "dtype": DTYPES}
    if len(paths) != 2 or any(value not in known.get(flag, ()) for flag, value in flags.items()):
        stop(f"python -m nanosafe.checkpoint SOURCE TARGET [--to=hf] [--dtype={'|'.join(DTYPES)}]")
    convert(*paths, DTYPES.get(flags.get("dtype")))


def convert(source, target, dtype=None):
    """Write a model folder, tensor by tensor: one of its files, and one to write, are in memory."""
    temporary, old = (target.rstrip("/") + ending for ending in (".tmp", ".old"))
    there = [path for path in (target, temporary, old) if os.path.lexists(path)]
    if there or not target.strip("/."):
        stop(f"{(there or [target])[0]!r} is there already: choose another TARGET, or remove it")
    with one_line_errors(source):
        folder = Folder(source)
        config, head = read_config(folder, "auto")
        places, dtype = map_tensors(config, head, folder), dtype or folder.dtype()
    with torch.device("meta"):
        model = LLaMA(config, head)
    tok = tokenizer.load(source) if tokenizer.find_tokenizer_file(source) else None
    if tok and tok.vocab_size > config.vocab_size:
        print(
            f"note: the tokenizer has {tok.vocab_size} tokens, {source!r} has rows for "
            f"{config.vocab_size}; training adds what is missing"
        )

    def weights():
        for name, p in tqdm(list(model.named_parameters()), unit="tensor", desc=target):
            whole = torch.empty(p.shape, dtype=dtype)
            with one_line_errors(source):
                copy_weights([(name, whole)], folder, places)
            if not torch.isfinite(whole).all():
                stop(f"{name} is not finite in {dtype}, which {source!r} has in {folder.dtype()}")
            yield name, whole

    try:
        write_model_folder(target, config, head, weights(), tok, dtype)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{target}: {config.num_hidden_layers} layers, {count:,} parameters, "
        f"{str(dtype).removeprefix('torch.')}, with {'its' if tok else 'no'} tokenizer"
    )
