"""Dataset specifications -> rows of jsonl files."""

import json
from typing import NamedTuple
import numpy as np
from nanosafe.data import parse_spec
from nanosafe.files import untrusted


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
    with untrusted(path):
        if path.endswith(".jsonl"):
            with open(path, encoding="utf-8-sig") as f:
                yield from parse(f, path)
        else:
            from nanosafe import raw

            yield from raw.read(path)


def parse(lines, path):
    for i, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield Row(value if isinstance(value, dict) else None, path, i)
