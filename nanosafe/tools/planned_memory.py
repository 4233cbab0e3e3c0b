"""What each GPU of a run holds, part by part, as the trainers and FSDP2 take it.

The counts are those of a dry run (dry_run.py), which tests/test_plan.py compares them with."""

import math
from typing import NamedTuple

import torch

from nanosafe.rollout import CPU_CACHE_BYTES, MAX_SLOTS
from nanosafe.tools.devices import GPUS_PER_NODE, RESERVED
from nanosafe.tools.model_sizes import block_activations, count_numbers, pinned_bytes
from nanosafe.tools.planned_setup import MOMENT_BYTES, RunSetup

LOGITS_BYTES = 2**29  # of logits that are in memory at a time on a GPU (logprobs.py)
CPU_LOGITS_BYTES = 2**25
# Where torch has it, all models exchange weights on the same streams, and so share their buffers.
SHARES_STREAMS = hasattr(torch.distributed.fsdp, "share_comm_ctx")


class Part(NamedTuple):
    """A part of the memory of the fullest GPU."""

    name: str
    bytes: float
    knobs: str  # what changes it


class Memory(NamedTuple):
    always: list[Part]
    training: list[Part]  # in addition, during an update
    sampling: list[Part]  # in addition, during a rollout; empty: the run does not sample
    host: list[Part]  # of a node, for what is offloaded


class RunMemory(RunSetup):
    """A RunSetup, and what each of its GPUs holds."""

    def memory(self):
        """The Memory of the fullest GPU."""
        always = self.constant_memory()
        sampling = self.sampling_memory(always) if self.is_ppo else []
        return Memory(always, self.training_memory(), sampling, self.host_memory())

    def constant_memory(self):
        weights = 0 if self.offloads_trained else self.count_models(self.whole_trained, self.shards)
        trained = weights + self.adapters_trained * self.adapter_numbers
        adapters = (self.adapters_trained + self.adapters_frozen) * self.adapter_numbers
        frozen = 0
        if not self.offloads_frozen:
            frozen = self.count_models(self.whole_frozen, self.frozen_shards)
        moment_bytes = MOMENT_BYTES[self.knobs.get("moments", "float32")]
        parts = [
            Part("weights, float32", 4 * weights, "gpus, lora_rank, offload=all"),
            Part("adapters, float32", 4 * adapters, "lora_rank"),
            Part("AdamW's moments", 2 * moment_bytes * trained, "gpus, lora_rank, offload=all"),
            Part("frozen models", self.compute_bytes * frozen, "gpus, lora_rank, offload=frozen"),
        ]
        if self.device.is_cpu:
            libraries = 7e8 if torch.version.cuda else 3e8
            parts.append(Part("Python and its libraries", libraries, "-"))
        if not self.frozen_is_plain and self.whole_frozen:
            kept = self.count_kept_outside(self.whole_frozen)
            parts.append(Part("frozen models, gathered", self.compute_bytes * kept, "parallel"))
        return [part for part in parts if part.bytes]

    def count_kept_outside(self, heads):
        """Numbers of models that stay gathered after a forward pass: those outside the blocks,
        which belong to FSDP's root."""
        return sum(self.count_outside(head) for head in heads)

    def training_memory(self):
        trained = self.count_trained()
        if self.offloads_trained:
            trained = self.adapters_trained * self.adapter_numbers
        parts = [Part("gradients, float32", 4 * trained, "gpus, lora_rank")]
        if self.adapters_trained:
            pairs = self.compute_bytes * self.pair_numbers
            parts.append(Part("adapters, stacked", pairs, "lora_rank"))
        if not self.is_plain:
            gathered = self.compute_bytes * self.count_gathered_in_training()
            parts.append(Part("gathered weights", gathered, "parallel"))
        kept = self.kept_activations()
        parts.append(Part("activations", kept, "max_tokens, activation_checkpointing"))
        parts.append(Part("at the backward pass's peak", self.backward_peak() - kept, "max_tokens"))
        return [part for part in parts if part.bytes]

    def count_gathered_in_training(self):
        """Numbers of trained models that have been scored before, and of the block at work."""
        if self.layers_stay:
            return self.count_models(self.whole_trained)
        block, _ = self.tensors["lm"]
        return self.count_kept_outside(self.whole_trained) + count_numbers(block)

    def count_prefetched(self):
        """Numbers in the buffers of a backward pass that gathers the next block meanwhile."""
        if self.layers_stay:
            return 0
        block, _ = self.tensors["lm"]
        buffers = 1 if SHARES_STREAMS else len(self.whole_trained + self.whole_frozen)
        return buffers * count_numbers(block)

    def kernels(self):
        """Which activations are kept: see block_activations()."""
        if self.device.is_cpu:
            return "cpu"
        return "compiled" if self.knobs.get("use_compile") else "eager"

    def tokens_in_memory(self):
        """Tokens of a micro-batch."""
        return min(self.tokens, self.knobs["max_tokens"])

    def block_bytes(self):
        """What one block keeps of a micro-batch."""
        numbers = block_activations(self.config, self.adapter.ranks, self.kernels())
        return self.compute_bytes * self.tokens_in_memory() * numbers

    def kept_activations(self):
        """What a forward pass keeps of a micro-batch for its backward pass."""
        width = self.config.hidden_size
        layers = self.config.num_hidden_layers
        blocks = layers * self.block_bytes()
        if self.knobs["activation_checkpointing"]:
            blocks = layers * width * self.compute_bytes * self.tokens_in_memory()
        last_norm = 3 * width * self.compute_bytes * self.tokens_in_memory()
        targets = width * self.compute_bytes * self.targets_in_memory()
        return blocks + last_norm + targets

    def targets_in_memory(self):
        return self.tokens_in_memory() * self.response / self.length

    def backward_peak(self):
        """The most that a backward pass holds of activations and of gradients on their way.

        It is reached in the gradient of the vocabulary's matrix, in the first blocks whose
        gradients are computed, or at the end, when those outside the blocks are reduced, or those
        of an adapter."""
        config = self.config
        kept = self.kept_activations()
        embedding = config.vocab_size * config.hidden_size
        is_lm = self.trained[0] == "lm"
        if self.device.is_cpu:
            chunk = 2 * CPU_LOGITS_BYTES if is_lm else 0
            recomputed = self.block_bytes() if self.knobs["activation_checkpointing"] else 0
            of_embedding = (
                8 if self.is_plain else 6
            )  # of the gradients of the head and the embedding
            if self.trains_adapters:
                of_embedding = 0
            return kept + chunk + recomputed + embedding * of_embedding
        gradient_of_vocabulary = 0
        if is_lm and not self.trains_adapters:
            gradient_of_vocabulary = embedding * self.compute_bytes
        at_vocabulary = kept + gradient_of_vocabulary + self.logits_bytes()
        width_bytes = config.hidden_size * self.compute_bytes * self.tokens_in_memory()
        at_block = kept + gradient_of_vocabulary + 3 * width_bytes
        if self.knobs["activation_checkpointing"]:
            at_block += self.block_bytes()
        at_block += self.compute_bytes * self.count_prefetched()
        if self.trains_adapters:
            at_end = 4 * self.adapter_numbers if self.gpus > 1 else 0
        else:
            # Meanwhile the gradients of the block before it are reduced, in float32; at the end the
            # gradients are there in the compute dtype, too.
            block, _ = self.tensors["lm"]
            at_block += 4 * count_numbers(block)
            at_end = (self.compute_bytes + 4) * self.count_outside(self.trained[0])
        return max(at_vocabulary, at_block, at_end)

    def logits_bytes(self):
        """A block of logits in float32 and its gradient, and the gradient of the hidden states."""
        if self.trained[0] != "lm":
            return 0
        targets = self.targets_in_memory()
        logits = min(LOGITS_BYTES, 4 * targets * self.config.vocab_size)
        hidden = targets * self.config.hidden_size
        return 1.5 * logits + (4 + self.compute_bytes) * hidden

    def sampling_memory(self, always):
        copy = 0
        if self.trains_adapters and not self.frozen_is_plain:
            copy = self.count_blocks("lm")
        elif not self.trains_adapters and not self.is_plain:
            copy = self.count_models(["lm"])
        pairs = self.pair_numbers if self.trains_adapters else 0
        parts = [
            Part("inference copy", self.compute_bytes * copy, "-"),
            Part("adapters, stacked", self.compute_bytes * pairs, "lora_rank"),
        ]
        held = sum(part.bytes for part in [*always, *parts])
        live = self.count_rows(held)
        logits = 3 * 4 * live * self.config.vocab_size
        parts.append(Part("KV cache", live * self.cache_row_bytes(), "slots, max_len"))
        parts.append(Part("sampler's logits", logits, "slots"))
        return [part for part in parts if part.bytes]

    def count_rows(self, held):
        """Responses that one rank decodes at a time: where `slots` is 0, as many as half of the
        memory beside the `held` bytes has room for."""
        if self.knobs["slots"]:
            return min(self.knobs["slots"], self.sequences_per_gpu)
        free = CPU_CACHE_BYTES
        if not self.device.is_cpu:
            free = max(0, (self.device.memory - RESERVED) * 1e9 - held)
        fitting = max(1, int(free / 2 / self.cache_row_bytes()))
        return min(MAX_SLOTS, self.sequences_per_gpu, fitting)

    def count_rows_of_a_rollout(self):
        sizes = {part.name: part.bytes for part in self.memory().sampling}
        return round(sizes["KV cache"] / self.cache_row_bytes())

    def cache_row_bytes(self):
        return math.ceil(self.knobs["max_len"] / 64) * 64 * self.cache_bytes_per_token()

    def cache_bytes_per_token(self):
        config = self.config
        keys = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return 2 * keys * self.compute_bytes  # and as many values

    def host_memory(self):
        """What a node's ranks keep in host memory. torch pins it, each tensor rounded up."""
        ranks = min(self.gpus, GPUS_PER_NODE)
        parts = []
        if self.offloads_trained and self.whole_trained:
            pinned = 0
            for head in self.whole_trained:
                pinned += self.count_pinned(head, self.shards, 4)
            moment_bytes = MOMENT_BYTES[self.knobs.get("moments", "float32")]
            moments = 2 * moment_bytes * self.count_models(self.whole_trained, self.shards)
            parts.append(Part("weights, pinned", ranks * pinned, "offload=all"))
            parts.append(Part("gradients, pinned", ranks * pinned, "offload=all"))
            parts.append(Part("moments", ranks * moments, "offload=all"))
        if self.offloads_frozen and self.whole_frozen:
            pinned = 0
            for head in self.whole_frozen:
                pinned += self.count_pinned(head, self.frozen_shards, self.compute_bytes)
            parts.append(Part("frozen models, pinned", ranks * pinned, "offload"))
        return parts

    def count_pinned(self, head, shards, bytes_each):
        block, outside = self.tensors[head]
        in_blocks = self.config.num_hidden_layers * pinned_bytes(block, shards, bytes_each)
        return in_blocks + pinned_bytes(outside, shards, bytes_each)

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
