"""Every method on the toy world, judged by gold: the table of docs/methods.md.

$ python tests/methods.py [--seeds=0,1,2] [--out_dir=out/methods] [--part=methods,phf,limits]

Runs the commands that the README shows, each in a process of its own, with one thread by default
(OMP_NUM_THREADS). What has a result already is not run again; --report_only=True prints the tables
and draws docs/methods.png (pip install matplotlib) of what is there.
"""

import json
import math
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from nanosafe import data
from nanosafe.tools import demo
from nanosafe.storage import load_python_file  # noqa: E402

MODELS = "--actor_model={o}/sft/model --reward_model={o}/reward/model"
LAG = MODELS + " --cost_model={o}/cost/model"
SAMPLE = "sample.py --model={o}/sft/model --prompts=toy/prompts --num_samples=8 --max_new_tokens=64 --reward_model={o}/reward/model "
PREF = "train_pref.py config/toy/{k}.py --init_from={o}/sft/model"
SEED = " --seed={s} --out_dir={o}/{k}"
METHODS = {  # key -> label, commands; the judged model is {o}/{key}/model
    "sft": ("SFT", ["train_sft.py config/toy/sft.py --tokenizer={o}/tokenizer" + SEED]),
    "reward": ("", [PREF + SEED]),
    "cost": ("", [PREF + SEED]),
    "best_of_8": (
        "best of 8 samples",
        [
            "sample.py --model={o}/sft/model --prompts=toy/prompts/test --num_samples=8 --max_new_tokens=64 "
            "--reward_model={o}/reward/model --write=sft --out={o}/best_of_8.jsonl --seed={s}"
        ],
    ),
    "rft": (
        "RFT: SFT on the best of 8",
        [
            SAMPLE + "--write=sft --out={o}/best.jsonl --seed={s}",
            "train_sft.py config/toy/rft.py --init_from={o}/sft/model --data={o}/best.jsonl" + SEED,
        ],
    ),
    "dpo": ("DPO", [PREF + SEED]),
    "ipo": ("IPO", [PREF + SEED]),
    "rrhf": (
        "RRHF, 8 answers ranked",
        [SAMPLE + "--out={o}/answers.jsonl --seed={s}", PREF + " --data={o}/answers.jsonl" + SEED],
    ),
    "ppo": ("PPO", ["train_ppo_lag.py config/toy/ppo.py " + MODELS + SEED]),
    "ppo_max": (
        "PPO-max",
        ["train_ppo_lag.py config/toy/ppo.py config/toy/ppo_max.py " + MODELS + SEED],
    ),
    "shaping": (
        "PPO, fixed shaping",
        ["train_ppo_lag.py config/toy/ppo_lag.py --lambda_init=1 --lambda_lr=0 " + LAG + SEED],
    ),
    "ppo_lag": ("PPO-Lag", ["train_ppo_lag.py config/toy/ppo_lag.py " + LAG + SEED]),
    "rloo_lag": (
        "RLOO-Lag, no critics",
        ["train_ppo_lag.py config/toy/ppo_lag.py config/toy/rloo_lag.py " + LAG + SEED],
    ),
    "grpo_lag": (
        "GRPO-Lag, no critics",
        [
            "train_ppo_lag.py config/toy/ppo_lag.py config/toy/rloo_lag.py --advantage=grpo "
            + LAG
            + SEED
        ],
    ),
    "ppo_lag_2": (
        "PPO-Lag, two rounds",
        [
            "sample.py --model={o}/ppo_lag/model --prompts=toy/prompts --num_samples=4 --max_new_tokens=64 "
            "--out={o}/round2/answers.jsonl --seed={s} --reward_model={o}/reward/model",
            "data/toy/prepare.py --annotate={o}/round2/answers.jsonl --out={o}/round2/pairs.jsonl",
            *(
                "train_pref.py config/toy/" + name + ".py --init_from={o}/" + name + "/model "
                "--data=toy/pairs:4000/-1,{o}/round2/pairs.jsonl --learning_rate=3e-4 --out_dir={o}/round2/"
                + name
                for name in ("reward", "cost")
            ),
            "train_ppo_lag.py config/toy/ppo_lag.py --actor_model={o}/ppo_lag/model --reward_model={o}/round2/reward/model "
            "--cost_model={o}/round2/cost/model" + SEED,
        ],
    ),
}
LIMITS = (-4.5, -4.0, -3.0, -2.0, -1.0)
OBJECTIVES = ("mle", "filter", "conditional", "unlikelihood", "awr", "rwr")


def run(command, log):
    """Run a command of the README; returns its seconds."""
    began = time.perf_counter()
    words = command.split()
    if words[0] != "-m":
        words[0] = os.path.join(ROOT, words[0])
    with open(log, "a") as f:
        f.write(f"\n$ python {command}\n")
        f.flush()
        done = subprocess.run(
            [sys.executable, *words],
            stdout=f,
            stderr=f,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": ROOT},
        )
    if done.returncode:
        raise SystemExit(f"error: python {command} failed: see {log}")
    return time.perf_counter() - began


def result(folder, key, make):
    """make()'s dict, kept in folder/key.json; what is there is not made again."""
    path = os.path.join(folder, key + ".json")
    if not os.path.exists(path):
        print(f"{time.strftime('%H:%M')} {folder} {key}", flush=True)
        value = make()
        os.makedirs(folder, exist_ok=True)
        with open(path, "w") as f:
            json.dump(value, f, indent=1)
    with open(path) as f:
        return json.load(f)


def last_row(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return json.loads(f.readlines()[-1])


def run_method(toy, o, seed, key):
    commands = [c.format(o=o, s=seed, k=key) for c in METHODS[key][1]]
    seconds = sum(run(c, f"{o}/log.txt") for c in commands)
    if key in ("reward", "cost"):
        return {
            "seconds": seconds,
            **{k: v for k, v in last_row(f"{o}/{key}").items() if "eval" in k},
        }
    if key == "best_of_8":  # its KL has a closed form, of which this is the upper bound
        judged = demo.gold(
            toy, [(row["input"], row["answer"]) for row in data.load(f"{o}/best_of_8.jsonl")]
        )
        judged["kl"] = math.log(8) - 7 / 8
    else:
        judged = demo.judge(toy, f"{o}/{key}/model", f"{o}/sft/model")
    return {**judged, "seconds": seconds}


def run_limit(toy, o, limit):
    """PPO-Lag under another limit. A greater KL weight makes the policy's answer to lambda smooth, and a slow lambda
    waits for it: with the demo's setting the two chase each other. The error is that of means of 16 rollouts, since
    neighbouring rollouts are alike."""
    out = f"{o}/limit_{limit}"
    run(
        f"train_ppo_lag.py config/toy/ppo_lag.py {LAG.format(o=o)} --cost_limit={limit} --max_steps=240 --kl_coef=1.0 "
        f"--actor_lr_schedule=constant --lambda_lr=0.02 --lambda_init=0.8 --out_dir={out}",
        f"{o}/log.txt",
    )
    with open(f"{out}/metrics.jsonl") as f:
        rows = [json.loads(line) for line in f][-160::2]  # the last 80 rollouts
    costs = [sum(row["cost"] for row in rows[i : i + 16]) / 16 for i in range(0, 80, 16)]
    mean = sum(costs) / len(costs)
    error = math.sqrt(sum((c - mean) ** 2 for c in costs) / (len(costs) - 1) / len(costs))
    return {
        **demo.judge(toy, f"{out}/model", f"{o}/sft/model"),
        "cost": mean,
        "error": error,
        "lambda": sum(row["lambda"] for row in rows) / len(rows),
    }


def run_phf(o, seed, objective):
    reference = "" if objective == "mle" else f" --reference={o}/phf/mle/model"
    run(
        f"-m nanosafe.phf.train config/toy/phf.py --objective={objective} --tokenizer={o}/tokenizer --seed={seed} "
        f"--out_dir={o}/phf/{objective}{reference}",
        f"{o}/log.txt",
    )
    return {k: v for k, v in last_row(f"{o}/phf/{objective}").items() if k.startswith("eval_")}


def spread(values, form="{:.2f}"):
    mean = sum(values) / len(values)
    return f"{form.format(mean)} ({form.format(min(values))} to {form.format(max(values))})"


def report(out_dir, seeds):
    def load(seed, key):
        path = f"{out_dir}/{seed}/{key}.json"
        return json.load(open(path)) if os.path.exists(path) else None

    head = [
        "method",
        "helpful, benign",
        "helpful, risky",
        "harmful, risky",
        "refused, benign",
        "KL",
        "seconds",
    ]
    rows = []
    for key, (label, _) in METHODS.items():
        found = [x for x in (load(s, key) for s in seeds) if x]
        if label and found:
            column = lambda name, scale=1, form="{:.2f}": spread(
                [scale * x[name] for x in found], form
            )
            rows.append(
                [
                    label,
                    column("helpfulness_benign"),
                    column("helpfulness_risky"),
                    column("harm_rate_risky", 100, "{:.1f}%"),
                    column("refusal_rate_benign", 100, "{:.1f}%"),
                    column("kl"),
                    f"{sum(x['seconds'] for x in found) / len(found):.0f}",
                ]
            )
    markdown(head, rows)
    rows = [(limit, x) for limit in LIMITS if (x := load(seeds[0], f"limit_{limit}"))]
    markdown(
        [
            "cost_limit",
            "mean cost, last 80 rollouts",
            "lambda",
            "helpful, benign",
            "harmful, risky",
            "refused, benign",
        ],
        [
            [
                limit,
                f"{x['cost']:.2f} ± {x['error']:.2f}",
                f"{x['lambda']:.2f}",
                f"{x['helpfulness_benign']:.2f}",
                f"{x['harm_rate_risky']:.1%}",
                f"{x['refusal_rate_benign']:.1%}",
            ]
            for limit, x in rows
        ],
    )
    if rows:
        draw(rows, {key: load(seeds[0], key) for key in ("sft", "ppo", "ppo_lag")})
    names = ("loss", "score", "score_max@25", "kl", "distinct_2", "self_bleu")
    lines = []
    for objective in OBJECTIVES:
        found = [x for x in (load(s, f"phf_{objective}") for s in seeds) if x]
        if found:
            lines.append(
                [
                    objective,
                    *(
                        spread([x["eval_" + n] for x in found], "{:.3f}")
                        if "eval_" + n in found[0]
                        else ""
                        for n in names
                    ),
                ]
            )
    markdown(
        [
            "objective",
            "held-out loss",
            "score, mean",
            "score_max@25",
            "KL from MLE, nats",
            "distinct bigrams",
            "self-BLEU",
        ],
        lines,
    )


def markdown(head, rows):
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def draw(rows, policies):
    """The harm-helpfulness picture over cost_limit."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(
        [100 * x["harm_rate_risky"] for _, x in rows],
        [x["helpfulness_benign"] for _, x in rows],
        "o-",
        label="PPO-Lag",
    )
    for limit, x in rows:
        left.annotate(
            f" {limit:g}",
            (100 * x["harm_rate_risky"], x["helpfulness_benign"]),
            va="top",
            fontsize=8,
        )
    for key, label in (("sft", "SFT"), ("ppo", "PPO")):
        if policies[key]:
            left.plot(
                100 * policies[key]["harm_rate_risky"],
                policies[key]["helpfulness_benign"],
                "s",
                label=label,
            )
    left.set(
        xlabel="harmful requests answered, %",
        ylabel="helpfulness to harmless requests",
        ylim=(0, 4),
    )
    left.legend(fontsize=8)
    limits = [limit for limit, _ in rows]
    right.plot(limits, limits, color="gray", lw=1, label="the limit")
    right.errorbar(
        limits,
        [x["cost"] for _, x in rows],
        [2 * x["error"] for _, x in rows],
        fmt="o",
        capsize=3,
        label="mean cost ± 2 standard errors",
    )
    right.set(xlabel="cost_limit", ylabel="mean cost, last 80 rollouts")
    right.legend(fontsize=8)
    fig.savefig(os.path.join(ROOT, "docs", "methods.png"), dpi=110)


def main(seeds="0,1,2", out_dir="out/methods", part="methods,phf,limits", report_only="False"):
    seeds = [int(s) for s in seeds.split(",")]
    toy = load_python_file(os.path.join(demo.ROOT, "data", "toy", "prepare.py"))
    for seed in seeds if report_only == "False" else ():
        o = f"{out_dir}/{seed}"
        result(o, "tokenizer", lambda: {"vocab": len(demo.prepare(o).ASKS)})
        for key in METHODS:
            if "methods" in part or key in ("sft", "reward", "cost"):
                result(o, key, lambda: run_method(toy, o, seed, key))
        for objective in OBJECTIVES if "phf" in part else ():
            result(o, f"phf_{objective}", lambda: run_phf(o, seed, objective))
        for limit in LIMITS if "limits" in part and seed == seeds[0] else ():
            result(o, f"limit_{limit}", lambda: run_limit(toy, o, limit))
    report(out_dir, seeds)


if __name__ == "__main__":
    main(**dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv[1:]))
