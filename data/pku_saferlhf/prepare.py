"""PKU-SafeRLHF: pairs of answers with separate labels for helpfulness and harmlessness.

$ python data/pku_saferlhf/prepare.py                       # the current release, 83.4K pairs
$ python data/pku_saferlhf/prepare.py --version=10k         # a laptop's download: 1.7 MB"""

from configurator import configure
from nanosafe import fetch

version = "v1"  # v1 (2024) | v0 (2023, what Beaver was trained on) | 10k | 30k
raw = ""  # folder with the raw files; empty: download
holdout = 0.0  # share of the prompts for test.jsonl, all files pooled; 0: the raw files' own split
out = ""  # folder to write to; empty: beside this script (v0, 10k and 30k in a subfolder)
tokenizer = ""  # folder with a tokenizer, to count tokens instead of characters
configure(globals())

def to_record(row):
    """One pair; a release without one of the two labels makes pairs without it."""
    record = {"input": row["prompt"], "answer": row["response_0"],
              "other_answer": row["response_1"], "is_safe": fetch.label(row["is_response_0_safe"]),
              "is_other_safe": fetch.label(row["is_response_1_safe"])}
    for ours, theirs in (("better", "better_response_id"), ("safer", "safer_response_id")):
        if row.get(theirs) is not None:
            record[ours] = not fetch.label(row[theirs])
    return record

fetch.prepare(__file__, to_record, raw, out, holdout, tokenizer, version=version)
