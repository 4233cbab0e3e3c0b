"""
Pretraining with human preferences (PHF): documents in segments, each with a misalignment score
(higher is worse): toxicity of sentences, personal data in sentences, PEP8 violations of lines.

$ python data/phf/prepare.py --task=pep8 --raw=FOLDER    # -> data/phf/pep8

The hub has these corpora as parquet: download a shard, convert it (the script says how), and give
the folder.
"""

import json
import math
import os

from configurator import configure
from nanosafe import fetch

task = "toxicity"  # toxicity | pii | pep8
raw = ""  # folder with the raw files; empty: download
holdout = 0.0  # share of the documents for test.jsonl; 0: none
out = ""  # folder to write to; empty: beside this script
tokenizer = ""  # folder with a tokenizer, to count tokens instead of characters
configure(globals())

SOURCES = {"toxicity": "tomekkorbak/detoxify-pile-chunk3-0-50000",
           "pii": "tomekkorbak/pii-pile-chunk3-0-50000",
           "pep8": "kejian/codeparrot-train-more-filter-3.3b-cleaned"}


def to_record(row):
    """The segments and their scores; the document's score is their mean."""
    texts, scores = row["texts"], [float(score) for score in row["scores"]]
    if not all(isinstance(text, str) for text in texts) or not all(map(math.isfinite, scores)):
        raise ValueError("a segment or a score that is none")
    if not isinstance(texts, list) or not texts or len(texts) != len(scores):
        raise ValueError("not one score for each segment")
    return {"texts": texts, "scores": scores, "avg_score": sum(scores) / len(scores)}


if task not in SOURCES:
    raise SystemExit(f"error: task={task!r}: choose one of {', '.join(SOURCES)}")
here = os.path.dirname(os.path.abspath(__file__))
files = fetch.raw_files(raw, SOURCES[task], here, lambda name: name.endswith(fetch.ENDINGS))
fetch.convert(files, to_record, out or os.path.join(here, task), holdout, tokenizer,
              key=lambda record: json.dumps(record["texts"]))
