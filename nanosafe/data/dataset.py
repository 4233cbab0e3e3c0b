"""jsonl -> cached token ids. rows.py reads the files, build.py fills the cache, packing.py batches.

A row is Safe-RLHF's RawSample: `input` (a string, or a list of turns that ends with the user's) or
`dialogue` (turns), `answer`, `other_answer`, `better` and `safer` (whether answer beats
other_answer), `is_safe`, `is_other_safe`; or `answers`, `scores`. A file of rows is a dataset."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from contextlib import suppress

import numpy as np
from tqdm import tqdm

from nanosafe.data.batching import check_fits, collate
from nanosafe.data.examples import encode_rows
from nanosafe.data.reader import load_rows
from nanosafe.data.spec import parse_spec
from nanosafe.data.template import PROMPT_BEGIN, PROMPT_TURN
from nanosafe.errors import stop, one_line_errors
from nanosafe.parallel import rank0_first, rank
from nanosafe.storage import find_corrupt_file, make_folder, replace_folder, read_json, write_json


VERSION = 2  # of the cache's layout


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


@rank0_first()  # rank 0 fills the cache of token ids, the others find it
def tokenize(spec, tokenizer, task, max_len, max_tokens=0, seed=42, method=(), read=encode_rows):
    """The Dataset of a specification (see load) for a task: sft, prompts, reward, cost, rank, or
    another for which read() makes examples by a `method`. The longest must fit a forward of max_tokens.

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
    if not os.path.isdir(folder) or find_corrupt_file(folder):
        build_cache(folder, load_rows(spec, seed), tokenizer, task, max_len, show, method, read)
    dataset = Dataset(folder)
    if show:
        print(f"{spec} ({task}): {dataset.report['text']}", flush=True)
    if not len(dataset):
        stop(f"data {spec!r} has no usable row for {task}: {dataset.report['text']}")
    check_fits(dataset.lengths.tolist(), max_tokens or max_len * dataset.width)
    return dataset


def build_cache(folder, rows, tokenizer, task, max_len, show, method=(), read=encode_rows):
    """Tokenise rows into the folder, under a temporary name first: several processes may try."""
    dropped, first, kept = Counter(), {}, {}

    def drop(row, reason):
        dropped[reason] += 1
        first.setdefault(reason, f"{row.file}:{row.line}")

    quiet = not show or len(rows) < 20000
    bar = tqdm(total=len(rows), desc="tokenising", unit="row", disable=quiet)
    for begin in range(0, len(rows), 2048):
        chunk = rows[begin : begin + 2048]
        for row, key, example in read(chunk, tokenizer, task, max_len, drop, *method):
            if key in kept:
                drop(row, "repeated prompt")
                del kept[key]  # the last one stays, in its own place
            kept[len(kept) if key is None else key] = example
        bar.update(len(chunk))
    bar.close()
    text = f"{len(rows)} rows, {len(kept)} {'blocks' if task == 'documents' else 'kept'}"
    for reason, count in dropped.most_common():
        text += f"; dropped {count} {reason} (first: {first[reason]})"
    write_cache(folder, list(kept.values()), {"text": text, "dropped": dropped})


def write_cache(folder, examples, report):
    """Write (sequences, labels, line) of examples; what a ranking lacks is empty, labelled nan."""
    width = max((len(labels) for _, labels, _ in examples), default=1)
    filled = lambda x, blank: (*x, *[blank] * (width - len(x)))
    sequences = [s for encoded, _, _ in examples for s in filled(encoded, ((), ()))]
    flat = lambda k, dtype: np.array([x for s in sequences for x in s[k]], dtype=dtype)
    labels = [filled(labels, math.nan) for _, labels, _ in examples]
    arrays = {
        "tokens": flat(0, np.int32),
        "mask": flat(1, np.uint8),
        "offsets": np.cumsum([0] + [len(s[0]) for s in sequences], dtype=np.int64),
        "labels": np.array(labels, np.float32).reshape(-1, width),
        "lines": np.array([line for _, _, line in examples], dtype=np.int64),
    }
    if sequences and len(sequences[0]) == 3:
        arrays["scores"] = flat(2, np.float32)
    temporary = f"{folder}.{os.getpid()}"
    make_folder(temporary)
    with one_line_errors(temporary, "written"):
        for name, array in arrays.items():
            np.save(os.path.join(temporary, name + ".npy"), array)
        write_json(report, temporary, "report.json")
    with suppress(OSError):  # another process is faster
        replace_folder(temporary, folder)
    shutil.rmtree(temporary, ignore_errors=True)
