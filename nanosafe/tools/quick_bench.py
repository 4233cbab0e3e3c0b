"""Whether nanosafe computes right on this machine, and how fast: in minutes, without the internet.

$ python -m nanosafe.bench --device=cuda --quick    # models of 1.1B, in five minutes
$ python -m nanosafe.bench --device=cuda --long     # then 7B, and sizes that others publish
$ python -m nanosafe.bench --quick                  # tiny models on a CPU: that all parts run

Each part is a process of its own (quick_workloads.py). Where one fails, or does not fit into
memory, a line says so and the next one begins. At the end there are a table, all numbers as JSON,
and one line for an issue."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import torch

import nanosafe
from nanosafe.errors import choose, stop
from nanosafe.printing import format_table
from nanosafe.storage import REPOSITORY, make_folder, write_json

SECONDS = {"quick": 300, "long": 1800}  # for all parts together
MODELS = "quick_bench_models"  # a folder that is removed, so no name that a user's own would have
LONGEST_CELL = 60  # letters of a reason in the table
LEAST_SECONDS = 10  # a part that has less is left out
DECODED_PROMPT = 128  # tokens, and as many are sampled


class Part(NamedTuple):
    name: str  # of its log
    work: str  # a name that quick_workloads.py knows
    options: dict


class Sizes(NamedTuple):
    """What is measured in both forms."""

    shape: str  # of the models
    decoded_rows: tuple  # how many rows are decoded together
    prompt: int  # tokens of a prompt that is decoded, and how many are sampled
    length: int  # tokens of a sequence that is trained on
    max_tokens: int  # of a forward
    prompts: int  # of a PPO-Lag iteration
    max_len: int  # of a prompt and its response in PPO-Lag, half of which is sampled


GPU_SIZES = Sizes("1.1b", (1, 16, 64, 256), 128, 2048, 8192, 64, 256)
CPU_SIZES = Sizes("tiny", (1, 4), 8, 32, 256, 8, 128)


def run(device, dtype, folder, is_long):
    """Run all parts, and print and write what they report.

    dtype   bfloat16 | float32
    folder  where models lie meanwhile (2 GB for 1.1B), logs, and quick.json"""
    choose("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        stop("device='cuda', but torch sees no GPU: use --device=cpu")
    if device == "cpu" and is_long:
        stop("long measures models that are too large for a CPU: use --device=cuda")
    bench = QuickBench(device, dtype, folder, SECONDS["long" if is_long else "quick"])
    try:
        measure(bench, GPU_SIZES if device == "cuda" else CPU_SIZES, is_long)
    finally:
        shutil.rmtree(bench.models, ignore_errors=True)
    report = make_report(bench)
    write_json(report, folder, "quick.json")
    print("\n" + format_report(report))
    print(f"\nall numbers: {folder}/quick.json. For an issue:\n{report['line']}")


def measure(bench, sizes, is_long):
    found = bench.run_part(Part("machine", "machine", {}))
    bench.run_part(Part("checks", "checks", {}))
    if "machine" not in found:  # nothing can be compared with it
        return
    for part in list_parts(sizes, found["machine"]):
        bench.run_part(part)
    if is_long:
        for part in list_long_parts(found["machine"]):
            bench.run_part(part)


def list_parts(sizes, machine):
    parts = [
        list_decoding(sizes.shape, sizes.decoded_rows, sizes.prompt, machine),
        list_training(sizes.shape, sizes.length, sizes.max_tokens, machine),
    ]
    models = {"shape": sizes.shape, "prompts": sizes.prompts}
    models["prompt_tokens"] = sizes.max_len // 2
    parts.append(Part("models", "models", models))
    for adapters in (False, True):
        options = {
            "shape": sizes.shape,
            "adapters": adapters,
            "prompts": sizes.prompts,
            "length": sizes.max_len,
            "new_tokens": sizes.max_len // 2,
            "max_tokens": sizes.max_tokens,
            "machine": machine,
        }
        name = "ppo_lag_adapters" if adapters else "ppo_lag"
        parts.append(Part(name, "ppo_lag", options))
    return parts


def list_long_parts(machine):
    """7B, and what others publish: docs/benchmarks.md has their numbers."""
    loss = {"tokens": 16384, "vocab_size": 248320, "hidden_size": 2048, "machine": machine}
    return [
        list_decoding("7b", (1, 16, 64), DECODED_PROMPT, machine),
        Part("loss", "loss", loss),
        list_training("3b", 4096, 4096, machine),
        list_training("7b-8-layers", 2048, 8192, machine),
    ]


def list_decoding(shape, rows, prompt_tokens, machine):
    options = {
        "shape": shape,
        "prompt_tokens": prompt_tokens,
        "new_tokens": prompt_tokens,
        "rows": rows,
        "bandwidth": machine["bandwidth"],
    }
    return Part(f"decode_{shape}", "decode", options)


def list_training(shape, length, max_tokens, machine):
    options = {"shape": shape, "length": length, "max_tokens": max_tokens, "machine": machine}
    return Part(f"train_{shape}", "train", options)


# ---- the parts ----


class QuickBench:
    """Runs parts one after the other, and keeps what they report."""

    def __init__(self, device, dtype, folder, seconds):
        self.device = device
        self.dtype = dtype
        self.folder = folder
        self.models = os.path.join(os.path.abspath(folder), MODELS)
        self.began = time.monotonic()
        self.seconds = seconds
        self.reports = {}  # of each part
        shutil.rmtree(self.models, ignore_errors=True)
        make_folder(self.models)

    def run_part(self, part):
        """Run a part in a process of its own, and return its report."""
        elapsed = time.monotonic() - self.began
        left = self.seconds - elapsed
        print(f"[{elapsed:3.0f} s] {part.name} ...", flush=True)
        if left < LEAST_SECONDS:
            report = {"rows": []}
            add_failure(report, part, f"left out: {self.seconds} s are over")
        else:
            report = self.start_process(part, left)
        self.reports[part.name] = report
        for line in describe(report):
            print(f"        {line}", flush=True)
        return report

    def start_process(self, part, seconds):
        """The report of a part's process. Of one that ends early it has the rows until then."""
        path = os.path.join(self.models, "report.json")
        command = [sys.executable, "-m", "nanosafe.tools.quick_workloads"]
        command += [part.work, self.models, path]
        options = {"device": self.device, "dtype": self.dtype, **part.options}
        for name, value in options.items():
            command.append(f"{name}={json.dumps(value)}")
        search_path = [REPOSITORY, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
            "NANOSAFE_CACHE": os.path.join(self.models, "cache"),
        }
        log_path = os.path.join(self.folder, f"{part.name}.log")
        reason = ""
        with open(log_path, "w") as log:
            try:
                done = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=seconds
                )
            except subprocess.TimeoutExpired:
                reason = f"ended after {seconds:.0f} s, which were left"
        if not reason and done.returncode:
            reason = explain_end(done.returncode, log_path)
        report = take_report(path)
        if reason:
            add_failure(report, part, reason, log_path)
        return report


def take_report(path):
    """The report in a file, which is removed; an empty one where there is none, or half of one."""
    report = {}
    if os.path.exists(path):
        with contextlib.suppress(ValueError), open(path) as f:
            report = json.load(f)
        os.remove(path)
    # A process that was ended has perhaps begun a row.
    rows = report.get("rows", [])
    report["rows"] = [row for row in rows if "amount" in row or "failed" in row]
    return report


def add_failure(report, part, reason, log_path=None):
    """Add a row that says why a part has no more of them."""
    row = {"name": part.name, "failed": reason}
    if log_path:
        row["log"] = log_path
    report["rows"].append(row)


def explain_end(code, log_path):
    """Why a process ended: the last line of its log that names an error."""
    if code == -9:
        return "killed, perhaps because the host's memory was full"
    with open(log_path, errors="replace") as log:
        lines = log.read().splitlines()
    for line in reversed(lines):
        if re.match(r"[\w.]*(Error|error|Exception)\b", line):
            return line[:200]
    return f"exit status {code}"


# ---- what is reported ----


def make_report(bench):
    """All that was found, as it is written."""
    machine = bench.reports["machine"]
    report = {
        "gpu": machine.get("gpu", "CPU"),
        "dtype": machine.get("dtype", bench.dtype),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if bench.device == "cuda" else None,
        "nanosafe": nanosafe.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.get("machine"),
        "checks": bench.reports["checks"].get("checks", []),
        "rows": [],
        "seconds": round(time.monotonic() - bench.began),
    }
    for part_report in bench.reports.values():
        report["rows"] += part_report["rows"]
    report["line"] = format_line(report)
    return report


def describe(report):
    """Lines about one part's report."""
    lines = []
    if "machine" in report:
        lines.append(describe_machine(report["machine"]))
    for check in report.get("checks", []):
        lines.append(describe_check(check))
    for row in report["rows"]:
        lines.append(f"{row['name']}: {describe_row(row)}")
    return lines


def describe_machine(machine):
    return (
        f"{machine['matrix']:.3g} TFLOP/s in a large product, {machine['bandwidth']:.4g} GB/s in "
        f"a large copy, {machine['memory']:.1f} GB"
    )


def describe_check(check):
    found = check.get("failed") or f"error {check['error']:.3g}, at most {check['tolerance']:g}"
    verdict = "right" if check["passed"] else "WRONG"
    return f"{verdict}: {check['name']} ({found})"


def describe_row(row):
    if "failed" in row:
        where = f" ({row['log']})" if "log" in row else ""
        return f"no number: {row['failed']}{where}"
    text = f"{row['amount']:.4g} {row['unit']}"
    if "share" in row:
        text += f", {row['share']:.0%} of the {row['of']}"
    return text


def format_report(report):
    """The checks, and the table of all rows."""
    lines = []
    for check in report["checks"]:
        lines.append(describe_check(check))
    table = [["", "", "peak, GB", "planned", "compiled anew", "host waits"]]
    for row in report["rows"]:
        cells = [row["name"], describe_row(row)[:LONGEST_CELL]]
        for name in ("peak", "plan"):
            cells.append(f"{row[name] / 1e9:.2f}" if name in row else "-")
        for name in ("compiled", "waits"):
            cells.append(row.get(name, "-"))
        table.append(cells)
    lines.append(format_table(table))
    for row in report["rows"]:
        if "phases" in row:
            lines.append(f"{row['name']}, seconds: {format_seconds(row['phases'])}")
        if "roofline" in row:
            lines.append(f"    at the machine's limit: {format_seconds(row['roofline'])}")
        if "metrics" in row:
            lines.append(f"{row['name']}: {describe_distance(row['metrics'])}")
    return "\n".join(lines)


def format_seconds(phases):
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in phases.items())


def describe_distance(metrics):
    """How far the update's forward and the sampler are from the forward that weighs tokens."""
    ratio = metrics.get("ratio", math.nan)
    gap = metrics.get("sampler_gap", math.nan)
    return f"first ratio {ratio:.8g}, |log p_train - log p_sample| {gap:.3g} nats a token"


def format_line(report):
    """What a user pastes into an issue."""
    words = [f"nanosafe {report['nanosafe']}", report["gpu"], f"torch {report['torch']}"]
    if report["cuda"]:
        words.append(f"CUDA {report['cuda']}")
    words.append(report["dtype"])
    if report["machine"]:
        words.append(f"copy {report['machine']['bandwidth']:.4g} GB/s")
        words.append(f"product {report['machine']['matrix']:.3g} TFLOP/s")
    passed = sum(check["passed"] for check in report["checks"])
    words.append(f"{passed} of {len(report['checks'])} checks right")
    for row in report["rows"]:
        words.append(f"{row['name']}: {describe_short(row)}")
    return "; ".join(words)


def describe_short(row):
    if "failed" in row:
        return row["failed"][:60]
    text = f"{row['amount']:.4g} {row['unit']}"
    if "share" in row:
        text += f" ({row['share']:.0%})"
    text += f" {row['peak'] / 1e9:.1f} GB"
    if "waits" in row:
        text += f", {row['compiled']} compiled, {row['waits']} waits"
    return text
