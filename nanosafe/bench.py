"""nanosafe beside its peers, and beside what the machine allows: one table, and its numbers as JSON.

$ pip install -e ".[bench]"
$ python -m nanosafe.bench                    # on the toy's texts, after python -m nanosafe.demo
$ python -m nanosafe.bench --pairs=PAIRS.jsonl --dialogues=DIALOGUES.jsonl --tokenizer=FOLDER

Both sides get the same weights, tokens and prompts. Each measurement is a process of its own
(tests/workloads.py), in turn: A B A B. So a peak of memory is its own, and a noisy machine is noisy
to all. Where both sides' first losses, or logits, differ, it stops. Tokens are without padding."""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys

import torch

from configurator import configure
from nanosafe import checkpoint, plan
from nanosafe import tokenizer as tokenizers
from nanosafe.data import tokenize
from nanosafe.files import make_folder, stop, table, write_json
from nanosafe.model import Config
from nanosafe.packing import examples_at

workloads = "load,forward,sft,reward,cost,dpo,generate,generate_eos,ppo,ppo_lag,growth"  # which
peers = "transformers,trl"  # whom to measure beside; empty: nanosafe alone
device = "cpu"  # cpu | cuda
pairs = "toy/pairs"  # pairs; their prompts are answered, too
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

config = configure(globals())

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EOS = 80  # one in so many tokens ends a response of generate_eos: 64 tokens on average, at most 128

def prepare():
    """Write models and tokens: for the peers, those of all steps in the order that we take them."""
    make_folder(folder)
    tok = tokenizers.load(tokenizer)
    shape = Config(max(vocab_size, tok.vocab_size), hidden_size, hidden_size * 43 // 16,
                   num_hidden_layers, num_attention_heads, initializer_range=hidden_size**-0.5)
    checkpoint.save(checkpoint.scratch(shape, "lm", seed=0), f"{folder}/model", tok)
    for seed, kind in enumerate(("reward", "cost")):
        model = checkpoint.load(f"{folder}/model", "score", score_type=kind, seed=seed)
        checkpoint.save(model, f"{folder}/{kind}", tok)
    sets = {"sft": tokenize(dialogues, tok, "sft", 512), "pairs": tokenize(pairs, tok, "reward", 512),
            "prompts": tokenize(pairs, tok, "prompts", 256)}
    lengths = {}
    for name, found in sets.items():
        examples = [i for s in range(steps) for i in examples_at(s, len(found), batch_size, 0)]
        rows = [[[x.tolist() for x in found.sequence(i, part)] for part in range(found.width)]
                for i in examples]
        shown = {"sft": lambda row: row[0], "prompts": lambda row: row[0][0],
                 "pairs": lambda row: [row[0][0], row[1][0], row[0][1].index(1)]}[name]
        write_json([shown(row) for row in rows], folder, name + ".json")
        lengths[name] = found.lengths[examples].mean(), found.targets[examples].mean()
    chosen = examples_at(0, len(sets["prompts"]), 64, 0)
    write_json([sets["prompts"].sequence(i)[0].tolist() for i in chosen], folder, "prompts64.json")
    return shape, lengths

def run(side, name, **options):
    """One process of tests/workloads.py -> its report, with its peak of memory in bytes."""
    report = os.path.join(folder, "report.json")
    shutil.rmtree(os.path.join(folder, "ours"), ignore_errors=True)
    command = [sys.executable, os.path.join(ROOT, "tests", "workloads.py"), side, name, folder, report]
    command += [f"{key}={json.dumps(value)}" for key, value in {"device": device, **options}.items()]
    with open(os.path.join(folder, "log.txt"), "w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                 env={**os.environ, "PYTHONPATH": ROOT})
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            log.seek(0)
            stop(f"{side}'s {name} failed, {log.name} says why: {log.read().strip()[-300:]}")
    with open(report) as f:
        found = json.load(f)
    return {**found, "peak": found["cuda_peak"] or usage.ru_maxrss * 1024}

def sides(name):
    """(nanosafe's options, {peer's setting: its options}, the peer) of a workload."""
    sizes = {"batch_size": batch_size, "steps": steps}
    ours, tried = {**sizes, "max_tokens": max_tokens}, [int(m) for m in micros.split(",")]
    settings = {f"trl, {m} at a time": {**sizes, "micro": m} for m in tried}
    if name in ("generate", "generate_eos"):
        eos = list(range(3, 3 + vocab_size // EOS)) if name == "generate_eos" else []
        same = {"max_new_tokens": 2 * max_new_tokens, "repetitions": steps, "eos": eos}
        return same, {f"{m} at a time": {**same, "micro": m} for m in (16, 32, 64)}, "transformers"
    if name in ("load", "forward", "growth"):
        same = {"repetitions": steps}
        ours = {**same, "max_tokens": max_tokens} if name == "forward" else same
        many = {f"{m} at a time": {**same, "micro": m} for m in tried}
        return ours, {"forward": many, "load": {"load": same}}.get(name, {}), "transformers"
    ours["data"] = dialogues if name == "sft" else pairs
    if name == "sft":
        settings["trl, packed"] = {**sizes, "batch_size": batch_size // 2, "micro": 2, "packing": 512}
    if name in ("ppo", "ppo_lag"):
        ours["max_new_tokens"] = max_new_tokens
        settings = {key: {**x, "rollout": batch_size, "max_new_tokens": max_new_tokens}
                    for key, x in settings.items()}
    return ours, settings if name != "cost" else {}, "trl"

def compare(name, shape, lengths, gpu):
    """Both sides in turn -> the row of a workload: of each, work per second and peak of memory."""
    ours, settings, peer = sides(name)
    settings = settings if peer in peers.split(",") else {}
    theirs = {"ppo_lag": "ppo", "generate_eos": "generate"}.get(name, name)  # theirs has no PPO-Lag
    reports = {"nanosafe": [], **{key: [] for key in settings}}
    for _ in range(repetitions if name != "growth" else 1):
        reports["nanosafe"].append(run("nanosafe", name.removesuffix("_eos"), **ours))
        for key, options in settings.items():
            reports[key].append(run("peer", theirs, **options))
            agree(name, key, reports["nanosafe"][-1], reports[key][-1])
    row = {"workload": name}
    for key, found in reports.items():
        rates = [work / s for r in found for work, s in zip(r["work"], r["seconds"])]
        row[key] = {"rate": statistics.median(rates), "least": min(rates), "most": max(rates),
                    "peak": statistics.median(r["peak"] for r in found)}
    first = reports["nanosafe"][-1]
    row.update({key: first[key] for key in ("phases", "grown", "losses") if key in first})
    if roofline := limit(name, shape, lengths, gpu):
        amount = statistics.mean(work for r in reports["nanosafe"] for work in r["work"])
        row["share"] = roofline * row["nanosafe"]["rate"] / amount
    if settings:
        best = max(settings, key=lambda key: row[key]["rate"])
        row.update(best=best, ratio=row["nanosafe"]["rate"] / row[best]["rate"],
                   memory=row["nanosafe"]["peak"] / row[best]["peak"])
    return row

def agree(name, setting, ours, theirs):
    """Stop if two sides that should compute the same do not; packing on a CPU mixes sequences."""
    if "logits" in ours:
        a, b = ours["logits"] + [ours["sum"] / 1e4], theirs["logits"] + [theirs["sum"] / 1e4]
    elif name in ("sft", "dpo", "reward") and "packed" not in setting:
        a, b = ours["losses"][:2], theirs["losses"][:2]
    else:
        return
    if max(abs(x - y) for x, y in zip(a, b)) > (2e-3 if device == "cpu" else 5e-2):
        stop(f"{name}: nanosafe has {a[:3]}, {setting} {b[:3]}: they do not compute the same")

def limit(name, shape, lengths, gpu):
    """Seconds of a step, or of a repetition, at this machine's own roofline; None: not counted."""
    kinds = {"sft": "train_sft.py", "forward": "train_sft.py", "ppo": "train_ppo_lag.py",
             "ppo_lag": "train_ppo_lag.py", "generate": "train_ppo_lag.py",
             "generate_eos": "train_ppo_lag.py"}
    if name in ("load", "growth"):
        return None
    script = kinds.get(name, "train_pref.py")
    flags = [f"--batch_size={batch_size}", f"--max_tokens={max_tokens}"]
    length, targets = lengths["sft" if script == "train_sft.py" else "pairs"]
    if script == "train_pref.py":
        flags, length, targets = [*flags, f"--objective={name}"], length / 2, targets / 2
    elif script == "train_ppo_lag.py":
        prompts = 64 if "generate" in name else batch_size
        targets = {"generate": 2 * max_new_tokens}.get(name, max_new_tokens)
        length = lengths["prompts"][0] + targets
        flags += [f"--rollout_size={prompts}", "--max_len=512", *["--cost_model="] * (name == "ppo")]
    with contextlib.redirect_stdout(None):
        knobs = plan.read_knobs(os.path.join(ROOT, script), flags)
    found = plan.Run(knobs, shape, gpu, 1, length, targets)
    rows = found.seconds()
    if name == "forward":
        rows = found.seconds([found.read(name, "lm", 64 * length, 64 * length, 1)])
    return sum(row[4] for row in (rows[:2] if "generate" in name else rows))

def main():
    shape, lengths = prepare()
    gpu = plan.this_machine(device)
    rows = []
    for name in workloads.split(","):
        rows.append(compare(name, shape, lengths, gpu))
        print(show(rows[-1:]), flush=True)
        write_json({"machine": gpu._asdict(), "torch": torch.__version__, "config": config,
                    "lengths": lengths, "rows": rows}, os.path.dirname(out), os.path.basename(out))
    print("\n" + show(rows))

UNITS = {"load": "tensors", "reward": "pairs", "cost": "pairs", "dpo": "pairs", "ppo": "responses",
         "ppo_lag": "responses"}

def show(rows):
    """The table of what was measured; then how it is made up, and how it grows."""
    head = ["", "per second", "nanosafe", "best of the peer", "ratio", "share of the limit",
            "peak, MB", "its share of the peer's"]
    shown = [head]
    for row in rows:
        if "grown" in row:
            continue
        best = row.get("best")
        rate = lambda x: f"{x['rate']:.4g} [{x['least']:.3g}, {x['most']:.3g}]"
        shown.append([row["workload"], UNITS.get(row["workload"], "tokens"), rate(row["nanosafe"]),
                      f"{rate(row[best])}, {best}" if best else "-",
                      f"{row['ratio']:.2f}" if best else "-",
                      f"{row['share']:.0%}" if "share" in row else "-",
                      f"{row['nanosafe']['peak'] / 1e6:.0f}",
                      f"{row['memory']:.2f}" if best else "-"])
    parts = [table(shown)]
    for row in rows:
        if row["workload"].startswith("ppo"):
            total = sum(row["phases"].values())
            parts.append(f"{row['workload']}, seconds: " + ", ".join(
                f"{name} {x:.2f} ({x / total:.0%})" for name, x in row["phases"].items()))
        for name, points in row.get("grown", {}).items():
            parts.append(f"microseconds per token by {name}: " + ", ".join(
                f"{size}: {1e6 * x:.0f}" for size, x in points))
    return "\n".join(parts)

if __name__ == "__main__":
    main()
