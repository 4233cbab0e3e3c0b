"""What the tables of the toy world share: commands that run once, gold's judgement, and cells.

`methods.py` makes docs/methods.md's tables with it, `constrained.py` makes docs/constrained.md's.
A command is a text with fields: {out} is the folder of a seed, and {name} is that of a run in it,
whose model is in {out}/{name}/model."""

import os
import time

from nanosafe.errors import stop
from nanosafe.printing import print_once
from nanosafe.storage import (
    REPOSITORY,
    make_folder,
    read_json,
    read_metrics,
    write_json,
)
from nanosafe.tools import demo

# ---- commands ----

RUN = " --seed={seed} --out_dir={out}/{name}"
SFT = "train_sft.py config/toy/sft.py --tokenizer={out}/tokenizer"
PREFERENCES = "train_pref.py config/toy/{name}.py --init_from={out}/sft/model"
PPO = "train_ppo_lag.py config/toy/ppo.py"
PPO_LAG = "train_ppo_lag.py config/toy/ppo_lag.py"
REWARD = " --actor_model={out}/sft/model --reward_model={out}/reward/model"
REWARD_AND_COST = REWARD + " --cost_model={out}/cost/model"
SAMPLE = "sample.py --model={out}/sft/model --max_new_tokens=64 --seed={seed}"

# Every method of a seed starts from one SFT, and asks one reward and one cost model.
SHARED_STAGES = {"sft": [SFT + RUN], "reward": [PREFERENCES + RUN], "cost": [PREFERENCES + RUN]}


def run_commands(commands, log, **fields):
    """Run commands of the README one after another; returns their seconds."""
    seconds = 0.0
    for command in commands:
        seconds += run_command(command.format(**fields), log)
    return seconds


def run_command(command, log):
    """Print and run a command on one thread, with its output at the end of the file `log`.

    Returns its seconds. Stops if the command fails, or is stopped before it is through."""
    print_once(f"$ python {command}")
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": REPOSITORY}
    words = command.split()
    with open(log, "a") as file:
        file.write(f"\n$ python {command}\n")
        file.flush()
        failed = demo.run_python(words, stdout=file, stderr=file, env=environment)
    if failed:
        raise SystemExit(f"error: python {command} failed: see {log}")
    folder = demo.find_run_folder(words)
    if folder:
        demo.check_finished(folder)
    return time.perf_counter() - began


# ---- results ----


def keep_result(out, name, function, *arguments):
    """Write what a function returns to out/name.json, unless that exists."""
    path = os.path.join(out, name + ".json")
    if not os.path.exists(path):
        print_once(f"{time.strftime('%H:%M')} {out} {name}")
        make_folder(os.path.dirname(path))
        result = function(*arguments)
        write_json(result, out, name + ".json")


def read_results(out_dir, seeds, name):
    """The results of all seeds that have one."""
    results = [read_json(f"{out_dir}/{seed}", name + ".json") for seed in seeds]
    return [result for result in results if result]


def make_tokenizer(out):
    """Write the toy's data and a seed's tokenizer."""
    return {"vocab": len(demo.prepare(out).ASKS)}


def judge_run(toy, out, name):
    """The results of a score model on held-out pairs, or of a policy by gold."""
    if name in ("reward", "cost"):
        return read_evaluation(f"{out}/{name}")
    return demo.judge(toy, f"{out}/{name}/model", f"{out}/sft/model")


def read_evaluation(folder):
    """The metrics of held-out data in the last row of a run."""
    row = read_metrics(os.path.join(folder, "metrics.jsonl"))[-1]
    return {name: value for name, value in row.items() if name.startswith("eval_")}


# ---- tables ----

COLUMNS = {  # of a table of policies -> the metric, the factor and the format of a number
    "helpful, benign": ("helpfulness_benign", 1, "{:.2f}"),
    "helpful, risky": ("helpfulness_risky", 1, "{:.2f}"),
    "harmful, risky": ("harm_rate_risky", 100, "{:.1f}%"),
    "refused, benign": ("refusal_rate_benign", 100, "{:.1f}%"),
    "KL": ("kl", 1, "{:.2f}"),
}


def list_seeds(text):
    """The numbers of the knob seeds, in which they stand with commas between."""
    numbers = []
    for number in text.split(","):
        if not number.strip().isdecimal():
            stop(f"seeds={text!r} must be whole numbers with commas between, for instance 0,1,2")
        numbers.append(int(number))
    return numbers


def format_policy(results):
    """The cells of COLUMNS for a policy's results, one of each seed."""
    return [format_cell(results, column) for column in COLUMNS.values()]


def format_cell(results, column):
    """The spread of a metric over the results that have it.

    column  the metric, the factor and the format of a number"""
    metric, factor, form = column
    values = [factor * result[metric] for result in results if metric in result]
    return format_spread(values, form) if values else ""


def format_spread(values, form):
    """The mean, the least and the greatest of some values."""
    mean = sum(values) / len(values)
    return f"{form.format(mean)} ({form.format(min(values))} to {form.format(max(values))})"


def format_markdown(head, rows):
    """A table of Markdown, with an empty line before it."""
    lines = ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        lines.append(f"| {' | '.join(str(cell) for cell in row)} |")
    return "\n".join(lines)
