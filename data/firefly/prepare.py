"""
Firefly: Chinese instructions of 23 kinds, demonstrations.

$ python data/firefly/prepare.py                     # 1.1 GB, about 1.1 million demonstrations
$ python data/firefly/prepare.py --raw=FOLDER        # files that are already on disk
"""

import os

from configurator import configure
from nanosafe import fetch

raw = ""  # folder with the raw files; empty: download
holdout = 0.0  # share of the prompts for test.jsonl; 0: none
out = ""  # folder to write to; empty: beside this script
tokenizer = ""  # folder with a tokenizer, to count tokens instead of characters
configure(globals())


def to_record(row):
    return {"input": row["input"], "answer": row["target"]}


here = os.path.dirname(os.path.abspath(__file__))
files = fetch.raw_files(raw, "YeungNLP/firefly-train-1.1M", here,
                        lambda name: name.endswith(".jsonl"))
fetch.convert(files, to_record, out or here, holdout, tokenizer)
