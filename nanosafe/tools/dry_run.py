"""A training step of a large model as one rank of many, on a machine that holds none of it.

$ python tests/dry_run.py --world=64 --layout=hsdp --rank=63 --shape=70b --head=score --max_tokens=4096

The code is the trainers': model_folder.build, parallel.put, forward, parallel.backward, optim.step. Tensors have shapes
and no memory, the process group sends nothing, and what goes to it is counted. So what depends on shapes alone breaks
here as it would on the cluster (uneven slices, ranks with no row of a tensor, meshes), and what a step holds and sends
can be compared with what is planned. Numbers do not exist: what asks for one is stood in for, in without_numbers()."""

import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanosafe import optim, parallel
from nanosafe.checkpoint import model_folder, run_state
from nanosafe.tools import plan
from nanosafe.losses import critic_loss, mle_loss
from nanosafe.model import Config
from nanosafe.data.batching import collate, gather_responses

SHAPES = {
    "tiny": (256, 704, 2, 8, 4),
    **plan.SHAPES,
}  # hidden, intermediate, layers, heads, heads of keys
KINDS = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
}  # how an operator's name begins


def config_of(shape, vocab_size):
    width, inner, layers, heads, keys = SHAPES[shape]
    return Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
    )


class Collectives(TorchDispatchMode):
    """Counts what goes to the process group: .calls[phase, kind, bytes] is how often.

    Bytes are those of the larger side: what a gather puts out, what a reduction is given."""

    def __init__(self):
        super().__init__()
        self.phase, self.calls = "put", Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again as what it does to this rank's slice
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_")
            kind = next((KINDS[k] for k in KINDS if name.startswith(k)), None)
            if kind:
                sizes = [
                    t.nbytes
                    for t in tree_leaves((args, kwargs, out))
                    if isinstance(t, torch.Tensor)
                ]
                self.calls[self.phase, kind, max(sizes)] += 1
            elif name != "wait_tensor":
                self.calls[self.phase, name, 0] += 1  # nothing a step should need
        return out

    def sums(self):
        """({kind: bytes}, {kind: calls}) of the step."""
        total, counts = (
            dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), 0) for _ in "ab"
        )
        for (phase, kind, size), n in self.calls.items():
            if phase != "whole":
                total[kind] = total.get(kind, 0) + size * n
                counts[kind] = counts.get(kind, 0) + n
        return total, counts


class Norm:
    """A gradient norm that exists: above grad_clip, so that the gradients are scaled as well."""

    @staticmethod
    def item():
        return 2.0


@contextmanager
def without_numbers(fake):
    """Stand in for what asks a tensor for its numbers: which targets are read (all), the gradients' norm (its real
    computation runs, its result is not looked at). And to_empty() takes no memory."""
    norm, to_empty, nonzero = parallel.gradient_norm, torch.nn.Module.to_empty, torch.Tensor.nonzero

    def not_taken(self, **options):
        with fake:
            return to_empty(self, **options)

    def every(self):
        return torch.arange(len(self))[:, None] if isinstance(self, FakeTensor) else nonzero(self)

    def grad_norm(parameters):
        assert norm(parameters).shape == ()
        return Norm

    with (
        patch.object(torch.Tensor, "nonzero", every),
        patch.object(parallel, "grad_norm", grad_norm),
        patch.object(torch.nn.Module, "to_empty", not_taken),
    ):
        yield


def check_slices(model, layout, world, rank):
    """Compare local_rows(), by which weights are read and saved, with where DTensor says the slice is."""
    writers = {"ddp": 1, "fsdp": world, "hsdp": min(world, plan.NODE)}[
        layout
    ]  # of ranks, the first: one copy
    for name, p in model.named_parameters():
        rows, start, count, writer = parallel.local_rows(p)
        shape, offset = rows.shape, (0,)
        if isinstance(p, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                p.shape, p.device_mesh, p.placements
            )
        assert rows.shape == shape and count == shape[0] and start + count <= len(p), (
            name,
            rows.shape,
            shape,
        )
        assert start == offset[0] or not count, (name, start, offset)
        assert writer == (rank < writers), name


def batch_of(max_tokens, vocab_size, fake):
    """Two sequences of different lengths, all targets but a prompt; of 0 tokens: the batch of a rank without work."""
    cut = max_tokens * 5 // 8
    lengths = [n for n in (cut, max_tokens - cut) if n]
    sequences = [np.arange(n) % vocab_size for n in lengths]
    batch = collate(sequences, [np.arange(n) >= 1 for n in lengths], "cpu")
    return batch._replace(
        **{
            key: fake.from_tensor(x)
            for key, x in batch._asdict().items()
            if isinstance(x, torch.Tensor)
        }
    ), [1] * len(lengths)


def loss_of(model, batch, starts):
    """The loss of SFT for a language model, of PPO's critic for a scorer, their sum for a model with both heads."""
    outs = {
        "lm": lambda: (model(*batch), None),
        "both": lambda: model(*batch),
        "score": lambda: (None, model(*batch[:3])),
    }
    logps, scores = outs[model.head]()
    loss = 0.0
    if logps is not None:
        loss = loss + mle_loss(logps, batch.targets >= 0)
    if scores is not None:
        values = gather_responses(scores, batch, starts, batch.max_seqlen)
        loss = loss + critic_loss(values, *torch.zeros(3, *values.shape), 5.0)
    return loss


def run(
    world,
    layout,
    rank,
    shape,
    head,
    max_tokens,
    vocab_size=32000,
    micros=1,
    checkpointing=False,
    train=True,
):
    """One step of rank `rank` of `world` -> what this rank holds and sends, in bytes. Once in a process.

    train=False: the forwards of a frozen model. "calls" has [phase, kind, bytes of one, how many]; of them "whole" is
    the gather before sampling, which the sums leave out. A dry rank learns nothing of time: "seconds" are its own."""
    os.environ["LOCAL_WORLD_SIZE"] = str(min(world, plan.NODE))
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    me = parallel.World(rank, world, torch.device("cpu"), rank == 0)
    placement = parallel.choose_placements(
        me, "bfloat16", layout, "none", False, checkpointing, 10**10
    )[not train]
    began, collectives, fake = (
        time.perf_counter(),
        Collectives(),
        FakeTensorMode(allow_non_fake_inputs=True),
    )
    with without_numbers(fake):
        model = model_folder.build_model(
            config_of(shape, vocab_size), head, placement, placement.dtype
        ).requires_grad_(train)
    check_slices(model, layout, world, rank)
    with fake, collectives, without_numbers(fake):
        optimizer = optim.make_adamw(model, 0.1, 0.9, 0.95) if train else None
        for k in range(micros):
            batch, starts = batch_of(max_tokens, vocab_size, fake)
            collectives.phase = "forward"
            with nullcontext() if train else torch.no_grad():
                loss = loss_of(model, batch, starts) / micros
            collectives.phase = "backward"
            if train:
                parallel.backward(model, loss, last=k == micros - 1)
        slices = {
            name: parallel.local_part(p.data) for name, p in parallel.named_local_parameters(model)
        }
        held = {"params": sum(p.nbytes for p in slices.values())}
        if train:
            grads = {name: parallel.local_part(p.grad) for name, p in model.named_parameters()}
            assert all(
                grads[name].shape == p.shape and grads[name].dtype == p.dtype
                for name, p in slices.items()
            )
            held["grads"] = sum(g.nbytes for g in grads.values())
            collectives.phase = "step"
            optim.guarded_step(model, optimizer, 1e-3, 1.0)
            moments = [
                parallel.local_part(s[key])
                for s in optimizer.state.values()
                for key in run_state.MOMENTS
            ]
            assert len(moments) == 2 * len(slices) and all(
                m.dtype == torch.float32 for m in moments
            )
            held["moments"] = sum(m.nbytes for m in moments)
            collectives.phase = "whole"
            with parallel.gathered_for_sampling(model) as twin:  # to sample from
                shapes = {name: p.shape for name, p in model.named_parameters()}
                assert all(
                    shapes[name] == p.shape
                    and p.dtype == placement.compute_dtype
                    and not isinstance(p, DTensor)
                    for name, p in twin.named_parameters()
                )
    total, counts = collectives.sums()
    phases = [[*key, n] for key, n in sorted(collectives.calls.items())]
    empty = sum(len(p) == 0 for p in slices.values())
    dist.destroy_process_group()
    return {
        **held,
        "collectives": total,
        "counts": counts,
        "calls": phases,
        "empty_slices": empty,
        "seconds": round(time.perf_counter() - began, 2),
    }


if __name__ == "__main__":
    knobs = {
        "world": 8,
        "layout": "fsdp",
        "rank": 0,
        "shape": "7b",
        "head": "lm",
        "max_tokens": 4096,
        "vocab_size": 32000,
        "micros": 1,
        "activation_checkpointing": False,
        "train": True,
    }
    for argument in sys.argv[1:]:
        key, _, value = argument.removeprefix("--").partition("=")
        kind = type(knobs[key])
        knobs[key] = value.lower() in ("true", "1") if kind is bool else kind(value)
    knobs["checkpointing"] = knobs.pop("activation_checkpointing")
    print(json.dumps(run(**knobs)))
