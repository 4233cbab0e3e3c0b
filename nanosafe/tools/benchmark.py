"""The harness of nanosafe.bench: prepares, runs both sides of each workload in turn, compares, tells."""

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

from nanosafe import checkpoint, tokenizer as tokenizers
from nanosafe.tools import plan, plot
from nanosafe.data import tokenize
from nanosafe.storage import make_folder, read_json, write_json
from nanosafe.errors import stop
from nanosafe.printing import format_table
from nanosafe.model import Config
from nanosafe.data.batching import examples_at

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
k = SimpleNamespace()  # the knobs of nanosafe/bench.py
EOS = 80  # one in so many tokens ends a response of generate_eos: 64 tokens on average, at most 128


def prepare():
    """Write models and tokens: for the peers, those of all steps in the order that we take them."""
    make_folder(k.folder)
    tok = tokenizers.load(k.tokenizer)
    shape = Config(
        max(k.vocab_size, tok.vocab_size),
        k.hidden_size,
        k.hidden_size * 43 // 16,
        k.num_hidden_layers,
        k.num_attention_heads,
        initializer_range=k.hidden_size**-0.5,
    )
    checkpoint.save(checkpoint.init_from_scratch(shape, "lm", seed=0), f"{k.folder}/model", tok)
    for seed, kind in enumerate(("reward", "cost")):
        model = checkpoint.load(f"{k.folder}/model", "score", score_type=kind, seed=seed)
        checkpoint.save(model, f"{k.folder}/{kind}", tok)
    sets = {
        "sft": tokenize(k.dialogues, tok, "sft", 512),
        "pairs": tokenize(k.pairs, tok, "reward", 512),
        "cost": tokenize(k.safety_pairs, tok, "cost", 512),
        "prompts": tokenize(k.pairs, tok, "prompts", 256),
    }
    lengths = {}
    for name, found in sets.items():
        examples = [i for s in range(k.steps) for i in examples_at(s, len(found), k.batch_size, 0)]
        rows = [
            [[x.tolist() for x in found.sequence(i, part)] for part in range(found.width)]
            for i in examples
        ]
        pair = lambda row: [row[0][0], row[1][0], row[0][1].index(1)]
        shown = {"sft": lambda row: row[0], "prompts": lambda row: row[0][0]}.get(name, pair)
        write_json([shown(row) for row in rows], k.folder, name + ".json")
        lengths[name] = found.lengths[examples].mean(), found.targets[examples].mean()
    chosen = examples_at(0, len(sets["prompts"]), 64, 0)
    write_json(
        [sets["prompts"].sequence(i)[0].tolist() for i in chosen], k.folder, "prompts64.json"
    )
    return shape, lengths


def run(side, name, **options):
    """One process of tests/workloads.py -> its report, with its peak of memory in bytes."""
    report = os.path.join(k.folder, "report.json")
    shutil.rmtree(os.path.join(k.folder, "ours"), ignore_errors=True)
    command = [
        sys.executable,
        os.path.join(ROOT, "tests", "workloads.py"),
        side,
        name,
        k.folder,
        report,
    ]
    machine = {"device": k.device, "dtype": k.dtype}
    command += [f"{key}={json.dumps(value)}" for key, value in {**machine, **options}.items()]
    with open(os.path.join(k.folder, "log.txt"), "w+") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": ROOT}
        )
        if done.returncode:
            log.seek(0)
            stop(f"{side}'s {name} failed, {log.name} says why: {log.read().strip()[-300:]}")
    with open(report) as f:
        return json.load(f)


def sides(name):
    """(nanosafe's options, {peer's setting: its options}, the peer) of a workload."""
    sizes = {"batch_size": k.batch_size, "steps": k.steps}
    ours, tried = {**sizes, "max_tokens": k.max_tokens}, [int(m) for m in k.micros.split(",")]
    settings = {f"trl, {m} at a time": {**sizes, "micro": m} for m in tried}
    if name in ("generate", "generate_eos"):
        eos = list(range(3, 3 + k.vocab_size // EOS)) if name == "generate_eos" else []
        same = {"max_new_tokens": 2 * k.max_new_tokens, "repetitions": k.steps, "eos": eos}
        return same, {f"{m} at a time": {**same, "micro": m} for m in (32, 64)}, "transformers"
    if name in ("load", "forward", "growth"):
        same = {"repetitions": k.steps}
        ours = {**same, "max_tokens": k.max_tokens} if name == "forward" else same
        many = {f"{m} at a time": {**same, "micro": m} for m in tried}
        return ours, {"forward": many, "load": {"load": same}}.get(name, {}), "transformers"
    ours["data"] = {"sft": k.dialogues, "cost": k.safety_pairs}.get(name, k.pairs)
    if name == "sft":
        settings["trl, packed"] = {
            **sizes,
            "batch_size": k.batch_size // 4,
            "micro": 2,
            "packing": 512,
        }
    if name in ("ppo", "ppo_lag"):
        ours["max_new_tokens"] = k.max_new_tokens
        if name == "ppo_lag":
            ours["ptx_data"] = k.dialogues
        settings = {
            key: {**x, "rollout": k.batch_size, "max_new_tokens": k.max_new_tokens}
            for key, x in settings.items()
        }
    return ours, settings if name != "cost" else {}, "trl"


def compare(name, shape, lengths, gpu):
    """Both sides in turn -> the row of a workload: of each, work per second and peak of memory."""
    ours, settings, peer = sides(name)
    settings = settings if peer in k.peers.split(",") else {}
    theirs = {"ppo_lag": "ppo", "generate_eos": "generate"}.get(name, name)  # theirs has no PPO-Lag
    reports = {"nanosafe": [], **{key: [] for key in settings}}
    for _ in range(k.repetitions if name != "growth" else 1):
        reports["nanosafe"].append(run("nanosafe", name.removesuffix("_eos"), **ours))
        for key, options in settings.items():
            reports[key].append(run("peer", theirs, **options))
            agree(name, key, reports["nanosafe"][-1], reports[key][-1])
    row = {"workload": name, "dtype": k.dtype}
    for key, found in reports.items():
        rates = [work / s for r in found for work, s in zip(r["work"], r["seconds"])]
        row[key] = {
            "rate": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "peak": statistics.median(r["peak"] for r in found),
        }
    first = reports["nanosafe"][-1]
    row.update({key: first[key] for key in ("phases", "grown", "losses") if key in first})
    if roofline := limit(name, shape, lengths, gpu):
        amount = statistics.mean(work for r in reports["nanosafe"] for work in r["work"])
        row.update(limit=roofline, share=sum(roofline.values()) * row["nanosafe"]["rate"] / amount)
    if settings:
        best = max(settings, key=lambda key: row[key]["rate"])
        row.update(
            best=best,
            ratio=row["nanosafe"]["rate"] / row[best]["rate"],
            memory=row["nanosafe"]["peak"] / row[best]["peak"],
        )
    return row


def agree(name, setting, ours, theirs):
    """Stop if two sides that should compute the same do not; packing on a CPU mixes sequences."""
    if "logits" in ours:
        a, b = ours["logits"] + [ours["sum"] / 1e4], theirs["logits"] + [theirs["sum"] / 1e4]
    elif name in ("sft", "dpo", "reward") and "packed" not in setting:
        a, b = ours["losses"][:2], theirs["losses"][:2]
    else:
        return
    if max(abs(x - y) for x, y in zip(a, b)) > (2e-3 if k.dtype == "float32" else 5e-2):
        stop(f"{name}: nanosafe has {a[:3]}, {setting} {b[:3]}: they do not compute the same")


def limit(name, shape, lengths, gpu):
    """Seconds of a step, or of a repetition, at this machine's own roofline; None: not counted."""
    kinds = {
        "sft": "train_sft.py",
        "forward": "train_sft.py",
        "ppo": "train_ppo_lag.py",
        "ppo_lag": "train_ppo_lag.py",
        "generate": "train_ppo_lag.py",
        "generate_eos": "train_ppo_lag.py",
    }
    if name in ("load", "growth"):
        return None
    script = kinds.get(name, "train_pref.py")
    flags = [f"--batch_size={k.batch_size}", f"--max_tokens={k.max_tokens}", f"--dtype={k.dtype}"]
    length, targets = lengths[
        "sft" if script == "train_sft.py" else "cost" if name == "cost" else "pairs"
    ]
    if script == "train_pref.py":
        flags, length, targets = [*flags, f"--objective={name}"], length / 2, targets / 2
    elif script == "train_ppo_lag.py":
        prompts = 64 if "generate" in name else k.batch_size
        targets = {"generate": 2 * k.max_new_tokens}.get(name, k.max_new_tokens)
        length = lengths["prompts"][0] + targets
        flags += [
            f"--rollout_size={prompts}",
            "--max_len=512",
            *["--cost_model=" if name == "ppo" else "--ptx_data=x"],
        ]
    with contextlib.redirect_stdout(None):
        knobs = plan.read_knobs(os.path.join(ROOT, script), flags)
    found = plan.Run(knobs, shape, gpu, 1, length, targets)
    rows = found.seconds()
    if name == "forward":
        rows = found.seconds([found.read(name, "lm", 64 * length, 64 * length, 1)])
    return {row[0]: row[4] for row in (rows[:2] if "generate" in name else rows)}


def main(**knobs):
    vars(k).update(knobs)
    if k.dtype == "auto":
        k.dtype = "float32" if k.device == "cpu" else "bfloat16"
    shape, lengths = prepare()
    gpu = plan.this_machine(k.device, k.dtype)
    rows = []
    for name in k.workloads.split(","):
        rows.append(
            {
                **compare(name, shape, lengths, gpu),
                "machine": gpu._asdict(),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "knobs": knobs,
                "lengths": lengths,
            }
        )
        print(show(rows[-1:]), flush=True)
        others = read_json(os.path.dirname(k.out) or ".", os.path.basename(k.out)).get(
            "rows", []
        )  # an earlier run's stay
        kept = [
            row
            for row in others
            if (row["workload"], row.get("dtype", "float32")) != (name, k.dtype)
        ]
        write_json(
            {"rows": [*kept, rows[-1]]}, os.path.dirname(k.out) or ".", os.path.basename(k.out)
        )
        if name == "ppo_lag":
            draw(
                rows[-1],
                os.path.splitext(k.out)[0]
                + "_ppo_lag"
                + "_bfloat16" * (k.dtype == "bfloat16" and k.device == "cpu"),
            )
    print("\n" + show(rows))


PHASES = {  # as planned -> as measured
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


def draw(row, path):
    """PPO-Lag's iteration, phase by phase, beside what the machine allows."""
    if not (made := plot.figure(width=7, height=4)):
        return
    drawn, ((axis,),) = made
    limits = {}
    for name, seconds in row["limit"].items():
        limits[PHASES[name]] = limits.get(PHASES[name], 0.0) + seconds
    names = [name for name in dict.fromkeys(PHASES.values()) if name in row["phases"]][::-1]
    axis.barh(
        names, [row["phases"][name] for name in names], color=plot.COLOURS[1], label="measured"
    )
    axis.barh(
        names,
        [limits[name] for name in names],
        color=plot.COLOURS[3],
        height=0.4,
        label="at the machine's limit",
    )
    axis.set(xlabel="seconds", title="one iteration of PPO-Lag")
    axis.legend()
    plot.save(drawn, os.path.dirname(path), os.path.basename(path))


UNITS = {
    "load": "tensors",
    "reward": "pairs",
    "cost": "pairs",
    "dpo": "pairs",
    "ppo": "responses",
    "ppo_lag": "responses",
}


def show(rows):
    """The table of what was measured; then how it is made up, and how it grows."""
    head = [
        "",
        "per second",
        "nanosafe",
        "best of the peer",
        "ratio",
        "share of the limit",
        "peak, MB",
        "its share of the peer's",
    ]
    shown = [head]
    for row in rows:
        if "grown" in row:
            continue
        best = row.get("best")
        rate = lambda x: f"{x['rate']:.4g} [{x['least']:.3g}, {x['most']:.3g}]"
        shown.append(
            [
                row["workload"],
                UNITS.get(row["workload"], "tokens"),
                rate(row["nanosafe"]),
                f"{rate(row[best])}, {best}" if best else "-",
                f"{row['ratio']:.2f}" if best else "-",
                f"{row['share']:.0%}" if "share" in row else "-",
                f"{row['nanosafe']['peak'] / 1e6:.0f}",
                f"{row['memory']:.2f}" if best else "-",
            ]
        )
    parts = [format_table(shown)]
    for row in rows:
        if row["workload"].startswith("ppo"):
            total = sum(row["phases"].values())
            parts.append(
                f"{row['workload']}, seconds: "
                + ", ".join(
                    f"{name} {x:.2f} ({x / total:.0%})" for name, x in row["phases"].items()
                )
            )
        for name, points in row.get("grown", {}).items():
            parts.append(
                f"microseconds per token by {name}: "
                + ", ".join(f"{size}: {1e6 * x:.0f}" for size, x in points)
            )
    return "\n".join(parts)
