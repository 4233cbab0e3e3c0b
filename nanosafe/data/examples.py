"""Rows -> conversations -> token ids: what each task takes from a row, why a row is dropped."""

import math
import re

from nanosafe.data.template import encode_conversation, split_into_segments


TASKS = {  # task -> fields that a row must have
    "sft": (),
    "prompts": ("input",),
    "rank": ("input",),
    "reward": ("input", "answer", "other_answer", "better"),
    "cost": ("input", "answer", "other_answer", "safer", "is_safe", "is_other_safe"),
}


def parse_record(record, task):
    """The conversations (turns, the user's first) of a row, preferred first, and their labels.

    sft, prompts: one; reward: chosen 1, rejected 0; cost: safer and unsafer, each +1 if safe, -1 if
    not; rank: two or more, with their scores. Raises ValueError with the reason to drop the row."""
    if record is None:
        raise ValueError("no JSON object")
    for name in TASKS[task]:
        if name not in record:
            raise ValueError(f"no field {name!r}")
    if task == "sft" and record.get("dialogue"):
        return [check_turns(record["dialogue"], even=True)], (0,)
    turns = check_turns(record.get("input"), even=False)
    if task == "prompts":
        return [turns], (0,)
    if task == "rank" and "answers" in record:
        return rank_answers(turns, record["answers"], record.get("scores"))
    answer = check_text(record.get("answer"), "answer")
    if task == "sft":
        return [turns + [answer]], (0,)
    other = check_text(record.get("other_answer"), "answer")
    if answer == other:
        raise ValueError("identical answers")
    if task == "rank" and "better" not in record:
        raise ValueError("neither a field 'answers' nor 'better'")
    first = bool(record["safer" if task == "cost" else "better"])
    pair = [turns + [answer], turns + [other]][:: 1 if first else -1]
    if task != "cost":
        return pair, (1, 0)
    signs = tuple(1 if record[name] else -1 for name in ("is_safe", "is_other_safe"))
    if signs == ((-1, 1) if first else (1, -1)):
        raise ValueError("contradictory safety labels")
    return pair, signs[:: 1 if first else -1]


def rank_answers(turns, answers, scores):
    """Conversations of different answers to one input, the best first, and their scores."""
    check_scores(scores, answers, "each answer")
    best = {}  # of an answer that stands there twice, its best score
    for score, answer in sorted(zip(scores, answers), key=lambda pair: -pair[0]):
        best.setdefault(check_text(answer, "answer"), score)
    if len(set(best.values())) < 2:
        raise ValueError("no two answers of different scores")
    return [turns + [answer] for answer in best], tuple(best.values())


def check_scores(scores, texts, each):
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise ValueError(f"not one score for {each}")
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise ValueError("a score that is no number")


def check_turns(turns, even):
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or len(turns) % 2 == even:
        raise ValueError(
            "a dialogue must alternate and end with the assistant"
            if even
            else "an input must be a text, or turns that end with the user's"
        )
    return [check_text(turn, "turn") for turn in turns]


def check_text(text, what):
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"empty {what}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"half a character in a {what}")
    return text


def usable_rows(rows, read, drop):
    """(row, read(its record)) of each row of which read() does not raise the reason to drop it."""
    for row in rows:
        try:
            yield row, read(row.record)
        except ValueError as error:
            drop(row, str(error))


def encode_rows(rows, tokenizer, task, max_len, drop):
    """(row, key by which it may repeat another, (sequences, labels, line)) of each usable row."""
    chunk = list(usable_rows(rows, lambda record: parse_record(record, task), drop))
    pieces = [
        piece for _, (talks, _) in chunk for turns in talks for piece in split_into_segments(turns)
    ]
    texts = {prompt for prompt, _ in pieces} | {p + a for p, a in pieces if a is not None}
    lookup = dict(zip(texts, tokenizer.encode_batch(list(texts)))).__getitem__
    for row, (talks, labels) in chunk:
        encoded = [encode_conversation(turns, tokenizer, lookup) for turns in talks]
        if max(len(ids) for ids, _ in encoded) > max_len:
            drop(row, f"longer than {max_len} tokens")
            continue
        if len(talks) > 1:  # compared is what is said last
            encoded = [(ids, keep_last_run(mask)) for ids, mask in encoded]
        key = tuple(encoded[0][0]) if task == "prompts" else None
        yield row, key, (encoded, labels, row.line)


def keep_last_run(mask):
    """A mask with only its last run of ones, which goes on to the end."""
    ones = mask[::-1].index(0)  # a prompt has no ones
    return [0] * (len(mask) - ones) + [1] * ones
