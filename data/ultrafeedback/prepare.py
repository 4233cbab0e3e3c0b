"""UltraFeedback: four models' answers to each instruction, scored by GPT-4. Pairs of the best and
the worst answer; all answers go along with their scores, for methods that rank them.

$ python data/ultrafeedback/prepare.py                   # openbmb/UltraFeedback, about 64,000
$ python data/ultrafeedback/prepare.py --raw=FOLDER      # also the binarized set, as jsonl"""

import math
from configurator import configure
from nanosafe.tools import download

config = configure(globals(), vars(download))


def to_record(row):
    if "chosen" in row:  # HuggingFaceH4/ultrafeedback_binarized
        *turns, answer = [message["content"] for message in row["chosen"]]
        other, scores = row["rejected"][-1]["content"], [row["score_chosen"], row["score_rejected"]]
        prompt, answers = turns[0] if len(turns) == 1 else turns, [answer, other]
    else:
        prompt, scored = row["instruction"], row["completions"]
        answers = [c["response"] for c in scored]
        scores = [c.get("fine-grained_score", c.get("overall_score")) for c in scored]
    kept = [
        (float(score), text)
        for score, text in zip(scores, answers)
        if text.strip() and math.isfinite(float(score))
    ]
    if len(kept) < 2 or max(kept)[0] == min(kept)[0]:
        raise ValueError("fewer than two answers, or all equally good")
    best, worst = (pick(kept, key=lambda k: k[0])[1] for pick in (max, min))
    return {
        "input": prompt,
        "answer": best,
        "other_answer": worst,
        "better": True,
        "answers": [text for _, text in kept],
        "scores": [score for score, _ in kept],
    }


download.prepare(__file__, to_record, config)
