"""The only file that imports torch.distributed.

    world = parallel.init(device)              # one process, or one of many under torchrun
    trained, frozen = parallel.places(world, ...)
    model = parallel.put(model, trained)       # inside checkpoint.load(), before any weight is read
    parallel.backward(model, loss)             # gradients add up over ranks and calls
    with parallel.whole(model): ...            # parameters whole on every rank, to sample from

One mechanism serves every layout: FSDP2 over a mesh (replicate, shard). DDP is (N, 1): whole copies
whose gradients are averaged. FSDP is (1, N): every tensor cut into N row slices. HSDP is (nodes, N
/ nodes): slices inside a node, copies across. A single GPU that trains in bfloat16, with float32
master weights and reduction, is (1, 1); a process that computes in float32 is left plain."""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from nanosafe import errors, watchdog
from nanosafe.errors import choose, stop

TIMEOUT_MINUTES = float(os.environ.get("NANOSAFE_TIMEOUT") or 0) or 30  # to wait for a rank
PROCESS_GROUP_TIMEOUT = timedelta(minutes=TIMEOUT_MINUTES + 5)  # torch's own, which says less
meshes, calls = {}, [0]  # calls: how many times this rank met the others


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device
    main: bool  # the rank that prints and writes


def init(device="auto", knobs=None):
    """Join the processes that torchrun started, or be alone. device: auto | cpu | cuda.
    From here on memory, the disk or a lost rank end a script in one line, with `knobs` to turn."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        stop("device='cuda', but torch sees no GPU: use --device=cpu")
    choose("device", device, ("cpu", "cuda"))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:  # of the bfloat16 kernels for every length met few are kept: a thousand take a gigabyte
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    if "RANK" in os.environ and not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://", timeout=PROCESS_GROUP_TIMEOUT))
        store = dist.PrefixStore(watchdog.agree_on_restart_id(store, rank, size), store)
        join_group(device, store=store, rank=rank, world_size=size)
        watchdog.start_hang_watchdog(
            store.clone(), rank, size, calls, TIMEOUT_MINUTES, dist.is_initialized
        )

    def leave(kind, error, trace):

        try:
            if said := errors.explain_failure(error, knobs or {}, size):
                print(f"error: rank {rank}: {said}", file=sys.stderr, flush=True)
            else:
                sys.__excepthook__(kind, error, trace)
        finally:  # be it that nobody listens any more
            if dist.is_initialized():
                os._exit(1)

    sys.excepthook = leave
    return World(rank, size, device, rank == 0)


def join_group(device, **options):
    # gloo beside nccl: gradients that are offloaded to the CPU are reduced there
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PROCESS_GROUP_TIMEOUT, **options)


class Placement(NamedTuple):
    """Where and how a model lives."""

    device: torch.device
    layout: str = "plain"  # plain | ddp | fsdp | hsdp
    dtype: torch.dtype = None  # of the parameters; None: that of the files
    compute_dtype: torch.dtype = None  # None: that of the parameters
    offload: bool = False  # parameters wait in host memory
    use_compile: bool = False
    activation_checkpointing: bool = False


def choose_placements(
    world, dtype, layout, offload, use_compile, activation_checkpointing, parameters
):
    """The Place of trained models, and that of frozen ones, from a trainer's knobs.

    dtype       auto | bfloat16 | float32: what is computed in; trained weights are float32 always
    layout      auto | plain | ddp | fsdp | hsdp
    offload     none | frozen | all: which models wait in host memory (GPU only)
    parameters  how many are trained, over all models: decides what "auto" is"""
    on_gpu = world.device.type == "cuda"
    known = {
        "auto": torch.bfloat16 if on_gpu else torch.float32,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
    }
    if dtype == "float16":
        stop("dtype='float16' overflows in RLHF training and is not supported: use bfloat16")
    choose("dtype", dtype, known)
    choose("parallel", layout, ("auto", "plain", "ddp", "fsdp", "hsdp"))
    choose("offload", offload, ("none", "frozen", "all"))
    if layout == "plain" and world.size > 1:
        stop(f"parallel='plain' is for one process, this is one of {world.size}: use auto")
    compute = known[dtype]
    if layout in ("auto", "plain"):
        # AdamW in float32 holds weights, gradients and two moments: 16 bytes per parameter
        room = torch.cuda.mem_get_info(world.device)[1] if on_gpu else 16 * 2**30
        layout = "ddp" if 16 * parameters < 0.25 * room or world.size == 1 else "fsdp"
        if world.size == 1 and compute == torch.float32 and offload == "none":
            layout = "plain"
    trained = Placement(
        world.device,
        layout,
        torch.float32,
        compute,
        offload == "all" and on_gpu,
        use_compile and on_gpu,
        activation_checkpointing,
    )
    away = offload != "none" and on_gpu
    frozen = Placement(
        world.device,
        "plain" if layout == "ddp" and not away else layout,
        compute,
        compute,
        away,
        use_compile and on_gpu,
    )
    return trained, frozen


def shard_model(model, place):
    """Lay `model` (on the meta device) out over the ranks and take its memory, not yet filled.
    Its parameters become this rank's row slices. The order is checkpoint, compile, shard."""
    model.activation_checkpointing = place.activation_checkpointing
    if place.use_compile:
        for layer in model.layers:
            layer.compile()
    if place.layout == "plain":
        return model.to_empty(device=place.device)
    if not dist.is_initialized():  # a single GPU that wants mixed precision
        join_group(place.device, store=dist.HashStore(), rank=0, world_size=1)
    policy = MixedPrecisionPolicy(param_dtype=place.compute_dtype, reduce_dtype=torch.float32)
    options = dict(
        mesh=make_mesh(place.layout, place.device.type),
        mp_policy=policy,
        offload_policy=CPUOffloadPolicy() if place.offload else OffloadPolicy(),
    )
    for layer in model.layers:  # a layer is gathered when it is needed, and dropped after it
        fully_shard(layer, **options, reshard_after_forward=place.layout != "ddp")
    fully_shard(model, **options, reshard_after_forward=False)
    model.place = place
    model.register_forward_pre_hook(count_collective, prepend=True)  # before it gathers its weights
    return model.to_empty(device="cpu" if place.offload else place.device)


def count_collective(*_):
    calls[0] += 1


def make_mesh(layout, device_type):
    """The (replicate, shard) mesh of a layout; DDP replicates everywhere, HSDP across nodes."""
    size = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    sharded = {"ddp": 1, "fsdp": size, "hsdp": local}[layout]
    key = device_type, size // sharded, sharded
    if key not in meshes:
        if size % sharded:
            stop(f"parallel='hsdp': {size} ranks are no multiple of the {sharded} in a node")
        sizes, names = (size // sharded, sharded), ("replicate", "shard")
        flat = sharded == size  # there are no copies
        meshes[key] = init_device_mesh(device_type, sizes[flat:], mesh_dim_names=names[flat:])
    return meshes[key]


@contextmanager
def gathered_for_sampling(model):
    """A plain twin of `model` whose parameters are whole on every rank, as long as the block runs.
    The twin has no hooks: ranks may do different amounts of work, CUDA graphs may be captured."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if not parts:
        yield model
        return
    count_collective()
    for part in parts:
        part.unshard()
    with torch.device("meta"):
        twin = type(model)(model.config, model.head)
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner)._parameters[leaf] = p
    try:
        yield twin
    finally:
        del twin
        for part in parts:
            part.reshard()


def backward(model, loss, last=True):
    """Back-propagate; over all ranks and calls gradients add up (FSDP takes the mean: the factor).

    last  whether this is the step's last call for `model`: copies exchange gradients only then"""
    if isinstance(model, FSDPModule):
        if model.place.layout == "ddp":
            model.set_requires_gradient_sync(last)
        model.set_requires_all_reduce(last)  # of HSDP's copies; slices meet every time
    count_collective()
    (loss * world_size()).backward()


def named_local_parameters(model):
    """named_parameters() as this rank's slices: a forward without a backward gathers some."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return model.named_parameters()


def local_rows(p):
    """(tensor, first row, row count, writer): this rank's part of `p`, and whether it saves it."""
    if not isinstance(p, DTensor):
        return p.data, 0, len(p), rank() == 0
    start, writer = 0, True
    coordinate = p.device_mesh.get_coordinate()
    for dim, placement in enumerate(p.placements):
        if isinstance(placement, Shard):  # torch.chunk's rule: ceil(rows / ranks), the last short
            start = min(len(p), coordinate[dim] * -(-len(p) // p.device_mesh.size(dim)))
        else:
            writer = writer and coordinate[dim] == 0
    local = p.data.to_local()
    return local, start, len(local), writer


def local_part(tensor):
    """This rank's slice of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(p):
    """The whole of a parameter, on every rank. A collective."""
    return p.data.full_tensor() if isinstance(p, DTensor) else p.data


def gradient_norm(parameters):
    """The 2-norm of all gradients over all ranks, as a float32 scalar tensor."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor):
    """Sum a tensor over ranks, in place. Of what is 0 on all ranks but one, that is a gather."""
    count_collective()
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_lists(lists, mine, count):
    """All `count` lists on every rank, of which this one brings those at indices `mine`."""
    count_collective()
    parts = [(mine, lists)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, (mine, lists))
    whose = dict(pair for part in parts for pair in zip(*part))
    return [whose[i] for i in range(count)]


def any_rank(flag, device):
    """Whether `flag` holds on at least one rank: so that all stop, or skip, at the same step."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def barrier():
    count_collective()
    if world_size() > 1:
        dist.barrier()


@contextmanager
def rank0_first():
    """Rank 0 runs the block before the others do: it makes what they find made."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def close(leave=True):
    """Leave the group, and the process, which else goes on alone: what a script does last."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        if leave:
            os._exit(0)  # a background thread of FSDP2 on gloo now and then aborts an ordinary exit
