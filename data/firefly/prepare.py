"""Firefly: Chinese instructions of 23 kinds, demonstrations.

$ python data/firefly/prepare.py                     # 1.1 GB, about 1.1 million demonstrations"""

from configurator import configure
from nanosafe.tools import download

config = configure(globals(), vars(download))


def to_record(row):
    return {"input": row["input"], "answer": row["target"]}


download.prepare(__file__, to_record, config, download.Release("YeungNLP/firefly-train-1.1M"))
