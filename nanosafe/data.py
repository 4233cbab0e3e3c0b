"""
jsonl -> cached token ids -> packed batches.

A row is Safe-RLHF's RawSample: `input` (a string, or a list of turns that ends with the user's) or
`dialogue` (turns), `answer`, `other_answer`, `better` and `safer` (whether answer beats other_answer),
`is_safe`, `is_other_safe`. Any jsonl file of such rows is a dataset.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import zipfile
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

# The one definition of the template. A dialogue repeats USER ... ASSISTANT:answer</s>; no space follows the colon.
PROMPT_BEGIN = "BEGINNING OF CONVERSATION: "
PROMPT_TURN = "USER: {input} ASSISTANT:"

TASKS = {  # task -> fields that a row must have
    "sft": (), "prompts": ("input",), "reward": ("input", "answer", "other_answer", "better"),
    "cost": ("input", "answer", "other_answer", "safer", "is_safe", "is_other_safe"),
}
ALIASES = {
    "stanford-alpaca": "alpaca", "pku-saferlhf": "pku_saferlhf", "pku-alignment/pku-saferlhf": "pku_saferlhf",
    "pku-saferlhf-30k": "pku_saferlhf/30k", "pku-saferlhf-10k": "pku_saferlhf/10k",
    **{f"hh-rlhf-{kind}-preference": f"hh_rlhf/{kind}-base" for kind in ("harmless", "helpful")},
    **{f"hh-rlhf-{kind}-dialogue": f"hh_rlhf/{kind}-base-dialogue" for kind in ("harmless", "helpful")},
}
ROOT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
VERSION = 1  # of the cache's layout


# ---- rows --------------------------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    record: dict
    file: str
    line: int


def load(spec, seed=42):
    """The rows of a dataset specification, as a list of Row.

    spec: comma-separated NAME[/SPLIT][:PROPORTION[:PATH]], or paths of .jsonl files with [:PROPORTION].
    PROPORTION is a share (0.5, 3/4), a repetition (2.5) or a count (100/-1). NAME is a folder below data/ that its prepare.py
    filled; SPLIT defaults to train.
    """
    parts = [(path, proportion) for path, proportion in parse_spec(spec) if proportion != 0]
    rows = []
    for (path, proportion), child in zip(parts, np.random.SeedSequence(seed).spawn(len(parts))):
        file_rows = list(read_rows(path))
        rows += [file_rows[i] for i in sample_indices(len(file_rows), proportion, child)]
    return rows


def parse_spec(spec):
    """[(path, proportion)], a negative proportion being a count."""
    parts, seen = [], set()
    for item in filter(None, (item.strip() for item in spec.split(","))):
        name, *rest = item.split(":")
        if len(rest) > 2 or (len(rest) == 2 and not rest[1]):
            stop(f"data {item!r}: write NAME[/SPLIT][:PROPORTION[:PATH]]")
        try:
            share = Fraction(1) if not rest or not rest[0] else Fraction(rest[0]) if "/-" not in rest[0] \
                else -abs(Fraction(int(rest[0].split("/")[0])))
        except (ValueError, ZeroDivisionError):
            stop(f"data {item!r}: the proportion {rest[0]!r} is not a number, a fraction a/b or a count n/-1")
        if share < 0 and "/-" not in rest[0] or (share < 0 and rest[0].startswith("-")):
            stop(f"data {item!r}: the proportion must not be negative; a count is written n/-1")
        path = resolve(name, os.path.expanduser(rest[1]) if len(rest) == 2 else None)
        if path in seen:
            stop(f"data {item!r}: this dataset is named twice; use one proportion, 2 repeats it")
        seen.add(path)
        parts.append((path, float(share)))
    if not parts:
        stop("data is empty: name a dataset, or the path of a .jsonl file")
    return parts


def resolve(name, path=None):
    """The jsonl file of a dataset's name; with `path`, that file, or NAME's file in that folder."""
    if path is None and name.endswith((".jsonl", ".json", ".gz", ".xz", ".zip")):
        candidates = [os.path.expanduser(name)]
    else:
        base, _, split = name.rpartition("/") if name.endswith(("/train", "/test")) else (name, "", "train")
        base = ALIASES.get(base.lower(), base)
        roots = ["data", ROOT] if path is None else [path]
        candidates = [os.path.join(root, base, split + ".jsonl") for root in roots]
        if path is not None:
            candidates += [path, os.path.join(path, split + ".jsonl")]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    if path is None and not name.endswith(".jsonl"):
        stop(f"dataset {name!r} has no file {candidates[0]!r}: run python data/{base.split('/')[0]}/prepare.py first")
    stop(f"dataset {name!r}: no file at {candidates[0]!r}")


def sample_indices(n, proportion, seed_sequence):
    """Safe-RLHF's sampling: whole copies in order, then a draw without replacement for the rest. proportion < 0: a count."""
    count = int(-proportion) if proportion < 0 else round(n * proportion)
    copies, rest = divmod(count, n) if n else (0, 0)
    indices = list(range(n)) * copies
    if rest:
        indices += np.random.default_rng(seed_sequence).choice(n, size=rest, replace=False).tolist()
    return indices


def split_train_test(n, ratio, seed=42):
    """Shuffled indices of a training and a test part, the latter round(n * ratio) long."""
    indices = np.arange(n)
    np.random.default_rng(seed).shuffle(indices)
    train = n - round(n * ratio)
    return indices[:train].tolist(), indices[train:].tolist()


def open_text(path):
    """A text file, opened through its compression: .gz, .xz, a .zip with one file, or none."""
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.endswith(".xz"):
        return lzma.open(path, "rt", encoding="utf-8-sig")
    if path.endswith(".zip"):
        archive = zipfile.ZipFile(path)
        return io.TextIOWrapper(archive.open(archive.namelist()[0]), encoding="utf-8-sig")
    if path.endswith(".parquet"):
        stop(f"{path!r}: parquet is not read here; convert it: "
             "python -c \"import pandas, sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\"")
    return open(path, encoding="utf-8-sig")


def read_rows(path):
    """The rows of a .json (a list) or .jsonl file; a line that is no JSON object becomes a Row with record None."""
    with open_text(path) as f:
        if path.removesuffix(".gz").removesuffix(".xz").removesuffix(".zip").endswith(".json"):
            values = enumerate(json.load(f), start=1)
        else:
            values = ((i, parse_line(line)) for i, line in enumerate(f, start=1) if line.strip())
        for i, value in values:
            yield Row(value if isinstance(value, dict) else None, path, i)


def parse_line(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


# ---- rows -> conversations -----------------------------------------------------------------------------------------------------

def conversations(record, task):
    """The conversations (lists of turns, the user first) that a row stands for, and their signs: the preferred one first.

    sft, prompts: one; reward: chosen, rejected; cost: safer, unsafer, with signs +1 safe and -1 unsafe.
    Raises ValueError with the reason to drop the row.
    """
    if record is None:
        raise ValueError("no JSON object")
    for name in TASKS[task]:
        if name not in record:
            raise ValueError(f"no field {name!r}")
    if task == "sft" and record.get("dialogue"):
        turns = check_turns(record["dialogue"], even=True)
        return [turns], (0,)
    turns = check_turns(record.get("input"), even=False)
    if task == "prompts":
        return [turns], (0,)
    answer = check_text(record.get("answer"), "answer")
    if task == "sft":
        return [turns + [answer]], (0,)
    other = check_text(record["other_answer"], "answer")
    if answer == other:
        raise ValueError("identical answers")
    pair, signs = [turns + [answer], turns + [other]], (0, 0)
    first = bool(record["better" if task == "reward" else "safer"])
    if task == "cost":
        signs = tuple(1 if record[name] else -1 for name in ("is_safe", "is_other_safe"))
        if signs == ((-1, 1) if first else (1, -1)):
            raise ValueError("contradictory safety labels")
    return (pair, signs) if first else (pair[::-1], signs[::-1])


def check_turns(turns, even):
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or len(turns) % 2 == even:
        raise ValueError("a dialogue must alternate and end with the assistant" if even else
                         "an input must be a text, or turns that end with the user's")
    return [check_text(turn, "turn") for turn in turns]


def check_text(text, what):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"empty {what}")
    return text


def segments(turns):
    """[(prompt text, answer or None)] of a conversation, one for each pair of turns."""
    texts = []
    for i in range(0, len(turns), 2):
        prompt = (PROMPT_BEGIN if i == 0 else "") + PROMPT_TURN.replace("{input}", turns[i])
        texts.append((prompt, turns[i + 1] if i + 1 < len(turns) else None))
    return texts


def encode(turns, tokenizer, lookup=None):
    """Token ids of a conversation, and a mask that is 1 on what an assistant says, its EOS included.

    <s>BEGINNING OF CONVERSATION: USER: hi ASSISTANT:hello</s>USER: ... ; nothing a user writes becomes a special token.
    An answer is tokenised together with its prompt; where that would merge tokens across the border, on its own.
    """
    lookup = lookup or (lambda text: tokenizer.encode(text, allow_special=False))
    ids, mask = [tokenizer.bos_id], [0]
    for prompt, answer in segments(turns):
        prompt_ids = lookup(prompt)
        ids += prompt_ids
        mask += [0] * len(prompt_ids)
        if answer is not None:
            joint = lookup(prompt + answer)
            n = len(prompt_ids)
            answer_ids = (joint[n:] if joint[:n] == prompt_ids else tokenizer.encode_suffix(answer)) + [tokenizer.eos_id]
            ids += answer_ids
            mask += [1] * len(answer_ids)
    return ids, mask


# ---- conversations -> cached ids -----------------------------------------------------------------------------------------------

class Dataset:
    """Tokenised examples, memory-mapped: `width` sequences each (two for pairs)."""

    def __init__(self, folder):
        arrays = {name: np.load(os.path.join(folder, name + ".npy"), mmap_mode="r")
                  for name in ("tokens", "mask", "offsets", "signs", "lines")}
        self.tokens, self.mask = arrays["tokens"], arrays["mask"]
        self.offsets, self.signs, self.lines = (np.asarray(arrays[name]) for name in ("offsets", "signs", "lines"))
        self.width = self.signs.shape[1]
        with open(os.path.join(folder, "report.json"), encoding="utf-8") as f:
            self.report = json.load(f)
        ends = self.offsets[:: self.width]
        self.lengths = np.diff(ends)  # (n,) tokens of each example, its sequences together
        sums = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        self.targets = sums[ends[1:]] - sums[ends[:-1]]  # (n,) tokens of each example that carry loss

    def __len__(self):
        return len(self.signs)

    def sequence(self, i, part=0):
        """Token ids and loss mask of an example's sequence."""
        k = i * self.width + part
        span = slice(self.offsets[k], self.offsets[k + 1])
        return self.tokens[span], self.mask[span]

    def batch(self, examples, device):
        """The packed Batch of some examples; of pairs, first all preferred sequences, then the others."""
        pairs = [self.sequence(i, part) for part in range(self.width) for i in examples]
        return collate([tokens for tokens, _ in pairs], [mask for _, mask in pairs], device)


def tokenize(spec, tokenizer, task, max_len, seed=42, show=True):
    """The Dataset of a specification (see load) for a task: sft, reward, cost or prompts.

    Tokenised once: the ids are cached under ~/.cache/nanosafe (or NANOSAFE_CACHE), by content and tokenizer. Rows that cannot
    be used are dropped, counted and reported; prompts are deduplicated.
    """
    parts = parse_spec(spec)
    key = hashlib.blake2b(digest_size=16)
    for text in (tokenizer.fingerprint(), task, str(max_len), str(seed), str(VERSION), PROMPT_BEGIN + PROMPT_TURN):
        key.update(text.encode() + b"\0")
    for path, proportion in parts:
        key.update(f"{proportion}\0".encode())
        with open(path, "rb") as f:
            while block := f.read(2**24):
                key.update(block)
    cache = os.environ.get("NANOSAFE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "nanosafe")
    folder = os.path.join(cache, key.hexdigest())
    if not os.path.isdir(folder):
        build(folder, load(spec, seed), tokenizer, task, max_len, show)
    dataset = Dataset(folder)
    if show:
        print(f"{spec} ({task}): {dataset.report['text']}", flush=True)
    if not len(dataset):
        stop(f"data {spec!r} has no usable row for {task}: {dataset.report['text']}")
    return dataset


def build(folder, rows, tokenizer, task, max_len, show):
    """Tokenise rows into the folder, under a temporary name first: several processes may try."""
    dropped, first, kept = Counter(), {}, {}

    def drop(row, reason):
        dropped[reason] += 1
        first.setdefault(reason, f"{row.file}:{row.line}")

    bar = tqdm(total=len(rows), desc="tokenising", unit="row", disable=not show or len(rows) < 20000)
    for begin in range(0, len(rows), 2048):
        chunk = []
        for row in rows[begin:begin + 2048]:
            try:
                chunk.append((row, *conversations(row.record, task)))
            except ValueError as error:
                drop(row, str(error))
        texts = {text for _, talks, _ in chunk for turns in talks for prompt, answer in segments(turns)
                 for text in ((prompt,) if answer is None else (prompt, prompt + answer))}
        lookup = dict(zip(texts, tokenizer.encode_batch(list(texts)))).__getitem__
        for row, talks, signs in chunk:
            encoded = [encode(turns, tokenizer, lookup) for turns in talks]
            if max(len(ids) for ids, _ in encoded) > max_len:
                drop(row, f"longer than {max_len} tokens")
                continue
            key = tuple(encoded[0][0]) if task == "prompts" else len(kept)
            if key in kept:
                drop(row, "repeated prompt")
                del kept[key]  # the last one stays, in its own place
            kept[key] = encoded, signs, row.line
        bar.update(len(rows[begin:begin + 2048]))
    bar.close()
    reasons = [f"{count} {reason} (first: {first[reason]})" for reason, count in dropped.most_common()]
    text = f"{len(rows)} rows, {len(kept)} kept" + "".join(f"; dropped {reason}" for reason in reasons)
    write_cache(folder, list(kept.values()), {"text": text, "dropped": dropped}, width=2 if task in ("reward", "cost") else 1)


def write_cache(folder, examples, report, width):
    sequences = [sequence for encoded, _, _ in examples for sequence in encoded]
    flat = lambda k, dtype: np.array([x for sequence in sequences for x in sequence[k]], dtype=dtype)
    arrays = {
        "tokens": flat(0, np.int32), "mask": flat(1, np.uint8),
        "offsets": np.cumsum([0] + [len(ids) for ids, _ in sequences], dtype=np.int64),
        "signs": np.array([signs for _, signs, _ in examples], dtype=np.int8).reshape(-1, width),
        "lines": np.array([line for _, _, line in examples], dtype=np.int64),
    }
    temporary = f"{folder}.{os.getpid()}"
    os.makedirs(temporary)
    for name, array in arrays.items():
        np.save(os.path.join(temporary, name + ".npy"), array)
    with open(os.path.join(temporary, "report.json"), "w", encoding="utf-8") as f:
        json.dump(report, f)
    try:
        os.rename(temporary, folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary)


# ---- cached ids -> batches -----------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Packed sequences: model(*batch[:3]) gives scores, model(*batch) the log-probabilities of the targets."""
    tokens: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32
    max_seqlen: int
    targets: torch.Tensor  # (N,) the next token where it carries loss, else -100


def collate(sequences, masks, device):
    """The Batch of token sequences whose masks are 1 on the tokens that are targets."""
    if not sequences:  # a rank without work still takes part in its peers' collectives: one token that nobody reads
        sequences, masks = [np.zeros(1, np.int32)], [np.zeros(1, np.uint8)]
    tokens = np.concatenate(sequences).astype(np.int64)
    mask = np.concatenate(masks)
    lengths = [len(s) for s in sequences]
    cu_seqlens = np.cumsum([0] + lengths)
    targets = np.full(len(tokens), -100)
    targets[:-1] = np.where(mask[1:], tokens[1:], -100)  # a sequence's first token is no target, so no border is crossed
    move = lambda x: torch.from_numpy(x).to(device, non_blocking=True)
    return Batch(move(tokens), move(cu_seqlens.astype(np.int32)), max(lengths), move(targets))


def responses_of(x, batch, starts, R):
    """What belongs to the responses in a packed tensor: x (N,) -> (B, R), right-padded.

    Column j of row b is the position before the response's j-th token: log p of emitting it, or the value of the state before
    it. starts: where the response begins in each sequence.
    """
    begins = batch.cu_seqlens[:-1].long()
    if len(starts) < len(begins):  # the batch of a rank without work
        return x.new_zeros(0, R) + 0 * x.sum()
    first = begins + torch.tensor(starts, device=x.device) - 1
    places = first[:, None] + torch.arange(R, device=x.device)
    return x[torch.minimum(places, batch.cu_seqlens[1:, None].long() - 1)]


def retokenize(ids, source, target):
    """A conversation's ids in another tokenizer: piece by piece between the ends of sequence, which stay where they are."""
    out, piece = [target.bos_id], []
    for i in map(int, ids):
        if i in source.eos_ids:
            out += target.encode(source.decode(piece), allow_special=False) + [target.eos_id]
            piece = []
        else:
            piece.append(i)
    return np.array(out + (target.encode(source.decode(piece), allow_special=False) if piece else []))


def order(n, epoch, seed):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def examples_at(step, n, batch_size, seed):
    """The examples of optimizer step `step`: a pure function, so that a resumed run needs no cursor but the step."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: order(n, epoch, seed) for epoch in range(positions[0] // n, positions[-1] // n + 1)}
    return [int(orders[p // n][p % n]) for p in positions]


def count_steps(n, batch_size, epochs, max_steps):
    """Optimizer steps in `epochs` passes over n examples, at most max_steps (0: no bound)."""
    steps = max(1, round(epochs * n / batch_size))
    return min(steps, max_steps) if max_steps > 0 else steps


def plan(lengths, max_tokens, ranks):
    """Deal a batch out: plan[rank] is that rank's list of micro-batches, each a list of indices into `lengths`.

    No micro-batch has more than max_tokens tokens; every rank gets as many (some may be empty), with about equal tokens; like
    lengths lie together. A pure function: every rank computes the same plan and takes its part.
    """
    longest, total = max(lengths), sum(lengths)
    if longest > max_tokens:
        stop(f"an example has {longest} tokens, max_tokens={max_tokens} per forward cannot hold it: raise max_tokens or lower max_len")
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bins = ranks * -(-total // (ranks * max_tokens))
    while True:
        low, high = max(longest, -(-total // bins)), max_tokens  # the least capacity with which `bins` bins suffice
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cut(by_length, lengths, middle)) <= bins else (middle + 1, high)
        parts = cut(by_length, lengths, low)
        if len(parts) <= bins:
            break
        bins += ranks
    while len(parts) < min(bins, len(lengths)):  # an idle rank helps a busy one
        part = max(parts, key=len)
        parts[parts.index(part):parts.index(part) + 1] = [part[:len(part) // 2], part[len(part) // 2:]]
    parts += [[] for _ in range(bins - len(parts))]
    return [parts[rank::ranks] for rank in range(ranks)]


def cut(indices, lengths, capacity):
    """Cut `indices` into runs of at most `capacity` tokens."""
    parts, room = [], 0
    for i in indices:
        if lengths[i] > room:
            parts.append([])
            room = capacity
        parts[-1].append(i)
        room -= lengths[i]
    return parts


def stop(message):
    raise SystemExit(f"error: {message}")
