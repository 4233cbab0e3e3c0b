"""Files on disk: JSON that may be broken, and files and folders of ours that are always whole.

What nanosafe writes goes to a temporary name first, is flushed to the disk, and is then renamed.
A symbolic link stays: what it leads to is written, and the temporary name is beside that.
Folders get checksums, so that a damaged one is found when it is read."""

import importlib.util
import json
import math
import os
import sys
import shutil
import zlib
from contextlib import contextmanager

from nanosafe.errors import one_line_errors, stop

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # scripts, config, data
CHECKSUMS = "checksums.json"
TAIL = 2**20  # bytes at the end of a file that describe_file() reads
CHECKED_ENDINGS = (".safetensors", ".npy", "report.json")  # what replace_folder() sums by default


def read_json(folder, name):
    """The object in a JSON file, or {} where there is no file. Stops with one line on another."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    if name == "generation_config.json":  # Llama-3.2 was published with one that is not JSON
        return {}
    stop(f"{path!r} is no JSON object")


def write_json(value, folder, name):
    with atomic_write(os.path.join(folder, name), encoding="utf-8") as f:
        f.write(format_json(value, indent=2) + "\n")


def format_json(value, **options):
    """A value as strict JSON, which has no NaN and no infinity: null stands for them.

    options  of json.dumps()"""
    return json.dumps(replace_non_finite(value, lambda _: None), allow_nan=False, **options)


def replace_non_finite(value, replace):
    """A copy of a JSON value with replace(x) in the place of each x that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return replace(value)
    if isinstance(value, dict):
        return {key: replace_non_finite(item, replace) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_non_finite(item, replace) for item in value]
    return value


def read_jsonl(path):
    """The rows of a jsonl file that nanosafe wrote; [] where there is none.

    A last line without its line end is one that a dying process left, and is dropped."""
    if not os.path.exists(path):
        return []
    with one_line_errors(path), open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def read_metrics(path):
    """The rows of a run's metrics.jsonl, with nan where a number was not finite: null in JSON."""
    rows = read_jsonl(path)
    for row in rows:
        for name, value in row.items():
            if value is None:
                row[name] = math.nan
    return rows


def write_jsonl(rows, path):
    """Write rows, one JSON object a line, to a file that appears when it is whole."""
    make_folder(os.path.dirname(os.path.abspath(path)))
    with atomic_write(path, encoding="utf-8", errors="backslashreplace") as f:
        for row in rows:
            f.write(format_json(row, ensure_ascii=False) + "\n")


def make_folder(path):
    """Make a folder, and those above it, or stop with one line."""
    with one_line_errors(path, "made"):
        os.makedirs(os.path.realpath(path), exist_ok=True)  # a link may lead to no folder yet


def make_empty_folder(path):
    """make_folder(), without what a process that died has left there."""
    shutil.rmtree(path, ignore_errors=True)
    make_folder(path)


@contextmanager
def atomic_write(path, mode="w", **options):
    """Open a file for writing. It gets its name when the block has ended and it is on the disk."""
    target = os.path.realpath(path)
    temporary = target + ".tmp"
    with one_line_errors(path, "written"):
        with open(temporary, mode, **options) as f:
            yield f
        flush_to_disk(temporary)
        os.replace(temporary, target)


def flush_to_disk(path):
    """fsync a file's contents, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def describe_file(folder, name):
    """[a file's name, size, CRC-32 of its last TAIL bytes].

    Training moves every tensor, so the end of a file of weights tells it from another's."""
    path = os.path.join(folder, name)
    with one_line_errors(path), open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - TAIL))
        return [name, size, zlib.crc32(f.read())]


def checksum(path):
    """[a file's size in bytes, its CRC-32]: finds damage, not forgery, at the speed of the disk."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            crc = zlib.crc32(block, crc)
    return [os.path.getsize(path), crc]


def replace_folder(source, target, sums=None):
    """Move a finished folder to `target`, in place of what is there, with checksums beside it.

    Both are on one disk: of a target that is a symbolic link, source is beside what it leads to.

    sums  {file name: checksum()} where they are known; by default those of tensors and reports"""
    if sums is None:
        sums = {}
        for name in sorted(os.listdir(source)):
            if name.endswith(CHECKED_ENDINGS):
                sums[name] = checksum(os.path.join(source, name))
    write_json(sums, source, CHECKSUMS)
    for name in (*os.listdir(source), "."):
        flush_to_disk(os.path.join(source, name))
    target = os.path.realpath(target)
    old = target + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(target):
        os.rename(target, old)
    os.rename(source, target)
    flush_to_disk(os.path.dirname(os.path.abspath(target)))
    shutil.rmtree(old, ignore_errors=True)


def check_link(path):
    """Stop unless replace_folder() can write the folder that a symbolic link leads to.

    It cannot where that is a whole disk, or where the folder around it may not be written to."""
    if not os.path.islink(path):
        return
    target = os.path.realpath(path)
    if os.path.ismount(target):
        stop(f"{path!r} links to the whole disk {target!r}: link to a folder on it")
    trial = target + ".tmp"
    shutil.rmtree(trial, ignore_errors=True)
    make_folder(trial)
    os.rmdir(trial)


def find_corrupt_file(folder, part=0, parts=1, may_be_replaced=False):
    """The name of a file that is not as replace_folder() left it, or "" where all are.

    part, parts      check this share of the files only: each rank takes its own
    may_be_replaced  a file of another length is the user's own doing, not damage"""
    try:
        with open(os.path.join(folder, CHECKSUMS), encoding="utf-8") as f:
            sums = sorted(json.load(f).items())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return CHECKSUMS
    for name, expected in sums[part::parts]:
        path = os.path.join(folder, name)
        if os.path.basename(name) != name:
            return name
        try:
            size, _ = expected
            if may_be_replaced and not (os.path.exists(path) and os.path.getsize(path) == size):
                continue
            if checksum(path) != expected:
                return name
        except (OSError, ValueError, TypeError):
            return name
    return ""


def names_function(text):
    """Whether a text is FILE.py:NAME, a function of the user's own."""
    return ".py:" in text


def split_function(text):
    """The file and the name in FILE.py:NAME."""
    path, _, name = text.rpartition(":")
    return path, name


def load_function(text):
    """The function that FILE.py:NAME names."""
    path, name = split_function(text)
    function = getattr(load_python_file(path), name, None)
    if not callable(function):
        stop(f"{path!r} has no function {name!r}")
    return function


def load_python_file(path):
    """Execute a Python file of the user's own, and return it as a module."""
    if not os.path.isfile(path):
        stop(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(f"file {path}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module
