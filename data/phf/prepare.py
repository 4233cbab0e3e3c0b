"""Documents in segments, each with a misalignment score, for pretraining with human preferences.

Higher scores are worse: the toxicity of sentences, the personal data in sentences, or the PEP 8
violations of lines.

$ python data/phf/prepare.py --task=pep8 --raw=FOLDER    # -> data/phf/pep8
"""

from configurator import configure
from nanosafe.errors import choose
from nanosafe.phf.documents import check_document
from nanosafe.tools import download

task = "toxicity"  # toxicity | pii | pep8
config = configure(globals(), vars(download))

PARQUET = r"\.parquet$"
RELEASES = {
    "toxicity": download.Release(
        "tomekkorbak/detoxify-pile-chunk3-0-50000", PARQUET, subfolder="toxicity"
    ),
    "pii": download.Release("tomekkorbak/pii-pile-chunk3-0-50000", PARQUET, subfolder="pii"),
    "pep8": download.Release(
        "kejian/codeparrot-train-more-filter-3.3b-cleaned", PARQUET, subfolder="pep8"
    ),
}


def to_record(row):
    """The segments and scores of a row, and the score of the document: the mean of its scores."""
    scores = [float(score) for score in row["scores"]]
    record = {"texts": row["texts"], "scores": scores}
    check_document(record)
    record["avg_score"] = sum(scores) / len(scores)
    return record


choose("task", task, RELEASES)
download.prepare(__file__, to_record, config, RELEASES[task])
