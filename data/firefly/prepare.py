"""Firefly: Chinese instructions of 23 kinds, demonstrations.

$ python data/firefly/prepare.py                     # 1.1 GB, about 1.1 million demonstrations"""

from configurator import configure
from nanosafe import fetch

raw = ""  # folder with the raw files; empty: download
holdout = 0.0  # share of the prompts for test.jsonl; 0: none
out = ""  # folder to write to; empty: beside this script
tokenizer = ""  # folder with a tokenizer, to count tokens instead of characters
configure(globals())

def to_record(row):
    return {"input": row["input"], "answer": row["target"]}

fetch.prepare(__file__, to_record, raw, out, holdout, tokenizer)
