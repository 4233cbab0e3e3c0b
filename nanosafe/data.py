"""jsonl -> cached token ids. rows.py reads the files, build.py fills the cache, packing.py batches.

A row is Safe-RLHF's RawSample: `input` (a string, or a list of turns that ends with the user's) or
`dialogue` (turns), `answer`, `other_answer`, `better` and `safer` (whether answer beats
other_answer), `is_safe`, `is_other_safe`; or `answers`, `scores`. A file of rows is a dataset."""

import hashlib
import json
import os
import re
from fractions import Fraction
import numpy as np
from nanosafe.files import damage, read_json, stop
from nanosafe.packing import check_fits, collate
from nanosafe.parallel import main_first, rank

ROOT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")

# The one definition of the template. A dialogue repeats it from USER: on.
PROMPT_BEGIN = "BEGINNING OF CONVERSATION: "
PROMPT_TURN = "USER: {input} ASSISTANT:"

VERSION = 2  # of the cache's layout


def load(spec, seed=42):
    """The records (dicts) of a dataset specification.

    spec is a comma-separated list of NAME[/SPLIT][:PROPORTION[:PATH]], or of paths of .jsonl files.
    PROPORTION is a share (0.5, 3/4), a repetition (2.5) or a count (100/-1); `seed` draws the rows.
    NAME is a folder below data/, or in PATH; SPLIT is train by default. Bad lines are said."""
    from nanosafe.rows import load_rows

    rows = load_rows(spec, seed)
    broken = [f"{row.file}:{row.line}" for row in rows if row.record is None]
    if broken:
        print(f"{spec}: {len(broken)} lines are no JSON object (first: {broken[0]}): dropped")
    return [row.record for row in rows if row.record is not None]


class Dataset:
    """Tokenised examples, memory-mapped: `width` sequences each (two for pairs), perhaps empty."""

    def __init__(self, folder):
        self.folder = folder
        arrays = {
            name.removesuffix(".npy"): np.load(os.path.join(folder, name), mmap_mode="r")
            for name in os.listdir(folder)
            if name.endswith(".npy")
        }
        self.tokens, self.mask, self.scores = map(arrays.get, ("tokens", "mask", "scores"))
        self.offsets, self.labels, self.lines = (
            np.asarray(arrays[name]) for name in ("offsets", "labels", "lines")
        )
        self.width = self.labels.shape[1]
        self.report = read_json(folder, "report.json")
        ends = self.offsets[:: self.width]
        self.lengths = np.diff(ends)  # (n,) tokens of each example, its sequences together
        sums = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        self.targets = sums[ends[1:]] - sums[ends[:-1]]  # (n,) tokens that carry loss

    def __len__(self):
        return len(self.labels)

    def sequence(self, i, part=0):
        """Token ids and loss mask of an example's sequence."""
        k = i * self.width + part
        span = slice(self.offsets[k], self.offsets[k + 1])
        return self.tokens[span], self.mask[span]

    def batch(self, examples, device):
        """The packed Batch of some examples; of pairs, all preferred ones, then the others."""
        parts = [self.sequence(i, part) for part in range(self.width) for i in examples]
        parts = [(tokens, mask) for tokens, mask in parts if len(tokens)]
        return collate([tokens for tokens, _ in parts], [mask for _, mask in parts], device)


@main_first()  # rank 0 fills the cache of token ids, the others find it
def tokenize(spec, tokenizer, task, max_len, max_tokens=0, seed=42, method=()):
    """The Dataset of a specification (see load) for a task: sft, prompts, reward, cost, rank, or
    documents (then method: see documents.py). The longest must fit a forward of max_tokens.

    Tokenised once: the ids are cached under ~/.cache/nanosafe (or NANOSAFE_CACHE), by content and
    tokenizer. What cannot be used is dropped, counted and reported; prompts are deduplicated."""
    parts, show = parse_spec(spec), rank() == 0
    key = hashlib.blake2b(digest_size=16)
    settings = [tokenizer.fingerprint, task, max_len, seed, VERSION, PROMPT_BEGIN, PROMPT_TURN]
    key.update(json.dumps([*settings, *method]).encode())
    for path, proportion in parts:
        key.update(f"{proportion}\0".encode())
        with open(path, "rb") as f:
            while block := f.read(2**24):
                key.update(block)
    cache = os.environ.get("NANOSAFE_CACHE") or os.path.expanduser("~/.cache/nanosafe")
    folder = os.path.join(cache, key.hexdigest())
    if not os.path.isdir(folder) or damage(folder):
        from nanosafe.build import build
        from nanosafe.rows import load_rows

        build(folder, load_rows(spec, seed), tokenizer, task, max_len, show, method)
    dataset = Dataset(folder)
    if show:
        print(f"{spec} ({task}): {dataset.report['text']}", flush=True)
    if not len(dataset):
        stop(f"data {spec!r} has no usable row for {task}: {dataset.report['text']}")
    check_fits(dataset.lengths.tolist(), max_tokens or max_len * dataset.width)
    return dataset


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
