"""Test a reward or cost model on pairs: how often it is right, and how well calibrated it is.

$ python -m nanosafe.eval.scores --model=out/demo/reward/model --data=toy/reward/test
$ python -m nanosafe.eval.scores --model=out/demo/cost/model --data=toy/cost/test

Writes scores.jsonl (texts, scores and labels, the worst mistake first), summary.json and pictures
to out_dir."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from configurator import configure
from nanosafe.data.examples import list_texts, parse_record, usable_rows
from nanosafe.data.reader import load_rows
from nanosafe.errors import choose, stop
from nanosafe.eval.statistics import bootstrap_interval, measure_calibration
from nanosafe.inference import ScoreModel, choose_dtype
from nanosafe.parallel import close, init
from nanosafe.ranges import check_ranges
from nanosafe.storage import make_folder, write_json, write_jsonl
from nanosafe.tools import plot

# model and data
model = "out/demo/cost/model"  # the score model's folder
objective = "auto"  # reward | cost; auto: what its config.json says, else reward
data = "toy/cost/test"  # pairs: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl
max_len = 2048  # longer conversations are left out
# results
out_dir = "out/scores"  # folder to write to
worst = 3  # mistakes to print
# machine
max_tokens = 8192  # packed tokens per forward
device = "auto"  # auto | cpu | cuda
config = configure(globals())
check_ranges(config)


# ---- data ----


class Pair(NamedTuple):
    """Two answers to one input, the preferred answer first."""

    source: str  # FILE:LINE
    conversations: list  # of texts in turn, the user's first; two
    labels: tuple  # cost: +1 safe, -1 unsafe; reward: 1 chosen, 0 rejected
    ids: list  # of token ids, two


class Pairs(NamedTuple):
    usable: list  # of Pair
    dropped: Counter  # of reasons


def read_pairs(data, objective, tokenizer, max_len):
    def read(record):
        parsed = parse_record(record, objective)
        ids = []
        for turns in parsed.conversations:
            ids.append(tokenizer.finished_conversation(turns, **parsed.options).ids)
        if max(len(ids[0]), len(ids[1])) > max_len:
            raise ValueError(f"longer than {max_len} tokens")
        texts = [list_texts(turns) for turns in parsed.conversations]
        return texts, parsed.labels, ids

    def drop(row, reason):
        dropped[reason] += 1

    dropped = Counter()
    usable = []
    for row, fields in usable_rows(load_rows(data), read, drop):
        usable.append(Pair(f"{row.file}:{row.line}", *fields))
    if not usable:
        stop(f"data {data!r} has no usable pair: {dict(dropped)}")
    return Pairs(usable, dropped)


def score_pairs(scorer, pairs):
    """The scores (n, 2) of pairs: the preferred answer's and the other's."""
    texts = []
    for pair in pairs:
        texts += pair.ids
    return np.array(scorer.score(texts)).reshape(-1, 2)


# ---- measures ----
# margins (n,) are positive where the score model prefers the answer that people prefer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Measured(NamedTuple):
    summary: dict  # what summary.json holds
    groups: dict  # {name: scores}: two groups whose distributions are drawn
    curves: dict  # {name: bins of a calibration}


def measure_margins(pairs, scores, margins):
    """Accuracy and calibration of the choice between two answers.

    The probability of the model's choice is Bradley-Terry's, sigmoid(|margin|)."""
    correct = margins > 0
    calibration = measure_calibration(sigmoid(np.abs(margins)), correct)
    summary = {
        "pairs": len(pairs.usable),
        "dropped": pairs.dropped,
        "accuracy": bootstrap_interval(correct),
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "calibration_error": calibration.error,
        "margin": bootstrap_interval(margins),
        "score_mean": scores.mean(),
        "score_std": scores.std(),
    }
    groups = {"preferred": scores[:, 0], "other": scores[:, 1]}
    return Measured(summary, groups, {"of two answers, the preferred": calibration.bins})


def measure_signs(pairs, scores, measured):
    """Add what the sign of a cost says about single answers: above 0 means unsafe.

    The probability that an answer is unsafe is sigmoid(cost)."""
    labels = np.array([pair.labels for pair in pairs.usable]).ravel()
    unsafe = labels < 0
    costs = scores.ravel()
    correct = np.where(unsafe, costs > 0, costs < 0)
    calibration = measure_calibration(sigmoid(costs), unsafe)
    groups = {"safe": costs[~unsafe], "unsafe": costs[unsafe]}
    summary = {
        **measured.summary,
        "sign_accuracy": bootstrap_interval(correct),
        "unsafe_calibration_error": calibration.error,
    }
    for name, group in groups.items():
        if len(group) > 0:
            summary[f"{name}_mean"] = float(group.mean())
    return Measured(summary, groups, {**measured.curves, "unsafe": calibration.bins})


# ---- results ----


def make_rows(pairs, scores, margins):
    """The rows of scores.jsonl, the lowest margin first."""
    rows = []
    for i in np.argsort(margins, kind="stable"):
        pair = pairs.usable[i]
        answers = []
        for texts, label, score in zip(pair.conversations, pair.labels, scores[i]):
            score = round(float(score), 4)
            answers.append({"turns": texts, "label": int(label), "score": score})
        margin = round(float(margins[i]), 4)
        rows.append({"where": pair.source, "margin": margin, "answers": answers})
    return rows


def print_summary(summary, objective):
    reasons = ""
    for reason, count in summary["dropped"].items():
        reasons += f"; left out {count} {reason}"
    print(f"\n{summary['pairs']} pairs ({objective}){reasons}")
    for name, value in summary.items():
        if isinstance(value, tuple):
            mean, low, high = value
            print(f"{name:24} {mean:.4f}  [{low:.4f}, {high:.4f}]")
        elif isinstance(value, float):
            print(f"{name:24} {value:.4f}")


def print_mistakes(rows, count):
    """Print the worst of the pairs in which the other answer has the better score."""
    for row in rows[:count]:
        if row["margin"] > 0:
            break
        print(f"\n{row['where']}: wrong by {-row['margin']:.2f}")
        preferred, other = row["answers"]
        print("> " + preferred["turns"][-2])
        print(f"  {preferred['score']:7.2f} preferred: {preferred['turns'][-1]}")
        print(f"  {other['score']:7.2f}     other: {other['turns'][-1]}")


# ---- run ----
choose("objective", objective, ("auto", "reward", "cost"))
make_folder(out_dir)
world = init(device, config)
asked_type = None if objective == "auto" else objective
scorer = ScoreModel(model, world, choose_dtype("auto", world), max_tokens, asked_type)
objective = scorer.model.config.score_type
pairs = read_pairs(data, objective, scorer.tok, max_len)

scores = score_pairs(scorer, pairs.usable)
margins = scores[:, 0] - scores[:, 1]
if objective == "cost":
    margins = -margins  # the preferred answer is the one that costs less
measured = measure_margins(pairs, scores, margins)
if objective == "cost":
    measured = measure_signs(pairs, scores, measured)

if world.main:
    rows = make_rows(pairs, scores, margins)
    write_jsonl(rows, f"{out_dir}/scores.jsonl")
    write_json(measured.summary, out_dir, "summary.json")
    print_summary(measured.summary, objective)
    print_mistakes(rows, worst)
    pictures = plot.scores(measured.groups, measured.curves, out_dir)
    print(f"\n{out_dir}: scores.jsonl, summary.json{pictures}")
close()
