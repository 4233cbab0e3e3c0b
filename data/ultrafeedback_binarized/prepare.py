"""UltraFeedback, binarized: the pairs that Zephyr was trained on, each with GPT-4's two scores.

$ python data/ultrafeedback_binarized/prepare.py                 # train_prefs and test_prefs
$ python data/ultrafeedback_binarized/prepare.py --raw=FOLDER    # the same files, downloaded"""

from configurator import configure
from nanosafe.data.layouts import to_raw_sample
from nanosafe.tools import download

config = configure(globals(), vars(download))

# Its other files have the chosen conversations (_sft) and prompts for sampling (_gen).
RELEASE = download.Release("HuggingFaceH4/ultrafeedback_binarized", "_prefs")


def to_record(row):
    """The pair, and both answers with their scores, for methods that rank them."""
    record = to_raw_sample(row)
    record["answers"] = [record["answer"], record["other_answer"]]
    record["scores"] = [float(row["score_chosen"]), float(row["score_rejected"])]
    return record


download.prepare(__file__, to_record, config, RELEASE)
