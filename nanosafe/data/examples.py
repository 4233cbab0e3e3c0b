"""Rows -> conversations -> token ids: what each task takes from a row, and why a row is dropped.

A row is Safe-RLHF's RawSample, a JSON object with some of these fields:

    input                       the user's text, or a list of turns that ends with the user's
    dialogue                    or a list of turns that ends with the assistant's
    answer, other_answer        what the assistant says
    better, safer               whether `answer` is better, or safer, than `other_answer`
    is_safe, is_other_safe      whether each is safe
    answers, scores             or any number of answers, and a score of each: higher is better

The labels (better, safer, is_safe, is_other_safe) are what parse_label() reads."""

import json
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanosafe.data.template import encode_conversation, split_into_segments

LABEL_TEXTS = {"true": True, "false": False}  # as a table's export may spell them, in any case
FLOAT32_MAX = float(np.finfo(np.float32).max)
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character in UTF-16: UTF-8 cannot write it


class ParsedRecord(NamedTuple):
    conversations: list  # each a list of turns, the user's first; the preferred conversation first
    labels: tuple  # a number of each conversation; the task says what it means


@dataclass(slots=True)
class Sequence:
    ids: list  # token ids
    loss_mask: list  # 1 on the tokens that carry loss
    scores: list | None = None  # of each token: for pretraining with human preferences


@dataclass(slots=True)
class Example:
    sequences: list  # one, or those that are compared, the preferred one first
    labels: tuple  # a number of each sequence
    line: int  # of its file


# ---- a row -> conversations ----


def parse_record(record, task):
    """The ParsedRecord of a row for a task, a key of TASKS.

    Raises ValueError with the reason to drop the row."""
    if record is None:
        raise ValueError("not a JSON object")
    return TASKS[task](record)


def parse_demonstration(record):
    """A conversation that ends with the assistant; label 0."""
    if record.get("dialogue"):
        turns = check_dialogue(record["dialogue"])
    else:
        turns = check_input(record.get("input"))
        turns = [*turns, check_text(record.get("answer"), "answer")]
    return ParsedRecord([turns], (0,))


def parse_prompt(record):
    """A conversation that ends with the user; label 0."""
    require_fields(record, "input")
    return ParsedRecord([check_input(record["input"])], (0,))


def parse_reward_pair(record):
    """The better conversation, label 1, and the other one, label 0."""
    require_fields(record, "input", "answer", "other_answer", "better")
    first, second = parse_pair(record)
    if parse_label(record, "better"):
        return ParsedRecord([first, second], (1, 0))
    return ParsedRecord([second, first], (1, 0))


def parse_cost_pair(record):
    """The safer conversation and the other one; each has the label +1 if safe, -1 if not."""
    require_fields(record, "input", "answer", "other_answer", "safer", "is_safe", "is_other_safe")
    first, second = parse_pair(record)
    first_sign = 1 if parse_label(record, "is_safe") else -1
    second_sign = 1 if parse_label(record, "is_other_safe") else -1
    if parse_label(record, "safer"):
        parsed = ParsedRecord([first, second], (first_sign, second_sign))
    else:
        parsed = ParsedRecord([second, first], (second_sign, first_sign))
    if parsed.labels == (-1, 1):  # the safer one is unsafe, the other one is safe
        raise ValueError("contradictory safety labels")
    return parsed


def parse_ranking(record):
    """Two or more conversations, the best first; a label is the score of the answer.

    A row without scores is a pair: the better one has the label 1, the other 0."""
    require_fields(record, "input")
    turns = check_input(record["input"])
    if "answers" in record:
        return rank_answers(turns, record["answers"], record.get("scores"))
    first, second = parse_pair(record)
    if "better" not in record:
        raise ValueError("neither a field 'answers' nor 'better'")
    if parse_label(record, "better"):
        return ParsedRecord([first, second], (1, 0))
    return ParsedRecord([second, first], (1, 0))


TASKS = {  # task -> the function that parses its rows
    "sft": parse_demonstration,
    "prompts": parse_prompt,
    "reward": parse_reward_pair,
    "cost": parse_cost_pair,
    "rank": parse_ranking,
}


def make_prompt_key(record):
    """A text that rows of one prompt share: the turns before the last answer, or a document.

    Such rows must not be trained on here and held out there. A row without a prompt has its own
    key. Works for any record, usable or not."""
    dialogue = record.get("dialogue")
    if isinstance(dialogue, list) and dialogue:
        prompt = dialogue[:-1]
    else:
        prompt = record.get("input") or record.get("texts") or record
    if isinstance(prompt, str):
        prompt = [prompt]
    return json.dumps(prompt)


def require_fields(record, *names):
    for name in names:
        if name not in record:
            raise ValueError(f"no field {name!r}")


def parse_label(record, name):
    """The bool of the label `name`: true or false, 1 or 0, or the text "true" or "false".

    Raises ValueError on anything else. Python's own truth would take "no", 2 and NaN for true."""
    value = record[name]
    if isinstance(value, str):
        value = LABEL_TEXTS.get(value.strip().lower())
    if value not in (0, 1):
        raise ValueError(f"{name!r} is not true or false")
    return bool(value)


def parse_pair(record):
    """The conversation with `answer`, and the one with `other_answer`."""
    turns = check_input(record.get("input"))
    answer = check_text(record.get("answer"), "answer")
    other_answer = check_text(record.get("other_answer"), "answer")
    if answer == other_answer:
        raise ValueError("identical answers")
    return [*turns, answer], [*turns, other_answer]


def rank_answers(turns, answers, scores):
    """The ParsedRecord of different answers to one input, the best first."""
    check_scores(scores, answers, "each answer")
    by_score = sorted(zip(scores, answers), key=lambda pair: -pair[0])
    best_scores = {}  # answer -> the best of its scores, as it may be there twice
    for score, answer in by_score:
        best_scores.setdefault(check_text(answer, "answer"), score)
    if len(set(best_scores.values())) < 2:
        raise ValueError("no two answers of different scores")
    conversations = [[*turns, answer] for answer in best_scores]
    return ParsedRecord(conversations, tuple(best_scores.values()))


def check_scores(scores, texts, each):
    """Raise ValueError unless both are lists, with one finite score for `each` text."""
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise ValueError(f"not one score for {each}")
    for score in scores:
        # Scores are kept as float32. Python compares a whole number of any size exactly.
        is_number = type(score) in (int, float)
        if not is_number or not abs(score) <= FLOAT32_MAX:
            raise ValueError("a score that is not a finite number")


def check_input(value):
    """The turns of an input: a text, or turns that end with the user's."""
    turns = [value] if isinstance(value, str) else value
    if not isinstance(turns, list) or len(turns) % 2 == 0:
        raise ValueError("an input must be a text, or turns that end with the user's")
    return [check_text(turn, "turn") for turn in turns]


def check_dialogue(turns):
    """The turns of a dialogue: user, assistant, and so on."""
    if not isinstance(turns, list) or not turns or len(turns) % 2 == 1:
        raise ValueError("a dialogue must alternate and end with the assistant")
    return [check_text(turn, "turn") for turn in turns]


def check_text(text, name):
    """The text, if it is one and not empty; else ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"empty {name}")
    if SURROGATE.search(text):
        raise ValueError(f"half a character in the {name}")
    return text


def usable_rows(rows, parse, drop):
    """Yield (row, parse(its record)) of each row for which parse() raises no ValueError.

    drop(row, reason) is called for every other row."""
    for row in rows:
        try:
            parsed = parse(row.record)
        except ValueError as error:
            drop(row, str(error))
            continue
        yield row, parsed


# ---- conversations -> token ids ----


def make_conversation_examples(rows, tokenizer, task, max_len, drop):
    """Yield (row, Example) of each usable row; drop(row, reason) is called for the others.

    What dataset.tokenize() calls for every chunk of rows."""

    def parse(record):
        return parse_record(record, task)

    usable = list(usable_rows(rows, parse, drop))
    ids_of_text = encode_texts(usable, tokenizer)
    for row, (conversations, labels) in usable:
        sequences = []
        for turns in conversations:
            encoded = encode_conversation(turns, tokenizer, ids_of_text.__getitem__)
            sequences.append(Sequence(encoded.ids, encoded.loss_mask))
        if max(len(sequence.ids) for sequence in sequences) > max_len:
            drop(row, f"longer than {max_len} tokens")
            continue
        if len(sequences) > 1:  # only the last answers are compared
            for sequence in sequences:
                sequence.loss_mask = keep_last_run(sequence.loss_mask)
        yield row, Example(sequences, labels, row.line)


def encode_texts(usable, tokenizer):
    """{text: ids} of every text that encode_conversation() will look up: one call is faster."""
    texts = set()
    for _, parsed in usable:
        for turns in parsed.conversations:
            for prompt, answer in split_into_segments(turns):
                texts.add(prompt)
                if answer is not None:
                    texts.add(prompt + answer)
    texts = list(texts)
    return dict(zip(texts, tokenizer.encode_batch(texts)))


def keep_last_run(mask):
    """A mask that ends with ones, of which only this last run is kept."""
    ones = mask[::-1].index(0)
    return [0] * (len(mask) - ones) + [1] * ones
