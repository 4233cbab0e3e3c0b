"""nanosafe's speed and memory beside its peers', and beside what this machine allows at most.

$ pip install -e ".[bench]" && python -m nanosafe.bench    # on the toy's texts, after nanosafe.demo
$ python -m nanosafe.bench --pairs=PAIRS.jsonl --dialogues=DIALOGUES.jsonl --tokenizer=FOLDER
$ python -m nanosafe.bench --device=cuda --quick    # nanosafe alone, in minutes: quick_bench.py

Both sides get the same weights, tokens and prompts. Each workload runs in processes of its own
(workloads.py, peer_workloads.py), in turn: A B A B. The bench stops where the first losses or
logits of the two sides differ. It prints a table and writes its numbers as JSON."""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

from configurator import configure
from nanosafe import checkpoint
from nanosafe.data import tokenize
from nanosafe.data.batching import examples_at
from nanosafe.errors import choose, stop
from nanosafe.model import Config
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.storage import REPOSITORY, make_folder, read_json, write_json
from nanosafe.tokenizer import load as load_tokenizer
from nanosafe.tools import plan, plot, quick_bench

quick = False  # is it right and how fast, on random models and without data, in five minutes
long = False  # the same, then models of 7B and the sizes that others publish, on a GPU
workloads = "load,forward,sft,reward,cost,dpo,generate,generate_eos,ppo,ppo_lag,growth"  # all
peers = "transformers,trl"  # whom to measure beside; empty: nanosafe alone
device = "cpu"  # cpu | cuda
dtype = "auto"  # of both sides: auto | bfloat16 | float32; auto is bfloat16 on a GPU
pairs = "toy/pairs"  # pairs; their prompts are answered, too
safety_pairs = "toy/pairs"  # pairs with safety labels
dialogues = "toy/sft"  # demonstrations
tokenizer = "out/demo/tokenizer"  # a folder
vocab_size = 32000  # of the model
hidden_size = 256  # of the model: width D
num_hidden_layers = 6  # of the model: blocks
num_attention_heads = 8  # of the model: heads H
batch_size = 32  # sequences, pairs or prompts of a step
steps = 4  # of each process; the first is warm-up
repetitions = 3  # of each process
max_tokens = 1024  # nanosafe's packed tokens per forward
micros = "2,4,8"  # the peers' sequences per forward; the best one counts
max_new_tokens = 64  # of PPO's responses; twice as many in generation
folder = "out/bench"  # weights, tokens, and what the runs write
out = "docs/benchmarks.json"  # the numbers

TOKENS_PER_EOS = 80  # in generate_eos, one token in so many ends a response
TOLERANCES = {"float32": 2e-3, "bfloat16": 5e-2}  # of losses and logits between the two sides
PEERS = {  # workload -> (the peer, its name for the workload); TRL has no PPO-Lag
    "load": ("transformers", "load"),
    "forward": ("transformers", "forward"),
    "generate": ("transformers", "generate"),
    "generate_eos": ("transformers", "generate"),
    "sft": ("trl", "sft"),
    "reward": ("trl", "reward"),
    "dpo": ("trl", "dpo"),
    "ppo": ("trl", "ppo"),
    "ppo_lag": ("trl", "ppo"),
}
UNITS = {  # what a workload counts per second, where it is not tokens
    "load": "tensors",
    "reward": "pairs",
    "cost": "pairs",
    "dpo": "pairs",
    "ppo": "responses",
    "ppo_lag": "responses",
}
PHASES = {  # of the planner -> of PhaseClock in workloads.py
    "prompts": "rollout",
    "responses": "rollout",
    "old log-probs": "actor: scoring",
    "reference": "reference: scoring",
    "reward": "reward model: scoring",
    "reward values": "reward critic: scoring",
    "cost": "cost model: scoring",
    "cost values": "cost critic: scoring",
    "actor": "actor: updates",
    "reward critic": "reward critic: updates",
    "cost critic": "cost critic: updates",
    "ptx": "ptx: updates",
}


def main():
    knobs = SimpleNamespace(**configure(globals()))
    check_ranges(vars(knobs))
    given = dict(vars(knobs))
    choose("dtype", knobs.dtype, ("auto", "bfloat16", "float32"))
    if knobs.steps < 2:
        stop(f"steps={knobs.steps}: the first step is warm-up, so give at least 2")
    if knobs.dtype == "auto":
        knobs.dtype = "float32" if knobs.device == "cpu" else "bfloat16"
    if knobs.quick or knobs.long:
        quick_bench.run(knobs.device, knobs.dtype, knobs.folder, knobs.long)
        return
    shape, lengths = prepare(knobs)
    machine = plan.measure_this_machine(knobs.device, knobs.dtype)
    about = {
        "machine": machine._asdict(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "knobs": given,
        "lengths": lengths,
    }
    rows = []
    for name in knobs.workloads.split(","):
        row = measure(knobs, name)
        add_limit(row, knobs, shape, lengths, machine)
        row.update(about)
        rows.append(row)
        print(format_rows([row]), flush=True)
        keep_row(knobs.out, row)
        if name == "ppo_lag":
            draw_phases(row, picture_path(knobs))
    print("\n" + format_rows(rows))


# ---- models and tokens ----


def prepare(knobs):
    """Write the models, and for the peers the tokens of all steps in the order that we take them.

    Returns the models' Config, and {data: (tokens, targets) per example, on average}."""
    make_folder(knobs.folder)
    tok = load_tokenizer(knobs.tokenizer)
    shape = Config(
        vocab_size=max(knobs.vocab_size, tok.vocab_size),
        hidden_size=knobs.hidden_size,
        intermediate_size=knobs.hidden_size * 43 // 16,
        num_hidden_layers=knobs.num_hidden_layers,
        num_attention_heads=knobs.num_attention_heads,
        initializer_range=knobs.hidden_size**-0.5,
    )
    path = os.path.join(knobs.folder, "model")
    checkpoint.save(checkpoint.init_from_scratch(shape, "lm", seed=0), path, tok)
    for seed, kind in enumerate(("reward", "cost")):
        model = checkpoint.load(path, "score", score_type=kind, seed=seed)
        checkpoint.save(model, os.path.join(knobs.folder, kind), tok)
    lengths = {}
    demonstrations = tokenize(knobs.dialogues, tok, "sft", 512)
    lengths["sft"] = write_examples(knobs, "sft", demonstrations, read_demonstration)
    compared = tokenize(knobs.pairs, tok, "reward", 512)
    lengths["pairs"] = write_examples(knobs, "pairs", compared, read_pair)
    labelled = tokenize(knobs.safety_pairs, tok, "cost", 512)
    lengths["cost"] = write_examples(knobs, "cost", labelled, read_pair)
    prompts = tokenize(knobs.pairs, tok, "prompts", 256)
    lengths["prompts"] = write_examples(knobs, "prompts", prompts, read_prompt)
    first = [read_prompt(prompts, i) for i in examples_at(0, len(prompts), 64, 0)]
    write_json(first, knobs.folder, "prompts64.json")
    return shape, lengths


def write_examples(knobs, name, dataset, read_example):
    """Write the examples of all steps; returns their mean numbers of tokens and of targets."""
    examples = []
    for step in range(knobs.steps):
        examples += list(examples_at(step, len(dataset), knobs.batch_size, 0))
    write_json([read_example(dataset, i) for i in examples], knobs.folder, name + ".json")
    return dataset.lengths[examples].mean(), dataset.target_counts[examples].mean()


def read_demonstration(dataset, i):
    """[ids, mask]"""
    ids, mask = dataset.sequence(i)
    return [ids.tolist(), mask.tolist()]


def read_prompt(dataset, i):
    ids, _ = dataset.sequence(i)
    return ids.tolist()


def read_pair(dataset, i):
    """[ids of the preferred text, ids of the other, where the responses begin]"""
    chosen, mask = dataset.sequence(i, 0)
    rejected, _ = dataset.sequence(i, 1)
    return [chosen.tolist(), rejected.tolist(), mask.tolist().index(1)]


# ---- measuring ----


def measure(knobs, name):
    """Both sides of a workload in turn -> a row: of each, work per second and peak of memory."""
    settings = peer_settings(knobs, name)
    reports = {"nanosafe": []}
    for setting in settings:
        reports[setting] = []
    for _ in range(1 if name == "growth" else knobs.repetitions):
        module, work = "workloads", name.removesuffix("_eos")
        ours = run_process(knobs, "nanosafe", module, work, own_options(knobs, name))
        reports["nanosafe"].append(ours)
        for setting, options in settings.items():
            peer, work = PEERS[name]
            theirs = run_process(knobs, peer, "peer_workloads", work, options)
            reports[setting].append(theirs)
            check_agreement(knobs, name, setting, ours, theirs)
    row = {"workload": name, "dtype": knobs.dtype}
    for side, found in reports.items():
        row[side] = summarize(found)
    row["amount"] = statistics.mean(join(reports["nanosafe"], "work"))
    last = reports["nanosafe"][-1]
    for key in ("phases", "grown", "losses"):
        if key in last:
            row[key] = last[key]
    if settings:
        row["best"] = max(settings, key=lambda setting: row[setting]["rate"])
        best = row[row["best"]]
        row["ratio"] = row["nanosafe"]["rate"] / best["rate"]
        row["memory"] = row["nanosafe"]["peak"] / best["peak"]
    return row


def join(reports, key):
    """The numbers of all reports in one list."""
    joined = []
    for report in reports:
        joined += report[key]
    return joined


def summarize(reports):
    rates = []
    for work, seconds in zip(join(reports, "work"), join(reports, "seconds")):
        rates.append(work / seconds)
    return {
        "rate": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "peak": statistics.median(report["peak"] for report in reports),
    }


def run_process(knobs, side, module, work, options):
    """Run a workload in a process of its own, and return its report."""
    report = os.path.join(knobs.folder, "report.json")
    shutil.rmtree(os.path.join(knobs.folder, "ours"), ignore_errors=True)
    command = [sys.executable, "-m", f"nanosafe.tools.{module}", work, knobs.folder, report]
    options = {"device": knobs.device, "dtype": knobs.dtype, **options}
    for key, value in options.items():
        command.append(f"{key}={json.dumps(value)}")
    search_path = [REPOSITORY, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))}
    with open(os.path.join(knobs.folder, "log.txt"), "w+") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            log.seek(0)
            end = log.read().strip()[-300:]
            stop(f"{side}'s {work} failed, {log.name} says why: {end}")
    with open(report) as f:
        return json.load(f)


def own_options(knobs, name):
    """The options of a workload on nanosafe's side."""
    if name.startswith("generate"):
        return generation_options(knobs, name)
    if name in ("load", "growth"):
        return {"repetitions": knobs.steps}
    if name == "forward":
        return {"repetitions": knobs.steps, "max_tokens": knobs.max_tokens}
    options = {"batch_size": knobs.batch_size, "steps": knobs.steps}
    options["max_tokens"] = knobs.max_tokens
    options["data"] = {"sft": knobs.dialogues, "cost": knobs.safety_pairs}.get(name, knobs.pairs)
    if name in ("ppo", "ppo_lag"):
        options["max_new_tokens"] = knobs.max_new_tokens
    if name == "ppo_lag":
        options["ptx_data"] = knobs.dialogues
    return options


def peer_settings(knobs, name):
    """{setting: options} that are tried on the peer's side; none where no peer is measured."""
    if name not in PEERS or PEERS[name][0] not in knobs.peers.split(","):
        return {}
    if name == "load":
        return {"load": {"repetitions": knobs.steps}}
    if name.startswith("generate"):
        micros = [32, 64]
    else:
        micros = [int(text) for text in knobs.micros.split(",")]
    settings = {}
    for micro in micros:
        if name.startswith("generate"):
            options = generation_options(knobs, name)
        elif name == "forward":
            options = {"repetitions": knobs.steps}
        else:
            options = {"batch_size": knobs.batch_size, "steps": knobs.steps}
        if name in ("ppo", "ppo_lag"):
            options["rollout"] = knobs.batch_size
            options["max_new_tokens"] = knobs.max_new_tokens
        trainer = "trl, " if PEERS[name][0] == "trl" else ""
        settings[f"{trainer}{micro} at a time"] = {**options, "micro": micro}
    if name == "sft":
        packed = {"batch_size": knobs.batch_size // 4, "steps": knobs.steps}
        settings["trl, packed"] = {**packed, "micro": 2, "packing": 512}
    return settings


def generation_options(knobs, name):
    eos = []
    if name == "generate_eos":
        eos = list(range(3, 3 + knobs.vocab_size // TOKENS_PER_EOS))
    return {
        "max_new_tokens": 2 * knobs.max_new_tokens,
        "repetitions": knobs.steps,
        "eos": eos,
    }


def check_agreement(knobs, name, setting, ours, theirs):
    """Stop if two sides that should compute the same do not. On a CPU, TRL's packing does not."""
    if "logits" in ours:
        our_numbers = ours["logits"] + [ours["sum"] / 1e4]
        their_numbers = theirs["logits"] + [theirs["sum"] / 1e4]
    elif name in ("sft", "dpo", "reward") and "packed" not in setting:
        our_numbers = ours["losses"][:2]
        their_numbers = theirs["losses"][:2]
    else:
        return
    difference = max(abs(a - b) for a, b in zip(our_numbers, their_numbers))
    if difference > TOLERANCES[knobs.dtype]:
        stop(
            f"{name}: nanosafe has {our_numbers[:3]}, {setting} {their_numbers[:3]}: "
            "they do not compute the same"
        )


# ---- the limit of this machine ----


def add_limit(row, knobs, shape, lengths, machine):
    """Add the seconds of each phase at this machine's roofline, and nanosafe's share of that."""
    amount = row.pop("amount")  # of work in one step or repetition
    if row["workload"] in ("load", "growth"):
        return
    row["limit"] = limit_seconds(row["workload"], knobs, shape, lengths, machine)
    row["share"] = sum(row["limit"].values()) * row["nanosafe"]["rate"] / amount


def limit_seconds(name, knobs, shape, lengths, machine):
    """{phase: seconds} of a step or a repetition at the roofline of this machine."""
    flags = [f"--batch_size={knobs.batch_size}", f"--max_tokens={knobs.max_tokens}"]
    flags.append(f"--dtype={knobs.dtype}")
    if name in ("sft", "forward"):
        script = "train_sft.py"
        length, targets = lengths["sft"]
    elif name in ("reward", "cost", "dpo"):
        script = "train_pref.py"
        flags.append(f"--objective={name}")
        length, targets = lengths["cost" if name == "cost" else "pairs"]
        length, targets = length / 2, targets / 2  # of each text of a pair
    else:
        script = "train_ppo_lag.py"
        prompts = 64 if name.startswith("generate") else knobs.batch_size
        flags += [f"--rollout_size={prompts}", "--max_len=512"]
        flags.append("--cost_model=" if name == "ppo" else "--ptx_data=x")
        targets = 2 * knobs.max_new_tokens if name == "generate" else knobs.max_new_tokens
        length = lengths["prompts"][0] + targets
    with contextlib.redirect_stdout(None):
        script_knobs = plan.read_knobs(os.path.join(REPOSITORY, script), flags)
    run = plan.Run(script_knobs, shape, machine, 1, length, targets)
    phases = run.phases()
    if name == "forward":
        phases = [run.score(name, "lm", 64 * length, 64 * length, 1)]
    if name.startswith("generate"):
        phases = phases[:2]  # prompts and responses
    return {times.name: times.roofline for times in run.times(phases)}


# ---- what is written ----


def keep_row(path, row):
    """Write a row to the JSON file, in the place of an earlier run's row of the same kind."""
    out_dir, name = os.path.dirname(path) or ".", os.path.basename(path)
    rows = []
    for other in read_json(out_dir, name).get("rows", []):
        other_kind = other["workload"], other.get("dtype", "float32")
        if other_kind != (row["workload"], row["dtype"]):
            rows.append(other)
    rows.append(row)
    write_json({"rows": rows}, out_dir, name)


def picture_path(knobs):
    path = os.path.splitext(knobs.out)[0] + "_ppo_lag"
    if knobs.dtype == "bfloat16" and knobs.device == "cpu":
        path += "_bfloat16"
    return path


def draw_phases(row, path):
    """Draw the phases of an iteration of PPO-Lag, as measured and at the machine's limit."""
    made = plot.make_figure(width=7, height=4)
    if made is None:
        return
    figure, axes = made
    axis = axes[0, 0]
    limits = {}
    for name, seconds in row["limit"].items():
        limits[PHASES[name]] = limits.get(PHASES[name], 0.0) + seconds
    names = [name for name in limits if name in row["phases"]]
    names.reverse()  # the first on top
    measured = [row["phases"][name] for name in names]
    axis.barh(names, measured, color=plot.BLUE, label="measured")
    allowed = [limits[name] for name in names]
    axis.barh(names, allowed, color=plot.GOLD, height=0.4, label="at the machine's limit")
    axis.set(xlabel="seconds", title="one iteration of PPO-Lag")
    axis.legend()
    plot.save_figure(figure, os.path.dirname(path), os.path.basename(path))


def format_rows(rows):
    """The table of what was measured, then the phases of PPO, and how costs grow."""
    table = [
        [
            "",
            "per second",
            "nanosafe",
            "best of the peer",
            "ratio",
            "share of the limit",
            "peak, MB",
            "its share of the peer's",
        ]
    ]
    for row in rows:
        if "grown" not in row:
            table.append(format_row(row))
    lines = [format_table(table)]
    for row in rows:
        if row["workload"].startswith("ppo"):
            lines.append(f"{row['workload']}, seconds: {format_phases(row['phases'])}")
        for size, points in row.get("grown", {}).items():
            costs = [f"{value}: {1e6 * seconds:.0f}" for value, seconds in points]
            lines.append(f"microseconds per token by {size}: {', '.join(costs)}")
    return "\n".join(lines)


def format_row(row):
    name = row["workload"]
    cells = [name, UNITS.get(name, "tokens"), format_rate(row["nanosafe"])]
    share = f"{row['share']:.0%}" if "share" in row else "-"
    peak = f"{row['nanosafe']['peak'] / 1e6:.0f}"
    if "best" not in row:
        return [*cells, "-", "-", share, peak, "-"]
    best = f"{format_rate(row[row['best']])}, {row['best']}"
    return [*cells, best, f"{row['ratio']:.2f}", share, peak, f"{row['memory']:.2f}"]


def format_rate(side):
    return f"{side['rate']:.4g} [{side['least']:.3g}, {side['most']:.3g}]"


def format_phases(phases):
    total = sum(phases.values())
    parts = [f"{name} {seconds:.2f} ({seconds / total:.0%})" for name, seconds in phases.items()]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
