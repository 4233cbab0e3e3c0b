"""MOSS: dialogues in English and Chinese, demonstrations.

$ python data/moss/prepare.py                        # moss-003-sft, without tools -> data/moss/003
$ python data/moss/prepare.py --version=002          # moss-002-sft -> data/moss/002"""

import re
from configurator import configure
from nanosafe.tools import download

version = "003"  # 003 (turns with their roles) | 002 (one text per dialogue)
config = configure(globals(), vars(download))

TURN = re.compile(r"\[(Human|MOSS)\]:\s*(.*?)\s*<eo[ha]>", re.DOTALL)


def to_record(row):
    """A dialogue, the human first, as Safe-RLHF reads it; its marks are dropped."""
    if "plain_text" in row:
        marks = TURN.findall(row["plain_text"])
        if [who for who, _ in marks] != ["Human", "MOSS"] * (len(marks) // 2):
            raise ValueError("the turns do not alternate")
        turns = [text for _, text in marks]
    else:
        chat = [row["chat"][f"turn_{i}"] for i in range(1, int(row["num_turns"]) + 1)]
        turns = [
            turn[who].replace(f"<|{who}|>:", "").replace(end, "").strip()
            for turn in chat
            for who, end in (("Human", "<eoh>"), ("MOSS", "<eom>"))
        ]
    if not turns or not all(turns):
        raise ValueError("an empty turn")
    return {"dialogue": turns}


download.prepare(__file__, to_record, config, release="version")
