"""Pretraining with human preferences (PHF): documents in segments, each with a misalignment score
(higher is worse): toxicity of sentences, personal data in sentences, PEP8 violations of lines.

$ python data/phf/prepare.py --task=pep8 --raw=FOLDER    # -> data/phf/pep8"""

from configurator import configure
from nanosafe.tools import download
from nanosafe.phf.documents import check_document

task = "toxicity"  # toxicity | pii | pep8
config = configure(globals(), vars(download))


def to_record(row):
    """The segments and their scores; the document's score is their mean."""
    record = {"texts": row["texts"], "scores": [float(score) for score in row["scores"]]}
    check_document(record)
    return {**record, "avg_score": sum(record["scores"]) / len(record["scores"])}


download.prepare(__file__, to_record, config, release="task")
