"""PKU-SafeRLHF: pairs of answers with separate labels for helpfulness and harmlessness.

$ python data/pku_saferlhf/prepare.py                       # the current release, 83.4K pairs
$ python data/pku_saferlhf/prepare.py --version=10k         # 1.7 MB -> data/pku_saferlhf/10k"""

from configurator import configure
from nanosafe.tools import download

version = "v1"  # v1 (2024) | v0 (2023, what Beaver was trained on) | 10k | 30k
config = configure(globals(), vars(download))


def to_record(row):
    """One pair; a release without one of the two labels makes pairs without it."""
    record = {
        "input": row["prompt"],
        "answer": row["response_0"],
        "other_answer": row["response_1"],
        "is_safe": download.label(row["is_response_0_safe"]),
        "is_other_safe": download.label(row["is_response_1_safe"]),
    }
    for ours, theirs in (("better", "better_response_id"), ("safer", "safer_response_id")):
        if row.get(theirs) is not None:
            record[ours] = not download.label(row[theirs])
    return record


download.prepare(__file__, to_record, config, release="version")
