"""What a run needs and how long it takes, computed before anybody rents a cluster.

$ python -m nanosafe.plan SCRIPT [config files] [flags of the script and of the planner]
$ python -m nanosafe.plan train_ppo_lag.py config/beaver_7b/ppo_lag.py --gpus=8 --gpu=a800-80gb

Memory is added up part by part. Time is a roofline: each phase takes as long as its matrix products
at the data sheet's rate, its bytes of memory or its bytes over links, whichever is slowest. The
column `expected` divides by SHARES, the part of these rates that others have measured
(docs/benchmarks.md names the sources)."""

import ast
import math
import os
import re
import sys
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

import configurator
from nanosafe.adapter_base import find_whole_model
from nanosafe.checkpoint.folder import read_model_config
from nanosafe.errors import choose, stop
from nanosafe.hub import find_model
from nanosafe.model import Config, LLaMA
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges

gpus = 0  # of the run, over all nodes; 0: the 8 of a node, or 1 for cpu
gpu = "a800-80gb"  # a800-80gb | a100-80gb | a100-40gb | h100 | h200 | rtx-4090 | cpu (this machine)
shape = ""  # 1.1b | 7b | 13b | 34b | 70b, where the model's folder does not exist yet
length = 0  # mean tokens of a sequence; 0: max_len
response = 0  # tokens of it that are sampled or carry loss; 0: half, or max_new_tokens


class Device(NamedTuple):
    """A GPU, or the CPU of this machine, by its data sheet."""

    memory: float  # GB
    matrix: float  # TFLOP/s of matrix products, in bfloat16 without sparsity
    bandwidth: float  # GB/s of its memory
    link: float  # GB/s to another GPU of the node, one way
    network: float  # GB/s of a node
    is_cpu: bool = False


GPUS = {
    "a800-80gb": Device(memory=80, matrix=312, bandwidth=2039, link=200, network=100),
    "a100-80gb": Device(memory=80, matrix=312, bandwidth=2039, link=300, network=100),
    "a100-40gb": Device(memory=40, matrix=312, bandwidth=1555, link=300, network=100),
    "h100": Device(memory=80, matrix=989, bandwidth=3350, link=450, network=400),
    "h200": Device(memory=141, matrix=989, bandwidth=4800, link=450, network=400),
    "rtx-4090": Device(memory=24, matrix=165, bandwidth=1008, link=25, network=25),
}
SHAPES = {
    "1.1b": Config(32000, 2048, 5632, 22, 32, 4),
    "7b": Config(32000, 4096, 11008, 32, 32, 32),
    "13b": Config(32000, 5120, 13824, 40, 40, 40),
    "34b": Config(32000, 8192, 22016, 48, 64, 8),
    "70b": Config(32000, 8192, 28672, 80, 64, 8),
}
SHARES = {"matrix": 0.57, "bandwidth": 0.68, "link": 0.7}  # of each rate, as others reached it
GPUS_PER_NODE = 8
RESERVED = 2.5  # GB for CUDA, NCCL's buffers and fragmentation; on a CPU for other processes


class Part(NamedTuple):
    """A part of the memory of the fullest GPU."""

    name: str
    bytes: float
    knobs: str  # what changes it


class Memory(NamedTuple):
    always: list[Part]
    training: list[Part]  # in addition, during an update
    sampling: list[Part]  # in addition, during a rollout; empty: the run does not sample


class Traffic(NamedTuple):
    """Bytes that one rank's collectives handle."""

    gathered: float = 0  # weights, from slices
    scattered: float = 0  # gradients, reduced into slices
    reduced: float = 0  # gradients, between copies


class Phase(NamedTuple):
    """The work of one rank in a part of a step or of an iteration."""

    name: str
    flops: float  # of matrix products
    memory_bytes: float  # read and written
    traffic: Traffic
    shards: int  # ranks that the model's rows are dealt to


class Times(NamedTuple):
    """Seconds of a phase."""

    name: str
    matrix: float
    bandwidth: float
    link: float
    roofline: float  # the slowest of the three
    expected: float


# ---- the command ----


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.argv = ["nanosafe.plan", "-h"]
        configurator.configure(globals())  # prints the text above and the planner's knobs, and ends
    knobs = read_knobs(arguments[0], arguments[1:])
    choose("gpu", knobs["gpu"], (*GPUS, "cpu"))
    config = read_shape(knobs)
    if knobs["gpu"] == "cpu":
        device = measure_this_machine(dtype=knobs["dtype"])
        gpus_by_default = 1
    else:
        device = GPUS[knobs["gpu"]]
        gpus_by_default = GPUS_PER_NODE

    def make_run(knobs, gpus):
        return Run(knobs, config, device, gpus, knobs["length"], knobs["response"])

    print_report(make_run(knobs, knobs["gpus"] or gpus_by_default), make_run)


def read_knobs(script, arguments):
    """A script's knobs as the script would resolve them, and the planner's. Nothing else of the
    script is executed."""
    if not os.path.isfile(script):
        stop(f"no script {script!r}: give train_sft.py, train_pref.py or train_ppo_lag.py")
    defaults = {"__file__": script}
    with open(script, encoding="utf-8") as f:
        source = f.read()
    for node in ast.parse(source).body:
        if configurator.calls_configure(node):
            break
        if isinstance(node, ast.Assign):
            defaults[node.targets[0].id] = ast.literal_eval(node.value)
    sys.argv = [script, *arguments]
    knobs = configurator.configure(defaults, globals())
    check_ranges(knobs)
    return knobs


def read_shape(knobs):
    """The policy's Config: that of the model folder, of the script's knobs, or of a named shape."""
    path = knobs.get("actor_model") or knobs["init_from"]
    name = knobs["shape"]
    if not name:
        if path == "scratch":
            names = [f.name for f in fields(Config) if f.name in knobs]
            return Config(**{name: knobs[name] for name in names})
        if os.path.isfile(os.path.join(find_whole_model(path), "config.json")):
            return read_model_config(find_whole_model(path))
        name = find_shape_in(path)
    if not name:  # perhaps one of the hub's models
        folder = find_whole_model(find_model(path, weights=False))
        if os.path.isfile(os.path.join(folder, "config.json")):
            return read_model_config(folder)
    if name not in SHAPES:
        stop(f"no model at {path!r}: say --shape=, one of {', '.join(SHAPES)}")
    return SHAPES[name]


def find_shape_in(path):
    """The name of a shape that a path holds, or "". 1.7b is not 7b."""
    for name in SHAPES:
        if re.search(rf"(?<![\d.]){name}", path.lower()):
            return name
    return ""


# ---- the model ----


def model_tensors(config, head):
    """(rows, columns) of the tensors of one block, and of the tensors outside the blocks."""
    with torch.device("meta"):
        model = LLaMA(replace(config, num_hidden_layers=1), head)
    block, outside = [], []
    for name, parameter in model.named_parameters():
        tensors = block if name.startswith("layers.") else outside
        tensors.append((len(parameter), parameter[0].numel()))
    return block, outside


def count_numbers(tensors, ranks=1):
    """Numbers in tensors whose rows are dealt to ranks: those of the first rank, the largest."""
    count = 0
    for rows, columns in tensors:
        count += math.ceil(rows / ranks) * columns
    return count


# ---- the run ----


class Run:
    """A trainer's knobs on a number of GPUs: what each GPU holds, and what it does in a step.

    knobs     the trainer's resolved knobs, a dict
    config    the policy's Config; score models and critics have the same shape
    length    mean tokens of a sequence, and
    response  how many of them are sampled or carry loss; 0 for both: see the knobs above"""

    def __init__(self, knobs, config, device, gpus, length=0, response=0):
        self.knobs, self.config, self.device, self.gpus = knobs, config, device, gpus
        self.tensors = {head: model_tensors(config, head) for head in ("lm", "score")}
        in_float32 = knobs["dtype"] == "float32" or (device.is_cpu and knobs["dtype"] == "auto")
        self.compute_bytes = 4 if in_float32 else 2  # of a number that is computed with
        self.is_plain = device.is_cpu and gpus == 1 and in_float32
        self.is_ppo = "actor_model" in knobs
        self.length = length or knobs["max_len"]
        most_sampled = knobs.get("max_new_tokens", self.length)
        self.response = response or min(self.length // 2, most_sampled)
        self.trained, self.frozen = list_models(knobs)  # the head of each
        self.layout = self.choose_layout()
        self.shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, GPUS_PER_NODE)}[self.layout]
        self.frozen_shards = self.shards
        if self.layout == "ddp" and knobs["offload"] == "none":
            self.frozen_shards = 1
        self.sequences = count_sequences(knobs)  # of a step, or of a rollout, over all ranks
        self.sequences_per_gpu = math.ceil(self.sequences / gpus)
        self.tokens = math.ceil(self.sequences_per_gpu * self.length)  # of one rank
        self.micro_batches = math.ceil(self.tokens / knobs["max_tokens"])

    def choose_layout(self):
        """As parallel.choose_layout() does."""
        layout = self.knobs["parallel"]
        if layout not in ("auto", "plain"):
            return layout
        is_small = 16 * self.count_models(self.trained) < 0.25 * self.device.memory * 1e9
        return "ddp" if is_small or self.gpus == 1 else "fsdp"

    def count_blocks(self, head, ranks=1):
        """Numbers in all blocks, or in the first rank's slices of them."""
        block, _ = self.tensors[head]
        return self.config.num_hidden_layers * count_numbers(block, ranks)

    def count_outside(self, head, ranks=1):
        _, outside = self.tensors[head]
        return count_numbers(outside, ranks)

    def count_models(self, heads, ranks=1):
        """Numbers in models with these heads, or in the first rank's slices of them."""
        count = 0
        for head in heads:
            count += self.count_blocks(head, ranks) + self.count_outside(head, ranks)
        return count

    # ---- memory ----

    def memory(self):
        """The Memory of the fullest GPU."""
        sampling = self.sampling_memory() if self.is_ppo else []
        return Memory(self.constant_memory(), self.training_memory(), sampling)

    def constant_memory(self):
        on_gpu = not self.device.is_cpu
        trained = self.count_models(self.trained, self.shards)
        if self.knobs["offload"] == "all" and on_gpu:
            trained = 0
        frozen = self.count_models(self.frozen, self.frozen_shards)
        if self.knobs["offload"] != "none" and on_gpu:
            frozen = 0
        parts = [
            Part("weights, float32", 4 * trained, "gpus, offload=all"),
            Part("AdamW's moments", 8 * trained, "gpus, offload=all"),
            Part("frozen models", self.compute_bytes * frozen, "gpus, offload=frozen"),
        ]
        if self.device.is_cpu:
            libraries = 7e8 if torch.version.cuda else 3e8
            parts.append(Part("Python and its libraries", libraries, "-"))
        if not self.is_plain:  # two blocks at a time, and all that is outside the blocks
            block, outside = self.tensors["lm"]
            gathered = count_numbers(outside) + 2 * count_numbers(block)
            parts.append(Part("gathered blocks", self.compute_bytes * gathered, "-"))
        return parts

    def training_memory(self):
        config = self.config
        trained = self.count_models(self.trained, self.shards)
        if self.knobs["offload"] == "all" and not self.device.is_cpu:
            trained = 0
        chunk = 0  # of logits, and its gradient
        if self.trained[0] == "lm":
            chunk = 2 * (32 * 2**20 if self.device.is_cpu else 2**29)
        bytes_each = 8 if self.is_plain else self.compute_bytes + 4
        vocabulary = chunk + config.vocab_size * config.hidden_size * bytes_each
        parts = [
            Part("gradients, float32", 4 * trained, "gpus"),
            Part("activations", self.activation_bytes(), "max_tokens, activation_checkpointing"),
            Part("logits and vocabulary gradients", vocabulary, "-"),
        ]
        if not self.is_plain:
            block, _ = self.tensors["lm"]
            gradients = (self.compute_bytes + 4) * count_numbers(block)
            parts.append(Part("blocks' gradients", gradients, "-"))
        return parts

    def activation_bytes(self):
        """What a micro-batch keeps for its backward pass: counted numbers per token and block."""
        config = self.config
        width, inner = config.hidden_size, config.intermediate_size
        attention = config.num_attention_heads * config.head_dim
        if self.device.is_cpu:  # where attention pads
            per_block = 7 * width + 4 * inner + 4.4 * attention
        else:
            per_block = 4 * width + 4 * inner + 5 * attention
        if config.qk_norm:  # which keeps its input, of half precision in float32, and its output
            heads = config.num_attention_heads + config.num_key_value_heads
            per_block += (2.4 if self.device.is_cpu else 3) * heads * config.head_dim
        if self.knobs["activation_checkpointing"]:
            per_token = per_block + config.num_hidden_layers * width
        else:
            per_token = per_block * config.num_hidden_layers
        tokens = min(self.tokens, self.knobs["max_tokens"])
        return tokens * self.compute_bytes * (per_token + 3 * width)

    def sampling_memory(self):
        copy = 0 if self.is_plain else self.compute_bytes * self.count_models(["lm"])
        live = self.count_live_rows()
        positions = math.ceil(self.knobs["max_len"] / 64) * 64
        cache = live * self.cache_bytes_per_token() * positions
        logits = 3 * 4 * live * self.config.vocab_size
        return [
            Part("inference copy", copy, "-"),
            Part("KV cache", cache, "slots, max_len"),
            Part("sampler's logits", logits, "slots"),
        ]

    def count_live_rows(self):
        """Responses that one rank decodes together."""
        return min(self.knobs["slots"] or 256, self.sequences_per_gpu)

    def cache_bytes_per_token(self):
        config = self.config
        keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return 2 * keys * self.compute_bytes  # and as many values

    def training_peak(self):
        memory = self.memory()
        return sum(part.bytes for part in memory.always + memory.training)

    def sampling_peak(self):
        memory = self.memory()
        if not memory.sampling:
            return 0
        return sum(part.bytes for part in memory.always + memory.sampling)

    def peak(self):
        return max(self.training_peak(), self.sampling_peak())

    def fits(self):
        return self.peak() / 1e9 <= self.device.memory - RESERVED

    # ---- work ----

    def phases(self):
        """The Phases of an optimizer step, or of one of PPO's iterations."""
        if self.is_ppo:
            return self.ppo_phases()
        is_mean = self.knobs.get("objective", "mle") == "mle"
        targets = self.count_targets()
        return [self.train("step", self.trained[0], self.tokens, targets, is_mean)]

    def count_targets(self):
        """Tokens of one rank that carry loss, or are read."""
        return self.tokens * self.response // self.length

    def ppo_phases(self):
        targets = self.count_targets()
        has_critics = len(self.trained) > 1
        phases = [self.prefill(), self.decode()]
        phases.append(self.score("old log-probs", "lm", self.tokens, targets, self.shards))
        phases.append(self.score("reference", "lm", self.tokens, targets, self.frozen_shards))
        names = ["reward", "cost"][: len(self.frozen) - 1]
        for name in names:
            phases.append(self.score(name, "score", self.tokens, targets, self.frozen_shards))
            if has_critics:
                values = name + " values"
                phases.append(self.score(values, "score", self.tokens, targets, self.shards))
        epochs = self.knobs["ppo_epochs"]
        for name, head in zip(("actor", "reward critic", "cost critic"), self.trained):
            phases.append(self.train(name, head, self.tokens * epochs, targets * epochs))
        if self.knobs["ptx_data"]:
            phases.append(self.ptx())
        return phases

    def prefill(self):
        """Every prompt is read once, by a gathered copy of the weights."""
        tokens = self.sequences_per_gpu * (self.length - self.response)
        flops = self.flops("lm", tokens, self.sequences_per_gpu, passes=1, products=1)
        return Phase("prompts", flops, 0, self.traffic("lm", self.shards), self.shards)

    def decode(self):
        """Every step reads all weights, and the keys and values of the rows that are live."""
        config = self.config
        tokens = self.sequences_per_gpu * self.response
        flops = self.flops("lm", tokens, tokens, passes=1, products=1)
        live = self.count_live_rows()
        steps = math.ceil(self.sequences_per_gpu / live) * self.response
        embedding = config.vocab_size * config.hidden_size  # of which a step reads a row per token
        weights = self.compute_bytes * (self.count_models(["lm"]) - embedding)
        keys = live * self.cache_bytes_per_token() * (self.length - self.response / 2)
        return Phase("responses", flops, steps * (weights + keys), Traffic(), 1)

    def score(self, name, head, tokens, targets, shards):
        """A forward pass without a backward one, of log-probabilities, scores or values."""
        flops = self.flops(head, tokens, targets, passes=1, products=1)
        weights = self.compute_bytes * self.count_models([head]) * self.micro_batches
        return Phase(name, flops, weights, self.traffic(head, shards, self.micro_batches), shards)

    def train(self, name, head, tokens, targets, uniform_weights=False, updates=True):
        """Forward and backward passes, and with `updates` the optimizer's step.

        uniform_weights  the loss is a mean of log-probabilities (LLaMA.log_probs)"""
        passes = 4 if self.knobs["activation_checkpointing"] else 3
        products = 3 if uniform_weights else 4
        flops = self.flops(head, tokens, targets, passes, products)
        micro_batches = max(1, math.ceil(tokens / self.knobs["max_tokens"]))
        moved = 4 * self.compute_bytes * self.count_models([head]) * micro_batches
        if updates:  # what AdamW reads and writes
            moved += 28 * self.count_models([head], self.shards)
        traffic = self.traffic(head, self.shards, micro_batches, trains=True)
        return Phase(name, flops, moved, traffic, self.shards)

    def ptx(self):
        """The gradients of demonstrations, which join the actor's."""
        batch_size = self.knobs["batch_size"]
        updates = self.knobs["ppo_epochs"] * self.sequences // batch_size
        tokens = math.ceil(batch_size / self.gpus) * self.length * updates
        return self.train("ptx", "lm", tokens, tokens / 2, uniform_weights=True, updates=False)

    def flops(self, head, tokens, targets, passes, products):
        """FLOP of matrix products: 2 per weight and token in each pass over the blocks.

        A target costs `products` products with the vocabulary's matrix."""
        config = self.config
        blocks = self.count_blocks(head) * 2 * tokens
        width = config.num_attention_heads * config.head_dim
        attention = 4 * width * self.count_seen_keys() * tokens
        flops = passes * (blocks + attention)
        if head == "lm":
            flops += 2 * config.vocab_size * config.hidden_size * targets * products
        return flops

    def count_seen_keys(self):
        """Keys that a query sees on average, added up over the layers: half of the sequence each,
        or fewer with a window."""
        seen = 0
        for window in self.config.windows_of_layers():
            window = min(window or self.length, self.length)
            seen += window - window**2 / (2 * self.length)
        return seen

    def traffic(self, head, shards, micro_batches=1, trains=False):
        """The Traffic of a model's passes, as FSDP2 sends it.

        Blocks are gathered in each forward and each backward pass; what is outside the blocks in
        each forward pass, or only once where no update lies between two. Copies exchange gradients
        in the last micro-batch."""
        blocks = self.count_blocks(head, shards) * shards
        outside = self.count_outside(head, shards) * shards
        copies = 0
        if trains and self.gpus > shards:
            copies = 4 * (blocks + outside) / shards
        if shards == 1:
            return Traffic(reduced=copies)
        if not trains:
            return Traffic(gathered=self.compute_bytes * (micro_batches * blocks + outside))
        gathered = self.compute_bytes * micro_batches * (2 * blocks + outside)
        return Traffic(gathered, 4 * micro_batches * (blocks + outside), copies)

    # ---- time ----

    def times(self, phases=None):
        """The Times of phases, by default of all."""
        times = []
        for phase in phases or self.phases():
            matrix = phase.flops / self.device.matrix / 1e12
            bandwidth = phase.memory_bytes / self.device.bandwidth / 1e9
            link = self.link_seconds(phase.traffic, phase.shards)
            roofline = max(matrix, bandwidth, link)
            expected = matrix / SHARES["matrix"]
            expected = max(expected, bandwidth / SHARES["bandwidth"], link / SHARES["link"])
            times.append(Times(phase.name, matrix, bandwidth, link, roofline, expected))
        return times

    def link_seconds(self, traffic, shards):
        """Seconds of ring collectives.

        All GPUs of a node share its network, or as many rings of copies as it has slices."""
        if self.device.is_cpu or self.gpus == 1:
            return 0.0
        link, network = self.device.link, self.device.network
        ring = min(link, network) if shards > GPUS_PER_NODE else link
        across = network / min(GPUS_PER_NODE, shards) if self.gpus > GPUS_PER_NODE else link
        copies = self.gpus // shards
        sliced = (traffic.gathered + traffic.scattered) * (shards - 1) / shards / ring
        copied = 2 * traffic.reduced * (copies - 1) / copies / across
        return (sliced + copied) / 1e9


def list_models(knobs):
    """The heads of the models that a trainer trains, and of those that it only reads."""
    if "actor_model" not in knobs:
        scores = knobs.get("objective") in ("reward", "cost")
        return ["score" if scores else "lm"], []
    scorers = 2 if knobs["cost_model"] else 1
    critics = scorers if knobs["advantage"] == "gae" else 0
    return ["lm"] + ["score"] * critics, ["lm"] + ["score"] * scorers


def count_sequences(knobs):
    """Sequences of an optimizer step, or of a rollout."""
    if "actor_model" in knobs:
        return knobs["rollout_size"] * knobs["num_samples"]
    if knobs.get("objective") in ("reward", "cost", "dpo", "ipo"):
        return 2 * knobs["batch_size"]  # pairs
    return knobs["batch_size"]


# ---- what is printed ----


def print_report(run, make_run):
    """Print a Run's tables; make_run(knobs, gpus) gives other runs to try where it does not fit."""
    print(
        f"\n{run.layout} over {run.gpus}, {len(run.trained)} models trained, {len(run.frozen)} "
        f"frozen, {run.sequences} sequences of {run.length} tokens, {run.micro_batches} "
        f"micro-batches of at most {run.knobs['max_tokens']} tokens on each rank\n"
    )
    print(format_table(memory_rows(run)) + "\n")
    print(format_table(time_rows(run)) + "\n")
    roofline = sum(times.roofline for times in run.times())
    expected = sum(times.expected for times in run.times())
    rate = run.sequences / expected
    print(
        f"{rate:.2f} sequences/s, {rate * run.length:.0f} tokens/s expected; "
        f"{expected / roofline:.2f}x the roofline"
    )
    if not run.fits():
        print(suggest_change(run, make_run))


def memory_rows(run):
    memory = run.memory()
    rows = [["memory per GPU, GB", "training", "sampling", "what changes it"]]
    for part in memory.always:
        size = format_gigabytes(part.bytes)
        rows.append([part.name, size, size if run.is_ppo else "", part.knobs])
    for part in memory.training:
        rows.append([part.name, format_gigabytes(part.bytes), "", part.knobs])
    for part in memory.sampling:
        rows.append([part.name, "", format_gigabytes(part.bytes), part.knobs])
    sampling = format_gigabytes(run.sampling_peak()) if run.is_ppo else ""
    available = f"of {run.device.memory:.1f} GB"
    rows.append(["all", format_gigabytes(run.training_peak()), sampling, available])
    return rows


def format_gigabytes(number):
    return f"{number / 1e9:.2f}"


def time_rows(run):
    columns = Times._fields[1:]
    rows = [["seconds", *columns]]
    totals = dict.fromkeys(columns, 0)
    for times in run.times():
        rows.append([times.name])
        for column in columns:
            seconds = getattr(times, column)
            rows[-1].append(f"{seconds:.3g}")
            totals[column] += seconds
    rows.append(["all"] + [f"{total:.3g}" for total in totals.values()])
    return rows


def suggest_change(run, make_run):
    """A sentence with the first change, from cheap to expensive, with which the run fits."""
    smaller = {
        "activation_checkpointing": True,
        "max_tokens": run.knobs["max_len"],
        "parallel": "fsdp",
    }
    tries = [
        ({"activation_checkpointing": True}, 1),
        (smaller, 1),
        ({**smaller, "offload": "frozen"}, 1),
    ]
    for exponent in range(1, 8):
        tries.append((smaller, 2**exponent))
    for change, factor in tries:
        other = make_run({**run.knobs, **change}, run.gpus * factor)
        if other.fits():
            flags = []
            for name, value in change.items():
                if run.knobs[name] != value:
                    flags.append(f"--{name}={value}")
            flags.append(f"--gpus={other.gpus}")
            seconds = sum(times.expected for times in other.times())
            return (
                f"it does not fit; with {' '.join(flags)} it does: {other.peak() / 1e9:.1f} GB, "
                f"{seconds:.1f} s"
            )
    return "it does not fit, nor on 128 times the GPUs: take a smaller model"


# ---- this machine ----


def measure_this_machine(device="cpu", dtype="float32"):
    """The Device that this machine has: the rates of a large matrix product and of a large copy."""
    size = 1024 if device == "cpu" else 8192
    matrix = torch.randn(size, size, device=device)
    if dtype == "bfloat16":
        matrix = matrix.bfloat16()
    source = torch.randn(2**25, device=device)
    target = torch.empty_like(source)
    product_seconds = measure_seconds("matrix @ matrix", matrix=matrix)
    copy_seconds = measure_seconds("target.copy_(source)", target=target, source=source)
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        link = 0
    else:
        memory = torch.cuda.mem_get_info()[1]
        link = 1
    matrix_rate = 2 * size**3 / product_seconds / 1e12
    bandwidth = 2 * source.nbytes / copy_seconds / 1e9
    return Device(memory / 1e9, matrix_rate, bandwidth, link, network=1, is_cpu=device == "cpu")


def measure_seconds(statement, **names):
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


if __name__ == "__main__":
    main(sys.argv[1:])
