"""Kill trainers, again and again, and see whether the run that comes out is the one that was never killed.

$ python tests/crash.py [--kills=50] [--trainers=sft,reward,cost,ppo_lag] [--out=out/crash] [--seed=0]
$ python tests/crash.py --soak=2.0 [--demo=out/demo]        # hours of PPO-Lag from the demo's models, killed every few minutes
$ python tests/crash.py --grow=10000                        # steps of SFT, a reward model and PPO-Lag, and the memory they take

Each trainer runs on the toy world under torchrun with two processes and FSDP. SIGKILL meets it at random instants: while it
starts, between two steps, while it saves (as soon as a half-written folder is there), sometimes one process only, whose
torchrun then ends the other. It is started again with --resume=True until it is done, as often as it takes for so many kills.
Weights, optimizer, lambda, cost window, metrics.jsonl and samples.jsonl must be those of an undisturbed run, bit for bit.
Not a test that pytest runs: an hour. docs/reliability.md has its figures."""

import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=ROOT)

from tqdm import tqdm  # noqa: E402

from conftest import make_world, rows_of, same_state, trainer_flags  # noqa: E402

from nanosafe import printing, storage
from nanosafe.checkpoint import run_state
from nanosafe.tools import demo
from nanosafe.storage import load_python_file  # noqa: E402

LONGER = {
    "sft": ["--max_steps=60", "--epochs=9"],
    "reward": ["--max_steps=60", "--epochs=9"],
    "cost": ["--max_steps=60", "--epochs=9"],
    "ppo_lag": ["--max_steps=80", "--log_interval=1"],
}


def start(command, out_dir, log):
    """The trainer under torchrun with two processes; it goes on where a run has begun."""
    resume = [f"--resume={os.path.exists(os.path.join(out_dir, 'config.py'))}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*launcher, *command, "--parallel=fsdp", f"--out_dir={out_dir}", *resume],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def family(pid):
    """A process and its descendants: torchrun puts its workers into sessions of their own."""
    children = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True
    ).stdout.split()
    return [pid, *(p for child in children for p in family(int(child)))]


def kill(process, pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def step_of(out_dir):
    """The step of the last state; 0 without one."""
    names = run_state.list_states(out_dir)
    return int(names[-1][5:]) if names else 0


def half_written(out_dir):
    return [
        p
        for pattern in ("state/*.tmp", "state/*.old", "model.tmp", "model.old")
        for p in glob.glob(os.path.join(out_dir, pattern))
    ]


def live_and_die(command, out_dir, draw, log):
    """One life of a run: (how it ended, whether a folder was half written then)."""
    process, begun = start(command, out_dir, log), time.time()
    how = draw.choices(("starting", "training", "saving", "one process"), (1, 4, 4, 1))[0]
    rows = lambda: (
        os.path.getsize(path)
        if os.path.exists(path := os.path.join(out_dir, "metrics.jsonl"))
        else 0
    )
    before, wait = (
        (rows(), step_of(out_dir)),
        draw.uniform(0, 12) if how == "starting" else draw.expovariate(1),
    )
    ready = None
    while process.poll() is None:
        if how == "starting":
            due = time.time() - begun > wait
        else:
            if ready is None and (rows(), step_of(out_dir)) != before:  # it trains
                ready = time.time()
            due = ready and (
                time.time() - ready > wait
                if how != "saving"
                else time.time() - ready > wait / 2 and half_written(out_dir)
            )
        if due:
            pids = family(process.pid)
            if how == "one process" and len(pids) > 2:
                os.kill(draw.choice(pids[1:]), signal.SIGKILL)
                process.wait()
            else:
                kill(process, pids)
            return how, bool(half_written(out_dir))
        time.sleep(0.001 if how == "saving" else 0.01)
    return "done" if process.returncode == 0 else f"exit {process.returncode}", False


def crash(kills=50, trainers="sft,reward,cost,ppo_lag", out="out/crash", seed=0):
    world = os.path.join(out, "world")
    shutil.rmtree(out, ignore_errors=True)
    os.environ["NANOSAFE_CACHE"] = os.path.join(out, "cache")
    flags = trainer_flags(
        make_world(load_python_file(os.path.join(ROOT, "data/toy/prepare.py")), Path(world))
    )
    found = {}
    for name in trainers.split(","):
        command = [
            str(x) for x in flags[name] if not str(x).startswith(("--max_steps", "--epochs"))
        ] + LONGER[name]
        path, draw, counts, runs, died = (
            os.path.join(out, name),
            random.Random(f"{seed} {name}"),
            {},
            0,
            0,
        )
        os.makedirs(path)
        with open(os.path.join(path, "log.txt"), "w") as log:
            if start(command, f"{path}/whole", log).wait():
                sys.exit(f"error: the run that nobody kills failed: {path}/log.txt")
            bar = tqdm(total=int(kills), desc=name, unit="kill")
            while died < int(kills):
                how, half = live_and_die(command, f"{path}/{runs}", draw, log)
                if how.startswith("exit"):
                    sys.exit(f"error: a run that was killed does not go on: {how}, {path}/log.txt")
                if how != "done":
                    counts[how] = counts.get(how, 0) + 1
                    counts["half-written"] = counts.get("half-written", 0) + half
                    died += 1
                    bar.update()
                if how == "done" or died == int(kills):
                    if how != "done" and start(command, f"{path}/{runs}", log).wait():
                        sys.exit(f"error: a run that was killed does not go on: {path}/log.txt")
                    assert same_state(f"{path}/whole", f"{path}/{runs}")
                    steps = [row["step"] for row in rows_of(f"{path}/{runs}/metrics.jsonl")]
                    assert steps == list(range(len(steps))) and not half_written(f"{path}/{runs}")
                    runs += 1
            bar.close()
        found[name] = {"kills": died, "runs, all bit-equal": runs, **counts}
        print(name, json.dumps(found[name]), flush=True)
        storage.write_json(found, out, "crash.json")
    rows = [{"trainer": name, **row} for name, row in found.items()]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    print(printing.format_table([heads, *([row.get(key, 0) for key in heads] for row in rows)]))


def soak(hours, demo_dir="out/demo", out="out/soak", seed=0):
    """PPO-Lag of the demo, slower: eight samples of each prompt, smaller steps, for hours, killed every few minutes."""
    shutil.rmtree(out, ignore_errors=True)
    begun, kills, draw, died = time.time(), 0, random.Random(int(seed)), []
    command = [
        "train_ppo_lag.py",
        "config/toy/ppo_lag.py",
        f"--actor_model={demo_dir}/sft/model",
        f"--reward_model={demo_dir}/reward/model",
        f"--cost_model={demo_dir}/cost/model",
        "--num_samples=8",
        "--batch_size=512",
        "--actor_learning_rate=2e-4",
        "--critic_learning_rate=5e-4",
        "--actor_lr_schedule=constant",
        "--lambda_lr=0.004",
        "--save_interval=10",
        "--epochs=10000",
    ]
    last = "--max_steps=2000"
    os.makedirs(out)
    with open(f"{out}/log.txt", "w") as log:
        while True:
            over = time.time() - begun > float(hours) * 3600
            if over:
                last = f"--max_steps={step_of(f'{out}/run') + 10}"
            process, until = (
                start([*command, last], f"{out}/run", log),
                time.time() + draw.uniform(120, 360),
            )
            while process.poll() is None and (over or time.time() < until):
                time.sleep(0.5)
            if process.poll() == 0:
                break
            if process.poll() is not None:
                sys.exit(f"error: the run stopped by itself, exit {process.poll()}: {out}/log.txt")
            kill(process, family(process.pid))
            kills += 1
            died.append(step_of(f"{out}/run"))
            print(
                f"{(time.time() - begun) / 60:.0f} min: kill {kills}, last state {died[-1]}",
                flush=True,
            )
    rows = rows_of(f"{out}/run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    found = {
        "hours": (time.time() - begun) / 3600,
        "kills": kills,
        "steps": len(rows),
        "states": died,
        "sft": demo.judge(
            load_python_file(os.path.join(ROOT, "data/toy/prepare.py")),
            f"{demo_dir}/sft/model",
            f"{demo_dir}/sft/model",
        ),
        "ppo_lag": demo.judge(
            load_python_file(os.path.join(ROOT, "data/toy/prepare.py")),
            f"{out}/run/model",
            f"{demo_dir}/sft/model",
        ),
    }
    storage.write_json(found, out, "soak.json")
    print(json.dumps(found, indent=2))


def grow(steps, trainers="sft,reward,ppo_lag", out="out/grow"):
    """Resident memory of a long run, read at every hundredth of it."""
    shutil.rmtree(out, ignore_errors=True)
    os.environ["NANOSAFE_CACHE"] = os.path.join(out, "cache")
    flags = trainer_flags(
        make_world(load_python_file(os.path.join(ROOT, "data/toy/prepare.py")), Path(out, "world"))
    )
    small = {
        "ppo_lag": ["--rollout_size=4", "--batch_size=2", "--max_new_tokens=4", "--ptx_coef=0"]
    }
    rows = [("trainer", "MB at a tenth", "at the end", "greatest between")]
    for name in trainers.split(","):
        command = [
            str(x)
            for x in flags[name]
            if not str(x).startswith(("--max_steps", "--epochs", "--save_interval"))
        ]
        command += [
            f"--max_steps={steps}",
            "--epochs=1e9",
            "--save_interval=1000",
            f"--out_dir={out}/{name}",
            *small.get(name, []),
        ]
        with open(f"{out}/{name}.txt", "w") as log:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log)
        held, metrics = {}, f"{out}/{name}/metrics.jsonl"
        bar = tqdm(total=int(steps), desc=name, unit="step")
        while process.poll() is None:
            if os.path.exists(metrics) and os.path.getsize(metrics):
                with open(metrics, "rb") as f:
                    f.seek(max(0, os.path.getsize(metrics) - 4000))
                    step = json.loads(f.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"]
                with open(f"/proc/{process.pid}/status") as f:
                    size = [int(line.split()[1]) for line in f if line.startswith("VmRSS")]
                held[100 * step // int(steps)] = size[0] / 1e3 if size else 0.0
                bar.update(step - bar.n)
            time.sleep(0.2)
        bar.close()
        if process.returncode:
            sys.exit(f"error: {name} failed: {out}/{name}.txt")
        later = [size for share, size in sorted(held.items()) if share >= 10 and size]
        rows.append((name, f"{later[0]:.1f}", f"{later[-1]:.1f}", f"{max(later):.1f}"))
        print(printing.format_table(rows), flush=True)


if __name__ == "__main__":
    given = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv[1:])
    if "grow" in given:
        grow(given.pop("grow"), **given)
    elif "soak" in given:
        soak(given.pop("soak"), given.pop("demo", "out/demo"), **given)
    else:
        crash(**given)
