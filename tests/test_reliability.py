"""What nanosafe promises never to lose, and how it fails: kills, full disks, lost ranks, signals,
numbers that are not finite, too little memory, secrets.

nanosafe/tools/crash.py has the long runs; docs/reliability.md has what both found."""

import ast
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from conftest import ROOT, rows_of, run, same_state, small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_house import PRODUCT, parse

from nanosafe import checkpoint, data, errors, optim, parallel, rl, storage, tokenizer, watchdog
from nanosafe.checkpoint import run_state
from nanosafe.monitor import Monitor
from nanosafe.storage import checksum
from nanosafe.tools.workload_report import Workload

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def spawn(*command, environment=None, **options):
    """Start a command in the background, in a session of its own; its output goes to a pipe."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ROOT, **(environment or {})},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def find_workers(process):
    """The process ids of the ranks below a torchrun."""
    done = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def wait_for_rows(folder, count, process):
    """Wait until a run has logged so many rows."""
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.02)


def without(flags, *names):
    """A command without the flags --name=... of these names."""
    prefixes = tuple(f"--{name}=" for name in names)
    return [flag for flag in flags if not str(flag).startswith(prefixes)]


def read_files(folder):
    """{path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_rows_are_close(rows, others, rel_tol=2e-3, abs_tol=2e-4):
    """That two runs logged the same numbers, up to rounding."""
    for row, other in zip(rows, others):
        for name, value in row.items():
            is_close = math.isclose(value, other[name], rel_tol=rel_tol, abs_tol=abs_tol)
            assert is_close, (name, row, other)


# ---- a state is whole, or it is not there ----


class Tiny:
    """A small model with its optimizer, which learns and is saved as a run is."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.model = checkpoint.init_from_scratch(small_config(), seed=1)
        self.optimizer = optim.make_adamw(self.model, 0.0, 0.9, 0.95)
        self.models = {"model": self.model}
        self.optimizers = {"model": self.optimizer}

    def learn(self, steps):
        tokens = torch.arange(9)
        targets = (tokens + 1) % 9
        cu_seqlens = torch.tensor([0, 9], dtype=torch.int32)
        for _ in range(steps):
            loss = -self.model(tokens, cu_seqlens, 9, targets).mean()
            loss.backward()
            optim.guarded_step(self.model, self.optimizer, 1e-2, 1.0)

    def save(self, step, keep=2):
        checkpoint.save(self.model, os.path.join(self.folder, "model"))
        run_state.save(self.folder, step, self.models, self.optimizers, {"skips": 0}, keep)

    def load(self):
        """Load the folder's latest state that is whole, and return its step."""
        return run_state.load(self.folder, self.models, self.optimizers)["step"]

    def copy_tensors(self):
        """Copies of the weights and of the optimizer's moments."""
        tensors = [parameter.clone() for parameter in self.model.parameters()]
        for parameter in self.model.parameters():
            moments = self.optimizer.state.get(parameter, {})
            for name in run_state.MOMENTS:
                if name in moments:
                    tensors.append(moments[name].clone())
        return tensors


def are_equal(tensors, others):
    return all(map(torch.equal, tensors, others))


SNAPSHOTS = {}  # a folder that is watched -> the folder for its snapshots
FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def take_snapshot_before(event, arguments):
    """An audit hook: copy a watched folder before Python changes a file in it."""
    if event in FILE_OPERATIONS:
        for folder, target in list(SNAPSHOTS.items()):
            if str(arguments[0]).startswith(folder):
                del SNAPSHOTS[folder]  # what copying opens is not watched
                shutil.copytree(folder, f"{target}/{len(os.listdir(target)):04d}")
                SNAPSHOTS[folder] = target


sys.addaudithook(take_snapshot_before)


def test_a_run_that_is_killed_anywhere_in_a_save_has_a_whole_state(tmp_path):
    """Take every state that a disk passes through during the third save, which deletes the first
    state: this is what SIGKILL can leave."""
    tiny = Tiny(tmp_path / "run")
    known = {}  # step -> tensors
    for step in (2, 4):
        tiny.learn(2)
        tiny.save(step)
        known[step] = tiny.copy_tensors()
    tiny.learn(2)
    known[6] = tiny.copy_tensors()
    os.mkdir(tmp_path / "snapshots")
    SNAPSHOTS[tiny.folder] = str(tmp_path / "snapshots")
    tiny.save(6)
    SNAPSHOTS.clear()

    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert len(snapshots) > 25
    steps = []
    models = 0
    for folder in snapshots:
        other = Tiny(folder)
        step = other.load()
        assert step in (4, 6)
        assert are_equal(other.copy_tensors(), known[step])
        steps.append(step)
        if os.path.exists(folder / "model"):  # it is missing between two renames only
            models += 1
            exported = list(checkpoint.load(folder / "model").parameters())
            is_new = are_equal(exported, known[6])
            is_old = are_equal(exported, known[4])
            assert is_new or (is_old and step == 4)
        other.learn(2)
        other.save(step + 2)  # over whatever was left behind
        names = os.listdir(folder / "state")
        assert not [name for name in names if name.endswith((".tmp", ".old"))]
        assert len(run_state.list_states(str(folder))) == 2
        exported = checkpoint.load(folder / "model").parameters()
        assert are_equal(exported, other.model.parameters())
    assert steps == sorted(steps)
    assert models >= len(snapshots) - 2


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {  # name -> the file of a state that is damaged, and how
    "flip": ("rank_00000_model.safetensors", flip_a_bit),
    "cut": ("rank_00000_model.safetensors", cut_in_half),
    "lose": ("rank_00000_model.safetensors", os.remove),
    "empty": ("rank_00000_model.safetensors", lambda path: path.write_bytes(b"")),
    "checksums": ("checksums.json", flip_a_bit),
    "state.json": ("state.json", flip_a_bit),
    "state lost": ("state.json", os.remove),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_passed_over_and_if_all_are_damaged_one_line_says_so(
    name, tmp_path, capsys
):
    file, damage = DAMAGES[name]
    tiny = Tiny(tmp_path)
    tiny.learn(1)
    tiny.save(2)
    expected = tiny.copy_tensors()
    tiny.learn(1)
    tiny.save(4)

    damage(tmp_path / "state" / "step_000004" / file)
    other = Tiny(tmp_path)
    assert other.load() == 2
    assert are_equal(other.copy_tensors(), expected)
    assert "step_000004/" in capsys.readouterr().out
    damage(tmp_path / "state" / "step_000002" / file)
    with pytest.raises(SystemExit, match="error: no state in .* is whole"):
        other.load()


def test_a_save_holds_the_rows_of_one_model_at_a_time_in_host_memory(tmp_path, monkeypatch):
    """A clone stands in for the copy that Tensor.cpu() makes of a GPU's tensor."""
    tiny = Tiny(tmp_path)
    tiny.learn(1)
    for name in ("other", "third"):
        tiny.models[name] = checkpoint.init_from_scratch(small_config(), seed=2)
    copies = WeakSet()
    bytes_alive = []
    write_file = run_state.save_file

    def copy_to_host(tensor):
        copy = tensor.clone()
        copies.add(copy)
        return copy

    def write_and_count(tensors, path, metadata):
        bytes_alive.append(sum(copy.nbytes for copy in copies))
        write_file(tensors, path, metadata)

    monkeypatch.setattr(torch.Tensor, "cpu", copy_to_host)
    monkeypatch.setattr(run_state, "save_file", write_and_count)
    run_state.save(str(tmp_path), 2, tiny.models, tiny.optimizers, {})
    weights = sum(parameter.nbytes for parameter in tiny.model.parameters())
    assert bytes_alive == [3 * weights, weights, weights]  # the first has AdamW's two moments
    assert len(copies) == 0


def join_models_of_a_state(folder):
    """Give a state the layout of older versions: one file of a rank's rows, of all models."""
    tensors, first_rows = {}, {}
    for path in sorted(folder.glob("rank_00000_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            first_rows.update(json.loads(file.metadata()["first_rows"]))
        tensors.update(load_file(path))
        path.unlink()
    joined = folder / "rank_00000.safetensors"
    save_file(tensors, joined, {"first_rows": json.dumps(first_rows)})
    sums = {}
    for name in (joined.name, "state.json", "record.json"):
        sums[name] = checksum(folder / name)
    (folder / "checksums.json").write_text(json.dumps(sums))


def test_a_state_of_an_older_version_with_one_file_for_all_models_is_resumed(tmp_path):
    tiny = Tiny(tmp_path)
    tiny.models["other"] = checkpoint.init_from_scratch(small_config(), seed=2)
    tiny.optimizers["other"] = optim.make_adamw(tiny.models["other"], 0.0, 0.9, 0.95)
    tiny.learn(2)
    tiny.save(2)
    expected = tiny.copy_tensors()
    join_models_of_a_state(tmp_path / "state" / "step_000002")
    fresh = Tiny(tmp_path)
    fresh.models["other"] = checkpoint.init_from_scratch(small_config(), seed=3)
    fresh.optimizers["other"] = optim.make_adamw(fresh.models["other"], 0.0, 0.9, 0.95)
    assert fresh.load() == 2
    assert are_equal(fresh.copy_tensors(), expected)
    others = fresh.models["other"].parameters()
    assert are_equal(others, tiny.models["other"].parameters())
    fresh.save(4)
    assert fresh.load() == 4


@pytest.mark.parametrize(
    "content, step",
    [(b"step_000002\n", 2), (b"step_9\n", 4), (b"", 4), (b"\0\0\0", 4), (b"\xff\xfe", 4)],
)
def test_a_pointer_to_the_latest_state_is_ignored_if_it_is_broken(content, step, tmp_path):
    tiny = Tiny(tmp_path)
    tiny.save(2)
    tiny.save(4)
    (tmp_path / "state" / "latest").write_bytes(content)
    assert tiny.load() == step


def test_the_latest_states_are_kept_by_number_and_those_of_an_abandoned_course_go(tmp_path):
    tiny = Tiny(tmp_path)
    for step in (999_998, 999_999, 1_000_000):
        tiny.save(step)
    assert run_state.list_states(str(tmp_path)) == ["step_999999", "step_1000000"]
    tiny.save(5, keep=0)  # at least one state stays
    assert run_state.list_states(str(tmp_path)) == ["step_000005"]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_export_is_refused_with_one_line(damage, tmp_path):
    Tiny(tmp_path).save(2)
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    if damage == "cut":
        content = content[:-9]
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="error: .*model.safetensors"):
        checkpoint.load(tmp_path / "model")
    if damage == "flip":  # who changed it on purpose deletes the checksums
        (tmp_path / "model" / "checksums.json").unlink()
        checkpoint.load(tmp_path / "model")


def test_damaged_token_ids_are_made_again(world, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path))
    tok = tokenizer.load(world / "tokenizer")
    spec = f"{world}/data/sft/train.jsonl:50/-1"
    first = data.tokenize(spec, tok, "sft", 200)
    expected = first.tokens.tolist()
    path = os.path.join(first.folder, "tokens.npy")
    with open(path, "rb") as f:
        content = bytearray(f.read())
    content[-4] ^= 1
    for damaged in (content, content[:60]):
        with open(path, "wb") as f:
            f.write(damaged)
        assert data.tokenize(spec, tok, "sft", 200).tokens.tolist() == expected


# ---- runs that die ----


@pytest.mark.parametrize("name", ["sft", "reward", "ppo_lag"])
def test_a_run_that_is_resumed_after_its_last_state_changes_nothing(name, trainers, tmp_path):
    run(*trainers[name], f"--out_dir={tmp_path}/a")
    before = rows_of(tmp_path / "a" / "metrics.jsonl")
    run(*trainers[name], f"--out_dir={tmp_path}/a", "--resume=True")
    assert rows_of(tmp_path / "a" / "metrics.jsonl") == before


def test_a_run_that_died_before_its_first_state_starts_again(trainers, tmp_path):
    run(*trainers["sft"], f"--out_dir={tmp_path}/a")
    os.mkdir(tmp_path / "b")
    (tmp_path / "b" / "config.py").write_text("seed = 0\n")
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    os.mkdir(tmp_path / "b" / "state")
    (tmp_path / "b" / "state" / "latest").write_text("")  # which a run leaves as it begins
    run(*trainers["sft"], f"--out_dir={tmp_path}/b", "--resume=True")
    assert same_state(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_torchrun_restarts_a_run_when_a_rank_dies(trainers, tmp_path):
    flags = [
        *without(trainers["cost"], "max_steps"),
        "--max_steps=80",
        "--epochs=99",
        "--parallel=fsdp",
    ]
    run(*flags, f"--out_dir={tmp_path}/a", ranks=2)
    process = spawn(*TORCHRUN, "--max-restarts=2", *flags, f"--out_dir={tmp_path}/b")
    wait_for_rows(tmp_path / "b", 5, process)
    os.kill(find_workers(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    assert same_state(tmp_path / "a", tmp_path / "b")


def test_ranks_agree_on_a_new_restart_id_where_dead_ranks_have_left_theirs():
    """Three attempts on one store, which torchrun keeps. In the second one, a rank died after it
    had written its word, and before it read the answer."""
    store = torch.distributed.HashStore()

    def agree(size):
        """The ids that so many ranks agree on: a set of one."""
        with ThreadPoolExecutor(size) as pool:
            futures = []
            for rank in range(size):
                futures.append(pool.submit(watchdog.agree_on_restart_id, store, rank, size))
            return {future.result() for future in futures}

    (first,) = agree(3)
    assert store.get("hello_0").decode() == first
    store.set("hello_1", "dead")
    (second,) = agree(3)
    assert second != first
    assert store.get("hello_0").decode() == second
    assert agree(1).isdisjoint({first, second})


@pytest.mark.slow
def test_a_restart_by_torchrun_does_not_take_over_another_run(trainers, tmp_path):
    """The first attempt is refused. torchrun takes that for a rank that died, and tries again."""
    run(*trainers["cost"], f"--out_dir={tmp_path}/a", ranks=2)
    before = read_files(tmp_path / "a")
    process = spawn(
        *TORCHRUN,
        "--max-restarts=1",
        *trainers["cost"],
        f"--out_dir={tmp_path}/a",
        "--max_steps=99",
    )
    output, _ = process.communicate(timeout=900)
    assert process.returncode
    assert output.count("holds a run") >= 2
    assert read_files(tmp_path / "a") == before


@pytest.mark.slow
def test_ranks_that_were_all_suspended_go_on(trainers, tmp_path):
    """As on a laptop that was closed, or in a queue that suspends jobs, for longer than the time
    that ranks wait for each other."""
    flags = [
        *without(trainers["sft"], "max_steps"),
        "--max_steps=40",
        "--epochs=999",
        "--save_interval=0",
    ]
    timeout = {"NANOSAFE_TIMEOUT": "0.2"}  # minutes
    process = spawn(*TORCHRUN, *flags, f"--out_dir={tmp_path}/a", environment=timeout)
    wait_for_rows(tmp_path / "a", 3, process)
    workers = find_workers(process)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(15)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    assert "has waited" not in output


# Runs a trainer whose rank 1 never comes back from its sixth batch.
HANGING_TRAINER = """
import os, runpy, sys, time
from nanosafe.data import Dataset

read_batch = Dataset.batch
calls = []

def batch(*arguments):
    calls.append(arguments)
    if os.environ["RANK"] == "1" and len(calls) == 6:
        time.sleep(999)
    return read_batch(*arguments)

Dataset.batch = batch
sys.argv = {command!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def find_rank_1(process):
    """The process id of rank 1 below a torchrun."""
    for pid in find_workers(process):
        with open(f"/proc/{pid}/environ", "rb") as f:
            if b"RANK=1\0" in f.read():
                return pid


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "reading"])
def test_a_rank_that_hangs_is_named(how, trainers, tmp_path):
    command = [
        *without(trainers["sft"], "max_steps"),
        "--max_steps=5000",
        "--epochs=999",
        "--save_interval=0",
        "--parallel=fsdp",
        f"--out_dir={tmp_path}/a",
    ]
    if how == "reading":  # while the others wait in FSDP's own collectives
        text = HANGING_TRAINER.format(command=[str(word) for word in command])
        (tmp_path / "hang.py").write_text(text)
        command = [tmp_path / "hang.py"]
    process = spawn(*TORCHRUN, *command, environment={"NANOSAFE_TIMEOUT": "0.2"})
    wait_for_rows(tmp_path / "a", 3, process)
    victim = find_rank_1(process)
    if how == "stopped":
        os.kill(victim, signal.SIGSTOP)
    began = time.time()
    output = ""
    for line in process.stdout:
        output += line
        if "has waited" in line:
            break
    waited = time.time() - began
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=900)
    message = "error: rank 0 has waited 0.2 minutes (NANOSAFE_TIMEOUT) for rank 1, which hangs"
    assert message in output
    assert waited < 300
    assert process.returncode != 0


@pytest.mark.parametrize(
    "signal_number, target",
    [
        (signal.SIGTERM, "all"),
        pytest.param(signal.SIGINT, "all", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "one worker", marks=pytest.mark.slow),
    ],
)
def test_under_torchrun_a_signal_saves_the_same_step_on_all_ranks(
    signal_number, target, trainers, tmp_path
):
    """A signal from a terminal or a queue reaches torchrun and its workers, to which torchrun sends
    it again."""
    flags = [
        *without(trainers["sft"], "max_steps"),
        "--max_steps=60",
        "--epochs=99",
        "--save_interval=0",
        "--parallel=fsdp",
    ]
    run(*flags, f"--out_dir={tmp_path}/a", ranks=2)
    process = spawn(*TORCHRUN, *flags, f"--out_dir={tmp_path}/b")
    wait_for_rows(tmp_path / "b", 3, process)
    workers = find_workers(process)
    pids = [*workers, process.pid] if target == "all" else workers[:1]
    for pid in pids:
        os.kill(pid, signal_number)
    output, _ = process.communicate(timeout=900)
    if target == "one worker":
        assert process.returncode == 0, output[-2000:]
    latest = run_state.list_states(str(tmp_path / "b"))[-1]
    assert 3 <= int(latest.removeprefix("step_")) < 60
    run(*flags, f"--out_dir={tmp_path}/b", "--resume=True", ranks=2)
    assert same_state(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(trainers, tmp_path):
    flags = [
        *without(trainers["ppo_lag"], "max_steps", "max_new_tokens", "rollout_size"),
        "--max_steps=5000",
        "--max_new_tokens=120",
        "--rollout_size=512",
        "--save_interval=0",
    ]
    process = spawn(sys.executable, *flags, f"--out_dir={tmp_path}/a")
    wait_for_rows(tmp_path / "a", 1, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (130, 0)
    process.communicate()


# ---- the run's folder ----


def open_folder(out_dir, resume=False):
    """Open a run's folder as a trainer does; returns whether it has a state."""
    return run_state.open_run_folder({"out_dir": str(out_dir), "resume": resume})


@pytest.mark.parametrize(
    "name", ["config.py", "metrics.jsonl", "samples.jsonl", "model/config.json", "model_ema/x"]
)
def test_a_run_without_states_is_not_overwritten_nor_resumed(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("a result")
    with pytest.raises(SystemExit, match="holds a run"):
        open_folder(tmp_path)
    with pytest.raises(SystemExit, match="no state to continue from"):
        open_folder(tmp_path, resume=True)
    assert read_files(tmp_path) == {path: b"a result"}


def test_a_finished_run_whose_states_were_deleted_stays_as_it_is(trainers, tmp_path):
    command = [*trainers["sft"], f"--out_dir={tmp_path}/a"]
    run(*command)
    shutil.rmtree(tmp_path / "a" / "state")
    before = read_files(tmp_path / "a")
    for resume, words in (("False", "holds a run"), ("True", "no state to continue from")):
        done = run(*command, f"--resume={resume}", check=False)
        assert done.returncode == 1
        assert words in done.stderr.splitlines()[-1]
        assert read_files(tmp_path / "a") == before


def test_a_run_begins_with_an_empty_pointer_so_that_it_can_start_again(tmp_path):
    def write(config, path):
        with open(path, "w") as f:
            f.write("seed = 0\n")

    out = tmp_path / "run"
    assert not open_folder(out)
    assert [path.name for path in out.iterdir()] == ["lock"]  # nothing says yet that a run is here
    run_state.begin_run({"out_dir": str(out)}, write)
    with pytest.raises(SystemExit, match="holds a run"):
        open_folder(out)
    assert not open_folder(out, resume=True)
    (out / "state" / "latest").write_text("step_000002\n")  # of a state that was deleted
    with pytest.raises(SystemExit, match="no state to continue from"):
        open_folder(out, resume=True)


LOCKS_A_FOLDER = """
import sys, time
from nanosafe.checkpoint import run_state
print(repr(run_state.lock_run_folder(sys.argv[1], 0)), flush=True)
time.sleep(60)
"""


def test_a_living_run_s_folder_is_locked_until_its_process_ends(trainers, tmp_path):
    out = tmp_path / "a"
    command = [*trainers["sft"], f"--out_dir={out}"]
    run(*command)
    process = spawn(sys.executable, "-c", LOCKS_A_FOLDER, out)
    assert process.stdout.readline() == "''\n"
    before = read_files(out)
    done = run(*command, "--resume=True", check=False)
    assert done.returncode == 1
    assert f"is in use by process {process.pid} on " in done.stderr.splitlines()[-1]
    assert read_files(out) == before
    process.kill()
    process.communicate()
    run(*command, "--resume=True")


def test_of_two_runs_that_start_at_once_one_is_refused(trainers, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    command = [*trainers["sft"], f"--out_dir={out}"]
    with open(out / "lock", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = run(*command, check=False, ranks=2)
        assert done.returncode
        assert "is in use by another run" in done.stderr
        assert os.listdir(out) == ["lock"]
    run(*command)


def test_a_restarted_run_waits_for_the_lock_of_a_dead_node(tmp_path):
    file = open(tmp_path / "lock", "a")
    fcntl.flock(file, fcntl.LOCK_EX)
    assert "is in use" in run_state.lock_run_folder(str(tmp_path), 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run_state.lock_run_folder, str(tmp_path), 60)
        time.sleep(0.2)
        file.close()
        assert waiting.result() == ""


def test_a_refused_resume_writes_nothing(trainers, tmp_path):
    out = tmp_path / "a"
    command = [*trainers["sft"], f"--out_dir={out}", "--keep=9"]
    run(*command)
    (out / "state" / "latest").write_text("step_000002\n")
    before = read_files(out)
    before.pop(out / "lock")
    mistakes = {
        "--batch_size=4": "batch_size 8 -> 4",
        "--hidden_size=64": "is [",
        "--data=nowhere": "prepare.py first",
        "--tokenizer=nowhere": "nowhere",
        "--max_steps=1": "is of step 2, but this run ends at step 1",
        "--log_to=mlflow": "choose one of tensorboard, wandb",
    }
    for mistake, words in mistakes.items():
        done = run(*command, mistake, "--resume=True", check=False)
        assert done.returncode == 1, mistake
        assert words in done.stderr.splitlines()[-1]
        after = read_files(out)
        after.pop(out / "lock")
        assert after == before


# ---- what a state was made with ----


def check_change(saved, now, step=4):
    run_state.check_record("state/step_000004", step, saved, now)


def record_of(steps=8, contents=None, **knobs):
    common = {"max_steps": 8, "epochs": 1.0, "lr_schedule": "constant", "warmup_ratio": 0.0}
    return {"steps": steps, "knobs": {**common, **knobs}, "contents": contents or {}}


@pytest.mark.parametrize(
    "old, new",
    [
        ({"batch_size": 64}, {"batch_size": 32}),
        ({"seed": 0}, {"seed": 1}),
        ({"objective": "reward"}, {"objective": "dpo"}),
        ({"rollout_size": 8}, {"rollout_size": 4}),
        ({"num_samples": 1}, {"num_samples": 2}),
        ({"ppo_epochs": 1}, {"ppo_epochs": 3}),
        ({"num_attention_heads": 4}, {"num_attention_heads": 2}),
        ({"lambda_init": 1.0}, {"lambda_init": 2.0}),
        ({"kl_coef": 0.1, "kl_target": 2.0}, {"kl_coef": 0.2, "kl_target": 2.0}),
    ],
)
def test_a_knob_that_changes_a_state_s_meaning_is_refused_with_both_values(old, new):
    name = next(iter(new))
    with pytest.raises(SystemExit, match=f"{name} {old[name]!r} -> {new[name]!r}"):
        check_change(record_of(**old), record_of(2, **new))  # not that it would end at step 2


def test_other_changed_knobs_are_printed_and_allowed(capsys):
    old = {"learning_rate": 1e-5, "kl_coef": 0.1, "kl_target": 0.0, "data": "a", "removed": 1}
    new = {"learning_rate": 2e-5, "kl_coef": 0.2, "kl_target": 0.0, "data": "b", "added": 2}
    check_change(record_of(**old, contents={"data": 7}), record_of(**new, contents={"data": 7}))
    expected = "learning_rate 1e-05 -> 2e-05, kl_coef 0.1 -> 0.2, data 'a' -> 'b'\n"
    assert capsys.readouterr().out.endswith(expected)
    check_change(record_of(), record_of())
    assert capsys.readouterr().out == ""
    check_change({}, record_of())  # of a state that is older than the record
    assert "does not know its knobs" in capsys.readouterr().out


def test_the_same_name_with_other_contents_is_refused():
    old = record_of(data="a", contents={"data": 7})
    with pytest.raises(SystemExit, match="data 'a' -> the same name with other contents"):
        check_change(old, record_of(data="a", contents={"data": 8}))
    with pytest.raises(SystemExit, match="data 'a' -> 'b'"):
        check_change(old, record_of(data="b", contents={"data": 8}))


@pytest.mark.parametrize(
    "schedule, warmup_ratio, is_allowed",
    [
        ("constant", 0.0, True),
        ("constant", 0.2, True),  # warm-up is over in both, after 1 and after 3 steps
        ("constant", 0.4, False),  # step 4 would be in the warm-up of 6 steps
        ("cosine", 0.0, False),
        ("linear", 0.0, False),
    ],
)
def test_a_run_may_go_on_longer_where_its_learning_rate_does_not_jump(
    schedule, warmup_ratio, is_allowed
):
    knobs = {"lr_schedule": schedule, "warmup_ratio": warmup_ratio}
    old, new = record_of(8, **knobs), record_of(16, **{**knobs, "max_steps": 16})
    if is_allowed:
        check_change(old, new)
        return
    with pytest.raises(SystemExit, match="lr_schedule='.*' would jump at step 4"):
        check_change(old, new)


def test_a_fingerprint_follows_contents_not_names(world, tmp_path, monkeypatch):
    tok = tokenizer.load(world / "tokenizer")
    lines = (world / "data" / "sft" / "train.jsonl").read_text().splitlines(keepends=True)
    numbers = {}
    for name, kept in (("a", lines[:20]), ("same", lines[:20]), ("other", lines[1:21])):
        (tmp_path / f"{name}.jsonl").write_text("".join(kept))
        monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / f"cache_{name}"))
        dataset = data.tokenize(f"{tmp_path}/{name}.jsonl", tok, "sft", 200)
        numbers[name] = run_state.fingerprint(dataset)
    assert numbers["a"] == numbers["same"] != numbers["other"]

    tiny = Tiny(tmp_path)
    tiny.save(2)
    first = run_state.fingerprint(str(tmp_path / "model"))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    assert run_state.fingerprint(str(tmp_path / "copy")) == first
    tiny.learn(1)
    tiny.save(4)
    assert run_state.fingerprint(str(tmp_path / "model")) != first
    assert run_state.fingerprint(None) == 0


@pytest.mark.parametrize(
    "change", [{"vocab_size": 64}, {"vocab_size": 128}, {"num_hidden_layers": 1}, {"head": "both"}]
)
def test_a_state_of_other_shapes_is_refused_as_a_whole(change, tmp_path):
    tiny = Tiny(tmp_path)
    tiny.learn(1)
    tiny.save(2)
    other = Tiny(tmp_path)
    sizes = {name: value for name, value in change.items() if name != "head"}
    config = small_config(**sizes)
    other.model = checkpoint.init_from_scratch(config, change.get("head", "lm"), seed=3)
    other.models = {"model": other.model}
    other.optimizers = {"model": optim.make_adamw(other.model, 0.0, 0.9, 0.95)}
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(SystemExit, match="does not fit this run: model/.* is .* there"):
        other.load()
    assert are_equal(list(other.model.parameters()), before)


# ---- symbolic links ----


@pytest.fixture
def other_disk(tmp_path):
    """A folder that is on another file system than tmp_path, where there is one."""
    root = tmp_path
    if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK):
        root = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


@pytest.mark.parametrize("exists", [True, False])
def test_a_model_or_state_that_is_a_link_stays_a_link(exists, other_disk, tmp_path):
    tiny = Tiny(tmp_path / "run")
    os.mkdir(tmp_path / "run")
    for name in ("model", "state"):
        if exists:
            os.mkdir(other_disk / name)
        os.symlink(other_disk / name, tmp_path / "run" / name)
    for step in (2, 4, 6):
        tiny.learn(1)
        tiny.save(step)
    for name in ("model", "state"):
        assert os.path.islink(tmp_path / "run" / name)
    assert sorted(os.listdir(other_disk)) == ["model", "state"]
    assert are_equal(list(checkpoint.load(other_disk / "model").parameters()), tiny.copy_tensors())
    assert Tiny(tmp_path / "run").load() == 6


def test_an_empty_folder_that_model_links_to_is_no_run(other_disk, tmp_path):
    os.mkdir(tmp_path / "run")
    os.symlink(other_disk, tmp_path / "run" / "model")
    os.symlink(other_disk / "nothing", tmp_path / "run" / "model_ema")
    assert not open_folder(tmp_path / "run")
    assert os.listdir(other_disk) == []


def test_a_link_that_cannot_be_written_through_is_refused_at_the_start(tmp_path):
    os.mkdir(tmp_path / "run")
    os.symlink("/proc", tmp_path / "run" / "model")  # a whole file system
    shown = "links to the whole disk '/proc'"
    with pytest.raises(SystemExit, match=shown):
        storage.check_link(str(tmp_path / "run" / "model"))
    with pytest.raises(SystemExit, match="holds a run"):  # what it leads to is not empty
        open_folder(tmp_path / "run")


def test_a_file_and_a_cache_that_are_links_stay_links(world, other_disk, tmp_path, monkeypatch):
    os.symlink(other_disk / "rows.jsonl", tmp_path / "rows.jsonl")
    for number in (1, 2):
        storage.write_jsonl([{"a": number}], str(tmp_path / "rows.jsonl"))
    assert storage.read_jsonl(other_disk / "rows.jsonl") == [{"a": 2}]

    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / "cache"))
    os.symlink(other_disk / "cache", tmp_path / "cache")
    tok = tokenizer.load(world / "tokenizer")
    spec = f"{world}/data/sft/train.jsonl:50/-1"
    folder = Path(data.tokenize(spec, tok, "sft", 200).folder)
    shutil.move(folder, other_disk / "moved")
    os.symlink(other_disk / "moved", folder)
    (other_disk / "moved" / "tokens.npy").write_bytes(b"")  # so that it is made again
    data.tokenize(spec, tok, "sft", 200)
    assert os.path.islink(folder)
    assert (other_disk / "moved" / "tokens.npy").stat().st_size > 0


# ---- any number of ranks ----


def read_responses(folder):
    with open(folder / "samples.jsonl") as f:
        return [json.loads(line)["response"] for line in f]


def test_a_run_of_two_ranks_goes_on_on_one_two_or_four(trainers, tmp_path):
    """FSDP -> plain, DDP, FSDP on four: the same prompts, rollouts and losses, up to rounding."""
    flags = trainers["ppo_lag"]
    whole = tmp_path / "whole"
    run(*flags, f"--out_dir={whole}", "--parallel=fsdp", "--keep=9", ranks=2)
    expected = rows_of(whole / "metrics.jsonl")
    for ranks, layout in ((0, "plain"), (2, "ddp"), (4, "fsdp")):
        out = tmp_path / layout
        shutil.copytree(whole, out)
        (out / "state" / "latest").write_text("step_000004\n")
        run(*flags, f"--out_dir={out}", f"--parallel={layout}", "--resume=True", ranks=ranks)
        rows = rows_of(out / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(8))
        assert rows[:4] == expected[:4]
        assert_rows_are_close(rows, expected)
        assert read_responses(whole) == read_responses(out)


class FakeWandb(ModuleType):
    """Stands in for wandb: keeps what init() is given, and gives each new run an id."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)  # find_spec() reads it
        self.options = []

    def init(self, **options):
        self.options.append(options)
        return SimpleNamespace(id=options.get("id", f"new-{len(self.options)}"))


def test_a_resumed_run_continues_its_run_on_wandb(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Monitor(str(tmp_path / "a"), 9, log_to="wandb", config={"resume": False})
    Monitor(str(tmp_path / "a"), 9, start=4, log_to="wandb", config={"resume": True})
    Monitor(str(tmp_path / "a"), 9, start=6, log_to="wandb", config={"resume": True})
    Monitor(str(tmp_path / "b"), 9, log_to="wandb")
    first, second, third, other = wandb.options
    assert "id" not in first and "id" not in other
    for options in (second, third):
        assert options["id"] == "new-1"
        assert options["resume"] == "allow"
        assert options["allow_val_change"]  # resume and max_steps are not what they were


# ---- disks ----


def limit_file_size():
    """What a full disk is like: no file grows beyond 60 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_reported_in_one_line_and_the_last_state_stays(ranks, trainers, tmp_path):
    flags = [*trainers["sft"], "--lr_schedule=constant", "--warmup_ratio=0"]
    flags.append(f"--out_dir={tmp_path}/a")
    run(*flags, "--max_steps=2", ranks=ranks)
    before = read_files(tmp_path / "a" / "state")
    launcher = TORCHRUN if ranks else [sys.executable]
    process = spawn(*launcher, *flags, "--resume=True", preexec_fn=limit_file_size)
    output, _ = process.communicate(timeout=900)
    assert process.returncode
    assert re.search("error: '.*' cannot be written: .*File too large", output), output[-2000:]
    files_of_tracebacks = re.findall('File "(.*)"', output)
    assert "nanosafe/" not in "".join(files_of_tracebacks)  # torchrun's own is allowed
    for path, content in before.items():
        assert path.read_bytes() == content
    run(*flags, "--resume=True", ranks=ranks)
    assert [row["step"] for row in rows_of(tmp_path / "a" / "metrics.jsonl")] == list(range(6))


@pytest.mark.parametrize("name", ["sft", "ppo_lag"])
def test_an_out_dir_that_cannot_be_made_is_reported_in_one_line(name, trainers, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*trainers[name], f"--out_dir={tmp_path}/file/run", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith(f"error: '{tmp_path}/file/run' cannot be made: ")


def test_metrics_on_a_full_disk_are_explained(tmp_path):
    monitor = Monitor(str(tmp_path), 9)
    monitor.metrics.close()
    monitor.metrics = open("/dev/full", "w", buffering=1)
    with pytest.raises(OSError) as caught:
        monitor.log(0, {"loss": 1.0})
    sentence = errors.explain_failure(caught.value, {})
    assert "No space left" in sentence
    assert "resume" in sentence


# ---- numbers ----


def save_broken_score_model(world, folder, name):
    """A copy of a score model whose scores of texts with some tokens are not finite."""
    model = checkpoint.load(world / name)
    with torch.no_grad():
        model.embed_tokens.weight[7:60] = float("nan")
    checkpoint.save(model, folder, tokenizer.load(world / "tokenizer"))


@pytest.mark.parametrize("name", ["reward", "cost"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_scores_that_are_not_finite_move_nothing(name, ranks, trainers, world, tmp_path):
    save_broken_score_model(world, tmp_path / "bad", name)
    flags = [
        *without(trainers["ppo_lag"], f"{name}_model"),
        f"--{name}_model={tmp_path}/bad",
        "--max_skips=100",
        "--ptx_data=",
        f"--reward_critic={world}/reward",
        f"--cost_critic={world}/cost",
    ]
    out = tmp_path / "a"
    done = run(*flags, f"--out_dir={out}", ranks=ranks)
    rows = rows_of(out / "metrics.jsonl")
    assert len(rows) == 8
    assert rows[-1]["skips"] >= 8
    for row in rows:
        assert row["skips"] > 0
        assert math.isfinite(row["lambda"])
    for path in out.rglob("*.json*"):
        values = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for value in values:
            read_strictly(value)
    assert None in [row[name] for row in rows]
    assert f"the {name} model gives some responses a non-finite score" in done.stderr
    assert "is not finite in" in done.stdout
    state = json.loads((out / "state" / "step_000008" / "state.json").read_text())
    for cost in state["multiplier"]["costs"]:
        assert math.isfinite(cost)
    start = load_file(world / "policy" / "model.safetensors")
    end = load_file(out / "model" / "model.safetensors")
    for tensor_name in start:
        assert torch.equal(start[tensor_name], end[tensor_name])


def read_strictly(text):
    """A JSON value, by a reader that knows no NaN and no Infinity."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_metrics_and_samples_are_strict_json_and_are_read_again(tmp_path):
    monitor = Monitor(str(tmp_path), 9, shown=("loss",))
    monitor.log(0, {"loss": math.nan, "eval_loss": math.inf, "tokens": 7, "lr": 0.1})
    monitor.sample(0, prompt="é", cost=-math.inf, scores=[1.0, math.nan])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, "loss": NaN}\n')  # as older versions wrote it
    expected = [
        {"step": 0, "loss": None, "eval_loss": None, "tokens": 7, "lr": 0.1},
        {"step": 1, "loss": None},
    ]
    Monitor(str(tmp_path), 9, start=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [read_strictly(line) for line in lines] == expected
    (sample,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert read_strictly(sample) == {
        "step": 0,
        "prompt": "é",
        "cost": None,
        "scores": [1.0, None],
    }
    losses = [row["loss"] for row in storage.read_metrics(str(tmp_path / "metrics.jsonl"))]
    assert all(math.isnan(loss) for loss in losses)


def test_the_files_of_evaluations_are_strict_json(tmp_path):
    value = {"mean": math.nan, "rows": [(1, -math.inf)], "name": "NaN", "count": 10**30}
    expected = {"mean": None, "rows": [[1, None]], "name": "NaN", "count": 10**30}
    storage.write_json(value, tmp_path, "summary.json")
    storage.write_jsonl([value], str(tmp_path / "scores.jsonl"))
    for name in ("summary.json", "scores.jsonl"):
        assert read_strictly((tmp_path / name).read_text()) == expected


def test_a_benchmark_whose_numbers_are_not_finite_fails(tmp_path, monkeypatch):
    """nan differs from the peer's loss by nan, which no tolerance refuses."""
    out = str(tmp_path / "report.json")
    monkeypatch.setattr(sys, "argv", ["workloads", "sft", str(tmp_path), out])
    workload = Workload("")
    workload.report["losses"] = [math.nan]
    with pytest.raises(ValueError, match="not JSON compliant"):
        workload.write_report()


def test_a_state_is_strict_json_and_keeps_numbers_that_are_not_finite(tmp_path):
    tiny = Tiny(tmp_path)
    extra = {"kl_coef": math.inf, "costs": [0.1, -math.inf], "moments": {"mean": math.nan}}
    run_state.save(str(tmp_path), 2, tiny.models, tiny.optimizers, extra)
    read_strictly((tmp_path / "state" / "step_000002" / "state.json").read_text())
    state = run_state.load(str(tmp_path), tiny.models, tiny.optimizers)
    assert state["kl_coef"] == math.inf
    assert state["costs"] == [0.1, -math.inf]
    assert math.isnan(state["moments"]["mean"])


def test_approx_kl_keeps_its_digits_near_0(trainers, tmp_path):
    """Log-ratios are about 1e-5 here. approx_kl is about half their square, and float32 has no such
    distance from 1: ratio - 1 - log_ratio would be 0."""
    command = [*without(trainers["ppo"], "actor_learning_rate"), "--actor_learning_rate=1e-6"]
    run(*command, f"--out_dir={tmp_path}/a", "--max_steps=4", "--actor_lr_schedule=constant")
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    for row in rows[1::2]:  # a rollout's second update
        assert 0 < row["approx_kl"] < 1e-9


# Runs a trainer in which one rank's third loss, or the gradient that it gives, is not finite.
TRAINER_WITH_A_BAD_BATCH = """
import runpy, sys
from nanosafe import parallel

real_backward = parallel.backward
calls = []

def backward(model, loss, last=True):
    calls.append(last)
    is_bad = parallel.rank() == {rank} and len(calls) == 3
    if is_bad and {kind!r} == "loss":
        loss = loss * float("inf")
    real_backward(model, loss, last)
    if is_bad and {kind!r} == "gradient":
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        parallel.local_part(gradients[0]).view(-1)[0] = float("nan")

parallel.backward = backward
sys.argv = {command!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_batch_on_one_rank_is_skipped_on_all(kind, trainers, tmp_path):
    command = [*without(trainers["sft"], "max_tokens"), "--max_tokens=4096", "--parallel=fsdp"]
    command = [str(word) for word in command]

    def run_with_a_bad_batch(rank):
        out = tmp_path / f"bad_on_{rank}"
        script = tmp_path / "bad_batch.py"
        text = TRAINER_WITH_A_BAD_BATCH.format(
            kind=kind, rank=rank, command=[*command, f"--out_dir={out}"]
        )
        script.write_text(text)
        return run(script, ranks=2), out

    done, out = run_with_a_bad_batch(rank=1)
    rows = rows_of(out / "metrics.jsonl")
    assert [row["skips"] for row in rows] == [0, 0, 1, 1, 1, 1]
    for row in rows[3:]:
        assert math.isfinite(row["loss"])
    assert "warning: step 2, rank " in done.stdout
    assert "the update is skipped" in done.stdout

    # The step is left out: the weights are the same whichever rank had the bad batch.
    _, other_out = run_with_a_bad_batch(rank=0)
    weights = load_file(out / "model" / "model.safetensors")
    other_weights = load_file(other_out / "model" / "model.safetensors")
    for name in weights:
        assert torch.equal(weights[name], other_weights[name])


def test_the_smallest_of_everything_gives_finite_numbers(trainers, world, tmp_path):
    """A batch, a window and a response of one; a rank without work; a response that is only EOS."""
    policy = checkpoint.load(world / "policy")
    tok = tokenizer.load(world / "tokenizer")
    with torch.no_grad():
        policy.lm_head.weight[tok.eos_id] = 0.2 * policy.norm.weight.sign()
    checkpoint.save(policy, tmp_path / "hasty", tok)
    replaced = ("actor_model", "rollout_size", "batch_size", "max_new_tokens", "max_steps")
    flags = [
        *without(trainers["ppo_lag"], *replaced),
        f"--actor_model={tmp_path}/hasty",
        "--rollout_size=1",
        "--batch_size=1",
        "--max_new_tokens=1",
        "--cost_window=1",
        "--max_steps=3",
        "--normalize_advantage=True",
        "--reward_scaling=mean_std",
    ]
    for ranks in (2, 0):
        out = tmp_path / f"on_{ranks}"
        run(*flags, f"--out_dir={out}", ranks=ranks)
        rows = rows_of(out / "metrics.jsonl")
        assert len(rows) == 3
        assert rows[-1]["skips"] == 0
        for row in rows:
            assert all(math.isfinite(value) for value in row.values())


def test_lambda_waits_while_its_cost_window_has_no_finite_cost():
    multiplier = rl.LagrangeMultiplier(1.0, 0.1, 5.0, 4, 0)
    multiplier.observe([math.nan, math.inf])
    assert multiplier.update(0.0) == 1.0
    assert math.isnan(multiplier.mean_cost)
    multiplier.observe([2.0, math.nan])
    assert multiplier.mean_cost == 2.0
    assert multiplier.update(0.0) == pytest.approx(math.exp(0.2))


# ---- memory ----


def test_out_of_memory_in_sampling_names_the_knob_to_lower(world):
    done = run(
        "sample.py",
        f"--model={world}/policy",
        "--prompt=hi",
        "--max_new_tokens=2000000000",
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = "error: rank 0: out of memory in sampling: max_new_tokens=2000000000 (fewer)"
    assert expected in done.stderr.splitlines()[-1]


def test_failures_that_are_no_defects_are_explained():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB"
    )
    knobs = {
        "max_tokens": 8192,
        "activation_checkpointing": False,
        "offload": "none",
        "out_dir": "x",
    }
    sentence = errors.explain_failure(error, knobs)
    hints = "max_tokens=8192 (fewer), activation_checkpointing=False (True), offload='none'"
    assert hints in sentence
    assert "79.25 GiB" in sentence
    assert errors.explain_failure(MemoryError(), {"max_tokens": 9})
    lost = RuntimeError("gloo: Connection closed by peer")
    assert "another rank ended" in errors.explain_failure(lost, {}, 2)
    assert errors.explain_failure(KeyboardInterrupt(), {}) == "interrupted"


def test_defects_keep_their_traceback():
    assert errors.explain_failure(ValueError("x"), {}) is None
    assert errors.explain_failure(BrokenPipeError(32, "Broken pipe"), {}) is None  # as of | head


WAITS_AFTER_INIT = """
import signal, time
from nanosafe.parallel import init

signal.signal(signal.SIGINT, signal.default_int_handler)
init("cpu")
print("on", flush=True)
time.sleep(60)
"""


def test_ctrl_c_before_the_first_step_prints_no_traceback():
    process = spawn(sys.executable, "-c", WAITS_AFTER_INIT)
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=900)
    assert output.strip() == "error: rank 0: interrupted"
    assert process.returncode in (1, -signal.SIGINT)


# ---- beside other work ----


@pytest.mark.parametrize("own_setting, spins", [(None, 0), ("active", 30_000_000_000)])
def test_threads_do_not_spin_unless_the_user_says_so(own_setting, spins, monkeypatch):
    """GNU's OpenMP prints how often it spins as torch is loaded; 300,000 times by default."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    if own_setting:
        monkeypatch.setenv("OMP_WAIT_POLICY", own_setting)
    output, _ = spawn(sys.executable, "train_sft.py", "-h").communicate(timeout=900)
    if "GOMP_" not in output:
        pytest.skip("torch is built with another OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in output


# ---- a stranger's code, and secrets ----

UNSAFE_MODULES = {"builtins", "pickle", "shelve", "marshal", "joblib", "dill", "yaml"}


def find_nodes(path, *kinds):
    return [node for node in ast.walk(parse(path)) if isinstance(node, kinds)]


def name_of_call(call):
    """The last name of what is called: load for torch.load(...)."""
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


@pytest.mark.parametrize("path", PRODUCT)
def test_no_module_that_executes_what_it_reads_is_imported(path):
    modules = []
    for node in find_nodes(path, ast.Import):
        modules += [alias.name for alias in node.names]
    for node in find_nodes(path, ast.ImportFrom):
        modules += [alias.name for alias in node.names]
        modules.append(node.module or "")
    unsafe = UNSAFE_MODULES & {module.split(".")[0] for module in modules}
    if path == "nanosafe/errors.py":  # torch.load raises an error of pickle's
        unsafe.discard("pickle")
        for node in find_nodes(path, ast.Attribute):
            if getattr(node.value, "id", "") == "pickle":
                assert node.attr == "UnpicklingError"
    assert not unsafe


@pytest.mark.parametrize("path", PRODUCT)
def test_nothing_executes_what_it_reads(path):
    """No eval, and no exec but of the user's own config files and Python files."""
    for call in find_nodes(path, ast.Call):
        name = name_of_call(call)
        is_method = isinstance(call.func, ast.Attribute)  # model.eval() is another thing
        assert name != "eval" or is_method
        assert name not in ("__import__", "system", "popen")
        assert name != "exec" or path == "configurator.py"
        assert name != "exec_module" or path == "nanosafe/storage.py"
        owner = getattr(getattr(call.func, "value", None), "id", "")
        keywords = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        if name == "load" and owner == "torch":
            assert keywords.get("weights_only") is True
        assert keywords.get("allow_pickle") in (None, False)
        assert keywords.get("shell") in (None, False)


def test_an_index_cannot_leave_its_folder(tmp_path):
    Tiny(tmp_path).save(2)
    secret = tmp_path / "secret.safetensors"
    shutil.move(tmp_path / "model" / "model.safetensors", secret)
    (tmp_path / "model" / "checksums.json").unlink()
    names = load_file(secret)
    for path in ("../secret.safetensors", str(secret), "x/../../secret.safetensors"):
        index = {"weight_map": {name: path for name in names}}
        storage.write_json(index, tmp_path / "model", "model.safetensors.index.json")
        with pytest.raises(SystemExit, match="which is not in the folder"):
            checkpoint.load(tmp_path / "model")


def test_checksums_cannot_leave_their_folder(tmp_path):
    Tiny(tmp_path).save(2)
    (tmp_path / "model" / "checksums.json").write_text('{"../../../etc/passwd": [1, 2]}')
    with pytest.raises(SystemExit, match="passwd is damaged"):
        checkpoint.load(tmp_path / "model")


SECRETS = (
    "OPENAI_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
)


def test_keys_in_the_environment_reach_no_output_and_no_file(trainers, tmp_path, monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, f"s3cr3t-{name}")
    commands = {
        "sft": trainers["sft"],
        "ppo_lag": trainers["ppo_lag"],
        "error": [*trainers["reward"], "--init_from=nowhere"],
    }
    output = ""
    for name, command in commands.items():
        done = run(*command, f"--out_dir={tmp_path}/{name}", check=False)
        output += done.stdout + done.stderr
    assert "error: " in output
    assert "s3cr3t" not in output
    for path, content in read_files(tmp_path).items():
        assert b"s3cr3t" not in content, path


def test_a_file_is_never_there_in_part(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    storage.write_jsonl([{"a": 1}], path)
    with pytest.raises(TypeError):  # a defect, which keeps its traceback
        storage.write_jsonl([{"a": object()}], path)
    assert storage.read_jsonl(path) == [{"a": 1}]


def test_a_folder_is_replaced_as_a_whole_with_its_checksums(tmp_path):
    os.mkdir(tmp_path / "new")
    save_file({"x": torch.zeros(3)}, tmp_path / "new" / "x.safetensors")
    storage.replace_folder(str(tmp_path / "new"), str(tmp_path / "there"))
    assert storage.find_corrupt_file(str(tmp_path / "there")) == ""
    assert not os.path.exists(tmp_path / "new")
    assert parallel.rank() == 0
