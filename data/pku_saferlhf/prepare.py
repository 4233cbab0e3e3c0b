"""PKU-SafeRLHF: pairs of answers with separate labels for helpfulness and harmlessness.

$ python data/pku_saferlhf/prepare.py                       # the current release, 83.4K pairs
$ python data/pku_saferlhf/prepare.py --version=10k         # 1.7 MB -> data/pku_saferlhf/10k
$ python data/pku_saferlhf/prepare.py --halves              # for a run with independent judges"""

from configurator import configure
from nanosafe.data.examples import parse_label
from nanosafe.errors import choose
from nanosafe.tools import download
from nanosafe.tools.halves import prepare_halves

version = "v1"  # v1 (2024) | v0 (2023, what Beaver was trained on) | 10k | 30k
halves = False  # instead: write OUT/halves, the files that tools/halves.py describes
assignments = ""  # a published split, {"source", "row", "split"} a line, to make the halves by
sets_folder = ""  # of evaluation prompts to keep out of the halves; empty: data/safety
config = configure(globals(), vars(download))

SHA256_OF_10K = "f5f42f6f08a1fadbc3fd7c36e627f651782ce0f2f8178361483defa62b79ca06"
RELEASES = {
    "v1": download.Release("PKU-Alignment/PKU-SafeRLHF"),
    "v0": download.Release("PKU-Alignment/PKU-SafeRLHF", revision="v0", subfolder="v0"),
    "10k": download.Release(
        "PKU-Alignment/PKU-SafeRLHF-10K",
        sha256={"round0/train.jsonl.xz": SHA256_OF_10K},
        subfolder="10k",
    ),
    "30k": download.Release("PKU-Alignment/PKU-SafeRLHF-30K", subfolder="30k"),
}


def to_record(row):
    """One pair with its labels; a release without one of the two makes pairs without it."""
    record = {
        "input": row["prompt"],
        "answer": row["response_0"],
        "other_answer": row["response_1"],
        "is_safe": parse_label(row, "is_response_0_safe"),
        "is_other_safe": parse_label(row, "is_response_1_safe"),
    }
    # The publisher's labels are the number, 0 or 1, of the response that wins.
    if row.get("better_response_id") is not None:
        record["better"] = not parse_label(row, "better_response_id")
    if row.get("safer_response_id") is not None:
        record["safer"] = not parse_label(row, "safer_response_id")
    # The current release says how severe the harm is, from 0 to 3, and in which categories.
    for prefix, response in (("", "response_0"), ("other_", "response_1")):
        if response + "_severity_level" in row:
            record[prefix + "severity"] = row[response + "_severity_level"]
        if response + "_harm_category" in row:
            record[prefix + "harm"] = list_categories(row[response + "_harm_category"])
    return record


def list_categories(categories):
    """The names of the categories of harm: a list of them, or {name: whether it is marked}."""
    if isinstance(categories, dict):
        categories = [name for name in categories if parse_label(categories, name)]
    return sorted(categories)


choose("version", version, RELEASES)
if halves or assignments:
    release = RELEASES[version]
    prepare_halves(__file__, to_record, config, release, assignments, sets_folder)
else:
    download.prepare(__file__, to_record, config, RELEASES[version])
