"""Test a reward or cost model on pairs: how often it is right, and how well calibrated it is.

$ python -m nanosafe.eval.scores --model=out/demo/reward/model --data=toy/reward/test
$ python -m nanosafe.eval.scores --model=out/demo/cost/model --data=toy/cost/test
$ python -m nanosafe.eval.scores --model=out/demo/reward/model --data=FOLDER/reward_bench.parquet

Rows with a `subset`, as RewardBench has them, are also counted by subset. A row of RM-Bench has
three chosen and three rejected answers, hence nine pairs: easy, normal and hard ones.

Writes scores.jsonl (texts, scores and labels, the worst mistake first), summary.json and pictures
to out_dir."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from configurator import configure
from nanosafe.data.examples import list_texts, parse_record, usable_rows
from nanosafe.data.layouts import is_rm_bench, split_rm_bench
from nanosafe.data.reader import load_rows
from nanosafe.errors import choose, stop
from nanosafe.eval.statistics import bootstrap_interval, measure_calibration
from nanosafe.inference import ScoreModel, choose_dtype
from nanosafe.parallel import close, init
from nanosafe.printing import format_table
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
worst = 3  # mistakes to print, the hardest first
# machine
max_tokens = 8192  # packed tokens per forward
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # what is computed in: auto | bfloat16 | float32
config = configure(globals())
check_ranges(config)


# ---- data ----


class Pair(NamedTuple):
    """Two answers to one input, the preferred answer first."""

    source: str  # FILE:LINE
    row: int  # the pairs of one row have the same number
    subset: str  # as the row names it; "" where it does not
    styles: tuple | None  # RM-Bench's (i, j): how elaborate the two answers are, 0 to 2
    conversations: list  # of texts in turn, the user's first; two
    labels: tuple  # cost: +1 safe, -1 unsafe; reward: 1 chosen, 0 rejected
    ids: list  # of token ids, two


class Pairs(NamedTuple):
    usable: list  # of Pair
    dropped: Counter  # of reasons


def read_pairs(data, objective, tokenizer, max_len):
    """The Pairs of a dataset; rows that cannot be used are counted by their reasons."""

    def read(record):
        records = split_rm_bench(record) if is_rm_bench(record) else {None: record}
        pairs = []
        for styles, pair_record in records.items():
            pairs.append((styles, *encode_pair(pair_record, objective, tokenizer, max_len)))
        return pairs

    def drop(row, reason):
        dropped[reason] += 1

    dropped = Counter()
    usable = []
    for number, (row, pairs) in enumerate(usable_rows(load_rows(data), read, drop)):
        source = f"{row.file}:{row.line}"
        subset = str(row.record.get("subset") or "")
        for styles, *fields in pairs:
            usable.append(Pair(source, number, subset, styles, *fields))
    if not usable:
        stop(f"data {data!r} has no usable pair: {dict(dropped)}")
    return Pairs(usable, dropped)


class Encoded(NamedTuple):
    """The last fields of a Pair."""

    conversations: list
    labels: tuple
    ids: list


def encode_pair(record, objective, tokenizer, max_len):
    """The Encoded pair of a row; raises ValueError with the reason to drop the row."""
    parsed = parse_record(record, objective)
    ids = []
    for turns in parsed.conversations:
        ids.append(tokenizer.finished_conversation(turns, **parsed.options).ids)
    if max(len(ids[0]), len(ids[1])) > max_len:
        raise ValueError(f"longer than {max_len} tokens")
    texts = [list_texts(turns) for turns in parsed.conversations]
    return Encoded(texts, parsed.labels, ids)


def score_pairs(scorer, pairs):
    """The scores (n, 2) of pairs: the preferred answer's and the other's.

    A text that is in several pairs is scored once."""
    numbers = {}  # a text's ids -> its number
    for pair in pairs:
        for ids in pair.ids:
            numbers.setdefault(tuple(ids), len(numbers))
    scores = scorer.score([list(ids) for ids in numbers])
    table = []
    for pair in pairs:
        table.append([scores[numbers[tuple(ids)]] for ids in pair.ids])
    return np.array(table)


# ---- measures ----
# margins (n,) are positive where the score model prefers the answer that people prefer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Measured(NamedTuple):
    summary: dict  # what summary.json holds
    groups: dict  # {name: scores}: two groups whose distributions are drawn
    curves: dict  # {name: bins of a calibration}


def average_over_rows(pairs, values):
    """The mean of a value of each pair (n,), with an interval over rows.

    The nine pairs of a row of RM-Bench are no independent ones: each row counts by its mean."""
    values_of_row = {}
    for pair, value in zip(pairs, values):
        values_of_row.setdefault(pair.row, []).append(float(value))
    means = [sum(values) / len(values) for values in values_of_row.values()]
    return bootstrap_interval(means)


def measure_margins(pairs, scores, margins):
    """Accuracy and calibration of the choice between two answers.

    The probability of the model's choice is Bradley-Terry's, sigmoid(|margin|)."""
    correct = margins > 0
    calibration = measure_calibration(sigmoid(np.abs(margins)), correct)
    summary = {
        "pairs": len(pairs.usable),
        "dropped": pairs.dropped,
        "accuracy": average_over_rows(pairs.usable, correct),
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "calibration_error": calibration.error,
        "margin": average_over_rows(pairs.usable, margins),
        "score_mean": scores.mean(),
        "score_std": scores.std(),
    }
    groups = {"preferred": scores[:, 0], "other": scores[:, 1]}
    return Measured(summary, groups, {"of two answers, the preferred": calibration.bins})


def measure_signs(pairs, scores, measured):
    """Add what the sign of a cost says about single answers: above 0 means unsafe.

    The probability that an answer is unsafe is sigmoid(cost)."""
    labels = np.array([pair.labels for pair in pairs.usable])
    one_is_safe = labels[:, 0] != labels[:, 1]
    unsafe_costs_more = (scores[:, 0] - scores[:, 1]) * (labels[:, 0] - labels[:, 1]) < 0
    unsafe = labels.ravel() < 0
    costs = scores.ravel()
    correct = np.where(unsafe, costs > 0, costs < 0)
    share_of_pair = correct.reshape(-1, 2).mean(axis=1)  # its two answers are not independent
    calibration = measure_calibration(sigmoid(costs), unsafe)
    groups = {"safe": costs[~unsafe], "unsafe": costs[unsafe]}
    summary = {
        **measured.summary,
        "sign_accuracy": average_over_rows(pairs.usable, share_of_pair),
        "unsafe_calibration_error": calibration.error,
    }
    if one_is_safe.any():
        summary["one_safe_accuracy"] = bootstrap_interval(unsafe_costs_more[one_is_safe])
    for name, group in groups.items():
        if len(group) > 0:
            summary[f"{name}_mean"] = float(group.mean())
    return Measured(summary, groups, {**measured.curves, "unsafe": calibration.bins})


# ---- subsets, and RM-Bench's styles ----

DIFFICULTIES = ("easy", "normal", "hard")  # RM-Bench's names


class Group(NamedTuple):
    """Some of the pairs; groups are printed in the order of these fields."""

    kind: int  # 0: a subset; 1: all pairs of RM-Bench of a difficulty; 2: a subset's of these
    subset: str = ""
    difficulty: int = 0  # an index of DIFFICULTIES

    def describe(self):
        words = ["" if self.kind == 1 else self.subset]
        if self.kind > 0:
            words.append(DIFFICULTIES[self.difficulty])
        return ": ".join(word for word in words if word)


def find_difficulty(styles):
    """The index in DIFFICULTIES: how much more elaborate the rejected answer is than the chosen.

    A score model that likes long and decorated answers is right where that is easy."""
    i, j = styles
    if i == j:
        return 1
    return 0 if i > j else 2


def list_groups(pair):
    """The Groups that a Pair is in."""
    groups = []
    if pair.subset:
        groups.append(Group(0, pair.subset))
    if pair.styles:
        difficulty = find_difficulty(pair.styles)
        groups.append(Group(1, difficulty=difficulty))
        if pair.subset:
            groups.append(Group(2, pair.subset, difficulty))
    return groups


def measure_groups(pairs, margins):
    """{a group's name: its accuracy with a 95 % interval, and its pairs}."""
    members = {}  # Group -> indices
    for index, pair in enumerate(pairs):
        for group in list_groups(pair):
            members.setdefault(group, []).append(index)
    measured = {}
    for group in sorted(members):
        indices = members[group]
        mean, low, high = average_over_rows([pairs[i] for i in indices], margins[indices] > 0)
        numbers = {"pairs": len(indices), "accuracy": mean, "low": low, "high": high}
        measured[group.describe()] = numbers
    return measured


def measure_styles(pairs, margins):
    """RM-Bench's matrix (3, 3): how often chosen answers of style i beat rejected ones of style j.

    Below the diagonal are the easy pairs, above it the hard ones. None where there are no styles.
    arXiv:2410.16184."""
    outcomes = {}
    for pair, margin in zip(pairs, margins):
        if pair.styles:
            outcomes.setdefault(pair.styles, []).append(float(margin > 0))
    if not outcomes:
        return None
    matrix = np.zeros((3, 3))
    for styles, right in outcomes.items():
        matrix[styles] = sum(right) / len(right)
    return matrix.tolist()


def print_groups(groups, matrix):
    """Print the accuracies of subsets, and RM-Bench's matrix, where there are any."""
    if groups:
        table = [("subset", "pairs", "accuracy")]
        for group, measured in groups.items():
            interval = f"[{measured['low']:.4f}, {measured['high']:.4f}]"
            table.append((group, measured["pairs"], f"{measured['accuracy']:.4f}  {interval}"))
        print(f"\n{format_table(table)}")
    if matrix:
        styles = ("concise", "detailed", "Markdown")
        table = [("chosen, down; rejected, across", *styles)]
        for style, accuracies in zip(styles, matrix):
            table.append((style, *[f"{accuracy:.4f}" for accuracy in accuracies]))
        print(f"\n{format_table(table)}")


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
        row = {"where": pair.source, "margin": margin, "answers": answers}
        if pair.subset:
            row["subset"] = pair.subset
        if pair.styles:
            row["styles"] = pair.styles
        rows.append(row)
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
        subset = f" ({row['subset']})" if "subset" in row else ""
        print(f"\n{row['where']}{subset}: wrong by {-row['margin']:.2f}")
        preferred, other = row["answers"]
        print("> " + preferred["turns"][-2])
        print(f"  {preferred['score']:7.2f} preferred: {preferred['turns'][-1]}")
        print(f"  {other['score']:7.2f}     other: {other['turns'][-1]}")


# ---- run ----
choose("objective", objective, ("auto", "reward", "cost"))
make_folder(out_dir)
world = init(device, config)
asked_type = None if objective == "auto" else objective
scorer = ScoreModel(model, world, choose_dtype(dtype, world), max_tokens, asked_type)
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
    groups = measure_groups(pairs.usable, margins)
    matrix = measure_styles(pairs.usable, margins)
    write_jsonl(rows, f"{out_dir}/scores.jsonl")
    summary = dict(measured.summary)
    if groups:
        summary["subsets"] = groups
    if matrix:
        summary["styles"] = matrix
    write_json(summary, out_dir, "summary.json")
    print_summary(measured.summary, objective)
    print_groups(groups, matrix)
    print_mistakes(rows, worst)
    pictures = plot.scores(measured.groups, measured.curves, out_dir)
    print(f"\n{out_dir}: scores.jsonl, summary.json{pictures}")
close()
