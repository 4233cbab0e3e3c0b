"""Prompts that test whether a model is safe. They are for evaluation only: never train on them.

$ python data/safety/prepare.py                        # all six sets
$ python data/safety/prepare.py --subset=xstest        # one -> data/safety/xstest/test.jsonl
$ python data/safety/prepare.py --raw=FOLDER           # from files that lie there, by their names
$ python data/safety/prepare.py --subset=xstest --raw=FOLDER

The sets: xstest, strongreject, beavertails_eval, simple_safety, do_not_answer, safe_rlhf."""

import os
import re
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
    name: str  # a regular expression, in small letters, that only names of this set's files match


SETS = {
    "xstest": PromptSet(
        download.Release(url=f"{GITHUB}/paul-rottger/exaggerated-safety/main/xstest_prompts.csv"),
        ("prompt",),
        "type",
        "xstest",
    ),
    "strongreject": PromptSet(
        download.Release(
            url=f"{GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/"
            "strongreject_dataset.csv"
        ),
        ("forbidden_prompt",),
        "category",
        "strong.?reject",
    ),
    "beavertails_eval": PromptSet(
        download.Release("PKU-Alignment/BeaverTails-Evaluation"),
        ("prompt",),
        "category",
        "beavertails.?eval",
    ),
    "simple_safety": PromptSet(
        download.Release("Bertievidgen/SimpleSafetyTests", r"\.csv"),
        ("prompt", "prompts_final"),
        "harm_area",
        "simple.?safety|(^|/)sst",
    ),
    "do_not_answer": PromptSet(
        download.Release(
            url=f"{GITHUB}/Libr-AI/do-not-answer/main/datasets/Instruction/do_not_answer_en.csv"
        ),
        ("question", "prompt"),
        "risk_area",
        "do.?not.?answer",
    ),
    "safe_rlhf": PromptSet(
        download.Release(
            url=f"{GITHUB}/PKU-Alignment/safe-rlhf/main/safe_rlhf/evaluate/gpt4/problem.json"
        ),
        ("prompt",),
        "category",
        "safe.?rlhf|(^|/)problem",
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


def find_owner(path):
    """The set whose name a file's path below --raw bears; None where it bears none."""
    name = os.path.relpath(path, os.path.expanduser(config["raw"])).lower()
    for set_name, prompt_set in SETS.items():
        if re.search(prompt_set.name, name):
            return set_name
    return None


def find_raw_paths():
    """{set: the paths of its files below --raw}, of the sets that are asked for.

    A set that is asked for by its name may lie in files of any name, but not in another set's."""
    owners = {path: find_owner(path) for path in download.find_raw_files(config["raw"])}
    wanted = SETS if subset == "all" else [subset]
    found = {}
    for set_name in wanted:
        paths = [path for path, owner in owners.items() if owner == set_name]
        if not paths and subset == set_name:
            paths = [path for path, owner in owners.items() if owner is None]
        if paths:
            found[set_name] = tuple(paths)
        else:
            print(f"{set_name}: none of the files in {config['raw']} bears its name: left out")
    if not found:
        stop(f"--raw={config['raw']}: no file of {subset}: give --subset=NAME, a set for a folder")
    return found


choose("subset", subset, [*SETS, "all"])
folder = config["out"] or os.path.dirname(os.path.abspath(__file__))
raw_paths = find_raw_paths() if config["raw"] else {}
for name, prompt_set in SETS.items():
    is_left_out = config["raw"] and name not in raw_paths
    if subset in (name, "all") and not is_left_out:
        config["out"] = os.path.join(folder, name)
        to_record = make_reader(prompt_set)
        release = prompt_set.release._replace(split="test", raw_paths=raw_paths.get(name, ()))
        download.prepare(__file__, to_record, config, release)
