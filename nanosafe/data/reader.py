"""The files of a dataset specification -> their rows.

A file has a JSON object on each line (.jsonl), or is a list of objects or has one on each line
(.json), or is a table whose first line names its columns (.csv). Each may be compressed (.gz, .xz,
or a .zip with nothing else in it). A table may also be .parquet, which pyarrow reads."""

import csv
import gzip
import io
import json
import lzma
import os
import re
import zipfile
from typing import NamedTuple

import numpy as np

from nanosafe.data.spec import COMPRESSED_ENDINGS, parse_spec
from nanosafe.errors import one_line_errors, stop

CHUNK = 2**16  # characters of a JSON list to read at a time
SEPARATORS = re.compile(r"[\s,]*")  # between the items of a JSON list
LONGEST_CELL = 2**30  # characters of a cell of a .csv file; Python's own limit is 2**17
PARQUET_BATCH = 1024  # rows of a .parquet file to read at a time
PARQUET_BUFFER = 2**20  # bytes of a column to read at a time


class Row(NamedTuple):
    record: dict | None  # None where the file has something else than a JSON object
    file: str
    line: int  # in a JSON list: the item; in a .parquet file: the row; from 1


def load(spec, seed=42):
    """The records (dicts) of a dataset specification.

    spec is a comma-separated list of NAME[/SPLIT][:PROPORTION[:PATH]], or of paths of .jsonl files.
    PROPORTION is a fraction (0.5, 3/4), a repetition (2.5) or a count (100/-1); `seed` draws the
    rows. NAME is a folder below data/, or in PATH; SPLIT is train by default. Lines that are not
    JSON objects are dropped, and their number is printed."""
    records = []
    broken = []
    for row in load_rows(spec, seed):
        if row.record is None:
            broken.append(f"{row.file}:{row.line}")
        else:
            records.append(row.record)
    if broken:
        print(f"{spec}: {len(broken)} lines are not JSON objects (first: {broken[0]}): dropped")
    return records


def load_rows(spec, seed=42):
    """The rows of a dataset specification (see load), as a list of Row."""
    return read_sources(parse_spec(spec), seed)


def read_sources(sources, seed):
    """The rows of Sources, as many of each as it says. Each source has its own seed."""
    sources = [source for source in sources if source.fraction != 0 and source.count != 0]
    seeds = np.random.SeedSequence(seed).spawn(len(sources))
    rows = []
    for source, source_seed in zip(sources, seeds):
        file_rows = list(read_rows(source.path))
        count = count_samples(len(file_rows), source)
        for i in sample_indices(len(file_rows), count, source_seed):
            rows.append(file_rows[i])
    return rows


def count_samples(n, source):
    """How many of its file's n rows a Source takes."""
    if source.count is not None:
        return source.count
    return round(n * source.fraction)


def sample_indices(n, count, seed_sequence):
    """Safe-RLHF's sampling: whole copies of range(n) in order, the rest without replacement."""
    if n == 0:
        return []
    copies, rest = divmod(count, n)
    drawn = np.random.default_rng(seed_sequence).choice(n, size=rest, replace=False)
    return list(range(n)) * copies + drawn.tolist()


def split_train_test(n, ratio, seed=42):
    """Shuffled indices of a training and a test part, the latter round(n * ratio) long."""
    indices = np.random.default_rng(seed).permutation(n).tolist()
    train = n - round(n * ratio)
    return indices[:train], indices[train:]


def read_rows(path):
    """Yield the Rows of a file. Stops with one line where the file cannot be read."""
    with one_line_errors(path):
        if path.endswith(".parquet"):
            values = read_parquet(path)
        else:
            values = read_text_file(path)
        for line, value in values:
            record = value if isinstance(value, dict) else None
            yield Row(record, path, line)


def read_text_file(path):
    """Yield (number, value) of the rows of a text file, perhaps compressed."""
    name = name_without_compression(path)
    with open_text(path) as f:
        if name.endswith(".json"):
            yield from read_json_list_or_lines(f, path)
        elif name.endswith(".csv"):
            yield from read_csv(f)
        else:
            yield from read_json_lines(f)


def open_text(path):
    """Open a text file, perhaps compressed. A byte order mark at its beginning is skipped."""
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.endswith(".xz"):
        return lzma.open(path, "rt", encoding="utf-8-sig")
    if path.endswith(".zip"):
        return open_zip(path)
    return open(path, encoding="utf-8-sig")


def open_zip(path):
    """Open the one file of rows in a .zip."""
    archive = zipfile.ZipFile(path)
    names = []
    for name in archive.namelist():
        if name.endswith((".json", ".jsonl", ".csv")) and not name.startswith("__MACOSX"):
            names.append(name)
    if len(names) != 1:
        stop(f"{path!r} holds {len(names)} files of rows, not one: unpack it")
    return io.TextIOWrapper(archive.open(names[0]), encoding="utf-8-sig")


def name_without_compression(path):
    """rows.jsonl of rows.jsonl.gz."""
    name, ending = os.path.splitext(path)
    return name if ending in COMPRESSED_ENDINGS else path


def read_json_lines(f):
    """Yield (line number, value) of the lines with anything on them; None is what is no JSON."""
    for line, text in enumerate(f, start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        yield line, value


def read_json_list_or_lines(f, path):
    """Yield (number, value) of a .json file, in which some programs write a row on each line."""
    beginning = f.read(CHUNK).lstrip()
    f.seek(0)
    if not beginning.startswith("{"):
        yield from read_json_list(f, path)
        return
    is_first = True
    for line, value in read_json_lines(f):
        if is_first and value is None:
            stop(f"{path!r} is neither a list of rows nor a row on each line")
        is_first = False
        yield line, value


def read_json_list(f, path):
    """Yield (number, item) of a JSON list in a text file, which is never in memory whole."""
    decoder = json.JSONDecoder()
    first = f.read(1)
    while first.isspace():
        first = f.read(1)
    if first and first != "[":
        stop(f"{path!r} is not a list of rows")
    buffer = ""  # what was read behind the bracket
    position = 0  # up to here the buffer is parsed
    number = 0
    size = CHUNK
    while True:
        position = SEPARATORS.match(buffer, position).end()
        if buffer.startswith("]", position):
            return
        try:
            item, end = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError):
            end = len(buffer)
        if end < len(buffer):
            number += 1
            yield number, item
            position = end
            size = CHUNK
            continue
        # The item may go on behind the buffer: 12 may be the beginning of 123.
        more = f.read(size)
        if not more:
            beginning = buffer[position : position + 40]
            stop(f"{path!r} breaks off, or is not a JSON list, at {beginning!r}")
        buffer = buffer[position:] + more
        position = 0
        size *= 2  # so that an item of n characters is parsed log(n) times


def read_csv(f):
    """Yield (line, row) of a table: a dict of texts, {column: cell}. None is what has more cells
    than there are columns. Raises ValueError where the file is not a table."""
    csv.field_size_limit(LONGEST_CELL)
    table = csv.DictReader(f)
    try:
        for row in table:
            yield table.line_num, None if None in row else row
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}") from error


def read_parquet(path):
    """Yield (number, row) of a .parquet file, of which one batch of rows is in memory at a time.

    Lists and structures become Python's lists and dicts. Columns that JSON has no kind of value for
    are left out, pictures and times for example."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        stop(f"{path!r}: parquet is read by pyarrow, which is not installed: pip install pyarrow")
    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            columns = [field.name for field in file.schema_arrow if has_json_values(field.type)]
            for batch in file.iter_batches(PARQUET_BATCH, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, NotImplementedError) as error:
        raise ValueError(str(error)) from error


def has_json_values(column_type):
    """Whether JSON has the values of a pyarrow type: texts, numbers, lists and dicts of them."""
    from pyarrow import types

    if types.is_map(column_type):  # Python has its values as pairs
        return False
    if types.is_nested(column_type):
        for i in range(column_type.num_fields):
            if not has_json_values(column_type.field(i).type):
                return False
        return True
    if types.is_dictionary(column_type):
        return has_json_values(column_type.value_type)
    is_text = types.is_string(column_type) or types.is_large_string(column_type)
    is_number = types.is_integer(column_type) or types.is_floating(column_type)
    return is_text or is_number or types.is_boolean(column_type) or types.is_null(column_type)
