"""Every method on the toy world, judged by gold: the tables of docs/methods.md.

$ python -m nanosafe.tools.methods

It runs the commands that the README shows, each in a process of its own, with one thread by default
(OMP_NUM_THREADS). What has a result already is not run again. At the end, or at once with
--report_only=True, it prints the tables and draws docs/methods.png (pip install matplotlib)."""

import math
import os
from typing import NamedTuple

from configurator import configure
from nanosafe import data
from nanosafe.storage import REPOSITORY, read_json, read_metrics, write_jsonl
from nanosafe.tools import demo
from nanosafe.tools.toy_runs import (
    COLUMNS,
    PPO,
    PPO_LAG,
    PREFERENCES,
    REWARD,
    REWARD_AND_COST,
    RUN,
    SAMPLE,
    SHARED_STAGES,
    format_cell,
    format_markdown,
    format_policy,
    format_spread,
    judge_run,
    keep_result,
    list_seeds,
    make_tokenizer,
    read_evaluation,
    read_results,
    run_command,
    run_commands,
)

seeds = "0,1,2"  # with commas between; the limits are tried with the first one only
out_dir = "out/methods"  # a folder for each seed
part = "methods,phf,limits,adapters"  # which of these
report_only = False  # run nothing: print the tables of what has a result


class Method(NamedTuple):
    label: str  # in the table; empty: a score model, which others need
    commands: list[str]


# The fields of commands are those of toy_runs.py.
SAMPLE_8 = SAMPLE + " --prompts=toy/prompts --num_samples=8 --reward_model={out}/reward/model"
BEST_OF_8 = SAMPLE_8.replace("toy/prompts", "toy/prompts/test")
SAMPLE_AGAIN = (
    "sample.py --model={out}/ppo_lag/model --prompts=toy/prompts --num_samples=4"
    " --max_new_tokens=64 --out={out}/round2/answers.jsonl --seed={seed}"
    " --reward_model={out}/reward/model"
)
ANNOTATE = (
    "data/toy/prepare.py --annotate={out}/round2/answers.jsonl --out={out}/round2/pairs.jsonl"
)
TRAIN_AGAIN = (
    "train_pref.py config/toy/KIND.py --init_from={out}/KIND/model"
    " --data=toy/pairs:4000/-1,{out}/round2/pairs.jsonl --learning_rate=3e-4"
    " --out_dir={out}/round2/KIND"
)
PPO_LAG_AGAIN = (
    PPO_LAG + " --actor_model={out}/ppo_lag/model --reward_model={out}/round2/reward/model"
    " --cost_model={out}/round2/cost/model"
)
METHODS = {
    "sft": Method("SFT", SHARED_STAGES["sft"]),
    "reward": Method("", SHARED_STAGES["reward"]),
    "cost": Method("", SHARED_STAGES["cost"]),
    "best_of_8": Method(
        "best of 8 samples", [BEST_OF_8 + " --write=sft --out={out}/best_of_8.jsonl"]
    ),
    "rft": Method(
        "RFT: SFT on the best of 8",
        [
            SAMPLE_8 + " --write=sft --out={out}/best.jsonl",
            "train_sft.py config/toy/rft.py --init_from={out}/sft/model --data={out}/best.jsonl"
            + RUN,
        ],
    ),
    "dpo": Method("DPO", [PREFERENCES + RUN]),
    "ipo": Method("IPO", [PREFERENCES + RUN]),
    "rrhf": Method(
        "RRHF, 8 answers ranked",
        [
            SAMPLE_8 + " --out={out}/answers.jsonl",
            PREFERENCES + " --data={out}/answers.jsonl" + RUN,
        ],
    ),
    "ppo": Method("PPO", [PPO + REWARD + RUN]),
    "ppo_max": Method("PPO-max", [PPO + " config/toy/ppo_max.py" + REWARD + RUN]),
    "shaping": Method(
        "PPO, fixed shaping",
        [PPO_LAG + " --lambda_init=1 --lambda_lr=0" + REWARD_AND_COST + RUN],
    ),
    "ppo_lag": Method("PPO-Lag", [PPO_LAG + REWARD_AND_COST + RUN]),
    "rloo_lag": Method(
        "RLOO-Lag, no critics",
        [PPO_LAG + " config/toy/rloo_lag.py" + REWARD_AND_COST + RUN],
    ),
    "grpo_lag": Method(
        "GRPO-Lag, no critics",
        [PPO_LAG + " config/toy/rloo_lag.py --advantage=grpo" + REWARD_AND_COST + RUN],
    ),
    "ppo_lag_2": Method(
        "PPO-Lag, two rounds",
        [
            SAMPLE_AGAIN,
            ANNOTATE,
            TRAIN_AGAIN.replace("KIND", "reward"),
            TRAIN_AGAIN.replace("KIND", "cost"),
            PPO_LAG_AGAIN + RUN,
        ],
    ),
}
# A greater KL weight makes the policy answer smoothly to lambda, and a slow lambda waits for it;
# with the demo's settings the two chase each other.
LIMITED = (
    PPO_LAG + REWARD_AND_COST + " --cost_limit={limit} --max_steps=240 --kl_coef=1.0"
    " --actor_lr_schedule=constant --lambda_lr=0.02 --lambda_init=0.8 --out_dir={out}/{name}"
)
LIMITS = (-4.5, -4.0, -3.0, -2.0, -1.0)
PRETRAINING = (
    "-m nanosafe.phf.train config/toy/phf.py --objective={name} --tokenizer={out}/tokenizer"
    " --seed={seed} --out_dir={out}/phf/{name}"
)
OBJECTIVES = ("mle", "filter", "conditional", "unlikelihood", "awr", "rwr")
# Full fine-tuning and adapters, all of one base, which has read pages of questions and answers but
# not the chat template. Each of them has a folder rank_{rank}, and rank 0 is full fine-tuning.
RANKS = (0, 4, 16)
ADAPTED = ("sft", "reward", "cost", "ppo_lag")  # each starts from the one before, as in the demo
PRETRAIN_BASE = (
    "-m nanosafe.phf.train config/toy/phf.py --data={out}/train.jsonl --eval_data={out}/test.jsonl"
    " --tokenizer={out}/tokenizer --eval_samples=0 --out_dir={out}"
)
SFT_OF_BASE = "train_sft.py config/toy/sft.py --init_from={base}/model" + RUN
ADAPTER = " config/toy/{recipe}.py --lora_rank={rank}"
POLICY_COLUMNS = {  # of adapters: the last of PPO-Lag alone
    **COLUMNS,
    "cost, last 20 rollouts": ("cost", 1, "{:.2f}"),
    "lambda": ("lambda", 1, "{:.2f}"),
}
HELD_OUT_COLUMNS = {  # -> the stage, its metric, the factor and the format of a number
    "SFT, loss": ("sft", "eval_loss", 1, "{:.4f}"),
    "reward, accuracy": ("reward", "eval_accuracy", 100, "{:.1f}%"),
    "cost, accuracy": ("cost", "eval_accuracy", 100, "{:.1f}%"),
    "cost, sign accuracy": ("cost", "eval_sign_accuracy", 100, "{:.1f}%"),
}
PHF_COLUMNS = {
    "held-out loss": "eval_loss",
    "score, mean": "eval_score",
    "score_max@25": "eval_score_max@25",
    "KL from MLE, nats": "eval_kl",
    "distinct bigrams": "eval_distinct_2",
    "self-BLEU": "eval_self_bleu",
}


def main():
    knobs = configure(globals())
    numbers = list_seeds(knobs["seeds"])
    parts = knobs["part"].split(",")
    if not knobs["report_only"]:
        if parts != ["adapters"]:
            for seed in numbers:
                run_seed(knobs["out_dir"], seed, parts, with_limits=seed == numbers[0])
        if "adapters" in parts:
            run_adapters(knobs["out_dir"], numbers)
    report(knobs["out_dir"], numbers)


# ---- runs ----


def run_seed(out_dir, seed, parts, with_limits):
    """Run what has no result yet."""
    out = f"{out_dir}/{seed}"
    toy = demo.load_toy()
    keep_result(out, "tokenizer", make_tokenizer, out)
    for name in METHODS:
        if "methods" in parts or name in SHARED_STAGES:
            keep_result(out, name, run_method, toy, out, seed, name)
    if "phf" in parts:
        for objective in OBJECTIVES:
            keep_result(out, f"phf_{objective}", run_phf, out, seed, objective)
    if "limits" in parts and with_limits:
        for limit in LIMITS:
            keep_result(out, f"limit_{limit}", run_limit, toy, out, limit)


def run_method(toy, out, seed, name):
    log = f"{out}/log.txt"
    seconds = run_commands(METHODS[name].commands, log, out=out, seed=seed, name=name)
    return {**judge_method(toy, out, name), "seconds": seconds}


def judge_method(toy, out, name):
    """judge_run(), also of the answers that are the best of 8."""
    if name == "best_of_8":
        answers = [(row["input"], row["answer"]) for row in data.load(f"{out}/best_of_8.jsonl")]
        judged = demo.gold(toy, answers)
        judged["kl"] = math.log(8) - 7 / 8  # an upper bound of the best of n: log n - (n - 1) / n
        return judged
    return judge_run(toy, out, name)


def run_adapters(out_dir, seeds):
    """The pipeline in full and with adapters of each rank, all on one base."""
    toy = demo.load_toy()
    base = f"{out_dir}/base"
    keep_result(base, "tokenizer", make_tokenizer, base)
    keep_result(base, "base", pretrain_base, base)
    for seed in seeds:
        for rank in RANKS:
            folder = f"{out_dir}/{seed}/rank_{rank}"
            for name in ADAPTED:
                keep_result(folder, name, run_adapted, toy, base, folder, seed, rank, name)


def pretrain_base(base):
    """A model that has read pages of questions and answers, as a base model has.

    A page is one text, in the tokens of a conversation. Documents come in sentences, and their
    tokens are others where a sentence begins."""
    for split in ("train", "test"):
        pages = []
        for row in data.load(f"toy/documents/{split}"):
            request, *answer = row["texts"]
            page = f"Question: {request.strip()}\n{''.join(answer)}"
            pages.append({"texts": [page], "scores": [0.0]})
        write_jsonl(pages, f"{base}/{split}.jsonl")
    run_command(PRETRAIN_BASE.format(out=base), f"{base}/log.txt")
    return read_evaluation(base)


def run_adapted(toy, base, folder, seed, rank, name):
    """A stage of the pipeline with adapters of a rank on the base; in full if the rank is 0."""
    command = SFT_OF_BASE if name == "sft" else METHODS[name].commands[0]
    command = command.format(out=folder, seed=seed, name=name, base=base)
    if rank:
        recipe = "lora_ppo_lag" if name == "ppo_lag" else "lora"
        command += ADAPTER.format(recipe=recipe, rank=rank)
    seconds = run_command(command, f"{folder}/log.txt")
    result = {**judge_method(toy, folder, name), "seconds": seconds}
    if name == "sft":
        result.update(read_evaluation(f"{folder}/{name}"))
    if name == "ppo_lag":
        rows = read_metrics(f"{folder}/{name}/metrics.jsonl")
        costs = [row["cost"] for row in rows[-40::2]]  # of the last 20 rollouts, a row of each
        result["cost"] = sum(costs) / len(costs)
        result["lambda"] = rows[-1]["lambda"]
    return result


def run_phf(out, seed, objective):
    command = PRETRAINING.format(out=out, seed=seed, name=objective)
    if objective != "mle":
        command += f" --reference={out}/phf/mle/model"
    run_command(command, f"{out}/log.txt")
    return read_evaluation(f"{out}/phf/{objective}")


def run_limit(toy, out, limit):
    """PPO-Lag under another limit. The error is that of the means of 16 rollouts each, since
    neighbouring rollouts are alike."""
    name = f"limit_{limit}"
    run_command(LIMITED.format(out=out, limit=limit, name=name), f"{out}/log.txt")
    rows = read_metrics(f"{out}/{name}/metrics.jsonl")
    rows = rows[-160::2]  # one of the last 80 rollouts each
    means = []
    for start in range(0, 80, 16):
        means.append(sum(row["cost"] for row in rows[start : start + 16]) / 16)
    mean = sum(means) / len(means)
    squares = sum((x - mean) ** 2 for x in means)
    return {
        **judge_run(toy, out, name),
        "cost": mean,
        "error": math.sqrt(squares / (len(means) - 1) / len(means)),
        "lambda": sum(row["lambda"] for row in rows) / len(rows),
    }


# ---- tables ----


def report(out_dir, seeds):
    report_methods(out_dir, seeds)
    first = f"{out_dir}/{seeds[0]}"
    limits = {limit: read_json(first, f"limit_{limit}.json") for limit in LIMITS}
    limits = {limit: result for limit, result in limits.items() if result}
    report_limits(limits)
    if limits:
        draw(limits, {name: read_json(first, name + ".json") for name in ("sft", "ppo")})
    report_phf(out_dir, seeds)
    report_adapters(out_dir, seeds)


def report_methods(out_dir, seeds):
    rows = []
    for name, method in METHODS.items():
        results = read_results(out_dir, seeds, name)
        if method.label and results:
            seconds = sum(result["seconds"] for result in results) / len(results)
            rows.append([method.label, *format_policy(results), f"{seconds:.0f}"])
    print(format_markdown(["method", *COLUMNS, "seconds"], rows))


def report_limits(limits):
    rows = []
    for limit, result in limits.items():
        row = [
            limit,
            f"{result['cost']:.2f} ± {result['error']:.2f}",
            f"{result['lambda']:.2f}",
            f"{result['helpfulness_benign']:.2f}",
            f"{result['harm_rate_risky']:.1%}",
            f"{result['refusal_rate_benign']:.1%}",
        ]
        rows.append(row)
    head = ["cost_limit", "mean cost, last 80 rollouts", "lambda"]
    print(format_markdown([*head, "helpful, benign", "harmful, risky", "refused, benign"], rows))


def report_phf(out_dir, seeds):
    rows = []
    for objective in OBJECTIVES:
        results = read_results(out_dir, seeds, f"phf_{objective}")
        if results:
            row = [objective]
            for metric in PHF_COLUMNS.values():
                values = [result[metric] for result in results if metric in result]
                row.append(format_spread(values, "{:.3f}") if values else "")
            rows.append(row)
    print(format_markdown(["objective", *PHF_COLUMNS], rows))


def report_adapters(out_dir, seeds):
    """Two tables: what is measured on held-out data, and the policies by gold."""
    held_out_rows = []
    policy_rows = []
    for rank in RANKS:
        label = f"adapters, rank {rank}" if rank else "full fine-tuning"
        results = {}
        for name in ADAPTED:
            results[name] = read_results(out_dir, seeds, f"rank_{rank}/{name}")
        row = [label]
        for stage, *column in HELD_OUT_COLUMNS.values():
            row.append(format_cell(results[stage], column))
        held_out_rows.append(row)
        for stage in ("sft", "ppo_lag"):
            row = [f"{METHODS[stage].label}, {label}"]
            for column in POLICY_COLUMNS.values():
                row.append(format_cell(results[stage], column))
            policy_rows.append(row)
    print(format_markdown(["", *HELD_OUT_COLUMNS], held_out_rows))
    print(format_markdown(["", *POLICY_COLUMNS], policy_rows))


def draw(limits, policies):
    """Draw harm and helpfulness as cost_limit changes, and whether the limits are kept."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    harm = [100 * result["harm_rate_risky"] for result in limits.values()]
    helpfulness = [result["helpfulness_benign"] for result in limits.values()]
    left.plot(harm, helpfulness, "o-", label="PPO-Lag")
    for limit, x, y in zip(limits, harm, helpfulness):
        left.annotate(f" {limit:g}", (x, y), va="top", fontsize=8)
    for name, label in (("sft", "SFT"), ("ppo", "PPO")):
        result = policies[name]
        if result:
            x, y = 100 * result["harm_rate_risky"], result["helpfulness_benign"]
            left.plot(x, y, "s", label=label)
    left.set_xlabel("harmful requests answered, %")
    left.set_ylabel("helpfulness to harmless requests")
    left.set_ylim(0, 4)
    left.legend(fontsize=8)
    values = list(limits)
    costs = [result["cost"] for result in limits.values()]
    errors = [2 * result["error"] for result in limits.values()]
    right.plot(values, values, color="gray", lw=1, label="the limit")
    label = "mean cost ± 2 standard errors"
    right.errorbar(values, costs, errors, fmt="o", capsize=3, label=label)
    right.set(xlabel="cost_limit", ylabel="mean cost, last 80 rollouts")
    right.legend(fontsize=8)
    figure.savefig(os.path.join(REPOSITORY, "docs", "methods.png"), dpi=110)


if __name__ == "__main__":
    main()
