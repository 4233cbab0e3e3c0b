"""Anthropic's hh-rlhf: pairs of dialogues that differ in the last answer.

$ python data/hh_rlhf/prepare.py                              # four subsets, 160,800 + 8,552 rows
$ python data/hh_rlhf/prepare.py --subset=harmless-base       # one of them
$ python data/hh_rlhf/prepare.py --subset=harmless-base --raw=FOLDER

Each subset gives SUBSET/{train,test}.jsonl, pairs, and SUBSET-dialogue/{train,test}.jsonl, the
preferred dialogues; the four together all/ and all-dialogue/. processed-hh-rlhf opens as well."""

import os

from configurator import configure
from nanosafe.data.layouts import read_transcripts
from nanosafe.errors import choose, stop
from nanosafe.tools import download

subset = "all"  # harmless-base | helpful-base | helpful-online | helpful-rejection-sampled | all
config = configure(globals(), vars(download))

HUB = "Anthropic/hh-rlhf"
RELEASES = {
    "harmless-base": download.Release(HUB, "^harmless-base/"),
    "helpful-base": download.Release(HUB, "^helpful-base/"),
    "helpful-online": download.Release(HUB, "^helpful-online/"),
    "helpful-rejection-sampled": download.Release(HUB, "^helpful-rejection-sampled/"),
    "all": download.Release(
        HUB, "^(harmless-base|helpful-base|helpful-online|helpful-rejection-sampled)/"
    ),
}


def to_record(row):
    """The chosen dialogue up to its last answer is the prompt; the rejected one begins with it."""
    if "context" in row:  # processed-hh-rlhf
        return {
            "input": [turn["text"] for turn in row["context"]],
            "better": True,
            "answer": row["chosen"]["text"],
            "other_answer": row["rejected"]["text"],
        }
    pair = read_transcripts(row["chosen"], row["rejected"])
    return {
        "input": pair.turns,
        "better": True,
        "answer": pair.answer,
        "other_answer": pair.other_answer,
    }


def to_dialogue(row):
    """The preferred dialogue of a pair, where the pair can be used."""
    record = download.check_record(to_record(row))
    return {"dialogue": [*record["input"], record["answer"]]}


choose("subset", subset, RELEASES)
if config["raw"] and subset == "all":
    stop("--raw needs --subset=NAME: the subsets' files have the same names")
folder = config["out"] or os.path.dirname(os.path.abspath(__file__))
for name, release in RELEASES.items():
    if subset in (name, "all"):
        config["out"] = os.path.join(folder, name)
        download.prepare(__file__, to_record, config, release)
        config["out"] = os.path.join(folder, name + "-dialogue")
        download.prepare(__file__, to_dialogue, config, release)
