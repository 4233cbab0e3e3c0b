"""A training step of a large model as one rank of many, on a machine that could not hold the model.

$ python -m nanosafe.tools.dry_run --world=64 --layout=hsdp --rank=63 --shape=70b --head=score
$ python -m nanosafe.tools.dry_run --world=1 --layout=ddp --ppo_lag=True --lora_rank=16

The code is the trainers' own: build_model, shard_model, new_adapter, forward, backward and
guarded_step. Tensors have shapes but no memory, and the process group sends nothing but counts what
it is given. So whatever depends on shapes alone fails here as it would on the cluster (uneven
slices, ranks without a row of some tensor, meshes), and the bytes that a step holds and sends can
be compared with the planner's. Tensors have no values; without_values() replaces what asks for one.
They are those of a GPU that runs blocks uncompiled: as_on_a_gpu() chooses its attention kernel."""

import inspect
import json
import os
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import configure
from nanosafe import attention, logprobs, optim, parallel
from nanosafe.checkpoint import adapter_folder, model_folder, run_state
from nanosafe.checkpoint.families import FAMILIES
from nanosafe.data.batching import collate, gather_responses
from nanosafe.lora import Lora
from nanosafe.losses import critic_loss, mle_loss
from nanosafe.model import Config
from nanosafe.tools import plan

world = 8  # ranks
layout = "fsdp"  # ddp | fsdp | hsdp
rank = 0  # which of them this process is
shape = "7b"  # tiny | 1.1b | 7b | 13b | 34b | 70b
head = "lm"  # lm | score | both
ppo_lag = False  # the six models of PPO-Lag instead of one with this head
lora_rank = 0  # of adapters that are trained on a frozen base; 0: the weights themselves are
max_tokens = 4096  # of a micro-batch; 0: that of a rank without work
vocab_size = 32000  # of the model
micros = 1  # micro-batches of the step
activation_checkpointing = False  # recompute each block in the backward pass
train = True  # False: only the forward passes of a frozen model

SHAPES = {"tiny": Config(32000, 256, 704, 2, 8, 4), **plan.SHAPES}
KINDS = {  # how the name of an operator begins -> the kind of collective
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
}


def main():
    knobs = configure(globals())
    print(json.dumps(run(**knobs)))


def run(
    world,
    layout,
    rank,
    shape,
    head,
    max_tokens,
    ppo_lag=False,
    lora_rank=0,
    vocab_size=32000,
    micros=1,
    activation_checkpointing=False,
    train=True,
):
    """Take one step as one rank; return what this rank holds and sends, in bytes. Once a process.

    In the result, "training_peak" is the most that passes forward and backward hold, with moments,
    and "sampling_peak" what the gather before sampling holds, without keys and values.
    "calls" lists [phase, kind, bytes of one, how many]. Its phase "sampling" is that gather,
    which "collectives" and "counts" leave out.
    "seconds" are those of the dry run itself and say nothing about the cluster."""
    began = time.perf_counter()
    os.environ["LOCAL_WORLD_SIZE"] = str(min(world, plan.GPUS_PER_NODE))
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    placements = make_placements(world, layout, rank, activation_checkpointing)
    collectives = Collectives()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    memory = LiveMemory(fake)
    config = replace(SHAPES[shape], vocab_size=vocab_size)
    with memory, without_values(fake):
        models = make_models(config, head, ppo_lag, lora_rank, train, placements, fake)
    held = Counter()
    empty_slices = 0
    for model in models.whole:
        check_slices(model, layout, world, rank)
        slices = local_slices(model).values()
        held["params"] += sum(part.nbytes for part in slices)
        empty_slices += sum(len(part) == 0 for part in slices)
    for model in models.adapters:
        held["adapters"] += sum(parameter.nbytes for parameter in model.parameters())
    with fake, collectives, memory, without_values(fake), as_on_a_gpu():
        optimizers = []
        for model in models.trained:
            optimizers.append(optim.make_adamw(model, 0.1, 0.9, 0.95))
        for k in range(micros):
            batch, starts = make_batch(max_tokens, vocab_size, fake)
            collectives.phase = "forward"
            with torch.no_grad():
                for model in models.scored:
                    compute_loss(model, batch, starts)
            for model in models.trained:
                collectives.phase = "forward"
                loss = compute_loss(model, batch, starts) / micros
                collectives.phase = "backward"
                parallel.backward(model, loss, last=k == micros - 1)
                del loss  # and with it what the forward pass has kept
        before_the_step = memory.peak
        collectives.phase = "step"
        for model, optimizer in zip(models.trained, optimizers):
            slices = local_slices(model)
            held["grads"] += count_gradient_bytes(model, slices)
            optim.guarded_step(model, optimizer, 1e-3, 1.0)
            held["moments"] += count_moment_bytes(optimizer, slices)
        # From the second step on, moments are there from the beginning.
        held["training_peak"] = before_the_step + held["moments"]
        collectives.phase = "sampling"
        if models.trained:
            held["sampling_peak"] = check_gathered_copy(models.trained[0], placements, memory)
    dist.destroy_process_group()
    total_bytes, counts = collectives.add_up()
    return {
        **held,
        "collectives": total_bytes,
        "counts": counts,
        "calls": [[*key, count] for key, count in sorted(collectives.calls.items())],
        "empty_slices": empty_slices,
        "seconds": round(time.perf_counter() - began, 2),
    }


def make_placements(world, layout, rank, activation_checkpointing):
    this_rank = parallel.World(rank, world, torch.device("cpu"), rank == 0)
    return parallel.choose_placements(
        this_rank,
        dtype="bfloat16",
        layout=layout,
        offload="none",
        use_compile=False,
        activation_checkpointing=activation_checkpointing,
        parameters=10**10,
    )


# ---- the models ----


class Models(NamedTuple):
    """The models of a step. The first that is trained is the one that samples."""

    whole: list  # with weights of their own, a base of adapters included
    adapters: list  # on the base
    trained: list
    scored: list  # read without gradients, before the updates


def make_models(config, head, ppo_lag, lora_rank, train, placements, fake):
    """One model, or PPO-Lag's: the reference, reward and cost model, actor and two critics."""
    models = Models([], [], [], [])
    read_heads = ["lm", "score", "score"] if ppo_lag else []
    trained_heads = ["lm", "score", "score"] if ppo_lag else [head]
    if not train:
        read_heads, trained_heads = trained_heads, []
    base = None
    if lora_rank:
        base = make_whole_model(config, "lm", placements.frozen, trains=False)
        models.whole.append(base)
    for head in read_heads:
        if base is not None and head == "lm":  # the reference is the base
            model = base
        elif base is not None:
            model = make_adapter(base, head, lora_rank, fake).requires_grad_(False)
            models.adapters.append(model)
        else:
            model = make_whole_model(config, head, placements.frozen, trains=False)
            models.whole.append(model)
        models.scored.append(model)
    for head in trained_heads:
        if base is not None:
            model = make_adapter(base, head, lora_rank, fake)
            models.adapters.append(model)
        else:
            model = make_whole_model(config, head, placements.trained, trains=True)
            models.whole.append(model)
        models.trained.append(model)
        if ppo_lag:  # old log-probabilities and values
            models.scored.append(model)
    return models


def make_whole_model(config, head, placement, trains):
    model = model_folder.build_model(config, head, placement, placement.dtype)
    return model.requires_grad_(trains)


def make_adapter(base, head, rank, fake):
    opened = adapter_folder.Base(base, FAMILIES["llama"], fingerprint=0)
    with fake:
        lora = Lora(rank, 2.0 * rank, "all")
        return adapter_folder.new_adapter("base", opened, head, lora, None, seed=0)


# ---- what is counted ----


class LiveMemory(TorchDispatchMode):
    """Adds up the tensors that are alive whenever an operator has made a large one.

    peak  the most so far, in bytes. Tensors below SMALL bytes are left out"""

    SMALL = 2**16
    LARGE = 2**20

    def __init__(self, fake):
        """fake: the FakeTensorMode of the step. DTensor makes tensors of another one to plan."""
        super().__init__()
        self.fake = fake
        self.storages = {}  # address -> a weak reference to the storage there
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again, as an operator on this rank's slice
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            is_ours = isinstance(value, FakeTensor) and value.fake_mode is self.fake
            if is_ours and value.device.type != "meta":
                self.add(value.untyped_storage())
        return out

    def add(self, storage):
        known = self.storages.get(storage._cdata)
        is_new = known is None or known() is not storage
        if is_new and storage.nbytes() >= self.SMALL:
            self.storages[storage._cdata] = weakref.ref(storage)
            if storage.nbytes() >= self.LARGE:
                self.peak = max(self.peak, self.count())

    def count(self):
        """Bytes that are held now. A storage that FSDP has freed is there, with no bytes."""
        total = 0
        for address, reference in list(self.storages.items()):
            storage = reference()
            if storage is None:
                del self.storages[address]
            else:
                total += storage.nbytes()
        return total


class Collectives(TorchDispatchMode):
    """Counts what is given to the process group: .calls[phase, kind, bytes] is how often.

    Bytes are those of the larger side: the output of a gather, the input of a reduction."""

    def __init__(self):
        super().__init__()
        self.phase = "setup"
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again, as an operator on this rank's slice
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_")
            self.count(name, tree_leaves((args, kwargs, out)))
        return out

    def count(self, name, values):
        for start, kind in KINDS.items():
            if name.startswith(start):
                sizes = [x.nbytes for x in values if isinstance(x, torch.Tensor)]
                self.calls[self.phase, kind, max(sizes)] += 1
                return
        if name != "wait_tensor":
            self.calls[self.phase, name, 0] += 1  # nothing that a step should need

    def add_up(self):
        """({kind: bytes}, {kind: calls}) of the step."""
        total_bytes = Counter(all_gather=0, reduce_scatter=0, all_reduce=0)
        counts = Counter(all_gather=0, reduce_scatter=0, all_reduce=0)
        for (phase, kind, size), times in self.calls.items():
            if phase != "sampling":
                total_bytes[kind] += size * times
                counts[kind] += times
        return total_bytes, counts


# ---- tensors without values ----


class Norm:
    """Stands for a gradient norm, above grad_clip so that gradients are scaled as well."""

    def item(self):
        return 2.0


@contextmanager
def without_values(fake):
    """Replace what asks a tensor for its values, and what would take memory.

    The norm of the gradients is computed, but its value is replaced. Module.to_empty() takes no
    memory."""
    gradient_norm = parallel.gradient_norm
    to_empty = torch.nn.Module.to_empty

    def replaced_norm(parameters):
        assert gradient_norm(parameters).shape == ()
        return Norm()

    def to_empty_without_memory(self, **options):
        with fake:
            return to_empty(self, **options)

    with (
        patch.object(parallel, "gradient_norm", replaced_norm),
        patch.object(torch.nn.Module, "to_empty", to_empty_without_memory),
    ):
        yield


@contextmanager
def as_on_a_gpu():
    """Choose the packed attention kernel, and blocks of logits, as on a GPU."""
    options = inspect.signature(varlen_attn).parameters

    def attend(layout, q, k, v, cache):
        return layout.attend_packed(q, k, v)

    with (
        patch.object(attention, "varlen_attn", varlen_attn, create=True),
        patch.object(attention, "VARLEN_OPTIONS", options, create=True),
        patch.object(attention, "attention_dtype", lambda x: x.dtype),
        patch.object(attention.PackedBatch, "attend", attend),
        patch.object(logprobs, "BLOCK_MIB", logprobs.GPU_MIB),
        patch.object(logprobs, "CHUNK_MIB", logprobs.GPU_MIB),
    ):
        yield


# ---- the step ----


def make_batch(max_tokens, vocab_size, fake):
    """Two sequences of different lengths, and where their responses begin.

    All tokens but the first are targets. With max_tokens=0 it is the batch of a rank without
    work."""
    first = max_tokens * 5 // 8
    lengths = [length for length in (first, max_tokens - first) if length > 0]
    sequences = [np.arange(length) % vocab_size for length in lengths]
    masks = [np.arange(length) >= 1 for length in lengths]
    batch = collate(sequences, masks, "cpu")
    batch = batch._replace(
        tokens=fake.from_tensor(batch.tokens),
        cu_seqlens=fake.from_tensor(batch.cu_seqlens),
        targets=fake.from_tensor(batch.targets),
        target_positions=fake.from_tensor(batch.target_positions),
    )
    return batch, [1] * len(lengths)


def compute_loss(model, batch, starts):
    """SFT's loss for a language model, the critic's loss of PPO for a score model, and their sum
    for a model with both heads."""
    if model.head == "lm":
        return mle_loss(model.log_probs(batch), batch.targets >= 0)
    if model.head == "score":
        return compute_critic_loss(model.scores(batch), batch, starts)
    logps, scores = model.log_probs_and_scores(batch)
    loss = mle_loss(logps, batch.targets >= 0)
    return loss + compute_critic_loss(scores, batch, starts)


def compute_critic_loss(scores, batch, starts):
    values = gather_responses(scores, batch, starts, batch.max_seqlen)
    zeros = torch.zeros(values.shape)
    return critic_loss(values, zeros, zeros, zeros, 5.0)


# ---- what is checked ----


def local_slices(model):
    """{name: this rank's slice} of a model's parameters."""
    slices = {}
    for name, parameter in parallel.named_local_parameters(model):
        slices[name] = parallel.local_part(parameter.data)
    return slices


def check_slices(model, layout, world, rank):
    """Compare local_rows(), by which weights are read and saved, with the slices of DTensor."""
    ranks_that_save = {"ddp": 1, "fsdp": world, "hsdp": min(world, plan.GPUS_PER_NODE)}[layout]
    for name, parameter in model.named_parameters():
        local = parallel.local_rows(parameter)
        shape, first = local.rows.shape, 0
        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            first = offset[0]
        assert local.rows.shape == shape, (name, local.rows.shape, shape)
        assert local.count == shape[0], name
        assert local.first + local.count <= len(parameter), name
        assert local.first == first or local.count == 0, (name, local.first, first)
        assert local.is_writer == (rank < ranks_that_save), name


def count_gradient_bytes(model, slices):
    total = 0
    for name, parameter in model.named_parameters():
        gradient = parallel.local_part(parameter.grad)
        assert gradient.shape == slices[name].shape, name
        assert gradient.dtype == slices[name].dtype, name
        total += gradient.nbytes
    return total


def count_moment_bytes(optimizer, slices):
    moments = []
    for state in optimizer.state.values():
        for key in run_state.MOMENTS:
            moments.append(parallel.local_part(state[key]))
    assert len(moments) == 2 * len(slices)
    assert all(moment.dtype == torch.float32 for moment in moments)
    return sum(moment.nbytes for moment in moments)


def check_gathered_copy(model, placements, memory):
    """Gather the weights as before sampling: all of each parameter, in the compute dtype.

    Returns the bytes that are held meanwhile."""
    shapes = {}
    with parallel.gathered_for_sampling(model) as copy:
        whole = getattr(copy, "base", copy)  # of an adapter
        for name, parameter in getattr(model, "base", model).named_parameters():
            shapes[name] = parameter.shape
        for name, parameter in whole.named_parameters():
            assert parameter.shape == shapes[name], name
            assert parameter.dtype == placements.trained.compute_dtype, name
            assert not isinstance(parameter, DTensor), name
        return memory.count()


if __name__ == "__main__":
    main()
