"""The parts of `python -m nanosafe.bench --quick`, each of which is a process of its own.

$ python -m nanosafe.tools.quick_workloads NAME FOLDER OUT [key=value ...]

workload_report.py explains the arguments. A report has "rows", one for each size that was measured:

    name                 what was measured, and of what size
    amount, unit         for instance 1,200 and "tokens/s"
    share, of            the share of what the machine reached in one large product or copy
    peak, plan           bytes of memory at the peak, and as the planner has them; `reserved` are
                         those that torch has taken from the GPU
    compiled, waits      in the part that is timed: versions of a block that torch.compile made, and
                         how often torch saw the host wait for the GPU
    failed               instead of all these: why there is no number

A number that only a GPU has is left out on a CPU."""

import gc
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from nanosafe import checkpoint, losses, monitor, optim, parallel, rollout
from nanosafe.checkpoint import model_folder, run_state
from nanosafe.errors import explain_failure
from nanosafe.logprobs import UniformLogProbs
from nanosafe.lora import Lora
from nanosafe.model import Config
from nanosafe.storage import (
    CHECKSUMS,
    REPOSITORY,
    read_json,
    read_metrics,
    write_json,
    write_jsonl,
)
from nanosafe.tools import demo, devices, model_sizes, plan, quick_checks, workloads
from nanosafe.tools.planned_run import Run
from nanosafe.tools.workload_report import Workload, read_peak_memory

SHAPES = {
    "tiny": Config(1000, 32, 48, 2, 4, 2),
    **model_sizes.SHAPES,
    # As fast as 7B, in a quarter of the memory: trained weights of 7B are too large for one GPU.
    "7b-8-layers": replace(model_sizes.SHAPES["7b"], num_hidden_layers=8),
}
VOCABULARY = 400  # of the tokenizer; the models' own is larger, and random weights use all of it
ADAPTER_RANK = 16
TIMED_STEPS = 3
SYNC_WARNING = "called a synchronizing CUDA operation"  # of torch.cuda.set_sync_debug_mode()


def main():
    workload = Workload(__doc__)
    functions = {
        "machine": measure_machine,
        "checks": check,
        "models": write_models,
        "decode": decode,
        "train": train,
        "ppo_lag": ppo_lag,
        "loss": measure_loss,
    }
    counts = Counts(workload.device)
    workload.report["rows"] = []
    parallel.init(workload.device)
    try:
        functions[workload.name](workload, counts, **workload.options)
    except Exception as error:
        reason = explain_failure(error, {})
        if reason is None:
            raise
        workload.report["rows"].append({"name": workload.name, "failed": reason})
    workload.write_report()
    sys.stdout.flush()
    os._exit(0)  # after a failure, what FSDP2 and NCCL have left could hang an ordinary exit


# ---- what is counted ----


class Counts:
    """Versions of blocks that torch.compile has made, and waits of the host, since the start."""

    def __init__(self, device):
        self.on_gpu = device == "cuda"
        self.waits = 0
        if self.on_gpu:
            warnings.showwarning = self.see_warning
            warnings.filterwarnings("always", message=SYNC_WARNING)

    def see_warning(self, message, *rest):
        if SYNC_WARNING in str(message):
            self.waits += 1
        else:
            print(f"warning: {message}")

    @contextmanager
    def added_to(self, row):
        """Add to a row what the block below adds to the counts, on a GPU."""
        if not self.on_gpu:
            yield
            return
        compiled, waits = count_compiled(), self.waits
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        row["compiled"] = count_compiled() - compiled
        row["waits"] = self.waits - waits


def count_compiled():
    return counters["stats"]["unique_graphs"]


@contextmanager
def new_row(workload, name):
    """A row that the block below fills. Memory that runs out there is the row's failure.

    The report is written after each row, so that no later one can take it along."""
    row = {"name": name}
    workload.report["rows"].append(row)
    if workload.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        yield row
        row["peak"] = read_peak(workload)
        if workload.device == "cuda":
            row["reserved"] = torch.cuda.max_memory_reserved()
    except Exception as error:
        reason = explain_failure(error, {})
        if reason is None:
            raise
        row["failed"] = reason
    gc.collect()
    if workload.device == "cuda":
        torch.cuda.empty_cache()
    workload.write_report()  # for now: what comes next may end the process


def read_peak(workload):
    if workload.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return read_peak_memory()


# ---- the machine, and whether it computes right ----


def measure_machine(workload, counts):
    machine = devices.measure_this_machine(workload.device, name_dtype(workload))
    workload.report["machine"] = machine._asdict()
    workload.report["dtype"] = name_dtype(workload)
    if workload.device == "cuda":
        workload.report["gpu"] = torch.cuda.get_device_name()


def check(workload, counts):
    """Every check of quick_checks.py: its error, and whether that is within its tolerance."""
    world = parallel.init(workload.device)
    workload.report["checks"] = []
    for name, (function, tolerance) in quick_checks.choose(workload.device).items():
        began = time.perf_counter()
        result = {"name": name, "tolerance": tolerance}
        try:
            found = function(world)
            result["passed"] = found <= tolerance
            if math.isfinite(found):
                result["error"] = found
            else:
                result["failed"] = f"error {found}"
                result["passed"] = False
        except Exception as error:  # a kernel that refuses, or a compiler that fails: the next
            result["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            result["passed"] = False
        result["seconds"] = time.perf_counter() - began
        workload.report["checks"].append(result)
    parallel.close(end_process=False)


# ---- models on the disk, for the trainer ----


def write_models(workload, counts, shape, prompts, prompt_tokens):
    """A policy, reward and cost models, adapters of these, and a file of prompts.

    Only the policy's weights are written. Reward and cost models are links to them, with a score
    head of their own, but each is read into memory by itself."""
    with open(plan.__file__, encoding="utf-8") as f:
        lines = f.read().splitlines()
    texts = [line.strip() for line in lines if len(line.split()) > 2]
    tok = demo.train_tokenizer(texts, VOCABULARY, f"{workload.folder}/tokenizer")
    path = os.path.join(workload.folder, "model")
    config = SHAPES[shape]
    model = checkpoint.init_from_scratch(config, "lm", seed=0)
    checkpoint.save(model, path, tok, workload.dtype)
    del model
    os.remove(os.path.join(path, CHECKSUMS))  # checking 2 GB for each of six models takes longer
    write_prompts(f"{workload.folder}/prompts.jsonl", texts, tok, prompts, prompt_tokens)
    bases = {}
    on_cpu = parallel.Placement(torch.device("cpu"))
    placements = parallel.Placements(on_cpu, on_cpu)
    lora = Lora(ADAPTER_RANK, 32.0, "all")
    for kind in ("reward", "cost"):
        write_score_model(workload, kind, path)
        model = checkpoint.load_trained(path, "score", placements, bases, lora, score_type=kind)
        checkpoint.save(model, f"{workload.folder}/{kind}_adapter", tok)


def write_score_model(workload, kind, path):
    """A score model's folder: a link to the policy's weights, and a score head."""
    folder = os.path.join(workload.folder, kind)
    os.makedirs(folder)
    for name in os.listdir(path):
        if name not in ("config.json", "model.safetensors"):
            os.symlink(os.path.join(path, name), os.path.join(folder, name))
    os.symlink(os.path.join(path, "model.safetensors"), os.path.join(folder, "policy.safetensors"))
    config = read_json(path, "config.json")
    config.update(score_type=kind, architectures=["LlamaForScore"])
    width = config["hidden_size"]
    head = torch.randn(1, width) / width**0.5
    tensors = {"score_head.weight": head.to(workload.dtype)}
    save_file(tensors, os.path.join(folder, "score_head.safetensors"), {"format": "pt"})
    # A tensor of each file is enough: an index says which files there are.
    weight_map = {
        "lm_head.weight": "policy.safetensors",
        "score_head.weight": "score_head.safetensors",
    }
    write_json({"weight_map": weight_map}, folder, "model.safetensors.index.json")
    write_json(config, folder, "config.json")


def write_prompts(path, texts, tok, count, tokens):
    """Different prompts of somewhat different lengths, up to about `tokens` with the template's."""
    template = tok.conversation([{"role": "user", "content": ""}], reply=True).ids
    longest = tokens - len(template)
    ids = []
    for text in texts:
        ids += tok.encode(text)
    rows = []
    for i in range(count):
        length = longest - i % (longest // 2)
        begin = i * longest % (len(ids) - longest)
        rows.append({"prompt": tok.decode(ids[begin : begin + length])})
    write_jsonl(rows, path)


# ---- decoding ----


def decode(workload, counts, shape, prompt_tokens, new_tokens, rows, bandwidth):
    """Tokens per second of some numbers of rows, without the prompts' prefill.

    On a GPU twice: as in sample.py, and with compiled blocks as in the trainers."""
    ways = [False, True] if counts.on_gpu else [False]
    for is_compiled in ways:
        name = f"decode, {shape}, compiled" if is_compiled else f"decode, {shape}"
        with new_row(workload, name) as row:
            model = make_model(workload, shape, is_compiled)
        if "failed" in row:
            return
        workload.report["rows"].remove(row)  # there is one for each number of rows
        for n in rows:
            with new_row(workload, f"{name}, {n} rows") as row:
                measure_decoding(
                    workload, counts, row, model, n, prompt_tokens, new_tokens, bandwidth
                )
        del model


def make_model(workload, shape, is_compiled):
    """A plain policy of a shape, with random weights that are drawn on the device."""
    device = torch.device(workload.device)
    placement = parallel.Placement(device, dtype=workload.dtype, use_compile=is_compiled)
    model = model_folder.build_model(SHAPES[shape], "lm", placement, workload.dtype)
    fill(model)
    return model.requires_grad_(False)


@torch.no_grad()
def fill(model):
    """Draw a model's weights on its device: init_from_scratch() does it on the host, slowly."""
    for name, parameter in parallel.named_local_parameters(model):
        rows = parallel.local_part(parameter.data)
        if name.endswith("norm.weight"):
            rows.fill_(1.0)
        else:
            rows.normal_(0.0, model.config.initializer_range)


def measure_decoding(workload, counts, row, model, n, prompt_tokens, new_tokens, bandwidth):
    """Fill a row. A step reads all weights but the embedding, and the keys of the live rows."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = n, prompt_tokens
    prompts = torch.randint(3, config.vocab_size, shape, generator=generator).tolist()

    def sample(count):
        rollout.generate(model, prompts, count, eos_ids=[], seed=0)

    def time_of(count):
        began = workload.now()
        sample(count)
        return workload.now() - began

    sample(new_tokens + 1)  # records graphs
    prefill = min(time_of(1), time_of(1))
    with counts.added_to(row):
        seconds = time_of(new_tokens + 1)
    seconds = min(seconds, time_of(new_tokens + 1))
    step = (seconds - prefill) / new_tokens
    if step <= 0:
        row["failed"] = "too short to be measured beside the prefill"
        return
    weights = sum(parameter.nbytes for parameter in model.parameters())
    weights -= model.embed_tokens.weight.nbytes
    keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cached = 2 * keys * model.embed_tokens.weight.itemsize * (prompt_tokens + new_tokens / 2)
    rate = (weights + n * cached) / step / 1e9
    row.update(amount=n / step, unit="tokens/s", share=rate / bandwidth, of="copy bandwidth")
    row.update(step_milliseconds=1e3 * step, gigabytes_per_second=rate)


# ---- training ----


def train(workload, counts, shape, length, max_tokens, machine):
    """A step of maximum likelihood on packed sequences of one length, with AdamW."""
    with new_row(workload, f"train, {shape}, {max_tokens} tokens") as row:
        flags = {"batch_size": max_tokens // length, "max_len": length}
        flags.update(max_tokens=max_tokens, dtype=name_dtype(workload))
        planned = plan_run(workload, "train_sft.py", flags, shape, machine, length)
        row["plan"] = planned.training_peak()
        step = make_training_step(workload, shape)
        step(length // 2, max_tokens // 2)
        for _ in range(2):  # another size: torch.compile makes lengths variable
            step(length, max_tokens)
        if workload.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with counts.added_to(row):
            began = workload.now()
            for _ in range(TIMED_STEPS):
                step(length, max_tokens)
            seconds = (workload.now() - began) / TIMED_STEPS
        flops = planned.phases()[0].flops
        share = flops / seconds / 1e12 / machine["matrix"]
        row.update(amount=max_tokens / seconds, unit="tokens/s")
        row.update(share=share, of="matrix rate", step_seconds=seconds)
    parallel.close(end_process=False)


def make_training_step(workload, shape):
    """A function that takes a step on so many random tokens in sequences of one length."""
    world = parallel.init(workload.device)
    config = SHAPES[shape]
    placement = parallel.choose_placements(
        world,
        name_dtype(workload),
        layout="auto",
        offload="none",
        use_compile=True,
        activation_checkpointing=False,
        parameters=checkpoint.count_parameters(config),
    ).trained
    model = model_folder.build_model(config, "lm", placement, torch.float32)
    fill(model)
    optimizer = optim.make_adamw(model, 0.0, 0.9, 0.95)

    def step(length, tokens):
        ids = np.random.default_rng(0).integers(3, config.vocab_size, (tokens // length, length))
        batch = workloads.make_batch(workload, list(ids))
        logps = model.log_probs(batch, uniform_weights=True)
        parallel.backward(model, losses.mle_loss(logps, batch.targets >= 0))
        optim.guarded_step(model, optimizer, 1e-5, 1.0)

    return step


def plan_run(workload, script, flags, shape, machine, length, response=0):
    """The planner's Run of a script with some flags on this machine.

    length    the mean of a sequence, and
    response  how many of its tokens are sampled; 0: it is no PPO"""
    words = []
    for name, value in flags.items():
        words.append(f"--{name}={value}")
    with redirect_stdout(None):
        knobs = plan.read_knobs(os.path.join(REPOSITORY, script), words)
    return Run(knobs, SHAPES[shape], devices.Device(**machine), 1, length, response)


def name_dtype(workload):
    return str(workload.dtype).removeprefix("torch.")


# ---- PPO-Lag ----


def ppo_lag(workload, counts, shape, adapters, prompts, length, new_tokens, max_tokens, machine):
    """The trainer's second iteration, the first being warm-up. Nothing is saved.

    adapters  six models as adapters on one base, instead of six models"""
    folder = workload.folder
    kind = "_adapter" if adapters else ""
    flags = {  # of models that write_models() has written
        "out_dir": f"{folder}/run",
        "actor_model": f"{folder}/model",
        "reward_model": f"{folder}/reward{kind}",
        "cost_model": f"{folder}/cost{kind}",
        "lora_rank": ADAPTER_RANK if adapters else 0,
        "prompts": f"{folder}/prompts.jsonl",
        "rollout_size": prompts,
        "batch_size": prompts,
        "max_len": length,
        "max_new_tokens": new_tokens,
        "max_tokens": max_tokens,
        "epochs": 2,
        "max_steps": 2,
        "save_interval": 0,
        "actor_warmup_ratio": 0,
        "critic_warmup_ratio": 0,
        "device": workload.device,
        "dtype": name_dtype(workload),
    }
    workload.options["batch_size"] = prompts  # what report_steps() counts
    name = "adapters on one base" if adapters else "six models"
    with new_row(workload, f"PPO-Lag, {shape}, {name}") as row:
        mean_length = new_tokens + (length - new_tokens) * 3 // 4  # of write_prompts()
        planner_flags = {**flags, "longest": new_tokens}
        planned = plan_run(
            workload, "train_ppo_lag.py", planner_flags, shape, machine, mean_length, new_tokens
        )
        row["plan"] = planned.peak()
        row["roofline"] = {times.name: times.roofline for times in planned.times()}
        count_iterations(counts)
        shutil.rmtree(flags["out_dir"], ignore_errors=True)
        checkpoint.save = run_state.save = save_nothing
        workloads.run_trainer(workload, "train_ppo_lag.py", flags)
        seconds = workload.report["seconds"][-1]
        row.update(amount=seconds, unit="s an iteration", phases=workload.report["phases"])
        row.update(share=sum(row["roofline"].values()) / seconds, of="roofline")
        row.update(counts.last)
        row["metrics"] = {}  # of the last iteration, but what is not finite
        for name, value in read_metrics(f"{flags['out_dir']}/metrics.jsonl")[-1].items():
            if math.isfinite(value):
                row["metrics"][name] = value


def save_nothing(*arguments, **options):
    """Replaces what writes models and states, which here are as large as they are useless."""


def count_iterations(counts):
    """Let counts.last be what the last iteration added, the waits of sampling apart."""
    counts.last = {}
    counts.in_sampling = 0
    seen = {"compiled": 0, "waits": 0, "sampling": 0}
    log, generate = monitor.Monitor.log, rollout.generate

    def log_and_count(self, step, metrics):
        log(self, step, metrics)
        if counts.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")  # from the first iteration's end on
            sampling = counts.in_sampling - seen["sampling"]
            counts.last["compiled"] = count_compiled() - seen["compiled"]
            counts.last["waits"] = counts.waits - seen["waits"] - sampling
            counts.last["waits_in_sampling"] = sampling
        seen.update(compiled=count_compiled(), waits=counts.waits, sampling=counts.in_sampling)

    def generate_and_count(*arguments, **options):
        before = counts.waits
        result = generate(*arguments, **options)
        counts.in_sampling += counts.waits - before
        return result

    monitor.Monitor.log = log_and_count
    rollout.generate = generate_and_count


# ---- the loss of an LM head ----


def measure_loss(workload, counts, tokens, vocab_size, hidden_size, machine):
    """Forward and backward of the mean log-probability, from hidden states to both gradients."""
    with new_row(workload, f"LM-head loss, {tokens} x {vocab_size} x {hidden_size}") as row:
        options = {"device": workload.device, "dtype": workload.dtype}
        x = torch.randn(tokens, hidden_size, **options).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, **options).mul_(0.02).requires_grad_()
        targets = torch.randint(vocab_size, (tokens,), device=workload.device)

        def step():
            x.grad = weight.grad = None
            UniformLogProbs.apply(x, weight, targets, 1.0).mean().backward()

        step()
        with counts.added_to(row):
            began = workload.now()
            for _ in range(TIMED_STEPS):
                step()
            seconds = (workload.now() - began) / TIMED_STEPS
        flops = 6 * tokens * vocab_size * hidden_size
        row.update(amount=1e3 * seconds, unit="ms")
        row.update(share=flops / seconds / 1e12 / machine["matrix"], of="matrix rate")


if __name__ == "__main__":
    main()
