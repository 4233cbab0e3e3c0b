"""
Raw datasets -> jsonl: what the prepare.py scripts share.

Files come from the Hugging Face hub (or the mirror in HF_ENDPOINT), or from a folder that is
already on disk. A download goes to a temporary name, continues where it broke off, and is checked
when its SHA-256 is known.
"""

import hashlib
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter

import numpy as np
from tqdm import tqdm

from nanosafe.rows import read_rows, stop

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zip", ".json", ".json.gz", ".json.xz")


def raw_files(raw, repo, folder, wanted, revision="main", sha256=None):
    """Paths of a dataset's raw files: those below the folder `raw`, or else downloaded to
    folder/raw.

    wanted(name) picks files of the hub's repository by their path there; sha256: {path there:
    digest}.
    """
    if raw:
        found = sorted(
            os.path.join(base, name)
            for base, _, names in os.walk(os.path.expanduser(raw))
            for name in names
            if name.endswith(ENDINGS))
        if not found:
            stop(f"--raw={raw}: no {', '.join(ENDINGS[:3])} or .json file there")
        return found
    names = [name for name in list_files(repo, revision) if wanted(name)]
    if not names:
        stop(f"{repo} (revision {revision}) has none of the files expected: download it by hand "
             "and give --raw=FOLDER")
    return [
        download(f"{endpoint()}/datasets/{repo}/resolve/{revision}/{urllib.parse.quote(name)}",
                 os.path.join(folder, "raw", revision, name), (sha256 or {}).get(name),
                 ) for name in names
    ]


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def list_files(repo, revision):
    """The files of a dataset repository on the hub."""
    url = f"{endpoint()}/api/datasets/{repo}/revision/{revision}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return [item["rfilename"] for item in json.load(answer)["siblings"]]
    except (OSError, ValueError, KeyError) as error:
        stop(f"{url}: {error}; set HF_ENDPOINT to a mirror, or download by hand and give "
             "--raw=FOLDER")


def download(url, path, sha256=None, attempts=5):
    """Fetch `url` to `path`, unless it is there; a broken transfer is continued."""
    if os.path.exists(path):
        return path
    part = path + ".part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for attempt in range(attempts):
        try:
            receive(url, part)
            break
        except OSError as error:  # URLError, timeouts and resets are all OSError
            if (isinstance(error, urllib.error.HTTPError) and error.code != 416 and error.code < 500
                    or attempt == attempts - 1):
                stop(f"{url}: {error}; what arrived stays in {part!r} and is continued the next "
                     "time")
    digest = hashlib.sha256()
    with open(part, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    if sha256 and digest.hexdigest() != sha256:
        os.remove(part)
        stop(f"{url}: the SHA-256 is {digest.hexdigest()}, not {sha256}: the file was damaged or "
             "has changed")
    os.replace(part, path)
    return path


def receive(url, part):
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206:
            have = 0  # the server knows no ranges: from the start
        size = have + int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(total=size or None, initial=have, unit="B", unit_scale=True,
                   desc=os.path.basename(part).removesuffix(".part"))
        with open(part, "ab" if have else "wb") as f, bar:
            while block := answer.read(2**16):
                f.write(block)
                bar.update(len(block))
    if size and os.path.getsize(part) != size:
        raise OSError(f"{os.path.getsize(part)} of {size} bytes arrived")


def convert(paths, to_record, out, holdout=0.0, key=lambda record: json.dumps(record.get("input"))):
    """Turn raw rows into out/train.jsonl and out/test.jsonl, and say what was kept and dropped.

    to_record(raw row) -> a record, or raises ValueError with the reason to drop the row
    holdout            0: the raw files' own split, by the word "test" in a file's name; else the
                       share of the prompts (by `key`) that goes to test, all files pooled: no
                       prompt is on both sides
    """
    splits, dropped, read = {"train": [], "test": []}, Counter(), 0
    for path in paths:
        split = splits["test" if "test" in os.path.basename(path) else "train"]
        for row in tqdm(read_rows(path), desc=os.path.basename(path), unit="row", leave=False):
            read += 1
            try:
                if row.record is None:
                    raise ValueError("no JSON object")
                split.append(to_record(row.record))
            except (ValueError, KeyError, TypeError) as error:
                dropped[f"field {error} is missing" if isinstance(error, KeyError) else str(error
                                                                                            )] += 1
    if holdout:
        pool = splits["train"] + splits["test"]
        prompts = list(dict.fromkeys(map(key, pool)))
        held = {prompts[i] for i in split_train_test(len(prompts), holdout)[1]}
        splits = {
            "train": [r for r in pool if key(r) not in held],
            "test": [r for r in pool if key(r) in held],
        }
    reasons = "".join(f"; dropped {count} ({reason})" for reason, count in dropped.most_common())
    print(f"{read} rows read, {sum(map(len, splits.values()))} kept{reasons}")
    os.makedirs(out, exist_ok=True)
    for name, records in splits.items():
        if records:
            write(os.path.join(out, name + ".jsonl"), records)
    return splits


def write(path, records):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(path + ".tmp", path)
    print(f"{path}: {len(records)} rows")


def split_train_test(n, ratio, seed=42):
    """Shuffled indices of a training and a test part, the latter round(n * ratio) long."""
    indices = np.arange(n)
    np.random.default_rng(seed).shuffle(indices)
    train = n - round(n * ratio)
    return indices[:train].tolist(), indices[train:].tolist()
