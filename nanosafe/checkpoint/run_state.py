"""The exact state of a run: what it needs to continue, bit by bit on as many ranks, and to
rounding on another number.

    out_dir/state/step_000500/  state.json  record.json  checksums.json
        rank_00000_actor.safetensors ..  a rank's rows of a model; rank_00000.safetensors with those
                                         of all models in older states
    out_dir/state/latest        the name of the last state; empty before the first
    out_dir/owner.json          which torchrun started the run
    out_dir/lock                locked while the run lives

There is no random state: the data order and samples are functions of the seed and the step."""

import fcntl
import json
import os
import shutil
import time
import zlib
from contextlib import suppress
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.adapter_base import describe_model_files, list_model_folders
from nanosafe.checkpoint.tensors import RowRange, copy_rows
from nanosafe.errors import one_line_errors, stop
from nanosafe.hub import find_model
from nanosafe.printing import print_once
from nanosafe.storage import (
    CHECKSUMS,
    atomic_write,
    check_link,
    checksum,
    describe_file,
    find_corrupt_file,
    flush_to_disk,
    make_empty_folder,
    make_folder,
    names_function,
    read_json,
    replace_folder,
    replace_non_finite,
    split_function,
    write_json,
)
from nanosafe.tokenizer.chat_template import Clock

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
RANK_FILE = "rank_"  # what the name of a file of a rank's rows begins with
RECORD = "record.json"  # what a state was made with
NODE_TIMEOUT = 120  # seconds in which a file server gives up the locks of a dead node


# ---- save ----


def save(out_dir, step, models, optimizers, extra, keep=2, record=None):
    """Write out_dir/state/step_NNNNNN, and delete older states once it is whole. A collective.

    models      {name: model}: everything whose weights the run changes
    optimizers  {name: optimizer} of the models that have one
    extra       {name: value} in JSON: lambda and its window, normalisers, counters
    keep        how many states stay, this one included; at least 1
    record      make_record() of the run, which load() compares

    Every rank writes its own rows, one model after another, so that it holds no more than those of
    one in host memory. Of copies, only one rank writes."""
    folder = os.path.join(out_dir, "state", name_state(step))
    temporary = folder + ".tmp"
    is_main = parallel.rank() == 0
    if is_main:
        make_empty_folder(temporary)
    parallel.barrier()
    own_sums = {}
    for name, model in models.items():
        file = name_rank_file(parallel.rank(), name)
        own_sums[file] = write_rank_file(os.path.join(temporary, file), name, model, optimizers)
    # This gather is also the barrier behind which all files of ranks are written.
    rank_sums = parallel.all_gather_lists([own_sums], [parallel.rank()], parallel.world_size())
    if is_main:
        optimizer_steps = {}
        for name in models:
            optimizer_steps[name] = count_optimizer_steps(optimizers.get(name))
        state = {"step": step, "ranks": len(rank_sums), "optimizer_steps": optimizer_steps, **extra}
        finish_state(folder, temporary, state, rank_sums, record)
        with atomic_write(os.path.join(out_dir, "state", "latest")) as f:
            f.write(name_state(step) + "\n")
        delete_other_states(out_dir, step, keep)
    parallel.barrier()


def name_state(step):
    return f"step_{step:06d}"


def name_rank_file(rank, model_name):
    return f"{RANK_FILE}{rank:05d}_{model_name}.safetensors"


def write_rank_file(path, model_name, model, optimizers):
    """Write the rows of a model that this rank saves; returns the file's checksum()."""
    tensors = {}
    first_rows = {}
    for part in local_slices({model_name: model}, optimizers):
        if part.is_writer:
            tensors[part.key] = part.rows.contiguous().cpu()
            first_rows[part.key] = part.first
    with one_line_errors(path, "written"):
        save_file(tensors, path, {"first_rows": json.dumps(first_rows)})
        flush_to_disk(path)
        return checksum(path)


def finish_state(folder, temporary, state, rank_sums, record):
    """Add state.json, the record and checksums, and give the folder its name.

    rank_sums  {file name: checksum()} of each rank"""
    # JSON has no NaN and no infinity, but a state must come back exactly.
    write_json(replace_non_finite(state, name_non_finite), temporary, "state.json")
    write_json(record or {}, temporary, RECORD)
    sums = {}
    for own_sums in rank_sums:
        sums.update(own_sums)
    with one_line_errors(folder, "written"):
        for name in ("state.json", RECORD):
            sums[name] = checksum(os.path.join(temporary, name))
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
        path = os.path.join(root, name)
        if name.startswith("step_") and name not in kept:
            if os.path.islink(path):  # rmtree() follows none
                os.remove(path)
            shutil.rmtree(path, ignore_errors=True)


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
    shape: list[int]  # of the whole tensor


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
                shape = list(parameter.shape)
                yield LocalSlice(full_key, rows, local.first, local.is_writer, shape)


# ---- load ----


@torch.no_grad()
def load(out_dir, models, optimizers, record=None):
    """Restore the latest state into models and optimizers; returns its state.json.

    There may be more or fewer ranks than when it was saved: each reads the rows that it needs.
    Stops, before anything is changed, where the state is of another run than `record` describes, or
    where its tensors are not exactly those of models and optimizers."""
    folder = find_latest_state(out_dir)
    state = restore_non_finite(read_json(folder, "state.json"))
    if record:
        check_record(folder, state["step"], read_json(folder, RECORD), record)
    pieces = {}  # key -> [(its RowRange, its lazy slice)] over the files of ranks
    # Whatever files of ranks the state has; find_latest_state() has seen that they are whole.
    for file in sorted(read_json(folder, CHECKSUMS)):
        if not file.startswith(RANK_FILE):
            continue
        handle = safe_open(os.path.join(folder, file), framework="pt")
        first_rows = json.loads(handle.metadata()["first_rows"])
        for key, first in first_rows.items():
            piece = handle.get_slice(key)
            row_range = RowRange(key, 0, piece.get_shape()[0], 1, first)
            pieces.setdefault(key, []).append((row_range, piece))
    for name, optimizer in optimizers.items():
        steps = state["optimizer_steps"].get(name)
        if steps:
            make_moments(models[name], optimizer, steps)
    parts = list(local_slices(models, optimizers))
    check_pieces(folder, pieces, {part.key: part.shape for part in parts})
    for part in parts:
        for row_range, piece in pieces[part.key]:
            copy_rows(part.rows, part.first, piece, row_range)
    return state


def check_pieces(folder, pieces, shapes):
    """Stop unless a state's pieces make up the tensors of a run, no more and no fewer.

    shapes  {key: shape} of the run's weights and moments"""
    saved = {}
    for key, found in pieces.items():
        rows = sum(row_range.rows for row_range, _ in found)
        saved[key] = [rows, *found[0][1].get_shape()[1:]]
    for key in sorted({*saved, *shapes}):
        if saved.get(key) != shapes.get(key):
            stop(
                f"{folder!r} does not fit this run: {key} is {saved.get(key, 'missing')} there, "
                f"and {shapes.get(key, 'missing')} in the run; resume with the run's own config.py"
            )


def make_moments(model, optimizer, steps):
    """Give AdamW the moments that it makes in its first step, which are filled afterwards."""
    for _, parameter in parallel.named_local_parameters(model):
        device = parallel.local_part(parameter.data).device
        dtype = optimizer.defaults.get("moment_dtype", parameter.dtype)  # as optim.py sets it
        moments = {key: torch.zeros_like(parameter.data, dtype=dtype) for key in MOMENTS}
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


def is_unfinished(out_dir):
    """Whether a run's latest state stands before its last step.

    A trainer that is asked to stop saves a state and exits with 0: its status does not tell."""
    latest = read_latest(out_dir)
    if latest not in list_states(out_dir):
        return False
    folder = os.path.join(out_dir, "state", latest)
    return read_step(latest) < read_json(folder, RECORD).get("steps", 0)


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


# ---- what a state was made with ----

# A state means something else where one of these has changed, so that is refused. All other knobs
# may change: the run goes on with the new value, and the change is printed. That is what a user
# wants of learning rates and coefficients, and what machines differ in (parallel, max_tokens).
FIXED_KNOBS = {
    # Step t takes the examples of positions t * batch_size .. of an order that the seed draws.
    "seed",
    "batch_size",
    "rollout_size",
    "num_samples",
    "ppo_epochs",  # also how many steps a rollout has
    # Which loss, and so which models, heads and moments of scores there are.
    "objective",
    "advantage",
    "normalizer",
    # Shapes do not show these: the same weights compute something else.
    "num_attention_heads",
    "num_key_value_heads",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    # A state has gone on from these, so a new value would be ignored without a word.
    "lambda_init",
    "normalizer_momentum",
    # What a multiplier remembers: numbers of its own kind, costs of one scale, the latest of them.
    "multiplier",
    "cost_kind",
    "constraint",
    "lambda_lookback",
}
UNRECORDED_KNOBS = ("out_dir", "resume")  # a run's folder may be moved
# Of a Dataset: where its examples come from, which the tokens follow from.
UNRECORDED_ARRAYS = ("lines.npy", "json.npy", "json_offsets.npy")


def make_record(knobs, steps, **sources):
    """What a run's states keep in record.json.

    knobs    the run's configuration
    steps    optimizer steps of the whole run, which its learning rates depend on
    sources  {knob: what it names}, the Dataset, or the path or name of a model or a list of them,
             whose contents must not change; None where there is none"""
    recorded = {name: value for name, value in knobs.items() if name not in UNRECORDED_KNOBS}
    contents = {name: fingerprint(source) for name, source in sources.items()}
    day = Clock.now().date().isoformat()
    return {"steps": steps, "knobs": recorded, "contents": contents, "day": day}


def fingerprint(source):
    """A number that changes with a Dataset's tokens and labels, or with the config and weights of a
    model folder or of a list of them; 0 of None. A list of one has the number of that one."""
    if source is None:
        return 0
    if isinstance(source, str):
        source = [source]
    if isinstance(source, list):
        facts = []
        for name in source:
            facts += describe_model(name)
    else:
        sums = read_json(source.folder, CHECKSUMS)
        arrays = [
            name for name in sorted(sums) if name.endswith(".npy") and name not in UNRECORDED_ARRAYS
        ]
        facts = [[name, sums[name]] for name in arrays]
    return zlib.crc32(json.dumps(facts).encode())


def describe_model(name):
    """describe_file() of the files of a model, or of the file of FILE.py:NAME."""
    if names_function(name):
        path, _ = split_function(name)
        return [describe_file(*os.path.split(path))]
    facts = []
    for folder in list_model_folders(find_model(name)):
        facts += describe_model_files(folder)
    return facts


def check_record(folder, step, saved, record):
    """Stop with one line if a state was made with something else that is fixed, and print what else
    has changed.

    step           of the state
    saved, record  make_record() of the state, {} if it is older than records, and of this run"""
    steps, knobs = record["steps"], record["knobs"]
    old_knobs = saved.get("knobs", {})
    changed = {}  # knob -> "old -> new"
    for name, value in knobs.items():
        if name in old_knobs and old_knobs[name] != value:
            changed[name] = f"{name} {old_knobs[name]!r} -> {value!r}"

    refused = [change for name, change in changed.items() if name in FIXED_KNOBS]
    for name, number in record["contents"].items():
        if saved.get("contents", {}).get(name, number) != number:
            same_name = f"{name} {knobs[name]!r} -> the same name with other contents"
            refused.append(changed.get(name, same_name))
    # With kl_target, kl_coef is only where the adaptation began.
    if "kl_coef" in changed and knobs["kl_target"]:
        refused.append(changed["kl_coef"])
    if refused:
        stop(
            f"{folder!r} was made with something else ({', '.join(refused)}): resume it with what "
            "it was made with, or start another run in another out_dir"
        )
    if step > steps:
        stop(
            f"{folder!r} is of step {step}, but this run ends at step {steps}: raise max_steps or "
            "epochs"
        )
    if not saved:
        print_once(f"{folder}: an old state, which does not know its knobs: compare them yourself")
        return
    check_schedules(folder, step, saved["steps"], steps, knobs)
    if changed:
        print_once(f"resumed with changes: {', '.join(changed.values())}")


def check_schedules(folder, step, old_steps, new_steps, knobs):
    """Stop where another number of steps would make the learning rate jump at step `step`.

    A constant learning rate does not depend on it once warm-up is over, so a run may go on longer:
    it equals one that was made longer from the start."""
    if old_steps == new_steps:
        return
    for name, schedule in knobs.items():
        if not name.endswith("lr_schedule"):
            continue
        warmup_ratio = knobs[name.replace("lr_schedule", "warmup_ratio")]
        old_warmup = int(warmup_ratio * old_steps)  # as optim.learning_rate_at() has it
        new_warmup = int(warmup_ratio * new_steps)
        jumps = schedule != "constant"
        if old_warmup != new_warmup and step < max(old_warmup, new_warmup):
            jumps = True
        if jumps:
            stop(
                f"{folder!r} is of a run of {old_steps} steps, and max_steps={knobs['max_steps']}, "
                f"epochs={knobs['epochs']:g} make it {new_steps}: {name}={schedule!r} would jump "
                f"at step {step}. Keep them, set {name}=constant, or start another run from model/"
            )


# ---- the run's folder ----

locks = {}  # path of a lock -> its open file, which holds the lock until this process ends


def open_run_folder(config):
    """Lock the run's folder, and return whether it has a state to continue from. A collective.

    Chat templates are told the day of the run's beginning from now on.

    A folder that holds a run is refused, unless that run is resumed, or unless the torchrun that
    started it starts it again. So is the folder of a run that lives. No file of the run changes
    here: begin_run() writes the first, when everything has been loaded and checked."""
    out_dir, resume = config["out_dir"], config["resume"]
    refusal = ""
    has_state = False
    day = Clock.now().date().isoformat()
    is_restart = is_restart_of(out_dir)
    if parallel.rank() == 0:  # what it finds holds for all: on other ranks a shared disk may lag
        refusal = find_refusal(out_dir, resume, is_restart)
        if not refusal:
            make_folder(out_dir)
            refusal = lock_run_folder(out_dir, NODE_TIMEOUT if is_restart else 0)
        states = list_states(out_dir)
        has_state = bool(states)
        if has_state:
            with suppress(OSError, ValueError):  # load() looks for damage, and reads an older one
                record = read_json(os.path.join(out_dir, "state", states[-1]), RECORD)
                day = record.get("day", day)
    indices = [0] if parallel.rank() == 0 else []
    found = parallel.all_gather_lists([[refusal, has_state, day]], indices, 1)[0]
    refusal, has_state, day = found
    if refusal:
        stop(refusal)
    Clock.fix(day)
    for name in ("model", "model_ema"):
        if parallel.rank() == 0:
            check_link(os.path.join(out_dir, name))
    return has_state


def begin_run(config, write):
    """Write that the run has begun, and with which configuration: the last thing before training.

    write  writes (config, path of config.py)"""
    out_dir = config["out_dir"]
    if parallel.rank() == 0:
        make_folder(os.path.join(out_dir, "state"))
        if not list_states(out_dir):
            with atomic_write(os.path.join(out_dir, "state", "latest")):
                pass  # it is empty: this run has had no state yet
        write_json(describe_owner(), out_dir, "owner.json")
        write(config, os.path.join(out_dir, "config.py"))
    parallel.barrier()


def find_refusal(out_dir, resume, is_restart):
    """Why a run may not use this folder, or ""."""
    holds_run = bool(list_run_files(out_dir))
    if resume and not holds_run:
        return f"resume=True, but {out_dir!r} has no run: start it without"
    if holds_run and not resume and not is_restart:
        return f"{out_dir!r} holds a run: continue it with --resume=True, or choose another out_dir"
    if resume and not list_states(out_dir) and not died_before_first_state(out_dir):
        found = ", ".join(list_run_files(out_dir))
        return (
            f"{out_dir!r} has no state to continue from, and its {found} would be overwritten: "
            "choose another out_dir, and start without resume"
        )
    return ""


def list_run_files(out_dir):
    """The names in out_dir that show that it holds a run. A model's folder that is still empty, to
    which a symbolic link may lead, shows nothing."""
    found = []
    for name in ("config.py", "metrics.jsonl", "samples.jsonl"):
        if os.path.exists(os.path.join(out_dir, name)):
            found.append(name)
    for name in ("model", "model_ema"):
        path = os.path.join(out_dir, name)
        if os.path.isdir(path) and os.listdir(path):
            found.append(name)
    if list_states(out_dir):
        found.append("state")
    return found


def died_before_first_state(out_dir):
    """Whether a run has begun here and has saved no state. Then it can only start again.

    begin_run() has left an empty state/latest. Where states were deleted, it names one, or is gone
    with them."""
    path = os.path.join(out_dir, "state", "latest")
    return os.path.exists(path) and os.path.getsize(path) == 0


def lock_run_folder(out_dir, seconds):
    """Lock out_dir/lock until this process ends; returns "", or one line if another process has it.

    The operating system gives up the lock with the process, however it ends. A file server gives up
    those of a dead node after a while.

    seconds  how long to wait for the lock"""
    path = os.path.join(out_dir, "lock")
    key = os.path.realpath(path)
    if key in locks and os.path.exists(key):  # two runs after each other in one process
        return ""
    with one_line_errors(path, "written"):
        file = open(path, "a+", encoding="utf-8", errors="replace")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                return (
                    f"{out_dir!r} is in use by {file.read().strip() or 'another run'}: choose "
                    f"another out_dir, or end that run; if its machine is dead, delete {path!r}"
                )
            time.sleep(1)
        except OSError as error:  # a file system without locks
            print_once(f"warning: {path!r} cannot be locked ({error}): start no second run there")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    locks[key] = file
    return ""


def describe_owner():
    """Which torchrun, or which shell, has started this process.

    In containers its machine's name and its number are often those of the last job, so the time at
    which it began counts as well."""
    parent = os.getppid()
    began = ""
    with suppress(OSError):  # a system without /proc
        with open(f"/proc/{parent}/stat", encoding="utf-8", errors="replace") as f:
            began = f.read().rpartition(")")[2].split()[19]  # in clock ticks; see proc_pid_stat(5)
    return {"torchrun": zlib.crc32(f"{os.uname().nodename} {parent} {began}".encode())}


def is_restart_of(out_dir):
    """Whether torchrun restarts its own run, as rank 0 finds it. A collective."""
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    is_ours = False
    if is_restart and parallel.rank() == 0:
        is_ours = read_json(out_dir, "owner.json") == describe_owner()
    return parallel.any_rank(is_ours, "cpu")
