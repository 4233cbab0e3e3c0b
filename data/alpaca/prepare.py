"""Alpaca, and anything in its layout (LIMA, Alpaca-zh, ...): demonstrations.

$ python data/alpaca/prepare.py                                  # 52,002 demonstrations
$ python data/alpaca/prepare.py --raw=FOLDER --out=data/lima     # another set in the same layout"""

from configurator import configure
from nanosafe.tools import download

config = configure(globals(), vars(download))

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"


def to_record(row):
    """Instruction and input make the prompt, joined by a space (Safe-RLHF); earlier turns first."""
    prompt = row["instruction"]
    if row.get("input"):
        prompt += " " + row["input"]
    turns = []
    for pair in row.get("history") or []:
        turns.extend(pair)
    if turns:
        return {"dialogue": [*turns, prompt, row["output"]]}
    return {"input": prompt, "answer": row["output"]}


download.prepare(__file__, to_record, config, download.Release(url=URL))
