"""A reward or cost model over a preference set: how often it is right, how sure it is of itself.

$ python -m nanosafe.eval.scores --model=out/demo/reward/model --data=toy/reward/test
$ python -m nanosafe.eval.scores --model=out/demo/cost/model --data=toy/cost/test

Writes scores.jsonl (texts, scores, labels, the worst mistake first), summary.json, pictures."""

from collections import Counter
import numpy as np
from configurator import configure
from nanosafe.tools import plot
from nanosafe.data.examples import parse_record, usable_rows
from nanosafe.data.template import encode_conversation
from nanosafe.eval.statistics import calibration, interval
from nanosafe.errors import choose, stop
from nanosafe.storage import make_folder, write_json, write_jsonl
from nanosafe.parallel import close, init
from nanosafe.inference import choose_dtype
from nanosafe.data.reader import load_rows
from nanosafe.inference import ScoreModel

model = "out/demo/cost/model"  # the score model's folder
objective = "auto"  # reward | cost; auto: what its config.json says
data = "toy/cost/test"  # pairs: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl
out_dir = "out/scores"  # folder to write to
worst = 3  # mistakes to print
max_len = 2048  # longer conversations are left out
max_tokens = 8192  # packed tokens per forward
device = "auto"  # auto | cpu | cuda
config = configure(globals())

choose("objective", objective, ("auto", "reward", "cost"))
make_folder(out_dir)
world = init(device, config)
scorer = ScoreModel(model, world, choose_dtype("auto", world), max_tokens)
if objective == "auto":
    objective = "cost" if scorer.model.config.score_type == "cost" else "reward"
sigmoid = lambda x: 1 / (1 + np.exp(-x))


# 1. pairs, what is preferred first
def read(record):
    pair, labels = parse_record(record, objective)
    ids = [encode_conversation(turns, scorer.tok)[0] for turns in pair]
    if max(map(len, ids)) > max_len:
        raise ValueError(f"longer than {max_len} tokens")
    return pair, labels, ids


dropped = Counter()
found = usable_rows(load_rows(data), read, lambda row, reason: dropped.update([reason]))
pairs = [(f"{row.file}:{row.line}", *parts) for row, parts in found]
if not pairs:
    stop(f"data {data!r} has no usable pair: {dict(dropped)}")

# 2. scores (n, 2), and how far each is on the right side
scores = np.array(scorer.score([x for *_, ids in pairs for x in ids])).reshape(-1, 2)
margins = (scores[:, 0] - scores[:, 1]) * (-1 if objective == "cost" else 1)
sure, right = sigmoid(np.abs(margins)), margins > 0  # Bradley-Terry's probability of its own choice
reliability, error = calibration(sure, right)
summary = {
    "pairs": len(pairs),
    "dropped": dropped,
    "accuracy": interval(right),
    "log_loss": float(np.logaddexp(0, -margins).mean()),
    "calibration_error": error,
    "margin": interval(margins),
    "score_mean": scores.mean(),
    "score_std": scores.std(),
}
groups = {"preferred": scores[:, 0], "other": scores[:, 1]}
curves = {"of two answers, the preferred": reliability}
if objective == "cost":
    unsafe, flat = np.array([labels for _, _, labels, _ in pairs]).ravel() < 0, scores.ravel()
    groups = {"safe": flat[~unsafe], "unsafe": flat[unsafe]}
    curves["unsafe"], unsafe_error = calibration(sigmoid(flat), unsafe)
    correct = np.where(unsafe, flat > 0, flat < 0)
    summary.update(
        sign_accuracy=interval(correct),
        unsafe_calibration_error=unsafe_error,
        **{f"{name}_mean": float(x.mean()) for name, x in groups.items() if len(x)},
    )

# 3. what it comes to
if world.main:
    rows = []
    for i in np.argsort(margins, kind="stable"):
        where, pair, labels, _ = pairs[i]
        rows.append(
            {
                "where": where,
                "margin": round(float(margins[i]), 4),
                "answers": [
                    {"turns": turns, "label": int(label), "score": round(float(score), 4)}
                    for turns, label, score in zip(pair, labels, scores[i])
                ],
            }
        )
    write_jsonl(rows, f"{out_dir}/scores.jsonl")
    write_json(summary, out_dir, "summary.json")
    reasons = "".join(f"; left out {n} {reason}" for reason, n in dropped.items())
    print(f"\n{len(pairs)} pairs ({objective}){reasons}")
    for name, value in summary.items():
        if isinstance(value, (float, tuple)):
            mean, *ends = np.atleast_1d(value)
            print(f"{name:24} {mean:.4f}", " [{:.4f}, {:.4f}]".format(*ends) if ends else "")
    for row in (row for row in rows[:worst] if row["margin"] <= 0):
        print(f"\n{row['where']}: wrong by {-row['margin']:.2f}")
        print("> " + row["answers"][0]["turns"][-2])
        for answer, what in zip(row["answers"], ("preferred", "other")):
            print(f"  {answer['score']:7.2f} {what:>9}: {answer['turns'][-1]}")
    written = plot.scores(groups, curves, out_dir)
    print(f"\n{out_dir}: scores.jsonl, summary.json{written}")
close()
