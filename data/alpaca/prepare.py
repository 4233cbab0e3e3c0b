"""Alpaca, and anything in its layout (LIMA, Alpaca-zh, ...): demonstrations.

$ python data/alpaca/prepare.py                                  # 52,002 demonstrations
$ python data/alpaca/prepare.py --raw=FOLDER --out=data/lima     # another set in the same layout"""

from configurator import configure
from nanosafe.tools import download

config = configure(globals(), vars(download))


def to_record(row):
    """Instruction and input make the prompt, joined by a space (Safe-RLHF); earlier turns first."""
    prompt = row["instruction"] + (" " + row["input"] if row.get("input") else "")
    history = [turn for pair in row.get("history") or [] for turn in pair]
    if history:
        return {"dialogue": [*history, prompt, row["output"]]}
    return {"input": prompt, "answer": row["output"]}


URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
download.prepare(__file__, to_record, config, url=URL)
