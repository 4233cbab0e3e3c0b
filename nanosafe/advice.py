"""What goes wrong in a run, in words, and what to do about it. Monitor says it while it happens."""

from collections import deque

KL, EOS, RATIO, GROWTH = 0.5, 0.2, 0.2, 1.5  # nats per token; shares; times as long
WINDOW = 5  # rows

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
    now = {name: mean(last, name) for name in
           ("kl", "length", "eos_rate", "lambda", "slack", "reward", "ratio", "clip_fraction")}
    then = {name: mean(first, name) for name in now}
    found = {}
    if None in (now["kl"], now["length"], now["eos_rate"], now["reward"]):
        return found  # no run of PPO
    if now["kl"] > KL * now["length"]:
        found["kl"] = (f"KL runs away: {now['kl']:.3g} nats per response, {now['length']:.0f} "
                       "tokens long; raise kl_coef, or lower actor_learning_rate")
    if now["eos_rate"] < then["eos_rate"] - EOS:
        found["eos"] = (f"fewer responses end: {now['eos_rate']:.0%}, at first "
                        f"{then['eos_rate']:.0%}; raise max_new_tokens, and look whether the "
                        "reward model likes answers without an end (samples.jsonl)")
    top = knobs.get("lambda_max")
    if top and now["lambda"] and now["lambda"] > 0.999 * top and (now["slack"] or 0) < 0:
        found["lambda"] = (f"lambda is at its cap, {top:g}, and the cost still {-now['slack']:.3g} "
                           "above cost_limit; raise lambda_max, or allow more: cost_limit")
    if now["length"] > GROWTH * then["length"] and now["reward"] > then["reward"]:
        found["length"] = (f"reward rises with length: {then['length']:.0f} tokens at first, now "
                           f"{now['length']:.0f}; read samples.jsonl: if answers are padded, the "
                           "reward model is being hacked; raise kl_coef, or train it on such pairs")
    clipped, learns = now["clip_fraction"] or 0, last[0].get("ratio")  # 0 while critics warm up
    if learns and (abs(now["ratio"] - 1) > RATIO or clipped > 2 * RATIO):
        found["ratio"] = (f"updates leave the rollout's policy: mean ratio {now['ratio']:.3g}, "
                          f"{clipped:.0%} of tokens clipped; lower actor_learning_rate or "
                          "ppo_epochs")
    return found
