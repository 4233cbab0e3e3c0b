"""A run before it is started: which models there are, how large, and how they lie on the GPUs.

With lora_rank one frozen base serves all models that are adapters on it: the actor, the reference
(the base itself), the critics, and those of the reward and cost models that are adapters, too."""

import math
import os
from typing import NamedTuple

from nanosafe.adapter_base import find_whole_model, is_adapter
from nanosafe.hub import find_model
from nanosafe.inference import list_constraints
from nanosafe.lora import Lora
from nanosafe.storage import names_function
from nanosafe.tools.devices import GPUS_PER_NODE
from nanosafe.tools.model_sizes import adapter_size, count_numbers, model_tensors

MOMENT_BYTES = {"float32": 4, "bfloat16": 2}  # of one of AdamW's two moments
USUAL_RANK = 16  # of adapters that are read, where the knobs say no rank
# train_pref.py's objectives whose sequences come in pairs.
PAIRED = ("reward", "cost", "dpo", "ipo", "simpo", "orpo", "safedpo", "bso", "bfpo", "modpo")


class PlannedModel(NamedTuple):
    name: str
    head: str  # lm | score
    trains: bool
    is_whole: bool  # False: the base of the adapters, or an adapter on it


# ---- which models there are ----


def list_models(knobs):
    """The PlannedModels of a trainer."""
    is_whole = not knobs.get("lora_rank")
    if "actor_model" not in knobs:
        scores = knobs.get("objective") in ("reward", "cost")
        return [PlannedModel("model", "score" if scores else "lm", True, is_whole)]
    scorers = []
    frozen = []
    paths = {"reward": knobs["reward_model"]}
    for name, constraint in list_constraints(knobs["cost_model"], knobs["cost_limit"]).items():
        paths[name] = constraint.folder
    for name, path in paths.items():
        scorers.append(name)
        if not names_function(path):
            stands_alone = is_whole_scorer(path, knobs)
            frozen.append(PlannedModel(name, "score", False, stands_alone))
    shares_base = is_whole and not all(model.is_whole for model in frozen)
    models = [PlannedModel("actor", "lm", True, is_whole)]
    if knobs["advantage"] == "gae":
        for name in scorers:
            models.append(PlannedModel(f"{name} critic", "score", True, is_whole))
    models.append(PlannedModel("reference", "lm", False, is_whole and not shares_base))
    return models + frozen


def is_whole_scorer(path, knobs):
    """Whether a reward or cost model has weights of its own, and is no adapter on the actor's base.

    A folder that is there says it itself. One that is still to be trained is taken to be trained
    like the actor, unless the planner's knob score_models says otherwise."""
    if knobs["score_models"] != "auto":
        return knobs["score_models"] == "whole"
    if not os.path.isdir(path):
        return not knobs.get("lora_rank")
    if not is_adapter(path):
        return True
    base = find_whole_model(find_model(knobs["actor_model"], weights=False))
    return os.path.realpath(find_whole_model(path)) != os.path.realpath(base)


def count_sequences(knobs):
    """Sequences of an optimizer step, or of a rollout."""
    if "actor_model" in knobs:
        return knobs["rollout_size"] * knobs["num_samples"]
    if knobs.get("objective") in PAIRED:
        return 2 * knobs["batch_size"]
    return knobs["batch_size"]


class RunSetup:
    """A trainer's knobs on a number of GPUs.

    knobs     the trainer's resolved knobs and the planner's, a dict
    config    the policy's Config; score models and critics have the same shape
    length    mean tokens of a sequence, and
    response  how many of them are sampled or carry loss; 0 for both: see the planner's knobs"""

    def __init__(self, knobs, config, device, gpus, length=0, response=0):
        self.knobs, self.config, self.device, self.gpus = knobs, config, device, gpus
        self.tensors = {head: model_tensors(config, head) for head in ("lm", "score")}
        in_float32 = knobs["dtype"] == "float32" or (device.is_cpu and knobs["dtype"] == "auto")
        self.compute_bytes = 4 if in_float32 else 2  # of a number that is computed with
        self.is_ppo = "actor_model" in knobs
        self.length = length or knobs["max_len"]
        most_sampled = knobs.get("max_new_tokens", self.length)
        self.response = response or min(self.length // 2, most_sampled)
        self.choose_models()
        self.choose_placements(in_float32)
        self.sequences = count_sequences(knobs)  # of a step, or of a rollout, over all ranks
        self.sequences_per_gpu = math.ceil(self.sequences / gpus)
        self.tokens = math.ceil(self.sequences_per_gpu * self.length)  # of one rank
        self.micro_batches = math.ceil(self.tokens / knobs["max_tokens"])

    def choose_models(self):
        self.models = list_models(self.knobs)
        self.trained = [model.head for model in self.models if model.trains]
        self.frozen = [model.head for model in self.models if not model.trains]
        self.whole_trained = [m.head for m in self.models if m.trains and m.is_whole]
        self.whole_frozen = [m.head for m in self.models if not m.trains and m.is_whole]
        # The reference is the base itself, and all others that are not whole are adapters on it.
        self.has_base = not all(model.is_whole for model in self.models)
        if self.has_base:
            self.whole_frozen.append("lm")
        rank = self.knobs.get("lora_rank", 0)
        targets = self.knobs.get("lora_targets", "all")
        self.lora = Lora(rank, 1.0, targets)
        if self.has_base and not rank:
            self.lora = Lora(USUAL_RANK, 1.0, "all")
        layers = self.config.num_hidden_layers
        self.adapter = adapter_size(self.config, self.lora if self.has_base else Lora(0, 1.0, ""))
        self.adapter_numbers = layers * self.adapter.parameters  # of one model
        self.pair_numbers = layers * self.adapter.pairs
        self.trains_adapters = rank > 0
        self.adapters_trained = len(self.trained) if self.trains_adapters else 0
        adapters = [m for m in self.models if not m.is_whole and m.name != "reference"]
        self.adapters_frozen = len(adapters) - self.adapters_trained

    def choose_placements(self, in_float32):
        """As parallel.choose_placements() does."""
        on_gpu = not self.device.is_cpu
        offload = self.knobs["offload"] if on_gpu else "none"
        self.offloads_trained = offload == "all"
        self.offloads_frozen = offload != "none"
        self.layout = self.choose_layout()
        self.shards = {"ddp": 1, "fsdp": self.gpus, "hsdp": min(self.gpus, GPUS_PER_NODE)}[
            self.layout
        ]
        # One process that computes in float32 is left plain. So are frozen copies.
        is_plain = self.gpus == 1 and in_float32 and self.layout == "ddp"
        self.is_plain = is_plain and not self.offloads_trained
        # Whole copies of trained models stay on the GPU, unless they wait in host memory.
        self.layers_stay = self.layout == "ddp" and not self.offloads_trained
        self.frozen_is_plain = self.layout == "ddp" and not self.offloads_frozen
        self.frozen_shards = self.shards
        if self.frozen_is_plain:
            self.frozen_shards = 1

    def choose_layout(self):
        layout = self.knobs["parallel"]
        if layout not in ("auto", "plain"):
            return layout
        trained = self.count_models(self.whole_trained)
        trained += self.adapters_trained * self.adapter_numbers
        in_memory = 16 * trained
        if self.trains_adapters:
            in_memory += self.compute_bytes * self.count_models(["lm"])
        is_small = in_memory < 0.25 * self.device.memory * 1e9
        return "ddp" if is_small or self.gpus == 1 else "fsdp"

    def count_blocks(self, head, ranks=1):
        """Numbers in all blocks, or in the first rank's slices of them."""
        block, _ = self.tensors[head]
        return self.config.num_hidden_layers * count_numbers(block, ranks)

    def count_outside(self, head, ranks=1):
        _, outside = self.tensors[head]
        return count_numbers(outside, ranks)

    def count_models(self, heads, ranks=1):
        """Numbers in whole models with these heads, or in the first rank's slices of them."""
        count = 0
        for head in heads:
            count += self.count_blocks(head, ranks) + self.count_outside(head, ranks)
        return count

    def count_trained(self):
        """Numbers that one rank trains: slices of whole models, and whole adapters."""
        whole = self.count_models(self.whole_trained, self.shards)
        return whole + self.adapters_trained * self.adapter_numbers
