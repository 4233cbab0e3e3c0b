"""UltraFeedback: four models' answers to each instruction, scored by GPT-4. Pairs of the best and
the worst answer; all answers go along with their scores, for methods that rank them.

$ python data/ultrafeedback/prepare.py                   # openbmb/UltraFeedback, about 64,000
$ python data/ultrafeedback/prepare.py --raw=FOLDER      # also the binarized set, as jsonl"""

import math
from typing import NamedTuple

from configurator import configure
from nanosafe.tools import download

config = configure(globals(), vars(download))


class Answers(NamedTuple):
    prompt: str | list  # a text, or turns that end with the user's
    texts: list
    scores: list  # of each answer: higher is better


def to_record(row):
    """The pair of the best and the worst answer, and all answers that are not empty."""
    answers = read_binarized(row) if "chosen" in row else read_completions(row)
    texts = []
    scores = []
    for text, score in zip(answers.texts, answers.scores):
        if text.strip() and math.isfinite(float(score)):
            texts.append(text)
            scores.append(float(score))
    if len(texts) < 2 or max(scores) == min(scores):
        raise ValueError("fewer than two answers, or all equally good")
    return {
        "input": answers.prompt,
        "answer": texts[scores.index(max(scores))],
        "other_answer": texts[scores.index(min(scores))],
        "better": True,
        "answers": texts,
        "scores": scores,
    }


def read_binarized(row):
    """The Answers of a row of HuggingFaceH4/ultrafeedback_binarized."""
    turns = [message["content"] for message in row["chosen"]]
    answer = turns.pop()
    prompt = turns[0] if len(turns) == 1 else turns
    other_answer = row["rejected"][-1]["content"]
    return Answers(prompt, [answer, other_answer], [row["score_chosen"], row["score_rejected"]])


def read_completions(row):
    """The Answers of a row of openbmb/UltraFeedback."""
    texts = []
    scores = []
    for completion in row["completions"]:
        texts.append(completion["response"])
        scores.append(completion.get("fine-grained_score", completion.get("overall_score")))
    return Answers(row["instruction"], texts, scores)


download.prepare(__file__, to_record, config, download.Release("openbmb/UltraFeedback"))
