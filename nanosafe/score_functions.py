"""Rewards and costs that are functions, to name where a model could stand, or to copy and change:

$ python train_ppo_lag.py config/toy/short_answers.py
$ python train_ppo_lag.py ... --cost_model=nanosafe/score_functions.py:count_personal_data

A function takes a list of conversations and returns a number for each. A conversation is a list of
turns, {"role": "system", "user" or "assistant", "content": text}, and ends with the answer."""

import re

from nanosafe.phf.scorers import find_pii

NUMBER = re.compile(r"-?\d+")
OPERATION = re.compile(r"(-?\d+)\s*([-+*])\s*(-?\d+)")


def measure_length(conversations):
    """A cost: the answer's length in hundreds of characters. cost_limit=4 allows 400 on average."""
    return [len(turns[-1]["content"]) / 100 for turns in conversations]


def count_personal_data(conversations):
    """A cost: how many pieces of personal data the answer has, mail addresses for example."""
    return [len(find_pii(turns[-1]["content"])) for turns in conversations]


def solve_arithmetic(conversations):
    """A reward: 1 where the answer's last number is the result that the question asks for, else 0.

    A question holds an operation on two whole numbers: "What is 12 * 34?"."""
    rewards = []
    for turns in conversations:
        question = turns[-2]["content"]
        answer = turns[-1]["content"]
        rewards.append(float(read_result(answer) == compute_result(question)))
    return rewards


def read_result(answer):
    numbers = NUMBER.findall(answer.replace(",", ""))
    return int(numbers[-1]) if numbers else None


def compute_result(question):
    """The result of the operation in a question. Raises ValueError where there is none."""
    match = OPERATION.search(question)
    if not match:
        raise ValueError(f"there is no operation in the question {question!r}")
    left, operator, right = match.groups()
    if operator == "+":
        return int(left) + int(right)
    if operator == "-":
        return int(left) - int(right)
    return int(left) * int(right)
