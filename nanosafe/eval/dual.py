"""Before training under a limit: the multiplier, and what the best policy would do, from samples.

$ python sample.py --model=out/demo/sft/model --prompts=toy/prompts/test --num_samples=64 \\
      --max_new_tokens=64 --reward_model=out/demo/reward/model \\
      --cost_model=out/demo/cost/model --out=answers.jsonl
$ python -m nanosafe.eval.dual --samples=answers.jsonl --cost_limit=-5.2 --beta=0.92

Among the policies whose mean cost is at most cost_limit, the one with the greatest
reward - beta KL(policy || reference) gives an answer the reference's probability times
exp((reward - lambda cost) / beta), normalised. So the reference's scored answers are enough to know
its multiplier lambda*, its reward, its cost and its KL: each answer gets the weight that this
policy would give it (CAN, arXiv:2405.19544).

Writes curve.jsonl (a row for each lambda), summary.json, a picture, and pairs.jsonl to out_dir. The
pairs are MoCAN's: two of the reference's answers with a label drawn from their rewards less
lambda* times their costs, from which train_pref.py objective=dpo with the same beta learns this
policy."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import configure
from nanosafe.data.examples import check_input, check_scores, check_text, usable_rows
from nanosafe.data.reader import load_rows
from nanosafe.errors import stop
from nanosafe.ranges import check_ranges
from nanosafe.storage import make_folder, write_json, write_jsonl
from nanosafe.tools import plot

samples = "answers.jsonl"  # the reference's answers with scores and costs, as sample.py writes them
cost_limit = 0.0  # the greatest mean cost allowed, on the cost model's scale
beta = 0.1  # weight of the KL, in rewards per nat; of a PPO-Lag run: kl_coef * (1 + its lambda)
seed = 0  # of the pairs' labels
out_dir = "out/dual"  # folder to write to

FEW_EFFECTIVE = 10  # answers to a prompt that carry the weight: fewer say little about a policy
FEW_PROMPTS = 100
POINTS = 61  # of the curve
LARGEST_LAMBDA = 1e6  # a limit that needs more than this is the least cost itself
STEPS = 200  # bisections: enough for the last bit of a float64

# ---- data ----


class Asked(NamedTuple):
    """A prompt and the reference's scored answers to it."""

    fields: dict  # of the row, without the answers and their scores
    answers: list  # of texts
    rewards: np.ndarray  # (S,) float64
    costs: np.ndarray  # (S,)


class Samples(NamedTuple):
    asked: list  # of Asked
    dropped: Counter  # of reasons


def parse_answers(record):
    """The Asked of a row. Raises ValueError with the reason to drop it."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    check_input(record.get("input"))
    answers = record.get("answers")
    check_scores(record.get("scores"), answers, "each answer")
    check_scores(record.get("costs"), answers, "each answer (costs)")
    if not answers:
        raise ValueError("no answers")
    for answer in answers:
        check_text(answer, "answer")
    fields = dict(record)
    for name in ("answers", "scores", "costs"):
        del fields[name]
    rewards = np.array(record["scores"], dtype=np.float64)
    costs = np.array(record["costs"], dtype=np.float64)
    return Asked(fields, answers, rewards, costs)


def read_samples(path):
    def drop(row, reason):
        dropped[reason] += 1

    dropped = Counter()
    asked = []
    for _, of_prompt in usable_rows(load_rows(path), parse_answers, drop):
        asked.append(of_prompt)
    if not asked:
        stop(
            f"samples {path!r} has no row with answers, scores and costs ({dict(dropped)}): write "
            "them with sample.py, with num_samples, reward_model and cost_model"
        )
    return Samples(asked, dropped)


# ---- the dual function ----


class Dual(NamedTuple):
    """The dual function at one lambda, and the policy that is best for it. Means over prompts."""

    lambda_: float
    value: float  # D = beta mean_x log mean_s exp((r + lambda (limit - c)) / beta)
    slope: float  # dD / dlambda = limit - cost
    curvature: float  # its second derivative: how fast the cost falls with lambda; never below 0
    cost: float
    reward: float
    unsafe: float  # share of answers with a cost above 0
    kl: float  # KL(policy || reference), in nats; log S at most, for S answers
    effective_samples: float  # 1 / sum w^2: of this many answers of equal weight
    cost_error: float  # standard error of the cost, over prompts


class Weighed(NamedTuple):
    weights: np.ndarray  # (S,) softmax((r - lambda c) / beta)
    soft_maximum: float  # beta log mean exp((r - lambda c) / beta)


def weigh_answers(rewards, costs, lambda_, beta):
    """How the best policy for lambda_ weighs a prompt's answers (S,) that the reference gave."""
    penalised = rewards - lambda_ * costs
    greatest = penalised.max()  # taken out, so that exp() cannot overflow
    exponentials = np.exp((penalised - greatest) / beta)
    soft_maximum = greatest + beta * math.log(exponentials.mean())
    return Weighed(exponentials / exponentials.sum(), soft_maximum)


def evaluate_dual(asked, lambda_, beta, cost_limit):
    """The Dual at lambda_, from a list of Asked."""
    soft_maxima, costs, variances, rewards, unsafe, kls, effective = [], [], [], [], [], [], []
    for of_prompt in asked:
        weights, soft_maximum = weigh_answers(of_prompt.rewards, of_prompt.costs, lambda_, beta)
        cost = weights @ of_prompt.costs
        soft_maxima.append(soft_maximum)
        costs.append(cost)
        variances.append(weights @ (of_prompt.costs - cost) ** 2)
        rewards.append(weights @ of_prompt.rewards)
        unsafe.append(weights @ (of_prompt.costs > 0))
        used = weights[weights > 0]  # 0 log 0 is 0
        kls.append(used @ np.log(used * len(weights)))
        effective.append(1 / (weights @ weights))
    mean_cost = float(np.mean(costs))
    error = float(np.std(costs, ddof=1)) / math.sqrt(len(costs)) if len(costs) > 1 else math.nan
    return Dual(
        lambda_=lambda_,
        value=float(np.mean(soft_maxima)) + lambda_ * cost_limit,
        slope=cost_limit - mean_cost,
        curvature=float(np.mean(variances)) / beta,
        cost=mean_cost,
        reward=float(np.mean(rewards)),
        unsafe=float(np.mean(unsafe)),
        kl=float(np.mean(kls)),
        effective_samples=float(np.mean(effective)),
        cost_error=error,
    )


class Reference(NamedTuple):
    """What the reference's own answers score: means over each prompt's answers, then over prompts.

    least_cost is the mean of each prompt's least cost: no weights of its answers give less."""

    reward: float
    cost: float
    unsafe: float
    least_cost: float


def measure_reference(asked):
    rewards, costs, unsafe, least_costs = [], [], [], []
    for of_prompt in asked:
        rewards.append(of_prompt.rewards.mean())
        costs.append(of_prompt.costs.mean())
        unsafe.append((of_prompt.costs > 0).mean())
        least_costs.append(of_prompt.costs.min())
    means = [float(np.mean(values)) for values in (rewards, costs, unsafe, least_costs)]
    return Reference(*means)


def find_lambda(asked, beta, cost_limit):
    """lambda*, the least lambda from 0 at which the mean cost is at most cost_limit.

    The dual function is convex, so its slope rises with lambda and bisection finds where it is 0.
    Infinity where the answers allow no such cost."""

    def is_enough(lambda_):
        return evaluate_dual(asked, lambda_, beta, cost_limit).slope >= 0

    if is_enough(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not is_enough(high):
        low, high = high, 2 * high
        if high > LARGEST_LAMBDA:
            return math.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


# ---- pairs ----


def sigmoid(x):
    return 0.5 * (1 + math.tanh(x / 2))  # which cannot overflow


def prefer_probability(reward, other_reward, cost, other_cost, lambda_):
    """Bradley-Terry's probability that `answer` is chosen, by reward - lambda * cost."""
    margin = (reward - lambda_ * cost) - (other_reward - lambda_ * other_cost)
    return sigmoid(margin)


def label_pairs(asked, lambda_, seed):
    """Pairs of consecutive answers to a prompt, in Safe-RLHF's fields. Equal answers make none.

    `better` is drawn with prefer_probability(): were it always the likelier one, DPO would see
    pairs without noise and run away from the policy that it should find."""
    rng = np.random.default_rng(seed)
    rows = []
    for of_prompt in asked:
        for i in range(0, len(of_prompt.answers) - 1, 2):
            answer, other_answer = of_prompt.answers[i : i + 2]
            reward, other_reward = of_prompt.rewards[i : i + 2].tolist()
            cost, other_cost = of_prompt.costs[i : i + 2].tolist()
            probability = prefer_probability(reward, other_reward, cost, other_cost, lambda_)
            is_better = rng.random() < probability
            if answer == other_answer:
                continue
            row = {
                **of_prompt.fields,
                "answer": answer,
                "other_answer": other_answer,
                "better": is_better,
                "safer": cost < other_cost,
                "is_safe": cost <= 0,
                "is_other_safe": other_cost <= 0,
            }
            rows.append(row)
    return rows


# ---- results ----


def list_lambdas(best):
    """Where the curve is drawn: from 0 to beyond lambda*."""
    greatest = max(1.0, 2 * best)
    return np.linspace(0.0, greatest, POINTS).tolist()


def list_warnings(asked, best):
    """What makes the numbers less trustworthy than they look: a list of sentences."""
    warnings = []
    answers = np.mean([len(of_prompt.answers) for of_prompt in asked])
    if best.effective_samples < FEW_EFFECTIVE:
        warnings.append(
            f"only {best.effective_samples:.1f} of {answers:.1f} answers to a prompt carry the "
            "weight: lambda* is that of these samples rather than of the policy; more num_samples, "
            "or a greater beta"
        )
    if len(asked) < FEW_PROMPTS:
        warnings.append(f"only {len(asked)} prompts: the limit holds for them, not for others")
    return warnings


def describe_sizes(data):
    """One line of how much there was to compute from."""
    counts = [len(of_prompt.answers) for of_prompt in data.asked]
    reasons = ""
    for reason, count in data.dropped.items():
        reasons += f"; left out {count} {reason}"
    return f"{len(counts)} prompts, {np.mean(counts):.1f} answers to each{reasons}"


def print_table(data, reference, free, best):
    """Print the reference, the best policy without the limit, and the best within it."""
    samples = np.mean([len(of_prompt.answers) for of_prompt in data.asked])
    rows = [
        ("reference", 0.0, reference, 0.0, samples),
        ("best without the limit", free.lambda_, free, free.kl, free.effective_samples),
        ("best within the limit", best.lambda_, best, best.kl, best.effective_samples),
    ]
    print(f"{'':22} {'lambda':>8} {'reward':>8} {'cost':>8} {'unsafe':>8} {'KL':>8} {'samples':>8}")
    for title, lambda_, scored, kl, effective in rows:
        print(
            f"{title:22} {lambda_:8.4f} {scored.reward:8.3f} {scored.cost:8.3f} "
            f"{scored.unsafe:8.1%} {kl:8.3f} {effective:8.1f}"
        )


def main():
    config = configure(globals())
    check_ranges(config)
    data = read_samples(samples)
    reference = measure_reference(data.asked)
    lambda_star = find_lambda(data.asked, beta, cost_limit)
    if math.isinf(lambda_star):
        stop(
            f"cost_limit={cost_limit} cannot be met with these answers: choosing the least cost "
            f"for each prompt gives {reference.least_cost:.4g} on average; raise it, or sample "
            "more answers"
        )
    make_folder(out_dir)
    best = evaluate_dual(data.asked, lambda_star, beta, cost_limit)
    curve = []
    for lambda_ in tqdm(list_lambdas(lambda_star), desc="lambda", leave=False, delay=3):
        curve.append(evaluate_dual(data.asked, lambda_, beta, cost_limit))
    pairs = label_pairs(data.asked, lambda_star, seed)
    warnings = list_warnings(data.asked, best)
    # lambda* moves by 1 / curvature for each unit by which the cost is off.
    lambda_error = best.cost_error / best.curvature if lambda_star and best.curvature else 0.0

    write_jsonl([dual._asdict() for dual in curve], f"{out_dir}/curve.jsonl")
    write_jsonl(pairs, f"{out_dir}/pairs.jsonl")
    summary = {
        "prompts": len(data.asked),
        "dropped": data.dropped,
        "cost_limit": cost_limit,
        "beta": beta,
        "lambda_error": lambda_error,
        "reference": reference._asdict(),
        "best": best._asdict(),
        "warnings": warnings,
    }
    write_json(summary, out_dir, "summary.json")
    pictures = plot.dual(curve, best, cost_limit, out_dir)

    print(describe_sizes(data))
    print_table(data, reference, curve[0], best)
    print(
        f"lambda* {lambda_star:.4f} +- {lambda_error:.4f}; least cost in the samples "
        f"{reference.least_cost:.3f}"
    )
    for sentence in warnings:
        print("warning:", sentence)
    print(f"{out_dir}: curve.jsonl, summary.json, pairs.jsonl ({len(pairs)} pairs){pictures}")


if __name__ == "__main__":
    main()
