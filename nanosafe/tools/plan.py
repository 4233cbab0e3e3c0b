"""What a run needs and how long it takes, before anybody rents a cluster.

$ python -m nanosafe.plan train_ppo_lag.py config/beaver_7b/ppo_lag.py --gpus=8 --gpu=a800-80gb

Behind the script: its config files and flags, and the five below.

The roofline is arithmetic: matrix products at the data sheet's rate, bytes of memory and of links
at theirs, the slowest of the three for each phase. `expected` divides by SHARES, which on a GPU
are assumptions (docs/benchmarks.md names their sources); on a CPU two blocks are tried."""

import ast
import math
import os
import sys
from collections import Counter, namedtuple
from dataclasses import replace

import numpy as np
import torch
from torch.utils.benchmark import Timer

import configurator
from nanosafe.data import batching
from nanosafe.errors import choose, stop
from nanosafe.losses import mle_loss
from nanosafe.model import Config, LLaMA
from nanosafe.printing import format_table
from nanosafe.rollout import generate
from nanosafe.storage import read_json


gpus = 0  # of the run, over all nodes; 0: a node's 8, or this machine's CPU


gpu = "a800-80gb"  # a800-80gb | a100-80gb | a100-40gb | h100 | h200 | rtx-4090 | cpu (this machine)


shape = ""  # 1.1b | 7b | 13b | 34b | 70b, where the model's folder is not there yet


length = 0  # mean tokens of a sequence; 0: max_len


response = 0  # tokens of it that are sampled or carry loss; 0: half, or max_new_tokens


TABLES = read_json(os.path.dirname(__file__), "machines.json")  # data sheets; shapes of models


GPU = namedtuple("GPU", TABLES["columns"])


GPUS = {name: GPU(*row) for name, row in TABLES["gpus"].items()}


SHARES, SHAPES = TABLES["shares"], TABLES["shapes"]


NODE = 8  # GPUs in a node


RESERVED = 2.5  # GB for CUDA, NCCL's buffers and what fragments; on a CPU for others


def model_tensors(c, head):
    """(rows, columns) of a block's tensors, and of those outside the blocks."""
    with torch.device("meta"):
        model = LLaMA(replace(c, num_hidden_layers=1), head)
    block, every = (
        Counter((len(p), p[0].numel()) for p in part.parameters()) for part in (model.layers, model)
    )
    return list(block.elements()), list((every - block).elements())


def size(tensors, ranks=1):
    """Numbers in tensors whose rows are dealt to ranks: the first rank's part, the largest."""
    return sum(math.ceil(rows / ranks) * columns for rows, columns in tensors)


class Run:
    """A trainer's resolved knobs on `gpus` GPUs of a kind: its memory and its phases.

    k  the knobs (dict); c  the policy's Config; a scorer and a critic have the same shape
    reached  the shares of the roofline that this machine reaches, by kind of phase, or None"""

    def __init__(self, knobs, config, gpu, gpus, length=0, response=0, reached=None):
        self.k, self.c, self.gpu, self.gpus, self.reached = knobs, config, gpu, gpus, reached
        self.cpu = gpu.link == 0
        self.shapes = {head: model_tensors(config, head) for head in ("lm", "score")}
        single = knobs["dtype"] == "float32" or self.cpu and knobs["dtype"] == "auto"
        self.bytes = 4 if single else 2  # of what is computed in
        self.plain = self.cpu and gpus == 1 and single
        self.ppo = "actor_model" in knobs
        self.length = length or knobs["max_len"]
        self.response = response or min(self.length // 2, knobs.get("max_new_tokens", self.length))
        critics = (1 + bool(knobs["cost_model"])) * (knobs["advantage"] == "gae") if self.ppo else 0
        score = knobs.get("objective") in ("reward", "cost")
        self.trained = ["score" if score else "lm"] + ["score"] * critics
        self.frozen = ["lm"] + ["score"] * (1 + bool(knobs["cost_model"])) if self.ppo else []
        parameters = sum(size(sum(self.tensors(head), [])) for head in self.trained)
        layout = knobs["parallel"]
        if layout in ("auto", "plain"):  # parallel.places() decides alike
            small = 16 * parameters < 0.25 * gpu.memory * 1e9 or gpus == 1
            layout = "ddp" if small else "fsdp"
        self.layout = layout
        self.shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, NODE)}[layout]
        self.frozen_shards = 1 if layout == "ddp" and knobs["offload"] == "none" else self.shards
        pairs = score or knobs.get("objective") in ("dpo", "ipo")
        self.sequences = (
            knobs["rollout_size"] * knobs["num_samples"]
            if self.ppo
            else knobs["batch_size"] * (1 + pairs)
        )
        self.tokens = math.ceil(math.ceil(self.sequences / gpus) * self.length)  # of a rank
        self.micros = math.ceil(self.tokens / knobs["max_tokens"])

    def tensors(self, head):
        block, outside = self.shapes[head]
        return block * self.c.num_hidden_layers, outside

    def local(self, heads, shards):
        return sum(size(sum(self.tensors(head), []), shards) for head in heads)

    def memory(self):
        """[(part, bytes, knob)] on the fullest GPU: always; while training; while sampling."""
        c, k, b = self.c, self.k, self.bytes
        block, outside = self.shapes["lm"]
        P = self.local(self.trained, self.shards)
        away, gone = k["offload"] == "all" and not self.cpu, k["offload"] != "none" and not self.cpu
        always = [
            ("weights, float32", 0 if away else 4 * P, "gpus, offload=all"),
            ("AdamW's moments", 0 if away else 8 * P, "gpus, offload=all"),
            (
                "frozen models",
                0 if gone else b * self.local(self.frozen, self.frozen_shards),
                "gpus, offload=frozen",
            ),
        ]
        if self.cpu:
            always.append(("Python and its libraries", 7e8 if torch.version.cuda else 3e8, "-"))
        if not self.plain:  # two blocks at a time, and what is outside them, whole
            always.append(("gathered blocks", b * (size(outside) + 2 * size(block)), "-"))
        train = [
            ("gradients, float32", 0 if away else 4 * P, "gpus"),
            ("activations", self.activations(), "max_tokens, activation_checkpointing"),
        ]
        chunk = 2 * (32 * 2**20 if self.cpu else 2**29) if self.trained[0] == "lm" else 0
        dense = c.vocab_size * c.hidden_size * (8 if self.plain else b + 4)
        train.append(("logits and vocabulary gradients", chunk + dense, "-"))
        if not self.plain:
            train.append(("blocks' gradients", (b + 4) * size(block), "-"))
        if not self.ppo:
            return always, train, []
        copy = 0 if self.plain else b * self.local(["lm"], 1)
        row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * b
        live = min(k["slots"] or 256, math.ceil(self.sequences / self.gpus))
        cache = live * row * math.ceil(k["max_len"] / 64) * 64
        logits = 3 * 4 * live * c.vocab_size
        return (
            always,
            train,
            [
                ("inference copy", copy, "-"),
                ("KV cache", cache, "slots, max_len"),
                ("sampler's logits", logits, "slots"),
            ],
        )

    def activations(self):
        """What a micro-batch keeps for its backward pass; numbers per token and block, counted."""
        c = self.c
        D, I, HE = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
        kept = 7 * D + 4 * I + 4.4 * HE if self.cpu else 4 * D + 4 * I + 5 * HE  # a CPU pads
        blocks = c.num_hidden_layers
        numbers = kept + blocks * D if self.k["activation_checkpointing"] else kept * blocks
        return min(self.tokens, self.k["max_tokens"]) * self.bytes * (numbers + 3 * D)

    def peaks(self):
        """(bytes while training, bytes while sampling)."""
        always, train, sample = ([x for _, x, _ in parts] for parts in self.memory())
        return sum(always + train), sum(always + sample) if sample else 0

    def phases(self):
        """[(phase, kind, matrix FLOP, memory bytes, traffic, shards)] of a step, or a rollout."""
        k, N = self.k, self.tokens
        answers = N * self.response // self.length
        if not self.ppo:
            return [self.train("step", self.trained[0], N, answers, k["objective"] == "mle")]
        phases = self.sample()
        heads = [("old log-probs", "lm", self.shards), ("reference", "lm", self.frozen_shards)]
        for name in ("reward", "cost")[: len(self.frozen) - 1]:
            heads.append((name, "score", self.frozen_shards))
            if len(self.trained) > 1:
                heads.append((name + " values", "score", self.shards))
        phases += [self.read(name, head, N, answers, shards) for name, head, shards in heads]
        for name, head in zip(("actor", "reward critic", "cost critic"), self.trained):
            phases += [self.train(name, head, N * k["ppo_epochs"], answers * k["ppo_epochs"])]
        if k["ptx_data"]:
            updates = k["ppo_epochs"] * self.sequences // k["batch_size"]
            tokens = math.ceil(k["batch_size"] / self.gpus) * self.length * updates
            phases.append(self.train("ptx", "lm", tokens, tokens / 2, even=True, update=False))
        return phases

    def flops(self, head, tokens, targets, passes, products):
        """Matrix FLOP: 2 per weight and token in a pass over the blocks, attention over half of the
        sequence on average, `products` with the vocabulary where a target is."""
        c = self.c
        blocks = size(self.tensors(head)[0]) * 2 * tokens
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * self.length
        vocabulary = 2 * c.vocab_size * c.hidden_size * targets * products if head == "lm" else 0
        return passes * (blocks + attention * tokens) + vocabulary

    def traffic(self, head, shards, micros=1, train=False):
        """Bytes of a model's (gathers, reduce-scatters, all-reduces), as FSDP2 sends them: blocks
        are gathered in each forward and each backward, what is outside them in each forward, or
        once if nothing is trained between; copies meet in the last micro-batch."""
        block, outside = (size(part, shards) * shards for part in self.tensors(head))
        gathers = self.bytes * (micros * (1 + train) * block + (micros if train else 1) * outside)
        scatters = 4 * micros * (block + outside) * train
        copies = 4 * (block + outside) / shards * (train and self.gpus > shards)
        return (gathers, scatters, copies) if shards > 1 else (0, 0, copies)

    def read(self, name, head, tokens, targets, shards):
        flops = self.flops(head, tokens, targets, 1, 1)
        weights = self.bytes * size(sum(self.tensors(head), [])) * self.micros
        return name, "read", flops, weights, self.traffic(head, shards, self.micros), shards

    def train(self, name, head, tokens, targets, even=False, update=True):
        passes = 4 if self.k["activation_checkpointing"] else 3
        flops = self.flops(head, tokens, targets, passes, 3 if even else 4)
        P, local = size(sum(self.tensors(head), [])), self.local([head], self.shards)
        micros = max(1, math.ceil(tokens / self.k["max_tokens"]))
        moved = 4 * self.bytes * P * micros + (28 * local if update else 0)  # AdamW's reads, writes
        traffic = self.traffic(head, self.shards, micros, True)
        return name, "train", flops, moved, traffic, self.shards

    def sample(self):
        """Prompts are read once; then every step reads all weights, and the keys of its rows."""
        c, k, b = self.c, self.k, self.bytes
        rows = math.ceil(self.sequences / self.gpus)
        live = min(k["slots"] or 256, rows)
        prompts = rows * (self.length - self.response)
        whole = self.traffic("lm", self.shards)
        prefill = "prompts", "sample", self.flops("lm", prompts, rows, 1, 1), 0, whole, self.shards
        steps = math.ceil(rows / live) * self.response
        row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * b
        keys = live * row * (self.length - self.response / 2)
        weights = b * (size(sum(self.tensors("lm"), [])) - c.vocab_size * c.hidden_size)
        flops = self.flops("lm", rows * self.response, rows * self.response, 1, 1)
        return [prefill, ("responses", "sample", flops, steps * (weights + keys), (0, 0, 0), 1)]

    def seconds(self, phases=None):
        """[(phase, matrix, bandwidth, link, roofline, expected)] in seconds."""
        rows = []
        for name, kind, flops, moved, traffic, shards in phases or self.phases():
            times = (
                flops / self.gpu.matrix / 1e12,
                moved / self.gpu.bandwidth / 1e9,
                self.link(traffic, shards),
            )
            shares = [self.reached[kind]] * 3 if self.reached else SHARES.values()
            expected = max(seconds / share for seconds, share in zip(times, shares))
            rows.append((name, *times, max(times), expected))
        return rows

    def link(self, traffic, shards):
        """Seconds of rings: a node's network serves all of its GPUs', or NODE rings of copies."""
        if self.cpu or self.gpus == 1:
            return 0.0
        gathers, scatters, copies = traffic
        slow = min(self.gpu.link, self.gpu.network)
        ring = slow if shards > NODE else self.gpu.link
        across = self.gpu.network / min(NODE, shards) if self.gpus > NODE else self.gpu.link
        n, m = shards, self.gpus // shards
        return ((gathers + scatters) * (n - 1) / n / ring + 2 * copies * (m - 1) / m / across) / 1e9


def fits(run):
    return max(run.peaks()) / 1e9 <= run.gpu.memory - RESERVED


def nearest(make, knobs, gpus):
    """The first change, from cheap to dear, with which a run fits: what, and that Run."""
    smaller = {"activation_checkpointing": True, "max_tokens": knobs["max_len"], "parallel": "fsdp"}
    tries = [{"activation_checkpointing": True}, smaller, {**smaller, "offload": "frozen"}]
    for change, times in [*((t, 1) for t in tries), *((smaller, 2**i) for i in range(1, 8))]:
        run = make({**knobs, **change}, gpus * times)
        if fits(run):
            new = {key: x for key, x in change.items() if knobs[key] != x}
            return " ".join(f"--{key}={x}" for key, x in {**new, "gpus": run.gpus}.items()), run
    return None, None


def report(run, make):
    """Print the tables of a Run; make(knobs, gpus) gives others to try."""
    gb = lambda x: f"{x / 1e9:.2f}"
    print(
        f"\n{run.layout} over {run.gpus}, {len(run.trained)} models trained, {len(run.frozen)} "
        f"frozen, {run.sequences} sequences of {run.length} tokens, {run.micros} micro-batches "
        f"of at most {run.k['max_tokens']} tokens on each rank\n"
    )
    rows = [["memory per GPU, GB", "training", "sampling", "what changes it"]]
    for i, parts in enumerate(run.memory()):
        rows += [
            [name, gb(x) if i < 2 else "", gb(x) if run.ppo and i != 1 else "", knob]
            for name, x, knob in parts
        ]
    peaks = run.peaks()
    print(
        format_table(
            [
                *rows,
                [
                    "all",
                    gb(peaks[0]),
                    gb(peaks[1]) if run.ppo else "",
                    f"of {run.gpu.memory:.1f} GB",
                ],
            ]
        )
    )
    timed = run.seconds()
    total = ["all", *(sum(column) for column in list(zip(*timed))[1:])]
    shown = [[name, *(f"{x:.3g}" for x in numbers)] for name, *numbers in [*timed, total]]
    shown.insert(0, ["seconds", "matrix", "bandwidth", "link", "roofline", "expected"])
    rate = run.sequences / total[-1]
    print(
        "\n" + format_table(shown) + f"\n\n{rate:.2f} sequences/s, {rate * run.length:.0f} "
        f"tokens/s expected; {total[-1] / total[-2]:.2f}x the roofline"
    )
    if not fits(run):
        change, other = nearest(make, run.k, run.gpus)
        print(
            "it does not fit"
            + (
                f"; with {change} it does: {max(other.peaks()) / 1e9:.1f} GB, "
                f"{sum(x[-1] for x in other.seconds()):.1f} s"
                if other
                else ", nor on 128 times the GPUs: take a smaller model"
            )
        )


def read_knobs(script, arguments):
    """A script's knobs as it would resolve them; nothing of it runs but their assignments."""
    if not os.path.isfile(script):
        stop(f"no script {script!r}: give train_sft.py, train_pref.py or train_ppo_lag.py")
    space = {"__file__": script}
    with open(script, encoding="utf-8") as f:
        for node in ast.parse(f.read()).body:
            if configurator.calls_configure(node):
                break
            if isinstance(node, ast.Assign):
                space[node.targets[0].id] = ast.literal_eval(node.value)
    sys.argv = [script, *arguments]
    return configurator.configure(space, globals())


def read_shape(knobs):
    """The policy's Config: of the model folder, or of a named shape."""
    shape, path = knobs["shape"], knobs.get("actor_model") or knobs["init_from"]
    if path == "scratch" and not shape:
        return Config(**{key: x for key, x in knobs.items() if key in Config.__dataclass_fields__})
    if not shape and os.path.isfile(os.path.join(path, "config.json")):
        return Config.from_dict(read_json(path, "config.json"))
    name = shape or next((s for s in SHAPES if s in path.lower()), "")
    if name not in SHAPES:
        stop(f"no model at {path!r}: say --shape=, one of {', '.join(SHAPES)}")
    return Config(32000, *SHAPES[name])


def timed(work, **names):
    timer = Timer(work, globals=names, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def this_machine(device="cpu", dtype="float32"):
    """A GPU's row for this machine: its memory, and what it does in a second, measured."""
    n = 1024 if device == "cpu" else 8192
    x, y = torch.randn(n, n, device=device), torch.randn(2**25, device=device)
    x, z = x.bfloat16() if dtype == "bfloat16" else x, torch.empty_like(y)
    product, copy = timed("x @ x", x=x), timed("z.copy_(y)", y=y, z=z)
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if device == "cpu"
        else torch.cuda.mem_get_info()[1]
    )
    return GPU(
        memory / 1e9,
        2 * n**3 / product / 1e12,
        2 * y.nbytes / copy / 1e9,
        0 if device == "cpu" else 1,
        1,
    )


def measure(run):
    """The shares of the roofline that this CPU reaches when it trains, reads and samples: with as
    many of the model's blocks as have 2e8 weights, up to 32 texts, about 1,024 of their tokens."""
    rows, share = min(run.sequences, 32), run.response / run.length
    lengths = [int(run.length * (i / rows + 0.5)) + 1 for i in range(rows)]
    blocks = min(run.c.num_hidden_layers, 1 + int(2e8) // size(run.shapes["lm"][0]))
    k = {**run.k, "batch_size": rows, "rollout_size": rows, "num_samples": 1}
    small = Run(k, replace(run.c, num_hidden_layers=blocks), run.gpu, 1, run.length, run.response)
    model = LLaMA(small.c).to(torch.float32 if run.bytes == 4 else torch.bfloat16)
    texts = [np.random.randint(3, run.c.vocab_size, n) for n in lengths]
    micros = batching.plan_micro_batches(lengths, max(1024, lengths[-1]), 1)[0]
    some = [texts[i] for i in micros[len(micros) // 2]]
    batch = batching.collate(some, [np.arange(len(t)) >= len(t) * (1 - share) for t in some], "cpu")
    counts, even = (len(batch.tokens), int((batch.targets >= 0).sum())), not run.ppo
    train = lambda: mle_loss(
        model.log_probs(batch, uniform_weights=even), batch.targets >= 0
    ).backward()
    work = {"train": (train, [small.train("", "lm", *counts, even, update=False)])}
    if run.ppo:
        work["read"] = (
            torch.no_grad()(lambda: model.log_probs(batch)),
            [small.read("", "lm", *counts, 1)],
        )
        prompts = [t[: math.ceil(len(t) * (1 - share))].tolist() for t in texts]
        limit = math.ceil(run.response)
        work["sample"] = lambda: generate(model, prompts, limit, eos_ids=[], seed=0), small.sample()
    return {
        kind: sum(row[4] for row in small.seconds(phases)) / timed("f()", f=f)
        for kind, (f, phases) in work.items()
    }


def main(arguments):
    if not arguments:
        return print(__doc__)
    knobs = read_knobs(arguments[0], arguments[1:])
    choose("gpu", knobs["gpu"], (*GPUS, "cpu"))
    config, here = read_shape(knobs), knobs["gpu"] == "cpu"
    kind = this_machine(dtype=knobs["dtype"]) if here else GPUS[knobs["gpu"]]
    make = lambda knobs, gpus, *more: Run(
        knobs, config, kind, gpus, knobs["length"], knobs["response"], *more
    )
    run = make(knobs, knobs["gpus"] or (1 if here else NODE))
    report(make(knobs, run.gpus, measure(run)) if here else run, make)


if __name__ == "__main__":
    main(sys.argv[1:])
