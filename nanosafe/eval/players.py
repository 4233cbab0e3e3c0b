"""The policies that an evaluation compares, the prompts they are asked, their answers, and the
answers' scores."""

import hashlib
import json
import os
from typing import NamedTuple

from nanosafe.data import load
from nanosafe.data.examples import read_prompt
from nanosafe.errors import stop
from nanosafe.inference import name_of_folder
from nanosafe.parallel import all_gather_lists

# ---- policies ----


def parse_player(text):
    """(name, model folder) of NAME=FOLDER or FOLDER; the name may be "".

    Both may hold "=": the first cut counts that leaves a folder which exists. Where none does, the
    cut is at the first "=", unless what stands before it is part of a path."""
    words = text.split("=")
    for count in range(len(words)):
        folder = os.path.expanduser("=".join(words[count:]))
        if os.path.exists(folder):
            return "=".join(words[:count]), folder
    name, equals, folder = text.partition("=")
    if not equals or "/" in name:
        return "", os.path.expanduser(text)
    return name, os.path.expanduser(folder)


def name_players(entries, at_least=1, knob="models"):
    """{name: model folder} of pairs of a name, perhaps "", and a folder.

    knob  which one they were given by
    Stops with one line if two have the same name, or if there are fewer than `at_least`."""
    players = {}
    for name, folder in entries:
        players[name or name_of_folder(folder)] = folder
    if len(players) < max(at_least, len(entries)):
        stop(
            f"{len(entries)} folders, {len(players)} names ({', '.join(players)}): give each a "
            f"name of its own, --{knob}=NAME=FOLDER,NAME=FOLDER"
        )
    return players


# ---- prompts ----


class Prompts(NamedTuple):
    usable: list  # of Prompt, no two equal
    dropped: int  # rows of the data that held no prompt


def read_prompts(data):
    """The prompts of a dataset, each of them once, in the order of its rows."""
    unique = {}  # a dictionary keeps the order
    dropped = 0
    for row in load(data):
        try:
            prompt = read_prompt(row)
        except ValueError:
            dropped += 1
            continue
        unique[json.dumps(prompt)] = prompt
    if not unique:
        stop(f"data {data!r} has no prompt that can be asked ({dropped} rows)")
    return Prompts(list(unique.values()), dropped)


# ---- answers ----


def hash_prompt(prompt):
    """A prompt's uid for sampling, which depends on its text alone.

    So every policy answers it with the same random numbers, whatever else is asked, on any rank."""
    texts = [turn["content"] for turn in prompt.turns]
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=7)
    return int(digest.hexdigest(), 16)


class Answers(NamedTuple):
    """A policy's answers, in the order of the prompts."""

    tokenizer: object
    questions: list  # of token ids
    responses: list  # of token ids


def answer_prompts(policy, prompts, uids):
    questions = [policy.question(prompt) for prompt in prompts]
    responses = policy.answers(questions, uids)
    return Answers(policy.tok, questions, responses)


def score_answers(scorer, prompts, answers):
    """The scores of a policy's answers, which the scorer reads in its own words."""
    scores = scorer.score_answers(prompts, answers.questions, answers.responses, answers.tokenizer)
    return [round(score, 4) for score in scores]


# ---- ranks ----


def share_from_main(value, world):
    """Rank 0's value, on every rank."""
    values = [value] if world.main else []
    (shared,) = all_gather_lists(values, range(len(values)), 1)
    return shared
