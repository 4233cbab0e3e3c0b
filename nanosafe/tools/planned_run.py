"""What a run computes and moves, phase by phase, and how long that takes.

Time is a roofline: each phase takes as long as its matrix products at the data sheet's rate, its
bytes of memory or its bytes over links, whichever is slowest. Expected times divide by SHARES, the
part of these rates that others have measured."""

import math
from typing import NamedTuple

from nanosafe.tools.devices import GPUS_PER_NODE, HOST_LINK, SHARES
from nanosafe.tools.planned_memory import RunMemory
from nanosafe.tools.planned_setup import MOMENT_BYTES, PlannedModel

# train_pref.py's objectives that compare a policy with a reference.
WITH_REFERENCE = ("dpo", "ipo", "kto", "safedpo", "bso", "bfpo", "modpo")


class Traffic(NamedTuple):
    """Bytes that one rank's collectives handle."""

    gathered: float = 0  # weights, from slices
    scattered: float = 0  # gradients, reduced into slices
    reduced: float = 0  # gradients, between copies
    copies: int = 1  # how many of these there are
    hosted: float = 0  # between the GPU and its host, or inside the host, for what is offloaded


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


class Run(RunMemory):
    """A RunMemory, and what each GPU does in a step, or in one of PPO's iterations."""

    # ---- work ----

    def phases(self):
        """The Phases of an optimizer step, or of one of PPO's iterations."""
        if self.is_ppo:
            return self.ppo_phases()
        objective = self.knobs.get("objective", "mle")
        targets = self.count_targets()
        phases = []
        has_reference = objective in WITH_REFERENCE and not self.knobs["reference_free"]
        if has_reference and self.trains_adapters:  # of a whole model its answers are kept
            reference = PlannedModel("reference", "lm", trains=False, is_whole=False)
            phases.append(self.score_model(reference, targets))
        is_mean = objective == "mle"
        phases.append(self.train("step", self.trained[0], self.tokens, targets, is_mean))
        return phases

    def count_targets(self):
        """Tokens of one rank that carry loss, or are read."""
        return self.tokens * self.response // self.length

    def ppo_phases(self):
        targets = self.count_targets()
        phases = [self.prefill(), self.decode()]
        for name in ("actor", "reference", "reward", "reward critic", "cost", "cost critic"):
            for model in self.models:
                if model.name == name:
                    phases.append(self.score_model(model, targets))
        epochs = self.knobs["ppo_epochs"]
        for model in self.models:
            if model.trains:
                tokens = self.tokens * epochs
                phases.append(self.train(model.name, model.head, tokens, targets * epochs))
        if self.knobs["ptx_data"]:
            phases.append(self.ptx())
        return phases

    def score_model(self, model, targets):
        name = "old log-probs" if model.name == "actor" else model.name.replace("critic", "values")
        is_sliced = model.trains and model.is_whole
        shards = self.shards if is_sliced else self.frozen_shards
        has_adapter = not model.is_whole and model.name != "reference"
        return self.score(
            name, model.head, self.tokens, targets, shards, has_adapter, not is_sliced
        )

    def prefill(self):
        """Every prompt is read once, by a gathered copy of the weights."""
        tokens = self.sequences_per_gpu * (self.length - self.response)
        flops = self.flops("lm", tokens, self.sequences_per_gpu, 1, 1, self.trains_adapters)
        shards = self.frozen_shards if self.trains_adapters else self.shards
        traffic = self.traffic("lm", shards)
        return Phase("prompts", flops, 0, traffic, shards)

    def decode(self):
        """Every step reads all weights, and the keys and values of the rows that are live.

        Rows are refilled while prompts are left; then the last ones go on until the longest
        response ends."""
        config = self.config
        tokens = self.sequences_per_gpu * self.response
        flops = self.flops("lm", tokens, tokens, 1, 1, self.trains_adapters)
        rounds = self.sequences_per_gpu / self.count_rows_of_a_rollout()
        steps = (rounds - 1) * self.response + self.longest_response()
        embedding = config.vocab_size * config.hidden_size  # of which a step reads a row per token
        if config.tie_word_embeddings:
            embedding = 0
        numbers = self.count_models(["lm"]) - embedding
        if self.trains_adapters:
            numbers += self.pair_numbers
        keys = tokens * self.cache_bytes_per_token() * (self.length - self.response / 2)
        moved = steps * self.compute_bytes * numbers + keys
        return Phase("responses", flops, moved, Traffic(), 1)

    def longest_response(self):
        """Tokens of the longest response of a rollout.

        Unless the planner's knob says it, one prompt in a rollout is taken to be a quarter as long
        as the mean, and its response to go on to the limit."""
        if self.knobs.get("longest"):
            return self.knobs["longest"]
        shortest_prompt = (self.length - self.response) / 4
        room = self.knobs["max_len"] - shortest_prompt
        return max(self.response, min(self.knobs["max_new_tokens"], room))

    def score(self, name, head, tokens, targets, shards, has_adapter=False, is_frozen=False):
        """A forward pass without a backward one, of log-probabilities, scores or values.

        is_frozen  the weights that are read are a frozen model's, or the base's"""
        flops = self.flops(head, tokens, targets, 1, 1, has_adapter)
        weights = self.compute_bytes * self.count_models([head]) * self.micro_batches
        traffic = self.traffic(head, shards, self.micro_batches, is_frozen=is_frozen)
        return Phase(name, flops, weights, traffic, shards)

    def train(self, name, head, tokens, targets, uniform_weights=False, updates=True):
        """Forward and backward passes, and with `updates` the optimizer's step.

        uniform_weights  the loss is a mean of log-probabilities (LLaMA.log_probs)"""
        passes = 4 if self.knobs["activation_checkpointing"] else 3
        products = 3 if uniform_weights else 4
        if self.trains_adapters:
            products -= 1  # a frozen head needs no gradient
        flops = self.flops(head, tokens, targets, passes, products, self.trains_adapters)
        micro_batches = max(1, math.ceil(tokens / self.knobs["max_tokens"]))
        trained, shards = self.count_models([head], self.shards), self.shards
        times_read = 4  # twice, and as many bytes of gradients are written and read
        if self.trains_adapters:
            trained, shards = self.adapter_numbers, self.frozen_shards
            times_read = 2
        moved = times_read * self.compute_bytes * self.count_models([head]) * micro_batches
        traffic = self.traffic(head, shards, micro_batches, trains=True)
        if updates:  # what AdamW reads and writes
            moment_bytes = MOMENT_BYTES[self.knobs.get("moments", "float32")]
            of_adamw = (12 + 4 * moment_bytes) * trained
            if self.offloads_trained and not self.trains_adapters:
                traffic = traffic._replace(hosted=traffic.hosted + of_adamw)
            else:
                moved += of_adamw
        return Phase(name, flops, moved, traffic, shards)

    def ptx(self):
        """The gradients of demonstrations, which join the actor's."""
        batch_size = self.knobs["batch_size"]
        updates = self.knobs["ppo_epochs"] * self.sequences // batch_size
        tokens = math.ceil(batch_size / self.gpus) * self.length * updates
        return self.train("ptx", "lm", tokens, tokens / 2, uniform_weights=True, updates=False)

    def flops(self, head, tokens, targets, passes, products, has_adapter=False):
        """FLOP of matrix products: 2 per number and token in each pass over the blocks.

        passes       1: forward; 3: with gradients of inputs and of weights; 4: blocks twice
        products     with the vocabulary's matrix, for each target
        has_adapter  on a frozen base: its weights need no gradients, so one pass less"""
        config = self.config
        weight_passes = passes
        if has_adapter and passes > 1:
            weight_passes = passes - 1
        width = config.num_attention_heads * config.head_dim
        attention = 4 * width * self.count_seen_keys()  # FLOP of a token
        flops = weight_passes * 2 * self.count_blocks(head) * tokens
        flops += passes * attention * tokens
        if has_adapter:
            flops += passes * 2 * self.pair_numbers * tokens
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

    def traffic(self, head, shards, micro_batches=1, trains=False, is_frozen=False):
        """The Traffic of a model's passes, as FSDP2 sends it.

        Blocks are gathered in each forward and each backward pass; what is outside the blocks in
        each forward pass, or only once where no update lies between two. Copies exchange gradients
        in the last micro-batch, and so do adapters, which each rank has whole."""
        blocks = self.count_blocks(head, shards) * shards
        outside = self.count_outside(head, shards) * shards
        gathered = micro_batches * blocks + outside
        scattered = 0
        if trains:
            gathered = micro_batches * (2 * blocks + outside)
        if trains and not self.trains_adapters:
            scattered = micro_batches * (blocks + outside)
        copies = self.gpus // shards
        reduced = 0
        if trains and self.trains_adapters:
            copies = self.gpus
            reduced = self.adapter_numbers
        elif trains:
            reduced = (blocks + outside) / shards
        hosted = self.count_hosted_bytes(gathered / shards, scattered / shards, is_frozen)
        return Traffic(
            gathered=self.compute_bytes * gathered if shards > 1 else 0,
            scattered=4 * scattered if shards > 1 else 0,
            reduced=4 * reduced if copies > 1 else 0,
            copies=copies,
            hosted=hosted,
        )

    def count_hosted_bytes(self, gathered, scattered, is_frozen):
        """Bytes between a GPU and its host, of so many gathered weights and scattered gradients."""
        if (is_frozen or self.trains_adapters) and self.offloads_frozen:
            return self.compute_bytes * gathered
        if not is_frozen and not self.trains_adapters and self.offloads_trained:
            return 4 * (gathered + scattered)
        return 0

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
        """Seconds of ring collectives, and of what goes to the host.

        All GPUs of a node share its network, or as many rings of copies as it has slices."""
        if self.device.is_cpu:
            return 0.0
        link, network = self.device.link, self.device.network
        ring = min(link, network) if shards > GPUS_PER_NODE else link
        across = network / min(GPUS_PER_NODE, shards) if self.gpus > GPUS_PER_NODE else link
        copies = traffic.copies
        sliced = (traffic.gathered + traffic.scattered) * (shards - 1) / shards / ring
        copied = 2 * traffic.reduced * (copies - 1) / copies / across
        hosted = traffic.hosted / HOST_LINK
        return (sliced + copied + hosted) / 1e9
