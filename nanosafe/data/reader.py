"""Dataset specifications -> rows of jsonl files."""

import gzip
import io
import json
import lzma
import re
import zipfile
from typing import NamedTuple

import numpy as np

from nanosafe.data.spec import parse_spec
from nanosafe.errors import stop, one_line_errors


def load(spec, seed=42):
    """The records (dicts) of a dataset specification.

    spec is a comma-separated list of NAME[/SPLIT][:PROPORTION[:PATH]], or of paths of .jsonl files.
    PROPORTION is a share (0.5, 3/4), a repetition (2.5) or a count (100/-1); `seed` draws the rows.
    NAME is a folder below data/, or in PATH; SPLIT is train by default. Bad lines are said."""
    rows = load_rows(spec, seed)
    broken = [f"{row.file}:{row.line}" for row in rows if row.record is None]
    if broken:
        print(f"{spec}: {len(broken)} lines are no JSON object (first: {broken[0]}): dropped")
    return [row.record for row in rows if row.record is not None]


class Row(NamedTuple):
    record: dict
    file: str
    line: int


def load_rows(spec, seed=42):
    """The rows of a dataset specification (see data.load), as a list of Row."""
    parts = [(path, proportion) for path, proportion in parse_spec(spec) if proportion != 0]
    rows = []
    for (path, proportion), child in zip(parts, np.random.SeedSequence(seed).spawn(len(parts))):
        file_rows = list(read_rows(path))
        rows += [file_rows[i] for i in sample_indices(len(file_rows), proportion, child)]
    return rows


def sample_indices(n, proportion, seed_sequence):
    """Safe-RLHF's sampling: whole copies in order, the rest drawn without replacement."""
    count = int(-proportion) if proportion < 0 else round(n * proportion)
    copies, rest = divmod(count, n) if n else (0, 0)
    drawn = np.random.default_rng(seed_sequence).choice(n, size=rest, replace=False)
    return list(range(n)) * copies + drawn.tolist()


def read_rows(path):
    """The rows of a jsonl file, or of a raw one (raw.py); a line that is no object gives None."""
    with one_line_errors(path):
        if path.endswith(".jsonl"):
            with open(path, encoding="utf-8-sig") as f:
                yield from parse_lines(f, path)
        else:
            yield from read_raw_rows(path)


def parse_lines(lines, path):
    for i, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield Row(value if isinstance(value, dict) else None, path, i)


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


def read_raw_rows(path):
    """The Rows of a file, compressed or not, of lines or one list."""
    f, name = open_text(path)
    with f:
        if name.endswith(".json"):
            for i, value in enumerate(json_items(f, path), start=1):
                yield Row(value if isinstance(value, dict) else None, path, i)
        else:
            yield from parse_lines(f, path)


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
