"""How processes work together: the only file that trains and samples through torch.distributed.

    world = parallel.init(device)                    # one process, or one of many under torchrun
    trained, frozen = parallel.choose_placements(world, ...)
    model = parallel.shard_model(model, trained)     # in checkpoint.load(), before weights are read
    parallel.backward(model, loss)                   # gradients add up over ranks and calls
    with parallel.gathered_for_sampling(model): ...  # whole parameters on every rank

One mechanism serves every layout: FSDP2 over a mesh of (replicate, shard). With N ranks,

    DDP    is (N, 1): every rank has whole copies, whose gradients are reduced
    FSDP   is (1, N): every tensor is cut into N slices of rows
    HSDP   is (nodes, N / nodes): slices inside a node, copies across nodes

A single GPU that trains in bfloat16, with float32 master weights and reduction, is (1, 1). A
process that computes in float32 is left plain."""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from math import ceil
from typing import NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    share_comm_ctx,
)
from torch.distributed.tensor import DTensor, Shard

from nanosafe.errors import choose, explain_failure, stop
from nanosafe.lora import AdaptedLLaMA
from nanosafe.watchdog import agree_on_restart_id, start_hang_watchdog


def read_timeout():
    """Minutes to wait for a rank: NANOSAFE_TIMEOUT, or 30 where it is not set, empty or 0."""
    text = os.environ.get("NANOSAFE_TIMEOUT") or "0"
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < 1e6:
        stop(f"NANOSAFE_TIMEOUT={text!r} must be a number of minutes")
    return minutes or 30.0


TIMEOUT_MINUTES = read_timeout()
# torch's own limit is longer than ours, because our message names the rank that hangs.
PROCESS_GROUP_TIMEOUT = timedelta(minutes=TIMEOUT_MINUTES + 5)
# oneDNN keeps a bfloat16 kernel for every length that it meets: a thousand take a gigabyte.
ONEDNN_KERNELS = "32"
CPU_MEMORY = 16 * 2**30  # bytes that "auto" assumes for a rank on a CPU
BYTES_PER_PARAMETER = 16  # of AdamW in float32: weight, gradient and two moments
# Versions of a block that torch.compile makes before it gives up and runs the block uncompiled. All
# models share the count. For models of one size PPO-Lag makes four to six, for three sizes about
# ten: with gradients, without, and with frozen parameters. The first of these is for the lengths of
# its first batch only, and perhaps the next ones, too. torch's own limit is 8.
COMPILED_VERSIONS = 64
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the newer name first


class Collectives:
    """How many collectives this rank has begun: what the watchdog compares between ranks."""

    count = 0


collectives = Collectives()
meshes = {}  # (device type, copies, slices) -> DeviceMesh
sharded_models = WeakSet()  # those of share_streams() that still live


# ---- the group ----


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    main: bool  # whether this is the rank that prints and writes


def init(device="auto", knobs=None):
    """Join the processes that torchrun started, or be alone. device: auto | cpu | cuda.

    From here on a full memory, a full disk or a lost rank ends the script with one line; `knobs`,
    the script's configuration, lets that line name the ones that help."""
    rank, size = read_ranks()
    device = pick_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        join_torchrun_group(device, rank, size)
    install_excepthook(rank, size, knobs or {})
    return World(rank, size, device, rank == 0)


def read_ranks():
    """(this rank, how many there are) as torchrun says them in the environment; (0, 1) alone."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    if missing:
        given = [f"{name}={os.environ[name]}" for name in needed if name not in missing]
        stop(
            f"the environment has {' '.join(given)}, but not {' '.join(missing)}: start several "
            "ranks by torchrun, or unset RANK and WORLD_SIZE to run alone"
        )
    rank = read_index("RANK")
    size = read_index("WORLD_SIZE")
    if rank >= size:
        stop(f"RANK={rank} must be below WORLD_SIZE={size}: start the ranks by torchrun")
    return rank, size


def read_index(name, default="0"):
    """A whole number, at least 0, in the environment."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        stop(f"{name}={text!r} in the environment must be a whole number, as torchrun sets it")
    return int(text)


def pick_device(name):
    """The torch.device of this process, set up for matrix products."""
    choose("device", name, ("auto", "cpu", "cuda"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_KERNELS)
        return torch.device("cpu")
    use_expandable_segments()
    if not torch.cuda.is_available():
        stop("device='cuda', but torch sees no GPU: use --device=cpu")
    index = read_index("LOCAL_RANK")
    if index >= torch.cuda.device_count():
        stop(
            f"LOCAL_RANK={index}, but torch sees {torch.cuda.device_count()} GPUs on this machine: "
            "start as many ranks with --nproc_per_node"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def use_expandable_segments():
    """Let segments of GPU memory grow, unless the user has configured the allocator.

    A run's tensors have ever new sizes, and what is free between them in fixed segments is often
    too small for the next one. torch reads the variables when the first tensor is put on a GPU."""
    if not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        for name in ALLOCATOR_VARIABLES:
            os.environ[name] = "expandable_segments:True"


def join_torchrun_group(device, rank, size):
    """Join the other ranks under this attempt's own key prefix, and watch them."""
    rendezvous = next(dist.rendezvous("env://", timeout=PROCESS_GROUP_TIMEOUT))
    store = rendezvous[0]
    prefix = agree_on_restart_id(store, rank, size)
    store = dist.PrefixStore(prefix, store)
    join_group(device, store=store, rank=rank, world_size=size)
    start_hang_watchdog(
        store.clone(), rank, size, collectives, TIMEOUT_MINUTES, dist.is_initialized
    )


def join_group(device, **options):
    # gloo beside nccl, because gradients that are offloaded to the CPU are reduced there
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PROCESS_GROUP_TIMEOUT, **options)


def install_excepthook(rank, size, knobs):
    """Turn failures that are no defects into one line, and end a failed rank at once."""

    def report_and_leave(kind, error, trace):
        try:
            sentence = explain_failure(error, knobs, size)
            if sentence:
                print(f"error: rank {rank}: {sentence}", file=sys.stderr, flush=True)
            else:
                sys.__excepthook__(kind, error, trace)
        finally:  # even if nobody reads what is printed
            if dist.is_initialized():
                os._exit(1)

    sys.excepthook = report_and_leave


def close(end_process=True):
    """Leave the group and end the process: what a script does last.

    A process without a group goes on, and so does one with end_process=False."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        if end_process:
            os._exit(0)  # a background thread of FSDP2 on gloo sometimes aborts an ordinary exit


# ---- layouts ----


class Placement(NamedTuple):
    """Where a model lives, how it is laid out over the ranks, and what it computes in."""

    device: torch.device
    layout: str = "plain"  # plain | ddp | fsdp | hsdp
    dtype: torch.dtype = None  # of the parameters; None: that of the files
    compute_dtype: torch.dtype = None  # None: that of the parameters
    offload: bool = False  # parameters wait in host memory
    use_compile: bool = False
    activation_checkpointing: bool = False


class Placements(NamedTuple):
    trained: Placement
    frozen: Placement


def choose_placements(
    world, dtype, layout, offload, use_compile, activation_checkpointing, parameters, frozen=0
):
    """The Placements of trained and of frozen models, from a trainer's knobs.

    dtype       auto | bfloat16 | float32: computed in; trained weights are always float32
    layout      auto | plain | ddp | fsdp | hsdp
    offload     none | frozen | all: which models wait in host memory (on a GPU only)
    parameters  how many are trained, over all models; "auto" depends on it
    frozen      how many a base has whose adapters are trained"""
    on_gpu = world.device.type == "cuda"
    compute_dtypes = {
        "auto": torch.bfloat16 if on_gpu else torch.float32,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
    }
    if dtype == "float16":
        stop("dtype='float16' overflows in RLHF training and is not supported: use bfloat16")
    choose("dtype", dtype, compute_dtypes)
    choose("parallel", layout, ("auto", "plain", "ddp", "fsdp", "hsdp"))
    choose("offload", offload, ("none", "frozen", "all"))
    if layout == "plain" and world.size > 1:
        stop(f"parallel='plain' is for one process, this is one of {world.size}: use auto")
    compute_dtype = compute_dtypes[dtype]
    # A single process that computes in bfloat16 needs FSDP2's float32 master weights, also where
    # "plain" is asked for.
    if layout in ("auto", "plain"):
        in_memory = BYTES_PER_PARAMETER * parameters + compute_dtype.itemsize * frozen
        layout = choose_layout(world, compute_dtype, offload, in_memory)
    offload_frozen = offload != "none" and on_gpu
    trained = Placement(
        world.device,
        layout,
        dtype=torch.float32,
        compute_dtype=compute_dtype,
        offload=offload == "all" and on_gpu,
        use_compile=use_compile and on_gpu,
        activation_checkpointing=activation_checkpointing,
    )
    frozen_placement = Placement(
        world.device,
        # Frozen copies exchange nothing, so DDP's need no mesh.
        "plain" if layout == "ddp" and not offload_frozen else layout,
        dtype=compute_dtype,
        compute_dtype=compute_dtype,
        offload=offload_frozen,
        use_compile=use_compile and on_gpu,
        activation_checkpointing=activation_checkpointing,  # of a base whose adapters are trained
    )
    return Placements(trained, frozen_placement)


def choose_layout(world, compute_dtype, offload, in_memory):
    """Whole copies where they take less than a quarter of the memory, slices where they do not.

    in_memory  bytes of whole copies, with gradients and moments"""
    if world.size == 1:
        in_float32 = compute_dtype == torch.float32 and offload == "none"
        return "plain" if in_float32 else "ddp"
    on_gpu = world.device.type == "cuda"
    memory = torch.cuda.mem_get_info(world.device)[1] if on_gpu else CPU_MEMORY
    return "ddp" if in_memory < 0.25 * memory else "fsdp"


def shard_model(model, placement):
    """Lay `model`, which is on the meta device, out over the ranks, and take its memory.

    Its parameters become this rank's slices of rows; they are not filled yet."""
    model.activation_checkpointing = placement.activation_checkpointing
    if placement.use_compile:
        torch._dynamo.config.recompile_limit = COMPILED_VERSIONS
        for layer in model.layers:
            layer.compile()
        model.compile_decoding = True
    if placement.layout == "plain":
        return model.to_empty(device=placement.device)
    if not dist.is_initialized():  # a single GPU that wants mixed precision
        join_group(placement.device, store=dist.HashStore(), rank=0, world_size=1)
    options = {
        "mesh": make_mesh(placement.layout, placement.device.type),
        "mp_policy": MixedPrecisionPolicy(placement.compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if placement.offload else OffloadPolicy(),
    }
    # A layer is gathered when it is needed, and dropped after it. Whole copies stay, unless they
    # wait in host memory.
    drops_layers = placement.layout != "ddp" or placement.offload
    for layer in model.layers:
        fully_shard(layer, **options, reshard_after_forward=drops_layers)
    fully_shard(model, **options, reshard_after_forward=False)
    model.placement = placement
    share_streams(model)
    # A forward gathers weights, which is a collective. It is counted before it begins.
    model.register_forward_pre_hook(lambda *_: count_collective(), prepend=True)
    return model.to_empty(device="cpu" if placement.offload else placement.device)


def share_streams(model):
    """Let a model, which has run no forward yet, exchange weights on the other models' streams.

    With streams of its own each model would keep its own buffers, about 1 GB at 7B, because memory
    that was used on one stream is not free for another.

    FSDP2 then has one record of which blocks it has gathered. So the backward pass of a model must
    follow its forward pass before the backward pass of another model."""
    for other in sharded_models:
        if other.placement.device == model.placement.device:
            share_comm_ctx([other, model])
            break  # all others share with this one already
    sharded_models.add(model)


def make_mesh(layout, device_type):
    """The (replicate, shard) mesh of a layout: DDP copies everywhere, HSDP across nodes."""
    size = dist.get_world_size()
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    slices = {"ddp": 1, "fsdp": size, "hsdp": ranks_per_node}[layout]
    if size % slices:
        stop(f"parallel='hsdp': {size} ranks are not a multiple of the {slices} in a node")
    copies = size // slices
    key = device_type, copies, slices
    if key not in meshes:
        if slices == size:
            meshes[key] = init_device_mesh(device_type, (slices,), mesh_dim_names=("shard",))
        else:
            names = ("replicate", "shard")
            meshes[key] = init_device_mesh(device_type, (copies, slices), mesh_dim_names=names)
    return meshes[key]


@contextmanager
def gathered_for_sampling(model):
    """A plain twin of `model` whose parameters are whole on every rank, while the block runs.

    The twin has no hooks: ranks may do different amounts of work with it, and CUDA graphs may be
    captured."""
    if isinstance(model, AdaptedLLaMA):
        with gathered_for_sampling(model.base) as base:
            yield model.for_sampling(base)
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        yield model
        return
    count_collective()
    for module in sharded:
        module.unshard()
    with torch.device("meta"):
        twin = type(model)(model.config, model.head)
    twin.compile_decoding = model.compile_decoding
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._parameters[leaf] = parameter
    try:
        yield twin
    finally:
        del twin
        for module in sharded:
            module.reshard()


# ---- gradients and parameters ----


def backward(model, loss, last=True):
    """Back-propagate. Over all ranks and calls, gradients add up.

    FSDP takes the mean over ranks, so the loss is multiplied by their number first. An adapter's
    parameters, whole on every rank, are not FSDP's.

    last  whether this is the step's last call for `model`: copies exchange gradients only then"""
    count_collective()
    if isinstance(model, FSDPModule):
        if model.placement.layout == "ddp":
            model.set_requires_gradient_sync(last)
        model.set_requires_all_reduce(last)  # between HSDP's copies; slices always exchange
        (loss * world_size()).backward()
    else:
        loss.backward()
        if last:
            sum_gradients_over_ranks(model)


def sum_gradients_over_ranks(model):
    """Replace the gradients of a model that is whole on every rank by their sum over the ranks."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    total = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, total.split(sizes)):
        gradient.copy_(part.view_as(gradient))


def named_local_parameters(model):
    """named_parameters() as this rank's slices, also where a forward has left some gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


class LocalRows(NamedTuple):
    """This rank's part of a parameter."""

    rows: torch.Tensor
    first: int  # the row of the parameter that they begin at
    count: int
    is_writer: bool  # whether this rank saves them: of copies, only one does


def local_rows(parameter):
    """The LocalRows of a parameter, which lies in one piece or is cut into slices of rows."""
    if not isinstance(parameter, DTensor):
        return LocalRows(parameter.data, 0, len(parameter), rank() == 0)
    first, is_writer = 0, True
    coordinate = parameter.device_mesh.get_coordinate()
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):  # as torch.chunk cuts: ceil(rows / ranks), the last short
            height = ceil(len(parameter) / parameter.device_mesh.size(dim))
            first = min(len(parameter), coordinate[dim] * height)
        elif coordinate[dim] != 0:
            is_writer = False
    rows = parameter.data.to_local()
    return LocalRows(rows, first, len(rows), is_writer)


def local_part(tensor):
    """This rank's slice of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(parameter):
    """The whole of a parameter, on every rank. A collective."""
    return parameter.data.full_tensor() if isinstance(parameter, DTensor) else parameter.data


def gradient_norm(parameters):
    """The 2-norm of all gradients over all ranks, a float32 scalar tensor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ---- collectives ----


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def count_collective():
    """Note that this rank begins a collective."""
    collectives.count += 1


def all_reduce_sum(tensor):
    """Sum a tensor over ranks, in place. Where all ranks but one have zeros, that is a gather."""
    count_collective()
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_lists(lists, indices, count):
    """All `count` lists on every rank, to which this rank contributes those at `indices`."""
    count_collective()
    parts = [(indices, lists)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, (indices, lists))
    gathered = {}
    for part_indices, part_lists in parts:
        gathered.update(zip(part_indices, part_lists))
    return [gathered[i] for i in range(count)]


class MetricSums:
    """Sums of metrics over micro-batches, and in the end over ranks.

    names  the metrics: the same, in the same order, on every rank"""

    def __init__(self, names, device):
        self.sums = {name: torch.zeros((), device=device) for name in names}

    def add(self, name, value):
        self.sums[name] += value.detach()

    def reduce(self):
        """{name: the sum over all ranks, a number}."""
        totals = all_reduce_sum(torch.stack(list(self.sums.values()))).tolist()
        return dict(zip(self.sums, totals))


def any_rank(flag, device):
    """Whether `flag` holds on at least one rank: so that all stop, or skip, at the same step."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def barrier():
    count_collective()
    if world_size() > 1:
        dist.barrier()


@contextmanager
def rank0_first():
    """Rank 0 runs the block before the others do, so that they find what it has made."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()
