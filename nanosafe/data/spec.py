"""jsonl -> cached token ids. rows.py reads the files, build.py fills the cache, packing.py batches.

A row is Safe-RLHF's RawSample: `input` (a string, or a list of turns that ends with the user's) or
`dialogue` (turns), `answer`, `other_answer`, `better` and `safer` (whether answer beats
other_answer), `is_safe`, `is_other_safe`; or `answers`, `scores`. A file of rows is a dataset."""

import os
import re
from fractions import Fraction

from nanosafe.errors import stop
from nanosafe.storage import read_json


ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "data")
ROOT = os.path.normpath(ROOT)


def parse_spec(spec):
    """[(path, proportion)], a negative proportion being a count."""
    parts = {}
    for item in filter(None, map(str.strip, spec.split(","))):
        match = re.fullmatch("([^:]+)(?::([^:]*)(?::([^:]+))?)?", item)
        if not match:
            stop(f"data {item!r}: write NAME[/SPLIT][:PROPORTION[:PATH]]")
        name, share, folder = match.groups()
        path = resolve(name, os.path.expanduser(folder) if folder else None)
        if path in parts:
            stop(f"data {item!r}: this dataset is named twice; use one proportion, 2 repeats it")
        try:
            count = (share or "1").endswith("/-1")
            parts[path] = float(Fraction(share[:-3] if count else share or "1")) * (-1) ** count
        except (ValueError, ZeroDivisionError):
            stop(f"data {item!r}: the proportion {share!r} is no number, a/b or count n/-1")
        if (parts[path] > 0) == count and parts[path]:
            stop(f"data {item!r}: the proportion must not be negative; a count is written n/-1")
    if not parts:
        stop("data is empty: name a dataset, or the path of a .jsonl file")
    return list(parts.items())


def resolve(name, path=None):
    """The jsonl file of a dataset's name; with `path`, that file, or NAME's file in that folder."""
    if path is None and name.endswith((".jsonl", ".json", ".gz", ".xz", ".zip")):
        base, candidates = "", [os.path.expanduser(name)]
    else:
        named = name.endswith(("/train", "/test"))
        base, _, split = name.rpartition("/") if named else (name, "", "train")
        roots = ["data", ROOT] if path is None else [path]
        if not any(os.path.isdir(os.path.join(root, base)) for root in roots):
            aliases = read_json(os.path.dirname(__file__), "aliases.json")  # the hub's names
            base = aliases.get(base.lower(), base)
        candidates = [os.path.join(root, base, split + ".jsonl") for root in roots]
        if path is not None:
            candidates += [path, os.path.join(path, split + ".jsonl")]
    if found := next(filter(os.path.isfile, candidates), None):
        return found
    if path is None and base:
        stop(
            f"dataset {name!r} has no file {candidates[0]!r}: run python "
            f"data/{base.split('/')[0]}/prepare.py first"
        )
    stop(f"dataset {name!r}: no file at {candidates[0]!r}")
