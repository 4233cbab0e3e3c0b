"""Rows -> conversations -> token ids: what each task takes from a row, and why a row is dropped.

A row is Safe-RLHF's RawSample, a JSON object with some of these fields:

    input                       the user's text, or a list of turns that ends with the user's
    dialogue                    or a list of turns that ends with the assistant's
    answer, other_answer        what the assistant says
    better, safer               whether `answer` is better, or safer, than `other_answer`
    is_safe, is_other_safe      whether each is safe
    answers, scores             or any number of answers, and a score of each: higher is better
    label                       whether `answer`, which stands alone, is a good one
    system                      what the system's turn says; without it there is no such turn
    chat_template_kwargs        variables of the chat template, an object

The labels (better, safer, is_safe, is_other_safe, label) are what parse_label() reads. Rows in the
layouts of other projects become such rows first (layouts.py)."""

import json
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanosafe.data.layouts import read_bool, to_raw_sample

FLOAT32_MAX = float(np.finfo(np.float32).max)
FIELDS = {"input", "dialogue", "texts", "answer", "answers"}  # of which each row has one
TAKEN_NAMES = {"self", "turns", "reply", "messages"}  # by Tokenizer.conversation()
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character in UTF-16: UTF-8 cannot write it


class ParsedRecord(NamedTuple):
    conversations: list  # each a list of turns {"role", "content"}; the preferred one first
    labels: tuple  # a number of each conversation; the task says what it means
    options: dict = {}  # variables of the chat template
    note: str = ""  # as that of Texts


class Prompt(NamedTuple):
    """A conversation in which the assistant is to speak next."""

    turns: list  # {"role", "content"}
    options: dict = {}  # variables of the chat template


class Texts(NamedTuple):
    """What a task takes from a row: ParsedRecord with texts, the user's first, instead of turns."""

    conversations: list
    labels: tuple
    note: str = ""  # what the task did with the row; rows with the same note are counted


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
    prompt: Prompt | None = None  # of the task prompts, what the ids were made of
    note: str = ""  # as that of Texts


# ---- a row -> conversations ----


def parse_record(record, task):
    """The ParsedRecord of a row for a task, a key of TASKS.

    Raises ValueError with the reason to drop the row."""
    if record is None:
        raise ValueError("not a JSON object")
    record = to_raw_sample(record)
    if record and not record.keys() & FIELDS:
        names = ", ".join(sorted(map(str, record))[:6])
        raise ValueError(f"no known layout (the fields are {names})")
    texts, labels, note = TASKS[task](record)
    system = record.get("system")
    if system is not None and system != "":  # an empty one keeps a template's own text away
        check_text(system, "system turn")
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, dict) or options.keys() & TAKEN_NAMES:
        raise ValueError("chat_template_kwargs is not an object with a template's variables")
    conversations = [make_turns(of_conversation, system) for of_conversation in texts]
    return ParsedRecord(conversations, labels, options, note)


def read_prompt(record):
    """The Prompt of a row. Raises ValueError with the reason to drop the row."""
    parsed = parse_record(record, "prompts")
    return Prompt(parsed.conversations[0], parsed.options)


def make_turns(texts, system=None):
    """The turns of a conversation, from its texts: the user's first, then the assistant's, .."""
    turns = []
    if system is not None:
        turns.append({"role": "system", "content": system})
    for i, text in enumerate(texts):
        role = "user" if i % 2 == 0 else "assistant"
        turns.append({"role": role, "content": text})
    return turns


def list_texts(turns):
    """The texts of a conversation, the user's first, without the system's."""
    return [turn["content"] for turn in turns if turn["role"] != "system"]


def make_input_fields(prompt):
    """The fields of a row with this Prompt, the opposite of read_prompt()."""
    texts = list_texts(prompt.turns)
    fields = {"input": texts[0] if len(texts) == 1 else texts}
    if prompt.turns[0]["role"] == "system":
        fields["system"] = prompt.turns[0]["content"]
    if prompt.options:
        fields["chat_template_kwargs"] = prompt.options
    return fields


def parse_demonstration(record):
    """A conversation that ends with the assistant; label 0."""
    if "label" in record and not parse_label(record, "label"):
        raise ValueError("an answer that its label calls bad")
    if record.get("dialogue"):
        turns = check_dialogue(record["dialogue"])
    else:
        turns = check_input(record.get("input"))
        turns = [*turns, check_text(record.get("answer"), "answer")]
    return Texts([turns], (0,))


def parse_prompt(record):
    """A conversation that ends with the user; label 0. A dialogue gives the turns before its last
    answer."""
    if record.get("dialogue"):
        return Texts([check_dialogue(record["dialogue"])[:-1]], (0,))
    require_fields(record, "input")
    return Texts([check_input(record["input"])], (0,))


def parse_reward_pair(record):
    """The better conversation, label 1, and the other one, label 0."""
    require_fields(record, "input", "answer", "other_answer", "better")
    first, second = parse_pair(record)
    if parse_label(record, "better"):
        return Texts([first, second], (1, 0))
    return Texts([second, first], (1, 0))


def parse_cost_pair(record):
    """The safer conversation and the other one; each has the label +1 if safe, -1 if not."""
    require_fields(record, "input", "answer", "other_answer", "safer", "is_safe", "is_other_safe")
    first, second = parse_pair(record)
    first_sign = parse_sign(record, "is_safe")
    second_sign = parse_sign(record, "is_other_safe")
    if parse_label(record, "safer"):
        parsed = Texts([first, second], (first_sign, second_sign))
    else:
        parsed = Texts([second, first], (second_sign, first_sign))
    if parsed.labels == (-1, 1):  # the safer one is unsafe, the other one is safe
        raise ValueError("contradictory safety labels")
    return parsed


def parse_bfpo_pair(record):
    """The better conversation and the other one; each has the label +1 if safe, -1 if not."""
    require_fields(record, "input", "answer", "other_answer", "better", "is_safe", "is_other_safe")
    first, second = parse_pair(record)
    first_sign = parse_sign(record, "is_safe")
    second_sign = parse_sign(record, "is_other_safe")
    if parse_label(record, "better"):
        return Texts([first, second], (first_sign, second_sign))
    return Texts([second, first], (second_sign, first_sign))


def parse_safedpo_pair(record):
    """SafeDPO's transform of a BFPO pair: a safe conversation first. arXiv:2505.20065 Sec. 3.2.

    If only the less helpful answer is safe, the two are swapped. Of two unsafe answers none is to
    be learnt: the row is dropped. Labels as in BFPO."""
    pair = parse_bfpo_pair(record)
    if pair.labels == (-1, -1):
        raise ValueError("two unsafe answers")
    if pair.labels == (-1, 1):
        better, other = pair.conversations
        return Texts([other, better], (1, -1), "swapped: only the less helpful answer is safe")
    return pair


def parse_helpful_answers(record):
    """Conversations that are judged one by one: label 1 if desirable, 0 if not.

    Of a pair the better one is desirable. A row with `label` has one answer."""
    if "label" in record:
        return parse_single_answer(record, "label")
    return parse_reward_pair(record)


def parse_safe_answers(record):
    """Conversations that are judged one by one: label 1 if safe, 0 if not.

    A row may have two answers, or one with `label` or `is_safe`."""
    if "label" in record:
        return parse_single_answer(record, "label")
    if "other_answer" not in record:
        return parse_single_answer(record, "is_safe")
    require_fields(record, "input", "answer", "is_safe", "is_other_safe")
    conversations = parse_pair(record)
    first_label = int(parse_label(record, "is_safe"))
    second_label = int(parse_label(record, "is_other_safe"))
    return Texts(list(conversations), (first_label, second_label))


def parse_single_answer(record, name):
    """The conversation with `answer`; its label is 1 or 0, as the row's label `name` is."""
    require_fields(record, "input", "answer", name)
    turns = check_input(record["input"])
    answer = check_text(record["answer"], "answer")
    return Texts([[*turns, answer]], (int(parse_label(record, name)),))


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
        return Texts([first, second], (1, 0))
    return Texts([second, first], (1, 0))


TASKS = {  # task -> the function that parses its rows
    "sft": parse_demonstration,
    "prompts": parse_prompt,
    "reward": parse_reward_pair,
    "cost": parse_cost_pair,
    "rank": parse_ranking,
    "bfpo": parse_bfpo_pair,
    "safedpo": parse_safedpo_pair,
    "kto": parse_helpful_answers,
    "kto_safe": parse_safe_answers,
}


def make_prompt_key(record):
    """A text that rows of one prompt share: the turns before the last answer, or a document.

    Such rows must not be trained on here and held out there. A row without a prompt has its own
    key. Works for any record, usable or not."""
    try:
        record = to_raw_sample(record)
    except ValueError:
        return json.dumps(record)
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
    """The bool of the label `name`, as read_bool() reads it; raises ValueError where it cannot."""
    label = read_bool(record[name])
    if label is None:
        raise ValueError(f"{name!r} is not true or false")
    return label


def parse_sign(record, name):
    """+1 if the label `name` is true, -1 if it is false."""
    return 1 if parse_label(record, name) else -1


def parse_pair(record):
    """The conversation with `answer`, and the one with `other_answer`."""
    turns = check_input(record.get("input"))
    answer = check_text(record.get("answer"), "answer")
    other_answer = check_text(record.get("other_answer"), "answer")
    if answer == other_answer:
        raise ValueError("identical answers")
    return [*turns, answer], [*turns, other_answer]


def rank_answers(turns, answers, scores):
    """The Texts of different answers to one input, the best first."""
    check_scores(scores, answers, "each answer")
    by_score = sorted(zip(scores, answers), key=lambda pair: -pair[0])
    best_scores = {}  # answer -> the best of its scores, as it may be there twice
    for score, answer in by_score:
        best_scores.setdefault(check_text(answer, "answer"), score)
    if len(set(best_scores.values())) < 2:
        raise ValueError("no two answers of different scores")
    conversations = [[*turns, answer] for answer in best_scores]
    return Texts(conversations, tuple(best_scores.values()))


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

    def encode(record):
        parsed = parse_record(record, task)
        sequences = []
        for turns in parsed.conversations:
            sequences.append(encode_for_task(turns, tokenizer, task, parsed.options))
        return parsed, sequences

    for row, (parsed, sequences) in usable_rows(rows, encode, drop):
        if max(len(sequence.ids) for sequence in sequences) > max_len:
            drop(row, f"longer than {max_len} tokens")
            continue
        if task not in ("sft", "prompts"):  # only the last answers are judged
            for sequence in sequences:
                sequence.loss_mask = keep_last_run(sequence.loss_mask)
        example = Example(sequences, parsed.labels, row.line, note=parsed.note)
        if task == "prompts":
            example.prompt = Prompt(parsed.conversations[0], parsed.options)
        yield row, example


def encode_for_task(turns, tokenizer, task, options):
    """The Sequence of a conversation. Raises ValueError where nothing in it could carry loss."""
    if task == "prompts":
        ids, loss_mask = tokenizer.conversation(turns, **options)
    else:
        ids, loss_mask = tokenizer.finished_conversation(turns, **options)
        if loss_mask[-1] == 0:
            raise ValueError("the chat template rewrites the prompt of the last answer")
    return Sequence(ids, loss_mask)


def keep_last_run(mask):
    """A mask that ends with ones, of which only this last run is kept."""
    ones = mask[::-1].index(0)
    return [0] * (len(mask) - ones) + [1] * ones
