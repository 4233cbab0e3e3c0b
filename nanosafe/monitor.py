"""What a run reports: a progress bar, metrics.jsonl, samples.jsonl, warnings in words, and
TensorBoard or W&B when asked."""

import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections import deque

from tqdm import tqdm

from nanosafe import parallel
from nanosafe.errors import choose, one_line_errors, stop
from nanosafe.printing import print_once
from nanosafe.storage import format_json, read_json, write_json, write_jsonl

# Thresholds of the warnings below.
KL_PER_TOKEN = 0.5  # nats
EOS_DROP = 0.2  # in the share of responses that end by themselves
RATIO_DISTANCE = 0.2  # of the mean ratio from 1
CLIPPED_SHARE = 0.4  # of the tokens whose ratio is clipped
LENGTH_GROWTH = 1.5  # times as long as at first
EMPTY_SHARE = 0.9  # of the responses, which are nothing but EOS
WINDOW = 5  # rows of metrics over which each number is averaged


class Monitor:
    """Writes a row per optimizer step to out_dir/metrics.jsonl and a few numbers on a bar.

    steps   optimizer steps of the whole run
    start   the step that the run resumes at; rows from there on, which a run that died has left,
            are dropped
    log_to  comma-separated: tensorboard, wandb
    shown   names of the metrics on the bar
    config  the run's knobs"""

    def __init__(self, out_dir, steps, start=0, log_to="", shown=(), config=None):
        self.main = parallel.rank() == 0
        self.shown = shown
        self.stop_requested_at = 0.0  # when SIGTERM or SIGINT came first; 0: it has not
        signal.signal(signal.SIGTERM, self.handle_signal)
        signal.signal(signal.SIGINT, self.handle_signal)
        if not self.main:
            return
        rows = read_rows_before(os.path.join(out_dir, "metrics.jsonl"), start)
        samples = read_rows_before(os.path.join(out_dir, "samples.jsonl"), start)
        self.metrics = rewrite_and_append(os.path.join(out_dir, "metrics.jsonl"), rows)
        self.samples = rewrite_and_append(os.path.join(out_dir, "samples.jsonl"), samples)
        self.watch = Watch(config)
        for row in rows:
            self.watch.see(row)  # these warnings were printed before the run was resumed
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file needs few lines
        )
        self.sinks = []
        for name in log_to.split(","):
            if name.strip():
                self.sinks.append(open_sink(name.strip(), out_dir, config, start))

    def log(self, step, metrics):
        """Record the metrics (name -> number) of optimizer step `step`.

        In metrics.jsonl null stands for a number that is not finite."""
        if not self.main:
            return
        row = {"step": step}
        for name, value in metrics.items():
            row[name] = value if isinstance(value, int) else float(f"{float(value):.8g}")
        self.metrics.write(format_json(row) + "\n")
        for sink in self.sinks:
            sink.log(step, row)
        shown = [f"{name} {row[name]:.3g}" for name in self.shown if name in row]
        self.bar.set_postfix_str(" ".join(shown))
        self.bar.update(step + 1 - self.bar.n)
        held_out = [f"{name} {x:.4g}" for name, x in row.items() if name.startswith("eval_")]
        if held_out:
            self.say(f"step {step}: {'  '.join(held_out)}")
        for sentence in self.watch.see(row):
            self.say(f"warning at step {step}: {sentence}")

    def sample(self, step, **record):
        """Record something to read, for example a prompt, a response and its scores."""
        if self.main:
            row = {"step": step, **record}
            self.samples.write(format_json(row, ensure_ascii=False) + "\n")

    def say(self, text):
        """Print a line on stderr, where the bar is, without breaking it."""
        print_once(text, file=sys.stderr)

    def handle_signal(self, number, frame):
        """The first SIGTERM or SIGINT asks the run to end after its step, a second ends it at once.

        torchrun passes on a signal that the ranks have received themselves, so a second one within
        a second is taken for the first."""
        now = time.monotonic()
        if self.stop_requested_at and now - self.stop_requested_at > 1:
            os._exit(128 + number)
        self.stop_requested_at = self.stop_requested_at or now

    def asked_to_stop(self, device):
        """Whether any rank was asked to stop: the same answer on all of them."""
        return parallel.any_rank(bool(self.stop_requested_at), device)

    def flush(self):
        """Bring the rows to the disk, before a state is saved that counts on them."""
        if self.main:
            for file in (self.metrics, self.samples):
                file.flush()
                os.fsync(file.fileno())

    def close(self):
        """Close the files and leave the process group: what a trainer does last."""
        if self.main:
            self.flush()
            self.bar.close()
            for sink in self.sinks:
                sink.close()
        parallel.close()


def read_rows_before(path, step):
    """The rows of a jsonl file of steps before `step`, up to a line that a dying run cut short."""
    if step == 0 or not os.path.exists(path):
        return []
    rows = []
    with one_line_errors(path), open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if not (line.startswith("{") and line.endswith("}\n")):
                break
            row = json.loads(line)
            if row["step"] < step:
                rows.append(row)
    return rows


def rewrite_and_append(path, rows):
    """Write `rows` to a jsonl file, and open it for appending line by line."""
    write_jsonl(rows, path)
    return open(path, "a", encoding="utf-8", buffering=1)


# ---- other places to log to ----


def check_sinks(log_to):
    """Stop with one line on a name in log_to that is unknown, or that is to be installed."""
    for name in log_to.split(","):
        name = name.strip()
        if not name:
            continue
        choose("log_to", name, ("tensorboard", "wandb"))
        if not importlib.util.find_spec(name):
            stop(f"log_to={name!r} is not installed: pip install {name}")


def open_sink(name, out_dir, config, start):
    """A TensorBoardSink or a WandbSink."""
    if name == "tensorboard":
        return TensorBoardSink(out_dir, start)
    return WandbSink(out_dir, config)


class TensorBoardSink:
    def __init__(self, out_dir, start):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(out_dir, purge_step=start)

    def log(self, step, row):
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def close(self):
        self.writer.close()


class WandbSink:
    """A run on W&B. Its id is kept in out_dir/wandb.json, and a resumed run continues it.

    W&B ignores rows of steps that it has already, as a resumed run repeats them."""

    def __init__(self, out_dir, config):
        import wandb

        options = {"project": "nanosafe", "name": os.path.basename(out_dir), "dir": out_dir}
        known_id = read_json(out_dir, "wandb.json").get("id")
        if known_id:
            options.update(id=known_id, resume="allow", allow_val_change=True)
        self.run = wandb.init(config=config, **options)
        write_json({"id": self.run.id}, out_dir, "wandb.json")

    def log(self, step, row):
        self.run.log(row, step=step)

    def close(self):
        self.run.finish()


# ---- what goes wrong in a run of PPO, in words ----


class Watch:
    """Compares the last WINDOW rows of metrics with the first, and warns once of each problem."""

    def __init__(self, knobs):
        self.knobs = knobs or {}
        self.warned = set()
        self.first = []
        self.last = deque(maxlen=WINDOW)

    def see(self, row):
        """The warnings that one more row of metrics gives rise to: a list of sentences."""
        if len(self.first) < WINDOW:
            self.first.append(row)
        else:
            self.last.append(row)
        if len(self.last) < WINDOW:
            return []
        sentences = []
        for problem, sentence in find_problems(self.first, self.last, self.knobs).items():
            if problem not in self.warned:
                self.warned.add(problem)
                sentences.append(sentence)
        return sentences


def mean_metric(rows, name):
    """The mean of a metric's finite values; nan, which exceeds no threshold, where there is none.

    A row that was read from metrics.jsonl has None for a number that was not finite."""
    values = [row[name] for row in rows if row.get(name) is not None]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def find_problems(first_rows, last_rows, knobs):
    """{name of a problem: what it looks like, and what to do about it}; {} outside PPO."""
    kl = mean_metric(last_rows, "kl")
    reward = mean_metric(last_rows, "reward")
    length = mean_metric(last_rows, "length")
    eos_rate = mean_metric(last_rows, "eos_rate")
    first_reward = mean_metric(first_rows, "reward")
    first_length = mean_metric(first_rows, "length")
    first_eos_rate = mean_metric(first_rows, "eos_rate")
    problems = {}

    if kl > KL_PER_TOKEN * length:
        problems["kl"] = (
            f"KL runs away: {kl:.3g} nats per response, {length:.0f} tokens long; raise kl_coef, "
            "or lower actor_learning_rate"
        )
    if eos_rate < first_eos_rate - EOS_DROP:
        problems["eos"] = (
            f"fewer responses end: {eos_rate:.0%}, at first {first_eos_rate:.0%}; raise "
            "max_new_tokens, and look whether the reward model likes answers without an end "
            "(samples.jsonl)"
        )
    empty_share = eos_rate - (length - 1)  # at least: no more than length - 1 have a second token
    if empty_share > EMPTY_SHARE:
        problems["empty"] = (
            f"responses are empty: at least {empty_share:.0%} are nothing but EOS; go back to an "
            "earlier state, and raise kl_coef or lower actor_learning_rate; if it was so from the "
            "first step, look at actor_model"
        )
    if length > LENGTH_GROWTH * first_length and reward > first_reward:
        problems["length"] = (
            f"reward rises with length: {first_length:.0f} tokens at first, now {length:.0f}; read "
            "samples.jsonl: if answers are padded, the reward model is being hacked; raise "
            "kl_coef, or train it on such pairs"
        )

    lambda_max = knobs.get("lambda_max") or 0
    for name in last_rows[0]:
        if not name.startswith("lambda"):  # and with several constraints lambda_2, ...
            continue
        lambda_ = mean_metric(last_rows, name)
        slack = mean_metric(last_rows, name.replace("lambda", "slack"))
        if lambda_max and lambda_ > 0.999 * lambda_max and slack < 0:
            problems[name] = (
                f"{name} is at its cap, {lambda_max:g}, and the cost still {-slack:.3g} above "
                "cost_limit; raise lambda_max, or allow more: cost_limit"
            )

    policy_learns = last_rows[0].get("ratio") != 0  # it is 0 while only critics learn
    ratio = mean_metric(last_rows, "ratio")
    clipped = mean_metric(last_rows, "clip_fraction")
    if policy_learns and (abs(ratio - 1) > RATIO_DISTANCE or clipped > CLIPPED_SHARE):
        problems["ratio"] = (
            f"updates leave the rollout's policy: mean ratio {ratio:.3g}, {clipped:.0%} of tokens "
            "clipped; lower actor_learning_rate or ppo_epochs"
        )
    return problems
