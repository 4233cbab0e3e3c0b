"""UltraFeedback: four models' answers to each instruction, scored by GPT-4. Pairs of the best and
the worst answer; all answers go along with their scores, for methods that rank them.

$ python data/ultrafeedback/prepare.py                   # openbmb/UltraFeedback, about 64,000"""

import math

from configurator import configure
from nanosafe.tools import download

config = configure(globals(), vars(download))


def to_record(row):
    """The pair of the best and the worst answer, and all answers that are not empty."""
    texts = []
    scores = []
    for completion in row["completions"]:
        text = completion["response"]
        score = float(completion.get("fine-grained_score", completion.get("overall_score")))
        if text.strip() and math.isfinite(score):
            texts.append(text)
            scores.append(score)
    if len(texts) < 2 or max(scores) == min(scores):
        raise ValueError("fewer than two answers, or all equally good")
    return {
        "input": row["instruction"],
        "answer": texts[scores.index(max(scores))],
        "other_answer": texts[scores.index(min(scores))],
        "better": True,
        "answers": texts,
        "scores": scores,
    }


download.prepare(__file__, to_record, config, download.Release("openbmb/UltraFeedback"))
