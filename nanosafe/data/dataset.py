"""A dataset specification -> examples as token ids, tokenised once and then read from a cache.

The cache is a folder of arrays below ~/.cache/nanosafe (or NANOSAFE_CACHE), which are mapped into
memory. Its name is a digest of everything that the token ids depend on."""

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
from nanosafe.data.examples import Prompt, make_conversation_examples, make_prompt_key
from nanosafe.data.reader import read_sources
from nanosafe.data.spec import parse_spec
from nanosafe.errors import one_line_errors, stop
from nanosafe.parallel import rank, rank0_first
from nanosafe.printing import print_once
from nanosafe.storage import find_corrupt_file, make_folder, read_json, replace_folder, write_json

VERSION = 5  # of the cache's layout, of its key, and of how rows are read
ROWS_AT_A_TIME = 2048  # are tokenised together
MANY = 0.2  # the share of rows from which on it is a loss that they are too long
ROWS_WITH_A_BAR = 20000  # so many rows take long enough for a progress bar


class Dataset:
    """Tokenised examples, memory-mapped. Each has `width` sequences, two for pairs; in a ranking
    some may be empty."""

    def __init__(self, folder):
        self.folder = folder
        self.tokens = load_array(folder, "tokens")  # (N,) int32: all sequences, end to end
        self.mask = load_array(folder, "mask")  # (N,) uint8: 1 on tokens that carry loss
        self.scores = load_array(folder, "scores")  # (N,) float32, or None: see phf/documents.py
        self.offsets = np.asarray(load_array(folder, "offsets"))  # (n * width + 1,) int64
        self.labels = np.asarray(load_array(folder, "labels"))  # (n, width) float32
        self.lines = np.asarray(load_array(folder, "lines"))  # (n,) int64: lines of their file
        self.prompts = np.asarray(load_array(folder, "prompts"))  # (n,) uint64: digests of prompts
        # Of the task prompts: each Prompt as JSON, end to end; else None.
        self.json = load_array(folder, "json")  # (bytes,) uint8
        self.json_offsets = load_array(folder, "json_offsets")  # (n + 1,) int64
        self.width = self.labels.shape[1]
        self.report = read_json(folder, "report.json")
        example_offsets = self.offsets[:: self.width]
        self.lengths = np.diff(example_offsets)  # (n,) tokens of each example, over its sequences
        targets_before = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        self.target_counts = np.diff(targets_before[example_offsets])  # (n,) tokens that carry loss

    def __len__(self):
        return len(self.labels)

    def sequence(self, i, part=0):
        """The token ids and the loss mask of a sequence of example i."""
        k = i * self.width + part
        span = slice(self.offsets[k], self.offsets[k + 1])
        return self.tokens[span], self.mask[span]

    def mismatched_sequence(self, i):
        """The prompt of example i with an answer to the next other prompt, as of sequence().

        Only answers are judged here: the loss mask of the task must be 1 on the last turn alone."""
        other = (i + 1) % len(self)
        while self.prompts[other] == self.prompts[i]:
            if other == i:
                stop("all examples have the same prompt: there is no answer to another one")
            other = (other + 1) % len(self)
        parts = np.flatnonzero(~np.isnan(self.labels[other]))
        question, question_mask = self.sequence(i)
        answer, answer_mask = self.sequence(other, parts[i % len(parts)])
        question = question[question_mask == 0]
        answer = answer[answer_mask == 1]
        mask = np.repeat([0, 1], [len(question), len(answer)])
        return np.concatenate([question, answer]), mask

    def prompt(self, i):
        """The Prompt that example i was made of, in a Dataset of the task prompts."""
        begin, end = self.json_offsets[i : i + 2]
        return Prompt(*json.loads(self.json[begin:end].tobytes()))

    def batch(self, examples, device):
        """The packed Batch of some examples; of pairs, all preferred ones, then the others."""
        sequences = []
        masks = []
        for part in range(self.width):
            for i in examples:
                tokens, mask = self.sequence(i, part)
                if len(tokens):
                    sequences.append(tokens)
                    masks.append(mask)
        return collate(sequences, masks, device)


def load_array(folder, name):
    """An array of the cache, mapped into memory, or None where there is none."""
    path = os.path.join(folder, name + ".npy")
    return np.load(path, mmap_mode="r") if os.path.exists(path) else None


def tokenize(
    spec,
    tokenizer,
    task,
    max_len,
    max_tokens=0,
    seed=42,
    make_examples=make_conversation_examples,
    options=(),
):
    """The Dataset of a specification (see spec.py) for a task, sft for example.

    Rows that cannot be used are dropped, counted and reported, and so are repeated prompts. Stops
    with one line where no row is left, or where an example does not fit into one forward.

    task           a key of examples.TASKS, or one that make_examples knows
    max_len        longest sequence in tokens
    max_tokens     tokens that fit into one forward; 0: as many as an example of max_len may have
    seed           draws the rows, where the specification takes a part of them; trainers leave it,
                   so that their own seed does not change the data
    make_examples  make_examples(rows, tokenizer, task, max_len, drop, *options) yields (row,
                   Example) pairs, and calls drop(row, reason) for rows that cannot be used
    options        further arguments of make_examples, for a task of its own"""
    with rank0_first():  # rank 0 fills the cache, then the others find it
        sources = parse_spec(spec)
        key = cache_key(sources, tokenizer, task, max_len, seed, options)
        cache = os.environ.get("NANOSAFE_CACHE") or "~/.cache/nanosafe"
        folder = os.path.join(os.path.expanduser(cache), key)
        if not os.path.isdir(folder) or find_corrupt_file(folder):
            rows = read_sources(sources, seed)
            build_cache(folder, rows, tokenizer, task, max_len, make_examples, options)
        dataset = Dataset(folder)
        print_once(f"{spec} ({task}): {dataset.report['text']}")
        if len(dataset) == 0:
            stop(f"data {spec!r} has no usable row for {task}: {dataset.report['text']}")
        if task == "cost":
            report_missing_sign(spec, dataset)
        check_fits(dataset.lengths.tolist(), max_tokens or max_len * dataset.width)
    return dataset


def report_missing_sign(spec, dataset):
    """Say so where no answer is safe, or none is unsafe: the sign of a cost means nothing then."""
    for sign, name in ((1, "safe"), (-1, "unsafe")):
        if not (dataset.labels == sign).any():
            print_once(
                f"{spec} (cost): no answer is {name} (see is_safe and is_other_safe), so nothing "
                "here says which costs are above 0, the border between safe and unsafe"
            )


def cache_key(sources, tokenizer, task, max_len, seed, options):
    """A digest of the files' contents and of everything else that the token ids depend on."""
    settings = [VERSION, tokenizer.identity, task, max_len, seed]
    key = hashlib.blake2b(digest_size=16)
    key.update(json.dumps([*settings, *options]).encode())
    for source in sources:
        key.update(json.dumps([source.fraction, source.count]).encode())
        with open(source.path, "rb") as f:
            while block := f.read(2**24):
                key.update(block)
    return key.hexdigest()


def build_cache(folder, rows, tokenizer, task, max_len, make_examples, options):
    """Tokenise the rows into the folder, with a report of what was dropped."""
    dropped = Counter()  # reason -> rows
    noted = Counter()  # what a task did with rows that are kept -> rows
    first_dropped = {}  # reason -> FILE:LINE

    def drop(row, reason):
        dropped[reason] += 1
        first_dropped.setdefault(reason, f"{row.file}:{row.line}")

    examples = {}  # of prompts the key is the text, so that one which repeats another is found
    prompts = {}  # the same keys -> digests
    is_quiet = rank() > 0 or len(rows) < ROWS_WITH_A_BAR
    with tqdm(total=len(rows), desc="tokenising", unit="row", disable=is_quiet) as bar:
        for begin in range(0, len(rows), ROWS_AT_A_TIME):
            chunk = rows[begin : begin + ROWS_AT_A_TIME]
            for row, example in make_examples(chunk, tokenizer, task, max_len, drop, *options):
                key = len(examples)
                if task == "prompts":
                    key = tuple(example.sequences[0].ids)
                if key in examples:
                    drop(row, "repeated prompt")
                    del examples[key], prompts[key]  # the last one stays, where it is
                if example.note:
                    noted[example.note] += 1
                examples[key] = example
                prompts[key] = digest_prompt(row.record)
            bar.update(len(chunk))

    unit = "blocks" if task == "documents" else "kept"
    text = f"{len(rows)} rows, {len(examples)} {unit}"
    text += describe_counts(noted, dropped, first_dropped)
    too_long = dropped[f"longer than {max_len} tokens"] / max(1, len(rows))
    if too_long > MANY:
        text += f"; max_len drops {too_long:.0%}: raise it to learn from long rows, too"
    report = {"text": text, "dropped": dropped, "noted": noted}
    write_cache(folder, make_arrays(list(examples.values()), list(prompts.values())), report)


def describe_counts(noted, dropped, first_dropped):
    """What became of rows, in words: {what: how many}, and {why one was dropped: FILE:LINE}."""
    text = ""
    for note, count in noted.most_common():
        text += f", of which {count} {note}"
    for reason, count in dropped.most_common():
        text += f"; dropped {count} {reason} (first: {first_dropped[reason]})"
    return text


def digest_prompt(record):
    """64 bits of a digest of a row's prompt."""
    key = make_prompt_key(record).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def report_shared_prompts(train, held_out):
    """Say how many examples of one Dataset have a prompt that the other one is trained on."""
    is_shared = np.isin(held_out.prompts, train.prompts)
    if is_shared.any():
        print_once(
            f"eval_data: {is_shared.sum()} of {len(held_out)} examples have a prompt that is in "
            f"data, too (the first is line {held_out.lines[is_shared.argmax()]}), so their metrics "
            "are not held out; python -m nanosafe.data.split makes files without a common prompt"
        )


def make_arrays(examples, prompts):
    """{name: array} of a cache, from Examples and the digests of their prompts.

    Examples may have different numbers of sequences: those that one lacks are empty, labelled nan.
    """
    width = max((len(example.labels) for example in examples), default=1)
    tokens = []
    mask = []
    scores = []
    offsets = [0]
    labels = []
    lines = []
    for example in examples:
        for sequence in example.sequences:
            tokens.extend(sequence.ids)
            mask.extend(sequence.loss_mask)
            scores.extend(sequence.scores or [])
            offsets.append(len(tokens))
        missing = width - len(example.sequences)
        offsets.extend([len(tokens)] * missing)
        labels.append([*example.labels, *[math.nan] * missing])
        lines.append(example.line)
    arrays = {
        "tokens": np.array(tokens, dtype=np.int32),
        "mask": np.array(mask, dtype=np.uint8),
        "offsets": np.array(offsets, dtype=np.int64),
        "labels": np.array(labels, dtype=np.float32).reshape(-1, width),
        "lines": np.array(lines, dtype=np.int64),
        "prompts": np.array(prompts, dtype=np.uint64),
    }
    if scores:
        arrays["scores"] = np.array(scores, dtype=np.float32)
    if examples and examples[0].prompt:
        texts = [json.dumps(example.prompt).encode() for example in examples]
        arrays["json"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
        arrays["json_offsets"] = np.cumsum([0] + [len(text) for text in texts])
    return arrays


def write_cache(folder, arrays, report):
    """Write arrays and the report to the folder, which appears when it is whole."""
    # A temporary name first, as several processes may write the same folder.
    temporary = f"{os.path.realpath(folder)}.{os.getpid()}"
    make_folder(temporary)
    with one_line_errors(temporary, "written"):
        for name, array in arrays.items():
            np.save(os.path.join(temporary, name + ".npy"), array)
    write_json(report, temporary, "report.json")
    with suppress(OSError):  # another process was faster
        replace_folder(temporary, folder)
    shutil.rmtree(temporary, ignore_errors=True)
