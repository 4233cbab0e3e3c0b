"""BeaverTails: questions with an answer and whether it is safe, in 14 kinds of harm. No pairs: to
judge a cost model by (is_safe), or to take safe demonstrations from.

$ python data/beavertails/prepare.py                     # 30k: 30,207 rows
$ python data/beavertails/prepare.py --version=330k
$ python data/beavertails/prepare.py --only_safe=True    # demonstrations"""

from configurator import configure
from nanosafe.tools import download

version = "30k"  # 30k | 330k
only_safe = False  # keep safe answers only
config = configure(globals(), vars(download))


def to_record(row):
    """The kinds of harm that are marked go along, by name."""
    safe = download.label(row["is_safe"])
    if only_safe and not safe:
        raise ValueError("unsafe, and only_safe is set")
    return {
        "input": row["prompt"],
        "answer": row["response"],
        "is_safe": safe,
        "harm": sorted(name for name, marked in row.get("category", {}).items() if marked),
    }


download.prepare(__file__, to_record, config, release="version")
