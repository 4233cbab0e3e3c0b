"""The exact state of a run: what it needs to continue bit by bit, on any number of ranks.

    out_dir/state/step_000500/  rank_00000.safetensors ..  state.json  checksums.json
    out_dir/state/latest        the name of the last state
    out_dir/owner.json          which torchrun started the run

There is no random state: the data order and samples are functions of the seed and the step."""

import json
import os
import shutil
import zlib
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.checkpoint.tensors import RowRange, copy_rows
from nanosafe.errors import one_line_errors, stop
from nanosafe.printing import print_once
from nanosafe.storage import (
    atomic_write,
    checksum,
    find_corrupt_file,
    flush_to_disk,
    make_folder,
    read_json,
    replace_folder,
    replace_non_finite,
    write_json,
)

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


# ---- save ----


def save(out_dir, step, models, optimizers, extra, keep=2):
    """Write out_dir/state/step_NNNNNN, and delete older states once it is whole. A collective.

    models      {name: model}: everything whose weights the run changes
    optimizers  {name: optimizer} of the models that have one
    extra       {name: value} in JSON: lambda and its window, normalisers, counters
    keep        how many states stay, this one included; at least 1

    Every rank writes its own rows. Of copies, only one rank does."""
    folder = os.path.join(out_dir, "state", name_state(step))
    temporary = folder + ".tmp"
    is_main = parallel.rank() == 0
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
    parallel.barrier()
    rank_sum = write_rank_file(temporary, models, optimizers)
    # This gather is also the barrier behind which all files of ranks are written.
    rank_sums = parallel.all_gather_lists([rank_sum], [parallel.rank()], parallel.world_size())
    if is_main:
        optimizer_steps = {}
        for name in models:
            optimizer_steps[name] = count_optimizer_steps(optimizers.get(name))
        state = {"step": step, "ranks": len(rank_sums), "optimizer_steps": optimizer_steps, **extra}
        finish_state(folder, temporary, state, rank_sums)
        with atomic_write(os.path.join(out_dir, "state", "latest")) as f:
            f.write(name_state(step) + "\n")
        delete_other_states(out_dir, step, keep)
    parallel.barrier()


def name_state(step):
    return f"step_{step:06d}"


def name_rank_file(rank):
    return f"rank_{rank:05d}.safetensors"


def write_rank_file(folder, models, optimizers):
    """Write the rows that this rank saves; returns the file's checksum()."""
    tensors = {}
    first_rows = {}
    for part in local_slices(models, optimizers):
        if part.is_writer:
            tensors[part.key] = part.rows.contiguous().cpu()
            first_rows[part.key] = part.first
    path = os.path.join(folder, name_rank_file(parallel.rank()))
    with one_line_errors(path, "written"):
        save_file(tensors, path, {"first_rows": json.dumps(first_rows)})
        flush_to_disk(path)
        return checksum(path)


def finish_state(folder, temporary, state, rank_sums):
    """Add state.json and checksums, and give the folder its name."""
    # JSON has no NaN and no infinity, but a state must come back exactly.
    write_json(replace_non_finite(state, name_non_finite), temporary, "state.json")
    sums = {}
    for rank, rank_sum in enumerate(rank_sums):
        sums[name_rank_file(rank)] = rank_sum
    with one_line_errors(folder, "written"):
        sums["state.json"] = checksum(os.path.join(temporary, "state.json"))
        replace_folder(temporary, folder, sums)


def name_non_finite(x):
    """What stands in state.json for NaN or an infinity."""
    return {"float": str(x)}


def restore_non_finite(value):
    """A copy of a value of state.json with the numbers that name_non_finite() named."""
    if isinstance(value, list):
        return [restore_non_finite(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"float"}:
        return float(value["float"])
    return {key: restore_non_finite(item) for key, item in value.items()}


def delete_other_states(out_dir, step, keep):
    """Delete all states but the last `keep` up to `step`, and whatever died half-written.

    States of later steps are of a course that the run has left."""
    root = os.path.join(out_dir, "state")
    until_now = [name for name in list_states(out_dir) if read_step(name) <= step]
    kept = until_now[-max(1, keep) :]
    for name in os.listdir(root):
        if name.startswith("step_") and name not in kept:
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def count_optimizer_steps(optimizer):
    """How many updates an optimizer has made; 0 for a model without one."""
    if optimizer is None:
        return 0
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


class LocalSlice(NamedTuple):
    """This rank's rows of a weight, or of a moment of AdamW."""

    key: str  # model / parameter / "weight" or the moment's name
    rows: torch.Tensor
    first: int  # the row of the whole tensor that they begin at
    is_writer: bool  # whether this rank saves them


def local_slices(models, optimizers):
    """Yield the LocalSlices of all weights and moments."""
    for model_name, model in models.items():
        optimizer = optimizers.get(model_name)
        for name, parameter in parallel.named_local_parameters(model):
            local = parallel.local_rows(parameter)
            tensors = {"weight": local.rows}
            state = optimizer.state.get(parameter, {}) if optimizer else {}
            for key, moment in state.items():
                if key in MOMENTS:
                    tensors[key] = moment
            for key, tensor in tensors.items():
                rows = parallel.local_part(tensor).detach()
                full_key = f"{model_name}/{name}/{key}"
                yield LocalSlice(full_key, rows, local.first, local.is_writer)


# ---- load ----


@torch.no_grad()
def load(out_dir, models, optimizers):
    """Restore the latest state into models and optimizers; returns its state.json.

    There may be more or fewer ranks than when it was saved: each reads the rows that it needs."""
    folder = find_latest_state(out_dir)
    state = restore_non_finite(read_json(folder, "state.json"))
    pieces = {}  # key -> [(its RowRange, its lazy slice)] over the files of ranks
    for rank in range(state["ranks"]):
        handle = safe_open(os.path.join(folder, name_rank_file(rank)), framework="pt")
        first_rows = json.loads(handle.metadata()["first_rows"])
        for key, first in first_rows.items():
            piece = handle.get_slice(key)
            row_range = RowRange(key, 0, piece.get_shape()[0], 1, first)
            pieces.setdefault(key, []).append((row_range, piece))
    for name, optimizer in optimizers.items():
        steps = state["optimizer_steps"][name]
        if steps:
            make_moments(models[name], optimizer, steps)
    for part in local_slices(models, optimizers):
        for row_range, piece in pieces[part.key]:
            copy_rows(part.rows, part.first, piece, row_range)
    return state


def make_moments(model, optimizer, steps):
    """Give AdamW the moments that it makes in its first step, which are filled afterwards."""
    for _, parameter in parallel.named_local_parameters(model):
        device = parallel.local_part(parameter.data).device
        moments = {key: torch.zeros_like(parameter.data) for key in MOMENTS}
        count = torch.tensor(float(steps), device=device)
        optimizer.state[parameter] = {"step": count, **moments}


def find_latest_state(out_dir):
    """The folder of the run's last state that is whole; the same on all ranks."""
    names = list_states(out_dir)
    latest = read_latest(out_dir)
    if latest in names:
        names = names[: names.index(latest) + 1]
    steps = [read_step(name) for name in names]
    # All ranks take the list of rank 0: on the others a shared disk may lag.
    indices = [0] if parallel.rank() == 0 else []
    steps = parallel.all_gather_lists([steps], indices, 1)[0]
    for step in reversed(steps):
        folder = os.path.join(out_dir, "state", name_state(step))
        damaged = find_corrupt_file(folder, parallel.rank(), parallel.world_size())
        found = parallel.all_gather_lists([damaged], [parallel.rank()], parallel.world_size())
        damaged_files = [name for name in found if name]
        if not damaged_files:
            return folder
        print_once(f"warning: {folder}/{damaged_files[0]} is damaged: the state before it is used")
    stop(f"no state in {out_dir!r} is whole: start another run")


def list_states(out_dir):
    """The names of a run's states, the earliest first."""
    root = os.path.join(out_dir, "state")
    if not os.path.isdir(root):
        return []
    names = []
    for name in os.listdir(root):
        if name.startswith("step_") and name.removeprefix("step_").isdigit():
            names.append(name)
    return sorted(names, key=read_step)


def read_step(name):
    """The step of a state, from its folder's name."""
    return int(name.removeprefix("step_"))


def read_latest(out_dir):
    """The name in state/latest, or "" where there is none that can be read."""
    try:
        with open(os.path.join(out_dir, "state", "latest")) as f:
            return f.read().strip()
    except (OSError, ValueError):
        return ""


# ---- the run's folder ----


def open_run_folder(config, write):
    """Make the run's folder, and return whether it has a state to continue from.

    A folder that holds a run is refused, unless that run is resumed, or unless the torchrun that
    started it starts it again.

    write  writes (config, path of config.py)"""
    out_dir, resume = config["out_dir"], config["resume"]
    has_state = parallel.any_rank(bool(list_states(out_dir)), "cpu")
    owner = {"torchrun": zlib.crc32(f"{os.uname().nodename} {os.getppid()}".encode())}
    if has_state and not resume and not is_restart_of(out_dir, owner):
        stop(f"{out_dir!r} holds a run: continue it with --resume=True, or choose another out_dir")
    if resume and not os.path.exists(os.path.join(out_dir, "config.py")):
        stop(f"resume=True, but {out_dir!r} has no run: start it without")
    parallel.barrier()
    make_folder(out_dir)
    if parallel.rank() == 0:
        write_json(owner, out_dir, "owner.json")
        write(config, os.path.join(out_dir, "config.py"))
    return has_state


def is_restart_of(out_dir, owner):
    """Whether torchrun restarts its own run, as rank 0 finds it. A collective."""
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    is_ours = False
    if is_restart and parallel.rank() == 0:
        is_ours = read_json(out_dir, "owner.json") == owner
    return parallel.any_rank(is_ours, "cpu")
