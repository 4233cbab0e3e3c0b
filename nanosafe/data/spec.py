"""A dataset specification -> the files that it names, and how much of each to take.

A specification is NAME[/SPLIT][:PROPORTION[:PATH]], or the path of a file, or several of them with
commas between. NAME is a folder below data/ (or below PATH), SPLIT is train or test."""

import difflib
import glob
import os
import re
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

from nanosafe.errors import stop
from nanosafe.storage import REPOSITORY

COMPRESSED_ENDINGS = (".gz", ".xz", ".zip")
# A name that ends like this is a path.
FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", *COMPRESSED_ENDINGS)
DATA_FOLDERS = ("data", os.path.join(REPOSITORY, "data"))  # below the current folder, and our own
ITEM = re.compile("(?P<name>[^:]+)(:(?P<proportion>[^:]*)(:(?P<folder>[^:]+))?)?")


class Source(NamedTuple):
    """A file, and how many of its rows to take: either `fraction` or `count` is None."""

    path: str
    fraction: float | None  # of the rows; 2.5 takes each row twice, and half of them once more
    count: int | None  # rows


def parse_spec(spec):
    """The Sources of a dataset specification. Stops with one line where it cannot be understood."""
    sources = []
    paths = set()
    for item in spec.split(","):
        if not item.strip():
            continue
        source = parse_item(item.strip(), spec)
        if source.path in paths:
            stop(f"data {item!r}: this dataset is named twice; use one proportion, 2 repeats it")
        paths.add(source.path)
        sources.append(source)
    if not sources:
        stop("data is empty: name a dataset, or the path of a .jsonl file")
    return sources


def parse_item(item, spec=""):
    """The Source of one NAME[/SPLIT][:PROPORTION[:PATH]] of a specification."""
    match = ITEM.fullmatch(item)
    if not match:
        stop(f"data {item!r}: write NAME[/SPLIT][:PROPORTION[:PATH]]{explain_separators(spec)}")
    path = find_file(match["name"], match["folder"], spec)
    proportion = match["proportion"] or "1"
    is_count = proportion.endswith("/-1")  # Safe-RLHF writes a count of n rows as n/-1
    try:
        number = Fraction(proportion.removesuffix("/-1"))
        fraction = float(number)
    except (ValueError, ZeroDivisionError, OverflowError):
        stop(
            f"data {item!r}: the proportion {proportion!r} is not a number, a fraction a/b or a "
            f"count n/-1{explain_separators(spec)}"
        )
    if number < 0:
        stop(f"data {item!r}: the proportion must not be negative; a count is written n/-1")
    if is_count:
        return Source(path, fraction=None, count=int(number))
    return Source(path, fraction=fraction, count=None)


def explain_separators(spec):
    """What to add to a message about `spec`, if a path that is there was cut at a comma or colon;
    else nothing."""
    separators = [i for i, character in enumerate(spec) if character in ",:"]
    for begin, end in combinations([-1, *separators, len(spec)], 2):
        path = spec[begin + 1 : end].strip()
        is_whole = "," not in path and ":" not in path
        if not is_whole and os.path.exists(os.path.expanduser(path)):
            return (
                f"; {path!r} is there, but a comma ends a dataset here, and a colon a name: rename "
                "it, or make a link to it"
            )
    return ""


def find_file(name, folder=None, spec=""):
    """The path of the file that a dataset's name means. Stops with one line where there is none.

    folder  the PATH of the specification: NAME is below it, or it is the file, or the file's folder
    spec    the whole specification, for messages
    """
    name = os.path.expanduser(name)
    if folder is None and name.endswith(FILE_ENDINGS):
        if not os.path.isfile(name):
            stop(f"dataset {name!r}: no file at {name!r}{explain_separators(spec)}")
        return name
    dataset, split = split_name(name)
    if folder is None:
        candidates = [file_of_dataset(root, dataset, split) for root in DATA_FOLDERS]
    else:
        folder = os.path.expanduser(folder)
        inside = os.path.join(folder, split + ".jsonl")
        candidates = [file_of_dataset(folder, dataset, split), folder, inside]
    for path in candidates:
        if os.path.isfile(path):
            return path
    if folder is not None:
        stop(f"dataset {name!r}: no file at {candidates[0]!r}{explain_separators(spec)}")
    stop(
        f"dataset {name!r} has no file {candidates[0]!r}: {suggest_dataset(dataset)}"
        f"{explain_separators(spec)}"
    )


def split_name(name):
    """(NAME, SPLIT) of NAME[/SPLIT]."""
    dataset, _, split = name.rpartition("/")
    if split in ("train", "test"):
        return dataset, split
    return name, "train"


def file_of_dataset(root, dataset, split):
    return os.path.join(root, match_folder(root, dataset), split + ".jsonl")


def match_folder(root, name):
    """The name of a folder below `root`, spelled as it is on the disk.

    Upper and lower case are the same, and so are - and _: PKU-SafeRLHF is pku_saferlhf. What is not
    on the disk is returned as it was given."""
    if os.path.isdir(os.path.join(root, name)):
        return name
    matched = ""
    for part in name.split("/"):
        parent = os.path.join(root, matched)
        entries = []
        if os.path.isdir(parent):
            entries = sorted(glob.glob("*", root_dir=parent))
        if part not in entries:
            for entry in entries:
                if normalize_name(entry) == normalize_name(part):
                    part = entry
                    break
        matched = os.path.join(matched, part)
    return matched


def normalize_name(name):
    return name.lower().replace("-", "_")


def suggest_dataset(dataset):
    """What to do about a dataset whose file is not there."""
    for root in DATA_FOLDERS:
        folder = match_folder(root, dataset).split("/")[0]
        if os.path.isfile(os.path.join(root, folder, "prepare.py")):
            return f"run python data/{folder}/prepare.py first"
    folders = {}
    for root in DATA_FOLDERS:
        for pattern in ("*/", "*/*/"):
            for path in glob.glob(pattern, root_dir=root):
                folders[normalize_name(path.rstrip("/"))] = path.rstrip("/")
    near = difflib.get_close_matches(normalize_name(dataset), folders, n=1, cutoff=0.0)
    return (
        f"the nearest folder below data/ is {folders[near[0]]!r}; run python data/NAME/prepare.py "
        "first, or name the path of a .jsonl or .json file, perhaps compressed"
    )
