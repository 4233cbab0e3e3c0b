"""
Whatever opens -> a Hugging Face folder.

$ python -m nanosafe.checkpoint SOURCE TARGET [--to=hf] [--dtype=bfloat16]
"""

import torch
from tqdm import tqdm

from nanosafe import tokenizer
from nanosafe.checkpoint import fill, locate, read_config, write_folder
from nanosafe.formats import Folder
from nanosafe.model import LLaMA

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments):
    paths = [arg for arg in arguments if not arg.startswith("--")]
    flags = dict(arg[2:].partition("=")[::2] for arg in arguments if arg.startswith("--"))
    if (len(paths) != 2 or not flags.keys() <= {"to", "dtype"} or flags.get("to", "hf") != "hf"
            or flags.get("dtype", "float32") not in DTYPES):
        raise SystemExit("error: python -m nanosafe.checkpoint SOURCE TARGET [--to=hf] "
                         f"[--dtype={'|'.join(DTYPES)}]")
    convert(*paths, DTYPES.get(flags.get("dtype")))


def convert(source, target, dtype=None):
    """Write a model folder, tensor by tensor: no more than one of its files is ever in memory."""
    folder = Folder(source)
    config, head = read_config(folder, "auto")
    with torch.device("meta"):
        model = LLaMA(config, head)
    places, dtype = locate(model, folder), dtype or folder.dtype()
    tok = tokenizer.load(source) if tokenizer.find(source) else None

    def weights():
        for name, p in tqdm(list(model.named_parameters()), unit="tensor", desc=target):
            whole = torch.empty(p.shape, dtype=dtype)
            fill([(name, whole)], folder, places)
            yield name, whole

    write_folder(target, config, head, weights(), tok, dtype)
    count = sum(p.numel() for p in model.parameters())
    print(f"{target}: {config.num_hidden_layers} layers, {count:,} parameters, "
          f"{str(dtype).removeprefix('torch.')}, with {'its' if tok else 'no'} tokenizer")
