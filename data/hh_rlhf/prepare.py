"""Anthropic's hh-rlhf: pairs of dialogues that differ in the last answer.

$ python data/hh_rlhf/prepare.py                              # four subsets, 160,800 + 8,552 rows
$ python data/hh_rlhf/prepare.py --subset=harmless-base       # one of them
$ python data/hh_rlhf/prepare.py --subset=harmless-base --raw=FOLDER

Each subset gives SUBSET/{train,test}.jsonl, pairs, and SUBSET-dialogue/{train,test}.jsonl, the
preferred dialogues; the four together all/ and all-dialogue/. processed-hh-rlhf opens as well."""

import os
import re
from configurator import configure
from nanosafe.tools import download
from nanosafe.errors import stop

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled", "all")

subset = "all"  # harmless-base | helpful-base | helpful-online | helpful-rejection-sampled | all
config = configure(globals(), vars(download))

MARK = re.compile(r"\n\n(Human|Assistant):")


def to_record(row):
    """The chosen dialogue up to its last answer is the prompt; the rejected one begins with it."""
    if "context" in row:
        return {
            "input": [turn["text"] for turn in row["context"]],
            "better": True,
            "answer": row["chosen"]["text"],
            "other_answer": row["rejected"]["text"],
        }
    _, *parts = MARK.split(row["chosen"])  # who speaks, what is said, who speaks, ...
    speakers, turns = parts[::2], parts[1::2]
    if speakers[-1:] != ["Assistant"]:
        raise ValueError("the last turn is the human's")
    prompt, rejected = row["chosen"].removesuffix(turns[-1]), row["rejected"]
    if not rejected.startswith(prompt) or MARK.search(rejected, len(prompt)):
        raise ValueError("the two dialogues differ before the last answer")
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise ValueError("the turns do not alternate")
    *turns, answer = map(str.strip, turns)
    return {
        "input": turns,
        "better": True,
        "answer": answer,
        "other_answer": rejected[len(prompt) :].strip(),
    }


def to_dialogue(row):
    record = download.checked(to_record(row))
    return {"dialogue": [*record["input"], record["answer"]]}


if config["raw"] and subset == "all":
    stop("--raw needs --subset=NAME: the subsets' files have the same names")
folder = config["out"] or os.path.dirname(os.path.abspath(__file__))
for name in SUBSETS if subset == "all" else (subset,):
    for make, ending in ((to_record, ""), (to_dialogue, "-dialogue")):
        config.update(subset=name, out=os.path.join(folder, name + ending))
        download.prepare(__file__, make, config, release="subset")
