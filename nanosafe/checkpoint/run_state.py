"""The exact state of a run: what it needs to go on, on any number of ranks."""

import json
import os
import shutil
import zlib
from contextlib import suppress

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.checkpoint.tensors import copy_rows
from nanosafe.errors import stop, one_line_errors
from nanosafe.storage import (
    checksum,
    find_corrupt_file,
    make_folder,
    replace_folder,
    read_json,
    flush_to_disk,
    atomic_write,
    write_json,
)


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


rank_file = "rank_{:05d}.safetensors".format


def save(out_dir, step, models, optimizers, extra, keep=2):
    """Write out_dir/state/step_NNNNNN: what a run needs to go on. A collective.

    models      {name: model}: everything whose weights the run changes
    optimizers  {name: optimizer} of those that have one
    extra       anything JSON knows: lambda and its window, normalisers, counters

    Every rank writes its own rows; replicas write nothing. There is no random state: data order and
    samples are functions of the seed and the step. Older states go when this one is whole."""
    root, main = os.path.join(out_dir, "state"), parallel.rank() == 0
    folder = os.path.join(root, f"step_{step:06d}")
    temporary = folder + ".tmp"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
    parallel.barrier()
    tensors, first_rows = {}, {}
    for key, rows, first, writer in local_slices(models, optimizers):
        if writer:
            tensors[key], first_rows[key] = rows.contiguous().cpu(), first
    path = os.path.join(temporary, rank_file(parallel.rank()))
    with one_line_errors(path, "written"):
        save_file(tensors, path, {"first_rows": json.dumps(first_rows)})
        flush_to_disk(path)
        mine = checksum(path)
    sums = parallel.all_gather_lists(
        [mine], [parallel.rank()], parallel.world_size()
    )  # all have written
    if main:
        steps = {name: count_optimizer_steps(optimizers.get(name)) for name in models}
        write_json(
            {"step": step, "ranks": len(sums), "optimizer_steps": steps, **extra},
            temporary,
            "state.json",
        )
        sums = {rank_file(rank): pair for rank, pair in enumerate(sums)}
        sums["state.json"] = checksum(os.path.join(temporary, "state.json"))
        with one_line_errors(folder, "written"):
            replace_folder(temporary, folder, sums)
        with atomic_write(os.path.join(root, "latest")) as f:
            f.write(f"step_{step:06d}\n")
        kept = [name for name in list_states(out_dir) if int(name[5:]) <= step][-max(1, keep) :]
        for name in os.listdir(root):  # what died half-written among them
            if name.startswith("step_") and name not in kept:
                shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    parallel.barrier()


def count_optimizer_steps(optimizer):
    """How many updates an optimizer has made; 0 for a model without one."""
    if optimizer is None:
        return 0
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def local_slices(models, optimizers):
    """(key, this rank's rows, the first of them, whether it saves them) of weights and moments."""
    for model_name, model in models.items():
        optimizer = optimizers.get(model_name)
        for name, p in parallel.named_local_parameters(model):
            rows, first, _, writer = parallel.local_rows(p)
            tensors = {"weight": rows}
            for key, moment in (optimizer.state.get(p, {}) if optimizer else {}).items():
                if key in MOMENTS:
                    tensors[key] = moment
            for key, tensor in tensors.items():
                yield (
                    f"{model_name}/{name}/{key}",
                    parallel.local_part(tensor).detach(),
                    first,
                    writer,
                )


def list_states(out_dir):
    """The names of a run's states, the earliest first."""
    root = os.path.join(out_dir, "state")
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted(
        (name for name in names if name[:5] == "step_" and name[5:].isdigit()),
        key=lambda name: int(name[5:]),
    )


@torch.no_grad()
def load(out_dir, models, optimizers):
    """Restore the latest state into models and optimizers, returns its step and extras.
    The states' rows may lie in another number of files than there are ranks: each picks its own."""
    folder = find_latest_state(out_dir)
    state = read_json(folder, "state.json")
    pieces = {}  # tensor -> [(first row, slice)]
    for rank in range(state["ranks"]):
        handle = safe_open(os.path.join(folder, rank_file(rank)), framework="pt")
        for key, start in json.loads(handle.metadata()["first_rows"]).items():
            pieces.setdefault(key, []).append((start, handle.get_slice(key)))
    for model_name, optimizer in optimizers.items():
        if steps := state["optimizer_steps"][model_name]:
            for _, p in parallel.named_local_parameters(models[model_name]):
                count = torch.tensor(float(steps), device=parallel.local_part(p.data).device)
                moments = {key: torch.zeros_like(p.data) for key in MOMENTS}
                optimizer.state[p] = {"step": count, **moments}
    for key, rows, first, _ in local_slices(models, optimizers):
        for start, piece in pieces[key]:
            copy_rows(rows, first, piece, start, piece.get_shape()[0])
    return state


def find_latest_state(out_dir):
    """The folder of the run's last state that is whole, as all ranks see it."""
    names = list_states(out_dir)
    with suppress(OSError, ValueError), open(os.path.join(out_dir, "state", "latest")) as f:
        del names[names.index(f.read().strip()) + 1 :]
    steps = [int(name[5:]) for name in names]  # as rank 0 sees them: a shared disk may lag
    for step in reversed(parallel.all_gather_lists([steps], range(parallel.rank() == 0), 1)[0]):
        folder = os.path.join(out_dir, "state", f"step_{step:06d}")
        wrong = find_corrupt_file(folder, parallel.rank(), parallel.world_size())
        if wrong:
            print(f"warning: {folder}/{wrong} is damaged: the state before it is used", flush=True)
        if not parallel.any_rank(bool(wrong), "cpu"):
            return folder
    stop(f"no state in {out_dir!r} is whole: start another run")


def open_run_folder(config, write):
    """Make the run's folder, write(config, its config.py), say whether there is a state to go on
    from. A run's folder is refused, unless it is resumed, or its own torchrun starts it again."""
    out_dir, resume = config["out_dir"], config["resume"]
    held = parallel.any_rank(bool(list_states(out_dir)), "cpu")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    owner = {"torchrun": zlib.crc32(f"{os.uname().nodename} {os.getppid()}".encode())}
    ours = again and parallel.rank() == 0 and read_json(out_dir, "owner.json") == owner
    if held and not (resume or parallel.any_rank(ours, "cpu")):
        stop(f"{out_dir!r} holds a run: continue it with --resume=True, or choose another out_dir")
    if resume and not os.path.exists(os.path.join(out_dir, "config.py")):
        stop(f"resume=True, but {out_dir!r} has no run: start it without")
    parallel.barrier()
    make_folder(out_dir)
    if parallel.rank() == 0:
        write_json(owner, out_dir, "owner.json")
        write(config, os.path.join(out_dir, "config.py"))
    return held
