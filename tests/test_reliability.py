"""What nanosafe promises never to lose, and how it fails: kills, disks, ranks, signals, numbers, memory, secrets.

nanosafe/tools/crash.py has the long runs; docs/reliability.md has what both found."""

import ast
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, rows_of, run, same_state, small_config
from safetensors.torch import load_file, save_file
from test_house import CODE, source

from nanosafe import checkpoint, data, errors, optim, parallel, rl, storage, tokenizer, watchdog
from nanosafe.checkpoint import run_state
from nanosafe.monitor import Monitor

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def spawn(*command, **more):
    """A script in the background, in a session of its own; its words go to a file."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )
    return process


def workers(process):
    """The trainer's processes below a torchrun."""
    out = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return list(map(int, out.split()))


def wait_for_rows(folder, count, process):
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.02)


def without(flags, *names):
    return [f for f in flags if not str(f).startswith(tuple(f"--{name}=" for name in names))]


# ---- a state is whole, or it is not there ----


class Tiny:
    """A model with its optimizer, which learns, and a monitor: what a run saves."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.model = checkpoint.init_from_scratch(small_config(), seed=1)
        self.optimizer = optim.make_adamw(self.model, 0.0, 0.9, 0.95)
        self.models = {"model": self.model}
        self.optimizers = {"model": self.optimizer}

    def learn(self, steps):
        for _ in range(steps):
            tokens = torch.arange(9)
            (
                -self.model(
                    tokens, torch.tensor([0, 9], dtype=torch.int32), 9, (tokens + 1) % 9
                ).mean()
            ).backward()
            optim.guarded_step(self.model, self.optimizer, 1e-2, 1.0)

    def save(self, step, keep=2):
        checkpoint.save(self.model, os.path.join(self.folder, "model"))
        run_state.save(self.folder, step, self.models, self.optimizers, {"skips": 0}, keep)

    def everything(self):
        moments = [
            self.optimizer.state[p][k]
            for p in self.model.parameters()
            for k in run_state.MOMENTS
            if p in self.optimizer.state
        ]
        return [x.clone() for x in (*self.model.parameters(), *moments)]


def same(a, b):
    return all(map(torch.equal, a, b))


SNAPSHOTS = {}  # a folder that is watched -> where its snapshots go


def on_file_operation(event, arguments):
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
        for folder, target in list(SNAPSHOTS.items()):
            if str(arguments[0]).startswith(folder):
                del SNAPSHOTS[folder]
                shutil.copytree(folder, f"{target}/{len(os.listdir(target)):04d}")
                SNAPSHOTS[folder] = target


sys.addaudithook(on_file_operation)


def test_killed_before_any_file_operation_of_a_save_a_run_has_a_whole_state(tmp_path):
    """Every state that a disk passes through while two states are saved, the third dropping the first: what SIGKILL leaves."""
    tiny, known = Tiny(tmp_path / "run"), {}
    for step in (2, 4):
        tiny.learn(2)
        tiny.save(step)
        known[step] = tiny.everything()
    tiny.learn(2)
    known[6] = tiny.everything()
    os.mkdir(tmp_path / "snapshots")
    SNAPSHOTS[tiny.folder] = str(tmp_path / "snapshots")
    tiny.save(6)
    SNAPSHOTS.clear()
    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert len(snapshots) > 25
    seen, models = [], 0
    for folder in snapshots:
        other = Tiny(folder)
        found = run_state.load(str(folder), other.models, other.optimizers)["step"]
        assert found in (4, 6) and same(other.everything(), known[found])
        seen.append(found)
        if os.path.exists(
            folder / "model"
        ):  # a reader finds a whole model, or, between two renames, none
            models += 1
            assert same(
                checkpoint.load(folder / "model").parameters(),
                known[
                    4
                    if found == 4
                    and not same(checkpoint.load(folder / "model").parameters(), known[6])
                    else 6
                ],
            )
        other.learn(2)
        other.save(found + 2)  # and goes on, over whatever was left behind
        assert not [n for n in os.listdir(folder / "state") if n.endswith((".tmp", ".old"))]
        assert len(run_state.list_states(str(folder))) == 2 and same(
            checkpoint.load(folder / "model").parameters(), other.model.parameters()
        )
    assert seen == sorted(seen) and models >= len(snapshots) - 2


@pytest.mark.parametrize(
    "harm", ["flip", "cut", "lose", "empty", "checksums", "state.json", "state lost"]
)
def test_a_damaged_state_is_passed_over_and_all_damaged_is_one_line(harm, tmp_path, capsys):
    tiny, known = Tiny(tmp_path), {}
    for step in (2, 4):
        tiny.learn(1)
        tiny.save(step)
        known[step] = tiny.everything()

    def damage(folder):
        name = {
            "checksums": "checksums.json",
            "state.json": "state.json",
            "state lost": "state.json",
        }.get(harm, "rank_00000.safetensors")
        path, content = folder / name, bytearray((folder / name).read_bytes())
        if harm in ("lose", "state lost"):
            path.unlink()
        elif harm in ("cut", "empty"):
            path.write_bytes(content[: len(content) // 2 if harm == "cut" else 0])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    damage(tmp_path / "state" / "step_000004")
    other = Tiny(tmp_path)
    assert run_state.load(str(tmp_path), other.models, other.optimizers)["step"] == 2 and same(
        other.everything(), known[2]
    )
    assert "step_000004/" in capsys.readouterr().out
    damage(tmp_path / "state" / "step_000002")
    with pytest.raises(SystemExit, match="error: no state in .* is whole"):
        run_state.load(str(tmp_path), other.models, other.optimizers)


def test_a_pointer_that_is_broken_points_nowhere(tmp_path):
    tiny = Tiny(tmp_path)
    tiny.save(2)
    tiny.save(4)
    for text, step in (("step_000002\n", 2), ("step_9\n", 4), ("", 4), ("\0\0\0", 4)):
        (tmp_path / "state" / "latest").write_text(text)
        assert run_state.load(str(tmp_path), tiny.models, tiny.optimizers)["step"] == step
    (tmp_path / "state" / "latest").write_bytes(b"\xff\xfe")
    assert run_state.load(str(tmp_path), tiny.models, tiny.optimizers)["step"] == 4


def test_states_are_kept_by_number_and_those_of_a_course_given_up_go(tmp_path):
    tiny = Tiny(tmp_path)
    for step in (999_998, 999_999, 1_000_000):
        tiny.save(step)
    assert run_state.list_states(str(tmp_path)) == ["step_999999", "step_1000000"]
    tiny.save(5, keep=0)  # 0 would keep none: one stays
    assert run_state.list_states(str(tmp_path)) == ["step_000005"]


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_export_is_refused_in_one_line(harm, tmp_path):
    Tiny(tmp_path).save(2)
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content if harm == "flip" else content[:-9])
    with pytest.raises(SystemExit, match="error: .*model.safetensors"):
        checkpoint.load(tmp_path / "model")
    if harm == "flip":  # whoever changed it on purpose says so
        (tmp_path / "model" / "checksums.json").unlink()
        checkpoint.load(tmp_path / "model")


def test_damaged_token_ids_are_made_again(world, tmp_path, monkeypatch):

    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path))
    tok, spec = tokenizer.load(world / "tokenizer"), f"{world}/data/sft/train.jsonl:50/-1"
    first = data.tokenize(spec, tok, "sft", 200)
    expected = first.tokens.tolist()
    path = os.path.join(first.folder, "tokens.npy")
    content = bytearray(open(path, "rb").read())
    content[-4] ^= 1
    open(path, "wb").write(content)
    assert data.tokenize(spec, tok, "sft", 200).tokens.tolist() == expected
    open(path, "wb").write(content[:60])
    assert data.tokenize(spec, tok, "sft", 200).tokens.tolist() == expected


# ---- runs that die ----


def test_a_run_that_was_killed_after_its_last_state_ends_well(trainers, tmp_path):
    for name in ("sft", "reward", "ppo_lag"):
        out = tmp_path / name
        run(*trainers[name], f"--out_dir={out}")
        before = rows_of(out / "metrics.jsonl")
        run(*trainers[name], f"--out_dir={out}", "--resume=True")
        assert rows_of(out / "metrics.jsonl") == before


def test_a_run_that_died_before_its_first_state_starts_again(trainers, tmp_path):
    run(*trainers["sft"], f"--out_dir={tmp_path}/a")
    os.mkdir(tmp_path / "b")
    (tmp_path / "b" / "config.py").write_text("seed = 0\n")
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    run(*trainers["sft"], f"--out_dir={tmp_path}/b", "--resume=True")
    assert same_state(tmp_path / "a", tmp_path / "b")


def test_torchrun_brings_a_run_back_when_a_rank_dies(trainers, tmp_path):
    flags = [
        *without(trainers["cost"], "max_steps"),
        "--max_steps=80",
        "--epochs=99",
        "--parallel=fsdp",
    ]
    run(*flags, f"--out_dir={tmp_path}/a", ranks=2)
    process = spawn(*TORCHRUN, "--max-restarts=2", *flags, f"--out_dir={tmp_path}/b")
    wait_for_rows(tmp_path / "b", 5, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert same_state(tmp_path / "a", tmp_path / "b")


def test_ranks_of_an_attempt_find_each_other_on_a_store_with_dead_ranks_words():
    """Three attempts on one store: torchrun keeps it. A rank of the second died after its hello, before it heard."""
    store = torch.distributed.HashStore()

    def ranks(size):
        with ThreadPoolExecutor(size) as pool:
            return set(
                pool.map(lambda rank: watchdog.agree_on_restart_id(store, rank, size), range(size))
            )

    (first,) = ranks(3)
    assert store.get("hello_0").decode() == first
    store.set("hello_1", "dead")
    (second,) = ranks(3)
    assert store.get("hello_0").decode() == second != first
    assert ranks(1).isdisjoint({first, second})


def test_torchrun_s_restarts_do_not_take_over_another_run(trainers, tmp_path):
    """The first attempt is refused; torchrun takes that for a rank that died, and tries again."""
    run(*trainers["cost"], f"--out_dir={tmp_path}/a", ranks=2)
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    process = spawn(
        *TORCHRUN,
        "--max-restarts=1",
        *trainers["cost"],
        f"--out_dir={tmp_path}/a",
        "--max_steps=99",
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode and said.count("holds a run") >= 2
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


HANGS = """
import os, runpy, sys, time
from nanosafe.data import Dataset
real, count = Dataset.batch, [0]
def batch(*arguments):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] == 6:
        time.sleep(999)
    return real(*arguments)
Dataset.batch = batch
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ranks_that_were_all_asleep_go_on(trainers, tmp_path):
    """A laptop that was closed, a queue that suspended its jobs: longer than ranks wait for each other."""
    flags = [
        *without(trainers["sft"], "max_steps"),
        "--max_steps=40",
        "--epochs=999",
        "--save_interval=0",
    ]
    process = spawn(*TORCHRUN, *flags, f"--out_dir={tmp_path}/a", env={"NANOSAFE_TIMEOUT": "0.2"})
    wait_for_rows(tmp_path / "a", 3, process)
    pids = workers(process)
    for sig in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, sig)
        time.sleep(15 if sig == signal.SIGSTOP else 0)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "has waited" not in said


@pytest.mark.parametrize("how", ["stopped", "reading"])
def test_a_rank_that_hangs_is_named(how, trainers, tmp_path):
    flags = [
        *without(trainers["sft"], "max_steps"),
        "--max_steps=5000",
        "--epochs=999",
        "--save_interval=0",
        "--parallel=fsdp",
        f"--out_dir={tmp_path}/a",
    ]
    if how == "reading":  # while the others wait in FSDP's own collectives
        (tmp_path / "hang.py").write_text(HANGS.format(argv=list(map(str, flags))))
        flags = [tmp_path / "hang.py"]
    process = spawn(*TORCHRUN, *flags, env={"NANOSAFE_TIMEOUT": "0.2"})
    wait_for_rows(tmp_path / "a", 3, process)
    victim = [
        pid for pid in workers(process) if b"RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read()
    ][0]
    if how == "stopped":
        os.kill(victim, signal.SIGSTOP)
    began = time.time()
    said = ""
    for line in process.stdout:
        said += line
        if "has waited" in line:
            break
    waited = time.time() - began
    subprocess.run(["kill", "-9", str(victim)])
    process.communicate(timeout=60)
    assert "error: rank 0 has waited 0.2 minutes (NANOSAFE_TIMEOUT) for rank 1, which hangs" in said
    assert waited < 60 and process.returncode != 0


@pytest.mark.parametrize(
    "sig, to", [(signal.SIGTERM, "all"), (signal.SIGINT, "all"), (signal.SIGTERM, "one worker")]
)
def test_under_torchrun_a_signal_saves_on_all_ranks_alike(sig, to, trainers, tmp_path):
    """A terminal's or a queue's signal reaches torchrun and its workers, to whom torchrun sends it again."""
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
    for pid in (*workers(process), process.pid) if to == "all" else workers(process)[:1]:
        os.kill(pid, sig)
    said, _ = process.communicate(timeout=120)
    assert to == "all" or process.returncode == 0, said[-2000:]
    assert 3 <= int(run_state.list_states(str(tmp_path / "b"))[-1][5:]) < 60
    run(*flags, f"--out_dir={tmp_path}/b", "--resume=True", ranks=2)
    assert same_state(tmp_path / "a", tmp_path / "b")


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
        assert process.wait(timeout=5) in (130, 0)
    process.communicate()


# ---- any number of ranks ----


def test_saved_on_two_ranks_a_run_goes_on_on_one_two_or_four(trainers, tmp_path):
    """FSDP -> plain, DDP, FSDP on four: the same prompts, rollouts and losses, to float tolerance."""
    flags = trainers["ppo_lag"]
    run(*flags, f"--out_dir={tmp_path}/a", "--parallel=fsdp", "--keep=9", ranks=2)
    expected = rows_of(tmp_path / "a" / "metrics.jsonl")
    for ranks, layout in ((0, "plain"), (2, "ddp"), (4, "fsdp")):
        out = tmp_path / layout
        shutil.copytree(tmp_path / "a", out)
        (out / "state" / "latest").write_text("step_000004\n")
        run(*flags, f"--out_dir={out}", f"--parallel={layout}", "--resume=True", ranks=ranks)
        rows = rows_of(out / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(8)) and rows[:4] == expected[:4]
        for x, y in zip(rows, expected):
            assert all(math.isclose(x[k], y[k], rel_tol=2e-3, abs_tol=2e-4) for k in x), (
                layout,
                x,
                y,
            )
        samples = [
            [json.loads(line)["response"] for line in open(d / "samples.jsonl")]
            for d in (tmp_path / "a", out)
        ]
        assert samples[0] == samples[1]


# ---- disks ----


def small_files():
    """What a full disk is like: no file grows beyond 60 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_one_line_and_the_last_state_stays(ranks, trainers, tmp_path):
    flags = trainers["sft"]
    run(*flags, f"--out_dir={tmp_path}/a", ranks=ranks if ranks > 1 else 0)
    run(
        *flags,
        f"--out_dir={tmp_path}/b",
        "--max_steps=2",
        "--lr_schedule=constant",
        ranks=ranks if ranks > 1 else 0,
    )
    before = {p: p.read_bytes() for p in (tmp_path / "b" / "state").rglob("*") if p.is_file()}
    launcher = TORCHRUN if ranks > 1 else [sys.executable]
    process = spawn(
        *launcher, *flags, f"--out_dir={tmp_path}/b", "--resume=True", preexec_fn=small_files
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode and re.search(
        "error: '.*' cannot be written: .*File too large", said
    ), said[-2000:]
    assert "nanosafe/" not in "".join(re.findall('File "(.*)"', said))  # no traceback of ours
    assert all(p.read_bytes() == content for p, content in before.items())
    run(*flags, f"--out_dir={tmp_path}/b", "--resume=True", ranks=ranks if ranks > 1 else 0)
    assert [row["step"] for row in rows_of(tmp_path / "b" / "metrics.jsonl")] == list(range(6))


def test_a_place_that_cannot_be_written_to_is_one_line(trainers, tmp_path):
    (tmp_path / "file").write_text("")
    for flags in (trainers["sft"], trainers["ppo_lag"]):
        done = run(*flags, f"--out_dir={tmp_path}/file/run", check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(
            f"error: '{tmp_path}/file/run' cannot be made: "
        )


def test_metrics_on_a_full_disk(tmp_path):
    monitor = Monitor(str(tmp_path), 9)
    monitor.metrics.close()
    monitor.metrics = open("/dev/full", "w", buffering=1)
    with pytest.raises(OSError) as caught:
        monitor.log(0, {"loss": 1.0})
    assert "No space left" in errors.explain_failure(
        caught.value, {}
    ) and "resume" in errors.explain_failure(caught.value, {})


# ---- numbers ----


def broken_scores(world, folder, name):
    """A score model whose scores are not finite for texts that hold some token."""
    model = checkpoint.load(world / name)
    with torch.no_grad():
        model.embed_tokens.weight[7:60] = float("nan")
    checkpoint.save(model, folder, tokenizer.load(world / "tokenizer"))
    return folder


@pytest.mark.parametrize("name", ["reward", "cost"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_scores_that_are_no_numbers_move_nothing(name, ranks, trainers, world, tmp_path):
    bad = broken_scores(world, tmp_path / "bad", name)
    flags = [
        *without(trainers["ppo_lag"], f"{name}_model"),
        f"--{name}_model={bad}",
        "--max_skips=100",
        "--ptx_data=",
        f"--reward_critic={world}/reward",
        f"--cost_critic={world}/cost",
    ]
    done = run(*flags, f"--out_dir={tmp_path}/a", ranks=ranks)
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert len(rows) == 8 and rows[-1]["skips"] >= 8
    assert all(row["skips"] > 0 and math.isfinite(row["lambda"]) for row in rows)
    assert (
        f"the {name} model gives some responses no number" in done.stderr
        and "is not finite in" in done.stdout
    )
    costs = json.load(open(tmp_path / "a" / "state" / "step_000008" / "state.json"))["multiplier"][
        "costs"
    ]
    assert all(map(math.isfinite, costs))
    start, end = (
        load_file(d / "model.safetensors") for d in (world / "policy", tmp_path / "a" / "model")
    )
    assert all(torch.equal(start[k], end[k]) for k in start)


INJECT = """
import sys, runpy, torch
from nanosafe import parallel
real, count = parallel.backward, [0]
def backward(model, loss, last=True):
    count[0] += 1
    bad = {kind!r} if parallel.rank() == {rank} and count[0] == 3 else ""
    real(model, loss * float("inf") if bad == "loss" else loss, last)
    if bad == "gradient":
        p = next(p for p in model.parameters() if p.grad is not None)
        parallel.local(p.grad).view(-1)[0] = float("nan")
parallel.backward = backward
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_batch_on_one_rank_is_skipped_on_all(kind, trainers, tmp_path):
    argv = [
        *map(str, without(trainers["sft"], "max_tokens")),
        "--max_tokens=4096",
        "--parallel=fsdp",
        f"--out_dir={tmp_path}/a",
    ]
    script = tmp_path / "inject.py"
    script.write_text(INJECT.format(kind=kind, rank=1, argv=argv))
    done = run(script, ranks=2)
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert [row["skips"] for row in rows] == [0, 0, 1, 1, 1, 1] and all(
        math.isfinite(row["loss"]) for row in rows[3:]
    )
    assert "warning: step 2, rank " in done.stdout and "the update is skipped" in done.stdout
    argv[-1] = (
        f"--out_dir={tmp_path}/b"  # and the run is what it is when the step is left out, wherever it is resumed
    )
    script.write_text(INJECT.format(kind=kind, rank=0, argv=argv))
    run(script, ranks=2)
    weights = [load_file(tmp_path / x / "model" / "model.safetensors") for x in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_the_smallest_of_everything_gives_numbers(trainers, world, tmp_path):
    """A batch, a window and a response of one; a rank without work; a response that is only its end."""
    policy = checkpoint.load(world / "policy")
    tok = tokenizer.load(world / "tokenizer")
    with torch.no_grad():
        policy.lm_head.weight[tok.eos_id] = 0.2 * policy.norm.weight.sign()
    checkpoint.save(policy, tmp_path / "hasty", tok)
    flags = [
        *without(
            trainers["ppo_lag"],
            "actor_model",
            "rollout_size",
            "batch_size",
            "max_new_tokens",
            "max_steps",
        ),
        f"--actor_model={tmp_path}/hasty",
        "--rollout_size=1",
        "--batch_size=1",
        "--max_new_tokens=1",
        "--cost_window=1",
        "--max_steps=3",
        "--normalize_advantage=True",
        "--reward_scaling=mean_std",
    ]
    run(*flags, f"--out_dir={tmp_path}/a", ranks=2)
    run(*flags, f"--out_dir={tmp_path}/b")
    for out in "ab":
        rows = rows_of(tmp_path / out / "metrics.jsonl")
        assert len(rows) == 3 and rows[-1]["skips"] == 0
        assert all(math.isfinite(x) for row in rows for x in row.values())


def test_a_cost_window_without_a_number_waits():
    multiplier = rl.LagrangeMultiplier(1.0, 0.1, 5.0, 4, 0)
    multiplier.observe([math.nan, math.inf])
    assert multiplier.update(0.0) == 1.0 and math.isnan(multiplier.mean_cost)
    multiplier.observe([2.0, math.nan])
    assert multiplier.mean_cost == 2.0 and multiplier.update(0.0) == pytest.approx(math.exp(0.2))


# ---- memory ----


def test_out_of_memory_names_the_knob_to_turn(trainers, tmp_path, world):
    done = run(
        "sample.py",
        f"--model={world}/policy",
        "--prompt=hi",
        "--max_new_tokens=2000000000",
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "error: rank 0: out of memory in sampling: max_new_tokens=2000000000 (fewer)"
        in done.stderr.splitlines()[-1]
    )
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB"
    )
    said = errors.explain_failure(
        error,
        {"max_tokens": 8192, "activation_checkpointing": False, "offload": "none", "out_dir": "x"},
    )
    assert (
        "max_tokens=8192 (fewer), activation_checkpointing=False (True), offload='none'" in said
        and "79.25 GiB" in said
    )
    assert (
        errors.explain_failure(MemoryError(), {"max_tokens": 9})
        and errors.explain_failure(ValueError("x"), {}) is None
    )
    assert "another rank ended" in errors.explain_failure(
        RuntimeError("gloo: Connection closed by peer"), {}, 2
    )
    assert errors.explain_failure(BrokenPipeError(32, "Broken pipe"), {}) is None  # of | head
    assert errors.explain_failure(KeyboardInterrupt(), {}) == "interrupted"


def test_ctrl_c_before_the_first_step_is_no_traceback(trainers, tmp_path):
    process = spawn(
        sys.executable,
        "-c",
        "import time, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from nanosafe.parallel import init; init('cpu'); print('on', flush=True); time.sleep(60)",
    )
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert said.strip() == "error: rank 0: interrupted" and process.returncode in (
        1,
        -signal.SIGINT,
    )


# ---- a stranger's code, and secrets ----


def test_nothing_executes_what_it_reads():
    """No pickle, and no eval or exec but of the user's own config files (configurator) and scorers (module_at)."""
    for path in CODE:
        for node in ast.walk(ast.parse(source(path))):
            name = os.path.basename(path)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "shelve", "marshal", "joblib", "dill", "yaml"} & {
                    m.split(".")[0] for m in modules
                }, path
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert (
                    called not in ("eval", "__import__", "system", "popen")
                    or name == "model.py"
                    and called == "eval"
                ), path
                assert called != "exec" or name == "configurator.py", path
                assert called != "exec_module" or name == "scorers.py", path
                if (
                    called == "load"
                    and getattr(getattr(node.func, "value", None), "id", "") == "torch"
                ):
                    assert keywords.get("weights_only") is True, path
                assert keywords.get("allow_pickle") in (None, False) and keywords.get("shell") in (
                    None,
                    False,
                ), path


def test_an_index_cannot_leave_its_folder(tmp_path):
    Tiny(tmp_path).save(2)
    shutil.move(tmp_path / "model" / "model.safetensors", tmp_path / "secret.safetensors")
    (tmp_path / "model" / "checksums.json").unlink()
    names = load_file(tmp_path / "secret.safetensors")
    for place in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "x/../../secret.safetensors",
    ):
        storage.write_json(
            {"weight_map": {name: place for name in names}},
            tmp_path / "model",
            "model.safetensors.index.json",
        )
        with pytest.raises(SystemExit, match="which is not in the folder"):
            checkpoint.load(tmp_path / "model")
    (tmp_path / "model" / "checksums.json").write_text(
        '{"../../../etc/passwd": [1, 2]}'
    )  # nor can its checksums
    with pytest.raises(SystemExit, match="passwd is damaged"):
        checkpoint.load(tmp_path / "model")


def test_keys_and_environment_reach_no_log_and_no_folder(trainers, tmp_path):
    secrets = {
        name: f"s3cr3t-{name}"
        for name in (
            "OPENAI_API_KEY",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
        )
    }
    said = ""
    for flags in (
        trainers["sft"],
        trainers["ppo_lag"],
        [*trainers["reward"], "--init_from=nowhere"],
    ):
        process = spawn(sys.executable, *flags, f"--out_dir={tmp_path}/{len(said)}", env=secrets)
        said += process.communicate(timeout=120)[0]
    found = [p for p in tmp_path.rglob("*") if p.is_file() and b"s3cr3t" in p.read_bytes()]
    assert not found and "s3cr3t" not in said and "error: " in said


def test_a_file_that_grows_whole_is_never_half_there(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    storage.write_jsonl([{"a": 1}], path)
    with pytest.raises(SystemExit, match="cannot be written"):
        storage.write_jsonl([{"a": object()}], path)
    assert storage.read_jsonl(path) == [{"a": 1}]
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    os.mkdir(tmp_path / "new")
    shutil.move(tmp_path / "x.safetensors", tmp_path / "new" / "x.safetensors")
    storage.replace_folder(str(tmp_path / "new"), str(tmp_path / "there"))
    assert storage.find_corrupt_file(str(tmp_path / "there")) == "" and not os.path.exists(
        tmp_path / "new"
    )
    assert parallel.rank() == 0
