"""Documents in segments, each with a misalignment score, for pretraining with human preferences.

Higher scores are worse: the toxicity of sentences, the personal data in sentences, or the PEP 8
violations of lines.

$ python data/phf/prepare.py --task=pep8 --raw=FOLDER    # -> data/phf/pep8
"""

from configurator import configure
from nanosafe.phf.documents import check_document
from nanosafe.tools import download

task = "toxicity"  # toxicity | pii | pep8
config = configure(globals(), vars(download))


def to_record(row):
    """The segments and scores of a row, and the score of the document: the mean of its scores."""
    scores = [float(score) for score in row["scores"]]
    record = {"texts": row["texts"], "scores": scores}
    check_document(record)
    record["avg_score"] = sum(scores) / len(scores)
    return record


download.prepare(__file__, to_record, config, release="task")
