"""TODO."""

import os
import zipfile

import torch
from safetensors import safe_open

from nanosafe.errors import stop, one_line_errors


WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "module.",
    "base_model.model.",
)  # what training libraries put before a tensor's name


class Files:
    """A folder's files, of which one is open. They know no Stored and no Folder: without a cycle,
    what is mapped is freed with the last reference."""

    def __init__(self, path):
        self.path, self.current = path, (None, None)  # the file that is open, its tensors

    def open(self, file):
        """What read_file() gives for a file of the folder."""
        if self.current[0] != file:
            self.current = None, None
            full = os.path.join(self.path, file)
            if os.path.dirname(file) or not os.path.isfile(full):
                stop(f"{self.path!r}: the index names {file!r}, which is not in the folder")
            self.current = file, read_file(full)
        return self.current[1]


def read_file(path):
    """{tensor name: tensor, or what has its rows} of a safetensors or .bin file."""
    with one_line_errors(path):
        if path.endswith(".safetensors"):
            handle = safe_open(path, framework="pt")
            return {key: handle.get_slice(key) for key in handle.keys()}
        # weights_only: tensors are read, nothing is executed. Files before torch 1.6 are no zip.
        tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        stop(f"{path!r} holds something else than a table of tensors")
    return tensors


class Stored:
    """A tensor in a folder's file."""

    def __init__(self, files, file, key):
        self.files, self.file, self.key = files, file, key
        part = files.open(file)[key]
        self.shape = torch.Size(part.shape if torch.is_tensor(part) else part.get_shape())

    def __getitem__(self, rows):
        return self.files.open(self.file)[self.key][rows]


def clean_name(name):
    """A tensor's name, less what wrappers and other libraries' heads made of it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    if name.startswith(("embed_tokens.", "layers.", "norm.")):  # saved without a head
        return "model." + name
    return "score_head." + name[6:] if name.startswith("score.") else name


class Joined:
    """A tensor that model parallelism divided into `pieces`, by rows (dim 0) or columns (dim 1)."""

    def __init__(self, pieces, dim):
        self.pieces, self.dim = pieces, dim
        self.shape = torch.cat([piece.to("meta") for piece in pieces], dim).shape

    def __getitem__(self, rows):
        if self.dim == 1:
            return torch.cat([piece[rows] for piece in self.pieces], dim=1)
        wanted, height = torch.arange(self.shape[0])[rows], len(self.pieces[0])
        return torch.cat(
            [piece[wanted[wanted // height == i] % height] for i, piece in enumerate(self.pieces)]
        )


FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def copy_rows(target, first, source, start, height, skip=0, step=1):
    """Copy the rows that two slices of a tensor share: `target` begins at its row `first`; `height`
    of the rows of `source` (read lazily), every step-th from `skip` on, at its row `start`."""
    begin, end = max(first, start), min(first + len(target), start + height)
    if begin < end:
        low, high = (skip + (row - start) * step for row in (begin, end - 1))
        rows = slice(low, high + 1) if step == 1 else slice(low, high + 1, step)
        target[begin - first : end - first] = source[rows].to(target)
