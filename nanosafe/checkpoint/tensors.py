"""Tensors in files, which are read lazily and in slices of rows.

Whatever holds a folder's tensor has a `shape` and a `dtype`, and `tensor[begin:end]` reads these
rows of it: a LazyTensor, a JoinedTensor, or a memory-mapped torch.Tensor."""

import os
import zipfile
from typing import NamedTuple

import torch
from safetensors import safe_open

from nanosafe.errors import one_line_errors, stop

# What training libraries put in front of a tensor's name.
WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "module.",
    "base_model.model.",
)
# What torch.load raises for a broken file, besides the errors that one_line_errors() knows.
BROKEN_PICKLE = (RuntimeError, AssertionError, AttributeError, IndexError, TypeError)


class RowRange(NamedTuple):
    """Rows of a tensor in a file, and where they belong in one of our parameters.

    Row i of the range is row source_start + i * stride of the tensor, and row target_start + i of
    the parameter."""

    tensor: str  # its name in the folder
    source_start: int
    rows: int
    stride: int
    target_start: int


def copy_rows(target, first, source, row_range):
    """Copy those rows of a range that this rank holds. Only these are read.

    target  this rank's rows of the parameter, which begin at its row `first`
    source  the tensor in the file, indexed by rows"""
    begin = max(first, row_range.target_start)
    end = min(first + len(target), row_range.target_start + row_range.rows)
    if begin >= end:
        return
    stride = row_range.stride
    source_begin = row_range.source_start + (begin - row_range.target_start) * stride
    source_end = source_begin + (end - 1 - begin) * stride + 1
    rows = source[source_begin:source_end:stride]
    target[begin - first : end - first] = rows.to(target)


def clean_name(name):
    """A tensor's name without the prefixes of wrappers, and with our name for a score head."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    if name.startswith(("embed_tokens.", "layers.", "norm.")):  # saved without a head
        return "model." + name
    if name.startswith("score."):  # LlamaForSequenceClassification
        return "score_head." + name.removeprefix("score.")
    return name


def read_file(path):
    """{name: tensor} of a .safetensors or .bin file; of safetensors, lazy slices instead."""
    if path.endswith(".safetensors"):
        with one_line_errors(path):
            handle = safe_open(path, framework="pt")
            return {name: handle.get_slice(name) for name in handle.keys()}
    tensors = read_pickle(path)
    if not isinstance(tensors, dict):
        stop(f"{path!r} holds something else than a table of tensors")
    for name, tensor in tensors.items():
        is_dense = torch.is_tensor(tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not is_dense:
            stop(f"{path!r} holds something else than a table of tensors: {name!r}")
    return tensors


def read_pickle(path):
    """torch.load of a file that may be broken. Tensors are read, and no code in it is executed."""
    with one_line_errors(path):
        can_be_mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        try:
            return torch.load(path, "cpu", weights_only=True, mmap=can_be_mapped)
        except BROKEN_PICKLE as error:
            raise ValueError(error) from error


class FolderReader:
    """Opens the files of a folder, and keeps the last one open.

    It refers neither to the folder's tensors nor to the Folder. As there is no cycle, a mapped file
    is freed with the last reference to it, without waiting for the garbage collector."""

    def __init__(self, path):
        self.path = path
        self.open_file = None
        self.tensors = None  # of the open file, as read_file() gives them

    def open(self, file):
        if file != self.open_file:
            self.open_file = None
            self.tensors = None  # the memory of the last file is free before the next is read
            path = os.path.join(self.path, file)
            if os.path.dirname(file) or not os.path.isfile(path):
                stop(f"{self.path!r}: the index names {file!r}, which is not in the folder")
            self.tensors = read_file(path)
            self.open_file = file
        return self.tensors


class LazyTensor:
    """A tensor in a file of a folder."""

    def __init__(self, reader, file, key):
        self.reader = reader
        self.file = file
        self.key = key  # the tensor's name in the file
        stored = reader.open(file)[key]
        if torch.is_tensor(stored):
            self.shape = stored.shape
        else:
            self.shape = torch.Size(stored.get_shape())
        no_rows = stored[:0] if self.shape else stored[...]
        self.dtype = no_rows.dtype

    def __getitem__(self, rows):
        return self.reader.open(self.file)[self.key][rows]


class JoinedTensor:
    """A tensor that model parallelism divided into pieces of equal size, by rows or by columns."""

    def __init__(self, pieces, dim):
        self.pieces = pieces
        self.dim = dim  # 0: by rows, 1: by columns
        self.dtype = pieces[0].dtype
        without_memory = [piece.to("meta") for piece in pieces]
        self.shape = torch.cat(without_memory, dim).shape

    def __getitem__(self, rows):
        if self.dim == 1:
            return torch.cat([piece[rows] for piece in self.pieces], dim=1)
        wanted = torch.arange(self.shape[0])[rows]
        height = len(self.pieces[0])
        found = []
        for i, piece in enumerate(self.pieces):
            in_this_piece = wanted[wanted // height == i]
            found.append(piece[in_this_piece % height])
        return torch.cat(found)
