"""Files of rows as publishers have them: compressed, or one large JSON list."""

import gzip
import io
import json
import lzma
import re
import zipfile
from nanosafe.files import stop
from nanosafe.rows import Row, parse

PARQUET = (
    "python -c \"import pandas as pd; pd.read_parquet('IN.parquet').to_json("
    "'OUT.jsonl', orient='records', lines=True)\""
)


def open_text(path):
    """A text file, opened through its compression (.gz, .xz, .zip of one), and its name without."""
    for ending, module in ((".gz", gzip), (".xz", lzma)):
        if path.endswith(ending):
            return module.open(path, "rt", encoding="utf-8-sig"), path[:-3]
    if path.endswith(".zip"):
        archive = zipfile.ZipFile(path)
        names = [
            name
            for name in archive.namelist()
            if name.endswith((".json", ".jsonl")) and not name.startswith("__MACOSX")
        ]
        if len(names) != 1:
            stop(f"{path!r} holds {len(names)} files of rows, not one: unpack it")
        return io.TextIOWrapper(archive.open(names[0]), encoding="utf-8-sig"), names[0]
    if path.endswith(".parquet"):
        stop(f"{path!r}: parquet is not read here; convert it with {PARQUET}")
    return open(path, encoding="utf-8-sig"), path


def read(path):
    """The Rows of a file, compressed or not, of lines or one list."""
    f, name = open_text(path)
    with f:
        if name.endswith(".json"):
            for i, value in enumerate(json_items(f, path), start=1):
                yield Row(value if isinstance(value, dict) else None, path, i)
        else:
            yield from parse(f, path)


def json_items(f, path):
    """The items of a JSON list in a text file, which is never in memory whole."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    buffer, at, size = "", 0, 2**16  # what follows the bracket
    if next((c for c in iter(lambda: f.read(1), "") if not c.isspace()), "[") != "[":
        stop(f"{path!r} is no list of rows")
    while not buffer.startswith("]", at := gap.match(buffer, at).end()):
        try:
            item, end = decoder.raw_decode(buffer, at)
        except ValueError:
            end = len(buffer)
        if end < len(buffer):  # or else it may go on
            yield item
            at, size = end, 2**16
        elif more := f.read(size):
            buffer, at, size = buffer[at:] + more, 0, 2 * size
        else:
            stop(f"{path!r} breaks off, or is no JSON list, at {buffer[at : at + 40]!r}")
