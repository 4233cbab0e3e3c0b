"""Raw datasets -> jsonl: what the prepare.py scripts share.

Files come from the Hugging Face hub (or the mirror in HF_ENDPOINT), or from a folder. A download
goes to a temporary name, continues where it broke off, and is checked when its SHA-256 is known."""

import hashlib
import os
import re
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple, TextIO

from tqdm import tqdm

from nanosafe import transfer
from nanosafe.data.examples import SURROGATE, make_prompt_key, parse_record
from nanosafe.data.reader import name_without_compression, read_rows, split_train_test
from nanosafe.errors import stop
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.storage import format_json
from nanosafe.tokenizer import load as load_tokenizer

# The knobs of every prepare.py besides its own: configure(globals(), vars(download)).
raw = ""  # folder with the raw files; empty: download
holdout = 0.0  # share of the prompts for test.jsonl, all files pooled; 0: the raw files' own split
out = ""  # folder to write to; empty: beside this script, some releases in a subfolder
tokenizer = ""  # folder with a tokenizer, to count tokens instead of characters

# All but the last may have one of COMPRESSED_ENDINGS behind it.
READABLE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
TEST_FILE = re.compile("(^|[^a-z])test([^a-z]|$)")  # the word "test" in a file's name


class Release(NamedTuple):
    """One release of a dataset: where its files are, and where its rows go."""

    repository: str = ""  # of the hub
    files: str = r"\.jsonl"  # a regular expression that finds its files' paths in the repository
    revision: str = "main"
    sha256: dict = {}  # {path in the repository: digest}, where it is known
    url: str = ""  # or one file somewhere else
    subfolder: str = ""  # of the script's folder, to write to
    split: str = ""  # of all its rows; empty: by the word "test" in a file's name
    raw_paths: tuple = ()  # its files below --raw, where other releases' lie there; empty: all


def prepare(script, to_record, config, release):
    """What a prepare.py does: find the raw files or download them, and convert them to jsonl.

    script     the path of the prepare.py
    to_record  a raw row (a dict) -> a record, or ValueError with the reason to drop the row
    config     the knobs, the script's own and those above"""
    check_ranges(config)
    paths = find_release_files(script, config, release)
    out = find_output_folder(script, config, release)
    tokenizer = os.path.expanduser(config["tokenizer"])
    convert(paths, to_record, out, config["holdout"], tokenizer, release.split)


def find_release_files(script, config, release):
    """The paths of a release's raw files: those below --raw, or downloaded ones."""
    if config["raw"]:
        return release.raw_paths or find_raw_files(config["raw"])
    folder = os.path.dirname(os.path.abspath(script))
    return download_release(release, os.path.join(folder, "raw"))


def find_output_folder(script, config, release):
    """--out, or the release's folder beside the script."""
    folder = os.path.dirname(os.path.abspath(script))
    out = config["out"] or os.path.join(folder, release.subfolder)
    return os.path.expanduser(out)


# ---- raw files ----


def find_raw_files(folder):
    """The paths of the files below a folder that can be read, in alphabetical order."""
    paths = []
    for parent, _, names in os.walk(os.path.expanduser(folder)):
        for name in names:
            if name_without_compression(name).endswith(READABLE_ENDINGS):
                paths.append(f"{parent}/{name}")
    if not paths:
        stop(f"--raw={folder}: no .jsonl, .json, .csv or .parquet file there, nor a compressed one")
    return sorted(paths)


def download_release(release, folder):
    """Download a release's files below `folder`, unless they are there; returns their paths."""
    if release.url:
        name = os.path.basename(release.url)
        return [download_file(release.url, os.path.join(folder, name))]
    # Releases are apart, as their files may have the same names.
    folder = os.path.join(folder, release.repository, release.revision)
    address = f"{transfer.hub_address()}/datasets/{release.repository}/resolve/{release.revision}"
    paths = []
    for name in choose_files(release):
        url = f"{address}/{urllib.parse.quote(name)}"
        path = os.path.join(folder, name)
        paths.append(download_file(url, path, release.sha256.get(name)))
    return paths


def choose_files(release):
    """The paths, in its repository, of a release's files. Stops with one line if there are none."""
    published = list_repository(release.repository, release.revision)
    chosen = []
    for name in published:
        is_readable = name_without_compression(name).endswith(READABLE_ENDINGS)
        if is_readable and re.search(release.files, name):
            chosen.append(name)
    if chosen:
        return chosen
    stop(
        f"{release.repository} (revision {release.revision}) has none of the files expected: "
        "download it by hand and give --raw=FOLDER"
    )


def list_repository(repository, revision):
    """The paths of the files in a dataset repository on the hub."""
    try:
        return transfer.list_repository("datasets", repository, revision).files
    except transfer.FAILURES as error:
        stop(
            f"{repository} (revision {revision}) at {transfer.hub_address()}: {error}; set "
            "HF_ENDPOINT to a mirror, or download and give --raw=FOLDER"
        )


def download_file(url, path, sha256=None):
    """Download `url` to `path`, unless it is there; returns the path.

    Stops with one line if that fails. What has arrived is kept in path.part, and the next download
    goes on from there; a file that has not the expected SHA-256 is removed."""
    if os.path.exists(path):
        return path
    partial = path + ".part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tqdm(unit="B", unit_scale=True, desc=os.path.basename(path)) as bar:
        try:
            transfer.receive_file(url, partial, bar)
        except transfer.FAILURES as error:
            stop(f"{url}: {error}; what arrived stays in {partial!r} and is continued next time")
    if sha256:
        digest = transfer.hash_file(partial, hashlib.sha256())
        if digest != sha256:
            os.remove(partial)
            stop(f"{url}: the SHA-256 is {digest}, not {sha256}: damaged or has changed")
    os.replace(partial, path)
    return path


# ---- raw rows -> jsonl ----


class Conversion(NamedTuple):
    """What a raw row became."""

    split: str  # train or test, by its file's name
    source: str  # FILE:LINE
    record: dict | None
    reason: str = ""  # to drop it, where there is no record


@dataclass
class Split:
    """A jsonl file that is being written under a temporary name, and what is in it."""

    path: str
    file: TextIO
    rows: int = 0
    size: int = 0  # characters, or tokens
    labelled: int = 0  # answers with a safety label
    unsafe: int = 0  # those that are not safe


def convert(paths, to_record, out, holdout=0.0, tokenizer="", split=""):
    """Convert raw files to out/train.jsonl and out/test.jsonl; print what was kept and dropped.

    to_record  a raw row -> a record, or ValueError with the reason to drop the row
    holdout    0: the raw files' own split, by the word "test" in a file's name; else the share of
               the prompts (by make_prompt_key()) that goes to test, all files pooled: no prompt is
               in both files, of pairs and of dialogues alike
    split      train or test: of all rows, whatever their files' names are
    tokenizer  the folder of one: the table counts its tokens instead of characters

    No file is in memory whole; with a holdout they are read twice."""
    if not 0 <= holdout < 1:
        stop(f"holdout={holdout}: give a share of the prompts, from 0 to below 1")
    tok = load_tokenizer(tokenizer) if tokenizer else None
    held_out = draw_held_out_prompts(paths, to_record, holdout) if holdout else set()
    os.makedirs(out, exist_ok=True)
    train = open_split(out, "train")
    test = open_split(out, "test")
    dropped = Counter()  # reason -> rows
    first_dropped = {}  # reason -> FILE:LINE
    for conversion in convert_rows(paths, to_record):
        if conversion.record is None:
            dropped[conversion.reason] += 1
            first_dropped.setdefault(conversion.reason, conversion.source)
            continue
        is_test = (split or conversion.split) == "test"
        if holdout:
            is_test = make_prompt_key(conversion.record) in held_out
        write_record(conversion.record, test if is_test else train, tok)

    kept = train.rows + test.rows
    print(format_summary(kept, dropped, first_dropped))
    for split in (train, test):
        close_split(split, any_kept=kept > 0)
    if kept == 0:
        stop(f"none of the {dropped.total()} rows in {', '.join(paths[:3])} can be used")
    print_splits((train, test), "tokens" if tok else "characters")


def format_summary(kept, dropped, first_dropped):
    """How many rows were read, kept and dropped: {reason: rows}, {reason: FILE:LINE}."""
    summary = f"{kept + dropped.total():,} rows read, {kept:,} kept"
    for reason, count in dropped.most_common():
        summary += f"; dropped {count:,} ({reason}), first: {first_dropped[reason]}"
    return summary


def draw_held_out_prompts(paths, to_record, share):
    """The keys of the prompts that go to the test file: a share of all of them."""
    prompts = {}  # as an ordered set
    for conversion in convert_rows(paths, to_record):
        if conversion.record is not None:
            prompts[make_prompt_key(conversion.record)] = None
    prompts = list(prompts)
    _, test = split_train_test(len(prompts), share)
    return {prompts[i] for i in test}


def convert_rows(paths, to_record):
    """Yield the Conversion of every raw row."""
    for path in paths:
        name = os.path.basename(path)
        split = "test" if TEST_FILE.search(name) else "train"
        for row in tqdm(read_rows(path), desc=name, unit="row", leave=False):
            source = f"{row.file}:{row.line}"
            if row.record is None:
                yield Conversion(split, source, None, "not a JSON object")
                continue
            try:
                conversion = Conversion(split, source, convert_row(row.record, to_record))
            except ValueError as error:
                conversion = Conversion(split, source, None, str(error))
            yield conversion


def convert_row(row, to_record):
    """The record of a raw row; raises ValueError with the reason to drop it."""
    return check_record(make_record(row, to_record))


def make_record(row, to_record):
    """to_record(row); raises ValueError with the reason where the row has not what it reads."""
    try:
        return to_record(row)
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error
    except (AttributeError, IndexError, OverflowError, TypeError) as error:
        # The row is a stranger's: a text where a list should be costs the row, not the run.
        raise ValueError("a field of another kind than expected") from error


def check_record(record):
    """The record, if training could use it; else raises ValueError."""
    if "texts" not in record:
        is_demonstration = "answer" in record or "dialogue" in record
        parse_record(record, "sft" if is_demonstration else "prompts")
    for text in find_texts(record):
        if SURROGATE.search(text):
            raise ValueError("half a character")
    if record.get("answer") == record.get("other_answer", ""):
        raise ValueError("identical answers")
    return record


def find_texts(value):
    """Yield the texts in a record, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from find_texts(item)


def open_split(folder, name):
    path = os.path.join(folder, name + ".jsonl")
    return Split(path, open(path + ".tmp", "w", encoding="utf-8"))


def write_record(record, split, tok):
    """Write a record to the file of a Split, and count what is in it."""
    split.file.write(format_json(record, ensure_ascii=False) + "\n")
    split.rows += 1
    texts = list(find_texts(record))
    pieces = tok.encode_batch(texts) if tok else texts
    split.size += sum(len(piece) for piece in pieces)
    for name in ("is_safe", "is_other_safe"):
        if name in record:
            split.labelled += 1
            split.unsafe += not record[name]


def close_split(split, any_kept):
    """Give a Split's file its name, or remove it where it is empty.

    any_kept  whether either split has rows; if none has, an older file stays"""
    split.file.close()
    if split.rows:
        os.replace(split.file.name, split.path)
        return
    os.remove(split.file.name)
    if any_kept and os.path.exists(split.path):
        os.remove(split.path)  # its rows may be in the other file now


def print_splits(splits, unit):
    """Print a table of the files that have rows."""
    table = [("", "rows", unit, "unsafe answers")]
    for split in splits:
        if split.rows:
            share = f"{split.unsafe / split.labelled:.1%}" if split.labelled else "-"
            table.append((split.path, f"{split.rows:,}", f"{split.size:,}", share))
    print(format_table(table))
