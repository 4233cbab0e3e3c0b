"""nanosafe's side of the work that nanosafe.bench times, each workload in a process of its own.

$ python -m nanosafe.tools.workloads NAME FOLDER OUT [key=value ...]

workload_report.py explains the arguments and the report. Training workloads run the real trainers:
a step lasts from one row of metrics to the next, and functions that the trainers call are replaced
by ones that time them."""

import gc
import os
import runpy
import sys

import torch

from nanosafe import checkpoint, losses, monitor, optim, parallel, rollout
from nanosafe.data import batching
from nanosafe.model import Config
from nanosafe.storage import REPOSITORY
from nanosafe.tools.workload_report import Workload

UNIFORM_WEIGHTS = 6  # its position among the arguments of LLaMA.forward
LEARNING = {
    "max_len": 512,
    "learning_rate": 1e-4,
    "lr_schedule": "constant",
    "warmup_ratio": 0,
    "weight_decay": 0,
}


def main():
    workload = Workload(__doc__)
    functions = {
        "load": load,
        "forward": forward,
        "generate": generate,
        "growth": growth,
        "sft": sft,
        "reward": reward,
        "cost": cost,
        "dpo": dpo,
        "ppo": ppo,
        "ppo_lag": ppo_lag,
    }
    functions[workload.name](workload, **workload.options)
    workload.write_report()


# ---- trainers ----


def sft(workload, data, **sizes):
    flags = {**single_model_flags(workload, **sizes), "data": data}
    run_trainer(workload, "train_sft.py", flags)


def reward(workload, data, **sizes):
    train_on_pairs(workload, data, sizes, objective="reward", regularization=0)


def cost(workload, data, **sizes):
    train_on_pairs(workload, data, sizes, objective="cost")


def dpo(workload, data, **sizes):
    train_on_pairs(workload, data, sizes, objective="dpo", beta=0.1)


def train_on_pairs(workload, data, sizes, **flags):
    flags = {**single_model_flags(workload, **sizes), **flags, "data": data, "eval_data": ""}
    run_trainer(workload, "train_pref.py", flags)


def ppo_lag(workload, **options):
    """Six models, and the gradients of demonstrations."""
    ppo(workload, cost_model=f"{workload.folder}/cost", **options)


def ppo(workload, data, max_new_tokens, cost_model="", ptx_data="", **sizes):
    flags = {
        **trainer_flags(workload, **sizes),
        "actor_model": f"{workload.folder}/model",
        "reward_model": f"{workload.folder}/reward",
        "cost_model": cost_model,
        "prompts": data,
        "ptx_data": ptx_data,
        "max_len": 256 + max_new_tokens,
        "max_new_tokens": max_new_tokens,
        "rollout_size": sizes["batch_size"],
        "actor_learning_rate": 1e-4,
        "critic_learning_rate": 1e-4,
        "actor_warmup_ratio": 0,
        "critic_warmup_ratio": 0,
    }
    run_trainer(workload, "train_ppo_lag.py", flags)


def single_model_flags(workload, **sizes):
    flags = {**trainer_flags(workload, **sizes), **LEARNING}
    return {**flags, "init_from": f"{workload.folder}/model"}


def trainer_flags(workload, batch_size, steps, max_tokens):
    return {
        "out_dir": f"{workload.folder}/ours",
        "save_interval": 0,
        "batch_size": batch_size,
        "max_steps": steps,
        "max_tokens": max_tokens,
        "device": workload.device,
        "dtype": str(workload.dtype).removeprefix("torch."),
    }


def run_trainer(workload, script, flags):
    """Run a trainer in this process, and report its steps and the phases of the last one."""
    phases = PhaseClock(workload, is_ppo=script == "train_ppo_lag.py")
    phases.time_trainer()
    report_steps(workload, phases)
    parallel.close = return_to_the_caller
    sys.argv = [script]
    for name, value in flags.items():
        sys.argv.append(f"--{name}={value}")
    runpy.run_path(os.path.join(REPOSITORY, script), run_name="__main__")


def return_to_the_caller():
    """Replaces parallel.close(), which would end the process."""


def report_steps(workload, phases):
    """Replace Monitor.log() by one that also reports the step that it logs."""
    log = monitor.Monitor.log
    ends = []

    def log_and_report(self, step, metrics):
        log(self, step, metrics)
        ends.append(workload.now())
        report = workload.report
        report["seconds"] = differences(ends)
        amount = metrics["tokens"] if workload.name == "sft" else workload.options["batch_size"]
        report["work"] = [amount] * len(report["seconds"])
        loss = metrics.get("loss", metrics.get("actor_loss", 0))
        report.setdefault("losses", []).append(float(loss))
        report["phases"] = dict(phases.seconds)  # of this step only
        phases.seconds.clear()

    monitor.Monitor.log = log_and_report


def differences(times):
    return [later - earlier for earlier, later in zip(times, times[1:])]


class PhaseClock:
    """The seconds that a trainer spends in each phase: {phase: seconds}."""

    def __init__(self, workload, is_ppo):
        self.workload = workload
        self.is_ppo = is_ppo
        self.seconds = {}
        self.paths = {}  # id of a model -> the folder it was loaded from
        self.in_ptx = False  # whether the actor's last forward pass was one of demonstrations

    def time_trainer(self):
        """Replace the functions that a trainer calls by timed ones, before it imports them."""
        self.replace(rollout, "generate", lambda *arguments: "rollout")
        self.replace(parallel, "backward", lambda model, *rest: self.phase_of_update(model))
        self.replace(optim, "guarded_step", lambda model, *rest: self.phase_of_update(model))
        load = checkpoint.load

        def load_and_time(path, *arguments, **options):
            model = load(path, *arguments, **options)
            self.paths[id(model)] = path
            self.replace(model, "forward", lambda *inputs: self.phase_of_forward(model, inputs))
            return model

        checkpoint.load = load_and_time

    def replace(self, owner, name, phase_of):
        """Replace a function by one that adds its seconds to the phase phase_of(*arguments)."""
        function = getattr(owner, name)

        def timed(*arguments, **options):
            phase = phase_of(*arguments)
            began = self.workload.now()
            result = function(*arguments, **options)
            elapsed = self.workload.now() - began
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed
            return result

        setattr(owner, name, timed)

    def phase_of_forward(self, model, inputs):
        # In PPO only the loss of demonstrations is a mean of log-probabilities.
        uniform_weights = len(inputs) > UNIFORM_WEIGHTS and inputs[UNIFORM_WEIGHTS]
        if model.head == "lm":
            self.in_ptx = self.is_ppo and bool(uniform_weights)
        if torch.is_grad_enabled():
            return self.phase_of_update(model)
        return self.name_of(model) + ": scoring"

    def phase_of_update(self, model):
        if self.in_ptx and model.head == "lm":
            return "ptx: updates"
        return self.name_of(model) + ": updates"

    def name_of(self, model):
        if not self.is_ppo:
            return "model"
        is_trained = next(model.parameters()).requires_grad
        if model.head == "lm":
            return "actor" if is_trained else "reference"
        kind = os.path.basename(self.paths[id(model)])  # reward or cost
        return f"{kind} critic" if is_trained else f"{kind} model"


# ---- one part of the work ----


def load_policy(workload):
    return checkpoint.load(f"{workload.folder}/model", dtype=workload.dtype, device=workload.device)


def load(workload, repetitions):
    def load_and_read():
        gc.collect()
        tensors = 0
        for parameter in load_policy(workload).parameters():
            parameter.sum().item()
            tensors += 1
        return tensors

    workload.repeat(load_and_read, repetitions)


@torch.no_grad()
def forward(workload, repetitions, max_tokens):
    """Log-probabilities of 64 demonstrations; the logits of the first one, to be compared."""
    model = load_policy(workload)
    sequences = [ids for ids, _ in workload.read_tokens("sft")][:64]
    first = make_batch(workload, sequences[:1])
    workload.report["logits"] = model.logits(first)[-1, :64].float().tolist()
    lengths = [len(ids) for ids in sequences]
    micro_batches = batching.plan_micro_batches(lengths, max_tokens, 1)[0]

    def add_up_logps():
        workload.report["sum"] = 0.0
        tokens = 0
        for micro_batch in micro_batches:
            batch = make_batch(workload, [sequences[i] for i in micro_batch])
            workload.report["sum"] += model.log_probs(batch).sum().item()
            tokens += len(batch.tokens)
        return tokens

    workload.repeat(add_up_logps, repetitions)


def make_batch(workload, sequences):
    """A Batch in which every token but the first of each sequence is a target."""
    masks = [[0] + [1] * (len(ids) - 1) for ids in sequences]
    return batching.collate(sequences, masks, workload.device)


def generate(workload, max_new_tokens, repetitions, eos):
    model = load_policy(workload)
    prompts = workload.read_tokens("prompts64")

    def sample():
        seed = len(workload.report["seconds"])
        return count_sampled(model, prompts, max_new_tokens, eos, seed)

    workload.repeat(sample, repetitions)


def count_sampled(model, prompts, max_new_tokens, eos, seed):
    responses = rollout.generate(model, prompts, max_new_tokens, eos_ids=eos, seed=seed)
    return sum(len(response) for response in responses)


# ---- growth ----


def growth(workload, repetitions):
    """Seconds per token while one size grows: report["grown"] is {size: [(value, seconds)]}."""
    model = load_policy(workload).float()
    prompts = workload.read_tokens("prompts64")
    grown = {}

    def measure(size, value, work, tokens):
        workload.report["seconds"] = []
        workload.repeat(work, repetitions + 1)
        seconds = min(workload.report["seconds"]) / tokens
        grown.setdefault(size, []).append((value, seconds))

    for tokens in (512, 1024, 2048, 4096, 8192):
        step = make_training_step(workload, model, tokens, 256)
        measure("packed tokens", tokens, step, tokens)
    for length in (64, 128, 256, 512, 1024):
        step = make_training_step(workload, model, 2048, length)
        measure("tokens of a sequence", length, step, 2048)
    for count in (1, 8, 32, 64, 128):
        sample = make_sampling(model, (2 * prompts)[:count], 32)
        measure("prompts sampled together", count, sample, 32 * count)
    for length in (32, 64, 128, 256):
        sample = make_sampling(model, prompts[:32], length)
        measure("tokens of a response", length, sample, 32 * length)
    for vocab_size in (8000, 32000, 128000):
        config = Config(**{**vars(model.config), "vocab_size": vocab_size})
        other = checkpoint.init_from_scratch(config, "lm").to(workload.device)
        step = make_training_step(workload, other, 1024, 256)
        measure("vocabulary", vocab_size, step, 1024)
    # A rate would mean nothing here.
    workload.report.update(grown=grown, seconds=[1.0], work=[0])


def make_training_step(workload, model, tokens, length):
    """A function that computes the gradients of random sequences of one length."""

    def step():
        ids = torch.randint(3, model.config.vocab_size, (tokens // length, length))
        batch = make_batch(workload, list(ids.numpy()))
        model.zero_grad()
        logps = model.log_probs(batch, uniform_weights=True)
        losses.mle_loss(logps, batch.targets >= 0).backward()

    return step


def make_sampling(model, prompts, max_new_tokens):
    def sample():
        count_sampled(model, prompts, max_new_tokens, eos=[], seed=0)

    return sample


if __name__ == "__main__":
    main()
