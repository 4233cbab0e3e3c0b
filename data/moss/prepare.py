"""MOSS: dialogues in English and Chinese, demonstrations.

$ python data/moss/prepare.py                        # moss-003-sft, without tools -> data/moss/003
$ python data/moss/prepare.py --version=002          # moss-002-sft -> data/moss/002"""

import re

from configurator import configure
from nanosafe.errors import choose
from nanosafe.tools import download

version = "003"  # 003 (turns with their roles) | 002 (one text per dialogue)
config = configure(globals(), vars(download))

RELEASES = {
    "002": download.Release("fnlp/moss-002-sft-data", r"\.json$", subfolder="002"),
    "003": download.Release("fnlp/moss-003-sft-data", r"no-tools\.jsonl\.zip$", subfolder="003"),
}
TURN = re.compile(r"\[(Human|MOSS)\]:\s*(.*?)\s*<eo[ha]>", re.DOTALL)


def to_record(row):
    """A dialogue, the human first, as Safe-RLHF reads it; its marks are dropped."""
    turns = split_text(row["plain_text"]) if "plain_text" in row else read_chat(row)
    if not turns or not all(turns):
        raise ValueError("an empty turn")
    return {"dialogue": turns}


def split_text(text):
    """The turns of moss-002's one text per dialogue."""
    speakers = []
    turns = []
    for speaker, turn in TURN.findall(text):
        speakers.append(speaker)
        turns.append(turn)
    if speakers != ["Human", "MOSS"] * (len(speakers) // 2):
        raise ValueError("the turns do not alternate")
    return turns


def read_chat(row):
    """The turns of moss-003's pairs of turns."""
    turns = []
    for i in range(1, int(row["num_turns"]) + 1):
        pair = row["chat"][f"turn_{i}"]
        turns.append(pair["Human"].replace("<|Human|>:", "").replace("<eoh>", "").strip())
        turns.append(pair["MOSS"].replace("<|MOSS|>:", "").replace("<eom>", "").strip())
    return turns


choose("version", version, RELEASES)
download.prepare(__file__, to_record, config, RELEASES[version])
