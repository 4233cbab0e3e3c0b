"""Prompts that test whether a model is safe. They are for evaluation only: never train on them.

$ python data/safety/prepare.py                        # all six sets
$ python data/safety/prepare.py --subset=xstest        # one -> data/safety/xstest/test.jsonl
$ python data/safety/prepare.py --subset=xstest --raw=FOLDER

The sets: xstest, strongreject, beavertails_eval, simple_safety, do_not_answer, safe_rlhf."""

import os
from typing import NamedTuple

from configurator import configure
from nanosafe.errors import choose, stop
from nanosafe.tools import download

subset = "all"  # the name of one of the sets, or all
config = configure(globals(), vars(download))

GITHUB = "https://raw.githubusercontent.com"


class PromptSet(NamedTuple):
    """Where a set is published, and in which columns it has what."""

    release: download.Release
    prompt: tuple  # what the set's files call the column of prompts
    category: str  # the column of categories


SETS = {
    "xstest": PromptSet(
        download.Release(url=f"{GITHUB}/paul-rottger/exaggerated-safety/main/xstest_prompts.csv"),
        ("prompt",),
        "type",
    ),
    "strongreject": PromptSet(
        download.Release(
            url=f"{GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/"
            "strongreject_dataset.csv"
        ),
        ("forbidden_prompt",),
        "category",
    ),
    "beavertails_eval": PromptSet(
        download.Release("PKU-Alignment/BeaverTails-Evaluation"), ("prompt",), "category"
    ),
    "simple_safety": PromptSet(
        download.Release("Bertievidgen/SimpleSafetyTests", r"\.csv"),
        ("prompt", "prompts_final"),
        "harm_area",
    ),
    "do_not_answer": PromptSet(
        download.Release(
            url=f"{GITHUB}/Libr-AI/do-not-answer/main/datasets/Instruction/do_not_answer_en.csv"
        ),
        ("question", "prompt"),
        "risk_area",
    ),
    "safe_rlhf": PromptSet(
        download.Release(
            url=f"{GITHUB}/PKU-Alignment/safe-rlhf/main/safe_rlhf/evaluate/gpt4/problem.json"
        ),
        ("prompt",),
        "category",
    ),
}


def make_reader(prompt_set):
    """The function that makes records of a set's raw rows."""
    numbers = {}  # prompt -> its number among the prompts, for sets that number none

    def to_record(row):
        prompt = find_prompt(row, prompt_set.prompt)
        number = numbers.setdefault(prompt, len(numbers) + 1)
        record = {
            "input": prompt,
            "category": row[prompt_set.category],
            "id": str(row.get("id") or number),
        }
        if prompt_set is SETS["xstest"]:
            if row["label"] not in ("safe", "unsafe"):
                raise ValueError("the label is not safe or unsafe")
            record["type"] = row["type"]
            record["label"] = row["label"]
        return record

    return to_record


def find_prompt(row, columns):
    """The prompt of a row: what is in the first of the columns that it has."""
    for column in columns:
        if column in row:
            return row[column]
    raise ValueError(f"no column {' or '.join(columns)}")


choose("subset", subset, [*SETS, "all"])
if config["raw"] and subset == "all":
    stop("--raw needs --subset=NAME: which of the sets lies in that folder")
folder = config["out"] or os.path.dirname(os.path.abspath(__file__))
for name, prompt_set in SETS.items():
    if subset in (name, "all"):
        config["out"] = os.path.join(folder, name)
        to_record = make_reader(prompt_set)
        release = prompt_set.release._replace(split="test")
        download.prepare(__file__, to_record, config, release)
