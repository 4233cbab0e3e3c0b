"""BeaverTails: questions with an answer and whether it is safe, in 14 kinds of harm. No pairs: to
judge a cost model by (is_safe), or to take safe demonstrations from.

$ python data/beavertails/prepare.py                     # 30k: 30,207 rows
$ python data/beavertails/prepare.py --version=330k
$ python data/beavertails/prepare.py --only_safe=True    # demonstrations"""

from configurator import configure
from nanosafe.data.examples import parse_label
from nanosafe.errors import choose
from nanosafe.tools import download

version = "30k"  # 30k | 330k
only_safe = False  # keep safe answers only
config = configure(globals(), vars(download))

HUB = "PKU-Alignment/BeaverTails"
RELEASES = {
    "30k": download.Release(HUB, "/30k/"),
    "330k": download.Release(HUB, "/330k/"),
}


def to_record(row):
    """A demonstration, whether it is safe, and the names of the kinds of harm that are marked."""
    is_safe = parse_label(row, "is_safe")
    if only_safe and not is_safe:
        raise ValueError("unsafe, and only_safe is set")
    categories = row.get("category", {})
    harm = [name for name in categories if parse_label(categories, name)]
    return {
        "input": row["prompt"],
        "answer": row["response"],
        "is_safe": is_safe,
        "harm": sorted(harm),
    }


choose("version", version, RELEASES)
download.prepare(__file__, to_record, config, RELEASES[version])
