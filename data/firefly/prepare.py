"""Firefly: Chinese instructions of 23 kinds, demonstrations.

$ python data/firefly/prepare.py                     # 1.1 GB, about 1.1 million demonstrations"""

from configurator import configure
from nanosafe import fetch

config = configure(globals(), vars(fetch))


def to_record(row):
    return {"input": row["input"], "answer": row["target"]}


fetch.prepare(__file__, to_record, config)
