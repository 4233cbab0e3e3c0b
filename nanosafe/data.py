"""
jsonl -> conversations -> cached token ids. rows.py reads the files, packing.py makes batches.

A row is Safe-RLHF's RawSample: `input` (a string, or a list of turns that ends with the user's) or
`dialogue` (turns), `answer`, `other_answer`, `better` and `safer` (whether answer beats
other_answer), `is_safe`, `is_other_safe`. Any jsonl file of such rows is a dataset.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter

import numpy as np
from tqdm import tqdm

from nanosafe.files import stop
from nanosafe.packing import collate
from nanosafe.rows import load_rows, parse_spec

# The one definition of the template. A dialogue repeats it from USER: on.
PROMPT_BEGIN = "BEGINNING OF CONVERSATION: "
PROMPT_TURN = "USER: {input} ASSISTANT:"

TASKS = {  # task -> fields that a row must have
    "sft": (),
    "prompts": ("input",),
    "reward": ("input", "answer", "other_answer", "better"),
    "cost": ("input", "answer", "other_answer", "safer", "is_safe", "is_other_safe"),
}
VERSION = 1  # of the cache's layout


def load(spec, seed=42):
    """The records (dicts) of a dataset specification.

    spec is a comma-separated list of NAME[/SPLIT][:PROPORTION[:PATH]], or of paths of .jsonl files.
    PROPORTION is a share (0.5, 3/4), a repetition (2.5) or a count (100/-1); `seed` draws the rows.
    NAME is a folder below data/ that its prepare.py filled, SPLIT is train by default; PATH is
    another place for it. Lines that are no JSON object are dropped, and said.
    """
    rows = load_rows(spec, seed)
    broken = [f"{row.file}:{row.line}" for row in rows if row.record is None]
    if broken:
        print(f"{spec}: {len(broken)} lines are no JSON object (first: {broken[0]}): dropped")
    return [row.record for row in rows if row.record is not None]


def conversations(record, task):
    """The conversations (lists of turns, the user's first) of a row, preferred first, and signs.

    sft, prompts: one; reward: chosen, rejected; cost: safer, unsafer, with signs +1 safe and -1
    unsafe. Raises ValueError with the reason to drop the row.
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
        raise ValueError("a dialogue must alternate and end with the assistant"
                         if even else "an input must be a text, or turns that end with the user's")
    return [check_text(turn, "turn") for turn in turns]


def check_text(text, what):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"empty {what}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"half a character in a {what}")
    return text


def segments(turns):
    """[(prompt text, answer or None)] of a conversation, one for each pair of turns."""
    texts = []
    for i in range(0, len(turns), 2):
        prompt = (PROMPT_BEGIN if i == 0 else "") + PROMPT_TURN.replace("{input}", turns[i])
        texts.append((prompt, turns[i + 1] if i + 1 < len(turns) else None))
    return texts


def encode(turns, tokenizer, lookup=None):
    """Token ids of a conversation, and a mask: 1 on what an assistant says and its EOS.

    <s>BEGINNING OF CONVERSATION: USER: hi ASSISTANT:hello</s>USER: ... ; nothing a user writes
    becomes a special token. An answer is tokenised together with its prompt; where that would merge
    tokens across the border, on its own.
    """
    lookup = lookup or (lambda text: tokenizer.encode(text, allow_special=False))
    ids = tokenizer.encode("", bos=True)
    mask = [0] * len(ids)
    for prompt, answer in segments(turns):
        prompt_ids = lookup(prompt)
        ids += prompt_ids
        mask += [0] * len(prompt_ids)
        if answer is not None:
            joint = lookup(prompt + answer)
            n = len(prompt_ids)
            same = joint[:n] == prompt_ids
            answer_ids = joint[n:] if same else tokenizer.encode_suffix(answer)
            ids += [*answer_ids, tokenizer.eos_id]
            mask += [1] * (len(answer_ids) + 1)
    return ids, mask


def retokenize(ids, source, target):
    """A conversation's ids in another tokenizer: piece by piece between the ends of sequence."""
    out, piece = target.encode("", bos=True), []
    for i in map(int, ids):
        if i in source.eos_ids:
            out += target.encode(source.decode(piece), allow_special=False) + [target.eos_id]
            piece = []
        else:
            piece.append(i)
    rest = target.encode(source.decode(piece), allow_special=False) if piece else []
    return np.array(out + rest)


class Dataset:
    """Tokenised examples, memory-mapped: `width` sequences each (two for pairs)."""
    def __init__(self, folder):
        arrays = {name: np.load(os.path.join(folder, name + ".npy"), mmap_mode="r")
                  for name in ("tokens", "mask", "offsets", "signs", "lines")}
        self.tokens, self.mask = arrays["tokens"], arrays["mask"]
        self.offsets, self.signs, self.lines = (np.asarray(arrays[name])
                                                for name in ("offsets", "signs", "lines"))
        self.width = self.signs.shape[1]
        with open(os.path.join(folder, "report.json"), encoding="utf-8") as f:
            self.report = json.load(f)
        ends = self.offsets[::self.width]
        self.lengths = np.diff(ends)  # (n,) tokens of each example, its sequences together
        sums = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        self.targets = sums[ends[1:]] - sums[ends[:-1]]  # (n,) tokens that carry loss

    def __len__(self):
        return len(self.signs)

    def sequence(self, i, part=0):
        """Token ids and loss mask of an example's sequence."""
        k = i * self.width + part
        span = slice(self.offsets[k], self.offsets[k + 1])
        return self.tokens[span], self.mask[span]

    def batch(self, examples, device):
        """The packed Batch of some examples; of pairs, all preferred ones, then the others."""
        pairs = [self.sequence(i, part) for part in range(self.width) for i in examples]
        return collate([tokens for tokens, _ in pairs], [mask for _, mask in pairs], device)


def tokenize(spec, tokenizer, task, max_len, seed=42, show=True):
    """The Dataset of a specification (see load) for a task: sft, reward, cost or prompts.

    Tokenised once: the ids are cached under ~/.cache/nanosafe (or NANOSAFE_CACHE), by content and
    tokenizer. Rows that cannot be used are dropped, counted and reported; prompts are deduplicated.
    """
    parts = parse_spec(spec)
    key = hashlib.blake2b(digest_size=16)
    settings = [tokenizer.fingerprint, task, max_len, seed, VERSION, PROMPT_BEGIN, PROMPT_TURN]
    key.update(json.dumps(settings).encode())
    for path, proportion in parts:
        key.update(f"{proportion}\0".encode())
        with open(path, "rb") as f:
            while block := f.read(2**24):
                key.update(block)
    cache = os.environ.get("NANOSAFE_CACHE") or os.path.expanduser("~/.cache/nanosafe")
    folder = os.path.join(cache, key.hexdigest())
    if not os.path.isdir(folder):
        build(folder, load_rows(spec, seed), tokenizer, task, max_len, show)
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

    quiet = not show or len(rows) < 20000
    bar = tqdm(total=len(rows), desc="tokenising", unit="row", disable=quiet)
    for begin in range(0, len(rows), 2048):
        chunk = []
        for row in rows[begin:begin + 2048]:
            try:
                chunk.append((row, *conversations(row.record, task)))
            except ValueError as error:
                drop(row, str(error))
        pieces = [piece for _, talks, _ in chunk for turns in talks for piece in segments(turns)]
        texts = {prompt for prompt, _ in pieces} | {p + a for p, a in pieces if a is not None}
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
    text = f"{len(rows)} rows, {len(kept)} kept"
    for reason, count in dropped.most_common():
        text += f"; dropped {count} {reason} (first: {first[reason]})"
    width = 2 if task in ("reward", "cost") else 1
    write_cache(folder, list(kept.values()), {"text": text, "dropped": dropped}, width)


def write_cache(folder, examples, report, width):
    sequences = [sequence for encoded, _, _ in examples for sequence in encoded]
    flat = lambda k, dtype: np.array([x for s in sequences for x in s[k]], dtype=dtype)
    arrays = {
        "tokens": flat(0, np.int32), "mask": flat(1, np.uint8),
        "offsets": np.cumsum([0] + [len(ids) for ids, _ in sequences], dtype=np.int64),
        "signs": np.array([signs for _, signs, _ in examples], np.int8).reshape(-1, width),
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
