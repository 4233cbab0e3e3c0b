"""Raw datasets -> jsonl: what the prepare.py scripts share.

Files come from the Hugging Face hub (or the mirror in HF_ENDPOINT), or from a folder. A download
goes to a temporary name, continues where it broke off, and is checked when its SHA-256 is known."""

import hashlib
import json
import os
import re
import urllib.request
from collections import Counter

import numpy as np
from tqdm import tqdm

from nanosafe.data.examples import parse_record
from nanosafe.data.reader import PARQUET, read_rows
from nanosafe.errors import choose, stop
from nanosafe.printing import format_table
from nanosafe.storage import read_json
from nanosafe.tokenizer import load as load_tokenizer


# The knobs of every prepare.py besides its own: configure(globals(), vars(fetch)).
raw = ""  # folder with the raw files; empty: download


holdout = 0.0  # share of the prompts for test.jsonl, all files pooled; 0: the raw files' own split


out = ""  # folder to write to; empty: beside this script, some releases in a subfolder


tokenizer = ""  # folder with a tokenizer, to count tokens instead of characters


ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zip", ".json", ".json.gz", ".json.xz")


def raw_files(raw, repo, folder, wanted, revision="main", sha256=None):
    """Paths of a dataset's raw files: those below `raw`, or else downloaded to folder/raw.

    wanted(name) picks files of the hub's repository by their path; sha256: {path: digest}. A
    `repo` that is a URL is one file."""
    if raw:
        found = sorted(
            f"{base}/{name}"
            for base, _, names in os.walk(os.path.expanduser(raw))
            for name in names
            if name.endswith(ENDINGS)
        )
        if not found:
            stop(
                f"--raw={raw}: no {', '.join(ENDINGS[:3])} or .json file there; parquet is "
                f"converted with {PARQUET}"
            )
        return found
    if "://" in repo:
        return [download(repo, f"{folder}/raw/{os.path.basename(repo)}")]
    there = list_files(repo, revision)
    names = [name for name in there if wanted(name)]
    if not names and any(name.endswith(".parquet") for name in there):
        stop(f"{repo} has parquet files only: convert each with {PARQUET} and give --raw=FOLDER")
    if not names:
        stop(
            f"{repo} (revision {revision}) has none of the files expected: download it by hand "
            "and give --raw=FOLDER"
        )
    base, place = f"{endpoint()}/datasets/{repo}/resolve/{revision}", f"{folder}/raw/{revision}"
    return [
        download(f"{base}/{urllib.parse.quote(name)}", f"{place}/{name}", (sha256 or {}).get(name))
        for name in names
    ]


def prepare(script, to_record, config, release=None, url=None):
    """What a prepare.py does, by its knobs `config`: raw files, convert()ed.

    They are one file at `url`, or what sources.json names by the script's folder and, of several
    releases, by the value of the knob named `release`: a repository, a pattern of its files' paths,
    and the part of the folder to write to (by default the release's name)."""
    here, part = os.path.dirname(os.path.abspath(script)), ""
    known = read_json(os.path.dirname(__file__), "sources.json")
    source = {"repo": url} if url else known[os.path.basename(here)]
    if release:
        part = config[release]
        choose(release, part, source)
        source = source[part]
    part, pattern = source.pop("part", part), source.pop("files", r"\.jsonl")
    wanted = lambda name: name.endswith(ENDINGS) and re.search(pattern, name)
    files = raw_files(config["raw"], folder=here, wanted=wanted, **source)
    convert(
        files,
        to_record,
        config["out"] or os.path.join(here, part),
        config["holdout"],
        config["tokenizer"],
    )


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def list_files(repo, revision):
    """The files of a dataset repository on the hub."""
    url = f"{endpoint()}/api/datasets/{repo}/revision/{revision}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return [item["rfilename"] for item in json.load(answer)["siblings"]]
    except (OSError, ValueError, KeyError) as error:
        stop(f"{url}: {error}; set HF_ENDPOINT to a mirror, or download and give --raw=FOLDER")


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
            status = getattr(error, "code", 500)  # of an answer
            if status < 500 and status != 416 or attempt == attempts - 1:
                stop(f"{url}: {error}; what arrived stays in {part!r} and is continued next time")
    digest = hashlib.sha256()
    with open(part, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    if sha256 and digest.hexdigest() != sha256:
        os.remove(part)
        stop(f"{url}: the SHA-256 is {digest.hexdigest()}, not {sha256}: damaged or has changed")
    os.replace(part, path)
    return path


def receive(url, part):
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206:
            have = 0  # the server knows no ranges: from the start
        size = have + int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(
            total=size or None,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=os.path.basename(part).removesuffix(".part"),
        )
        with open(part, "ab" if have else "wb") as f, bar:
            while block := answer.read(2**16):
                f.write(block)
                bar.update(len(block))
    if size and os.path.getsize(part) != size:
        raise OSError(f"{os.path.getsize(part)} of {size} bytes arrived")


def key(record):
    """What two rows share that must not be on both sides of a split: the prompt, or the text."""
    return json.dumps(record.get("input") or record.get("texts") or record["dialogue"][:-1])


def convert(paths, to_record, out, holdout=0.0, tokenizer=""):
    """Turn raw rows into out/train.jsonl and out/test.jsonl, and say what was kept and dropped.

    to_record(raw row) -> a record, or raises ValueError with the reason to drop the row
    holdout            0: the raw files' own split, by the word "test" in a file's name; else the
                       share of the prompts (by key()) that goes to test, all files pooled: no
                       prompt is on both sides, of pairs and of dialogues alike
    tokenizer          a folder with one: the table counts its tokens instead of characters

    No file is in memory whole; with a holdout they are read twice."""
    held, tok = set(), load_tokenizer(tokenizer) if tokenizer else None
    if holdout:
        prompts = list(dict.fromkeys(key(r) for _, r, _ in records(paths, to_record) if r))
        held = {prompts[i] for i in split_train_test(len(prompts), holdout)[1]}
    os.makedirs(out, exist_ok=True)
    names = {split: os.path.join(out, split + ".jsonl") for split in ("train", "test")}
    files = {split: open(name + ".tmp", "w", encoding="utf-8") for split, name in names.items()}
    counts = {split: Counter() for split in names}
    dropped = Counter()
    for split, record, reason in records(paths, to_record):
        if record is None:
            dropped[reason] += 1
            continue
        if holdout:
            split = "test" if key(record) in held else "train"
        files[split].write(json.dumps(record, ensure_ascii=False) + "\n")
        said = list(texts_of(record))
        safe = [record[name] for name in ("is_safe", "is_other_safe") if name in record]
        counts[split].update(
            rows=1,
            unsafe=safe.count(False),
            labelled=len(safe),
            size=sum(map(len, tok.encode_batch(said) if tok else said)),
        )
    rows = [("", "rows", "tokens" if tok else "characters", "unsafe answers")]
    reasons = "".join(f"; dropped {count:,} ({reason})" for reason, count in dropped.most_common())
    kept = sum(c["rows"] for c in counts.values())
    print(f"{kept + dropped.total():,} rows read, {kept:,} kept{reasons}")
    for split, c in counts.items():
        files[split].close()
        if c["rows"]:
            os.replace(files[split].name, names[split])
            share = f"{c['unsafe'] / c['labelled']:.1%}" if c["labelled"] else "-"
            rows.append((names[split], f"{c['rows']:,}", f"{c['size']:,}", share))
            continue
        os.remove(files[split].name)
        if kept and os.path.exists(names[split]):
            os.remove(names[split])  # an older one: its rows are now on the other side
    if not kept:
        stop(f"none of the {dropped.total()} rows in {', '.join(paths[:3])} can be used")
    print(format_table(rows))


def records(paths, to_record):
    """(split, record or None, why there is none) of every raw row."""
    for path in paths:
        name = os.path.basename(path)
        split = "test" if re.search("(^|[^a-z])test([^a-z]|$)", name) else "train"
        for row in tqdm(read_rows(path), desc=name, unit="row", leave=False):
            try:
                if row.record is None:
                    raise ValueError("no JSON object")
                yield split, checked(to_record(row.record)), ""
            except KeyError as error:
                yield split, None, f"field {error} is missing"
            except (AttributeError, IndexError, OverflowError, TypeError):
                yield split, None, "a field of another kind than expected"
            except ValueError as error:
                yield split, None, str(error)


def checked(record):
    """The record, if training could use it; else raises ValueError."""
    if "texts" not in record:
        parse_record(record, "sft" if {"answer", "dialogue"} & record.keys() else "prompts")
    if any(re.search("[\ud800-\udfff]", text) for text in texts_of(record)):
        raise ValueError("half a character")
    if record.get("answer") == record.get("other_answer", ""):
        raise ValueError("identical answers")
    return record


def label(value):
    """A label that is true or false, or 1 or 0; nothing else will do."""
    if value not in (0, 1):
        raise ValueError(f"the label {value!r}")
    return bool(value)


def texts_of(value):
    """The texts in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_of(item)


def split_train_test(n, ratio, seed=42):
    """Shuffled indices of a training and a test part, the latter round(n * ratio) long."""
    indices = np.random.default_rng(seed).permutation(n).tolist()
    train = n - round(n * ratio)
    return indices[:train], indices[train:]
