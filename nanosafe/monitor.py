"""What a run tells: a progress bar, metrics.jsonl, and TensorBoard or W&B when asked."""

import importlib.util
import json
import os
import signal
import sys
import time
from collections import deque
from itertools import takewhile

from tqdm import tqdm

from nanosafe import parallel
from nanosafe.errors import stop, one_line_errors
from nanosafe.storage import write_jsonl


KL, EOS, RATIO, GROWTH = 0.5, 0.2, 0.2, 1.5  # nats per token; shares; times as long


WINDOW = 5  # rows


with open(os.path.join(os.path.dirname(__file__), "advice.json"), encoding="utf-8") as words:
    SENTENCES = json.load(words)


class Watch:
    """Says once what goes wrong in a run with these `knobs`: the last WINDOW rows by the first."""

    def __init__(self, knobs):
        self.knobs, self.said, self.first, self.last = knobs or {}, set(), [], deque(maxlen=WINDOW)

    def see(self, row):
        """The sentences that one more row of metrics gives rise to."""
        (self.first if len(self.first) < WINDOW else self.last).append(row)
        if len(self.last) < WINDOW:
            return []
        found = faults(self.first, self.last, self.knobs)
        new = [text for kind, text in found.items() if kind not in self.said]
        self.said |= found.keys()
        return new


def mean(rows, name):
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None


def faults(first, last, knobs):
    """{kind: sentence} of what is wrong in the last rows of a run, beside its first."""
    names = "kl", "length", "eos_rate", "lambda", "slack", "reward", "ratio", "clip_fraction"
    now, then = ({name: mean(rows, name) for name in names} for rows in (last, first))
    if None in (now["kl"], now["length"], now["eos_rate"], now["reward"]):
        return {}  # no run of PPO
    top, slack, clipped = knobs.get("lambda_max"), now["slack"] or 0, now["clip_fraction"] or 0
    learns = last[0].get("ratio")  # 0 while critics warm up
    wrong = {
        "kl": now["kl"] > KL * now["length"],
        "eos": now["eos_rate"] < then["eos_rate"] - EOS,
        "lambda": top and now["lambda"] and now["lambda"] > 0.999 * top and slack < 0,
        "length": now["length"] > GROWTH * then["length"] and now["reward"] > then["reward"],
        "ratio": learns and (abs(now["ratio"] - 1) > RATIO or clipped > 2 * RATIO),
    }
    facts = {"now": now, "then": then, "top": top, "excess": -slack, "clipped": clipped}
    return {kind: SENTENCES[kind].format(**facts) for kind in wrong if wrong[kind]}


class Monitor:
    """Writes a row per optimizer step to out_dir/metrics.jsonl and a few numbers on a bar.

    steps     optimizer steps of the whole run
    start     the step the run resumes at; rows from there on, left by a run that died, are dropped
    log_to    comma-separated: tensorboard, wandb
    shown     names of the metrics on the bar"""

    def __init__(self, out_dir, steps, start=0, log_to="", shown=(), config=None):
        self.main, self.shown, self.asked = parallel.rank() == 0, shown, 0.0
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self.ask)
        if not self.main:
            return
        self.metrics, rows = reopen(os.path.join(out_dir, "metrics.jsonl"), start)
        self.samples, _ = reopen(os.path.join(out_dir, "samples.jsonl"), start)
        self.watch = Watch(config)
        for row in rows:  # what they say was said
            self.watch.see(row)
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )  # a log needs few lines
        names = filter(None, map(str.strip, log_to.split(",")))
        self.sinks = [open_sink(name, out_dir, config, start) for name in names]

    def log(self, step, metrics):
        """Record the metrics (name -> number) of optimizer step `step`."""
        if not self.main:
            return
        row = {
            "step": step,
            **{
                name: x if isinstance(x, int) else float(f"{float(x):.8g}")
                for name, x in metrics.items()
            },
        }
        self.metrics.write(json.dumps(row) + "\n")
        for write, _ in self.sinks:
            write(step, row)
        self.bar.set_postfix_str(" ".join(f"{k} {row[k]:.3g}" for k in self.shown if k in row))
        self.bar.update(step + 1 - self.bar.n)
        if held_out := [f"{name} {x:.4g}" for name, x in row.items() if name[:5] == "eval_"]:
            self.say(f"step {step}: {'  '.join(held_out)}")
        for text in self.watch.see(row):
            self.say(f"warning at step {step}: {text}")

    def sample(self, step, **record):
        """Record something to read: a prompt, a response and its scores."""
        if self.main:
            self.samples.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")

    def say(self, text):
        """Print a line without breaking the bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def ask(self, sig, frame):
        """A first SIGTERM or SIGINT asks the run to end after its step. A second ends it at once,
        unless it is the first's echo: torchrun passes on what all have received."""
        if self.asked and time.monotonic() - self.asked > 1:
            os._exit(128 + sig)
        self.asked = self.asked or time.monotonic()

    def asked_to_stop(self, device):
        """Whether any rank was asked to: the same on all."""
        return parallel.any_rank(bool(self.asked), device)

    def flush(self):
        """Bring the rows to the disk: before a state is saved that counts on them."""
        if self.main:
            for file in (self.metrics, self.samples):
                file.flush()
                os.fsync(file.fileno())

    def close(self):
        """End the files, and the process group: what a trainer does last."""
        if self.main:
            self.flush()
            self.bar.close()
            for _, finish in self.sinks:
                finish()
        parallel.close()


def open_sink(name, out_dir, config, start):
    """Two functions for TensorBoard or W&B: write(step, metrics) and finish()."""
    if name not in ("tensorboard", "wandb"):
        stop(f"log_to={name!r}: choose tensorboard or wandb, or leave it empty")
    if not importlib.util.find_spec(name):
        stop(f"log_to={name!r} is not installed: pip install {name}")
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out_dir, purge_step=start)
        add = lambda step, row: [writer.add_scalar(key, value, step) for key, value in row.items()]
        return add, writer.close
    import wandb

    run = wandb.init(project="nanosafe", name=os.path.basename(out_dir), dir=out_dir, config=config)
    return lambda step, row: run.log(row, step=step), run.finish


def reopen(path, start):
    """Open a jsonl file for appending, with the rows of steps before `start` kept; and these."""
    rows = []
    if start > 0 and os.path.exists(path):
        with one_line_errors(path), open(path, encoding="utf-8", errors="replace") as f:
            whole = takewhile(lambda line: line[0] == "{" and line.endswith("}\n"), f)
            rows = [row for row in map(json.loads, whole) if row["step"] < start]
    write_jsonl(rows, path)
    return open(path, "a", encoding="utf-8", buffering=1), rows
