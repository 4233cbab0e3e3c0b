"""What goes wrong in a run, in words, and what to do about it. Monitor says it while it happens."""

import json
import os
from collections import deque

KL, EOS, RATIO, GROWTH = 0.5, 0.2, 0.2, 1.5  # nats per token; shares; times as long
WINDOW = 5  # rows
with open(os.path.join(os.path.dirname(__file__), "advice.json"), encoding="utf-8") as words:
    SENTENCES = json.load(words)


class Watch:
    """Says once what goes wrong in a run with these `knobs`: the last WINDOW rows by the first."""

    def __init__(self, knobs):
        self.knobs, self.said, self.first, self.last = knobs or {}, set(), [], deque(maxlen=WINDOW)

    def see(self, row):
        """The sentences that one more row of metrics gives rise to."""
        (self.first if len(self.first) < WINDOW else self.last).append(row)
        if len(self.last) < WINDOW:
            return []
        found = faults(self.first, self.last, self.knobs)
        new = [text for kind, text in found.items() if kind not in self.said]
        self.said |= found.keys()
        return new


def mean(rows, name):
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def faults(first, last, knobs):
    """{kind: sentence} of what is wrong in the last rows of a run, beside its first."""
    names = "kl", "length", "eos_rate", "lambda", "slack", "reward", "ratio", "clip_fraction"
    now, then = ({name: mean(rows, name) for name in names} for rows in (last, first))
    if None in (now["kl"], now["length"], now["eos_rate"], now["reward"]):
        return {}  # no run of PPO
    top, slack, clipped = knobs.get("lambda_max"), now["slack"] or 0, now["clip_fraction"] or 0
    learns = last[0].get("ratio")  # 0 while critics warm up
    wrong = {
        "kl": now["kl"] > KL * now["length"],
        "eos": now["eos_rate"] < then["eos_rate"] - EOS,
        "lambda": top and now["lambda"] and now["lambda"] > 0.999 * top and slack < 0,
        "length": now["length"] > GROWTH * then["length"] and now["reward"] > then["reward"],
        "ratio": learns and (abs(now["ratio"] - 1) > RATIO or clipped > 2 * RATIO),
    }
    facts = {"now": now, "then": then, "top": top, "excess": -slack, "clipped": clipped}
    return {kind: SENTENCES[kind].format(**facts) for kind in wrong if wrong[kind]}
