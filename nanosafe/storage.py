"""Files: others', refused in one line, and ours, which appear whole. Words in tables."""

import importlib.util
import json
import os
import shutil
import zlib
from contextlib import contextmanager

from nanosafe.errors import stop, one_line_errors


CHECKSUMS = "checksums.json"


def read_json(folder, name):
    """The object in a json file; {} where there is no file."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    if name == "generation_config.json":  # Llama-3.2 was published with one that is no JSON
        return {}
    stop(f"{os.path.join(folder, name)!r} is no JSON object")


def write_json(value, folder, name):
    with atomic_write(os.path.join(folder, name), encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")


def make_folder(path):
    """Make a folder to write to: before there is anything that could be lost."""
    with one_line_errors(path, "made"):
        os.makedirs(path, exist_ok=True)


@contextmanager
def atomic_write(path, mode="w", **text):
    """Open a file to write that has its name when it is whole, and on the disk."""
    with one_line_errors(path, "written"):
        with open(path + ".tmp", mode, **text) as f:
            yield f
        flush_to_disk(path + ".tmp")
        os.replace(path + ".tmp", path)


def flush_to_disk(path):
    """Bring a file, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checksum(path):
    """[a file's bytes, its CRC-32], which finds damage, not ill will, as fast as a disk reads."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            crc = zlib.crc32(block, crc)
    return [os.path.getsize(path), crc]


def replace_folder(source, target, sums=None):
    """Put a finished folder in the place of `target`, with checksums: `sums`, or of its tensors."""
    names = sorted(os.listdir(source))
    sums = (
        {
            name: checksum(os.path.join(source, name))
            for name in names
            if name.endswith((".safetensors", ".npy", "report.json"))
        }
        if sums is None
        else sums
    )
    write_json(sums, source, CHECKSUMS)
    for name in (*os.listdir(source), "."):
        flush_to_disk(os.path.join(source, name))
    old = target.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(target):
        os.rename(target, old)
    os.rename(source, target)
    flush_to_disk(os.path.dirname(os.path.abspath(target)))
    shutil.rmtree(old, ignore_errors=True)


def find_corrupt_file(folder, part=0, parts=1, replaced=False):
    """The first file that is not as put_folder() found it, or ''; replaced: length may differ."""
    name = CHECKSUMS
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            sums = sorted(json.load(f).items())
        for name, (size, crc) in sums[part::parts]:
            path = os.path.join(folder, name)
            other = replaced and not (os.path.exists(path) and os.path.getsize(path) == size)
            if os.path.basename(name) != name or not other and checksum(path) != [size, crc]:
                return name
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return name
    return ""


def read_jsonl(path):
    """The rows of a file of ours; none where there is none. A line that broke off is left out."""
    with one_line_errors(path):
        lines = open(path, encoding="utf-8").readlines() if os.path.exists(path) else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def write_jsonl(rows, path):
    """Write rows to a file that appears when it is whole."""
    make_folder(os.path.dirname(os.path.abspath(path)))
    with atomic_write(path, encoding="utf-8", errors="backslashreplace") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load_python_file(path):
    """A Python file as a module: yours, for it is executed."""
    if not os.path.isfile(path):
        stop(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
