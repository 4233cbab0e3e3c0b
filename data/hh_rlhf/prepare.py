"""Anthropic's hh-rlhf: pairs of dialogues that differ in the last answer.

$ python data/hh_rlhf/prepare.py                              # four subsets, 160,800 + 8,552 rows
$ python data/hh_rlhf/prepare.py --subset=harmless-base       # one of them
$ python data/hh_rlhf/prepare.py --subset=harmless-base --raw=FOLDER

Each subset gives SUBSET/{train,test}.jsonl, pairs, and SUBSET-dialogue/{train,test}.jsonl, the
preferred dialogues; the four together all/ and all-dialogue/. processed-hh-rlhf opens as well."""

import os
import re

from configurator import configure
from nanosafe import fetch
from nanosafe.files import stop

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled", "all")

subset = "all"  # harmless-base | helpful-base | helpful-online | helpful-rejection-sampled | all
raw = ""  # folder with the subset's raw files; empty: download
holdout = 0.0  # share of the prompts for test.jsonl, all files pooled; 0: the raw files' own split
out = ""  # folder to write to; empty: beside this script
tokenizer = ""  # folder with a tokenizer, to count tokens instead of characters
configure(globals())

MARK = re.compile(r"\n\n(Human|Assistant):")

def to_record(row):
    """The chosen dialogue up to its last answer is the prompt; the rejected one begins with it."""
    if "context" in row:
        return {"input": [turn["text"] for turn in row["context"]], "better": True,
                "answer": row["chosen"]["text"], "other_answer": row["rejected"]["text"]}
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
    return {"input": turns, "better": True, "answer": answer,
            "other_answer": rejected[len(prompt):].strip()}

def to_dialogue(row):
    record = fetch.checked(to_record(row))
    return {"dialogue": [*record["input"], record["answer"]]}

if raw and subset == "all":
    stop("--raw needs --subset=NAME: the subsets' files have the same names")
here = os.path.dirname(os.path.abspath(__file__))
for name in SUBSETS if subset == "all" else (subset,):
    folder = os.path.join(out or here, name)
    fetch.prepare(__file__, to_record, raw, folder, holdout, tokenizer, subset=name)
    fetch.prepare(__file__, to_dialogue, raw, folder + "-dialogue", holdout, tokenizer, subset=name)
