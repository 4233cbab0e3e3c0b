"""Kill trainers again and again, and check that the run that results equals one never killed.

$ python -m nanosafe.tools.crash [--kills=50] [--trainers=sft,reward,cost,ppo_lag]
$ python -m nanosafe.tools.crash --soak=2.0     # hours of PPO-Lag, killed every few minutes
$ python -m nanosafe.tools.crash --grow=10000   # steps of each trainer, and the memory they take

Each trainer runs on the toy world under torchrun with two processes and FSDP. SIGKILL comes at
random instants: while the run starts, between two steps, while it saves (as soon as a half-written
folder exists), and sometimes to one process only, in which case torchrun ends the other one. The
run is started again with --resume=True until it is done. Weights, optimizer, lambda, cost window,
metrics.jsonl and samples.jsonl must then equal those of an undisturbed run bit for bit. It takes an
hour; docs/reliability.md has its results. The soak starts from the models of nanosafe.demo."""

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

from tqdm import tqdm

from configurator import configure
from nanosafe.checkpoint import run_state
from nanosafe.errors import stop
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.storage import REPOSITORY, write_json
from nanosafe.tools.demo import judge, load_toy
from nanosafe.tools.toy_world import make_world, rows_of, same_state, trainer_flags

kills = 50  # of each trainer
trainers = "sft,reward,cost,ppo_lag"  # which, with commas between
soak = 0.0  # hours of PPO-Lag, in place of the kills; 0: none
grow = 0  # steps of each trainer while memory is watched, in place of the kills; 0: none
demo = "out/demo"  # the folder of nanosafe.demo, from whose models the soak starts
out = ""  # a folder, which is emptied first; empty: out/crash, out/soak or out/grow
seed = 0  # of the instants

STEPS = {  # how long the undisturbed runs are
    "sft": ["--max_steps=60", "--epochs=9"],
    "reward": ["--max_steps=60", "--epochs=9"],
    "cost": ["--max_steps=60", "--epochs=9"],
    "ppo_lag": ["--max_steps=80", "--log_interval=1"],
}
INSTANTS = {"starting": 1, "training": 4, "saving": 4, "one process": 1}  # with their weights


def main():
    knobs = configure(globals())
    check_ranges(knobs)
    names = knobs["trainers"].split(",")
    if knobs["grow"]:
        watch_memory(knobs["grow"], names, choose_folder(knobs["out"], "out/grow"))
    elif knobs["soak"]:
        folder = choose_folder(knobs["out"], "out/soak")
        run_soak(knobs["soak"], os.path.abspath(knobs["demo"]), folder, knobs["seed"])
    else:
        kill_trainers(
            knobs["kills"], names, choose_folder(knobs["out"], "out/crash"), knobs["seed"]
        )


def choose_folder(out, default):
    """The trainers run in the repository, so paths are absolute."""
    return os.path.abspath(out or default)


# ---- processes ----


def start(command, out_dir, log):
    """Start a trainer under torchrun with two processes; resume where a run has begun."""
    has_begun = os.path.exists(os.path.join(out_dir, "config.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--parallel=fsdp", f"--out_dir={out_dir}", f"--resume={has_begun}"]
    return subprocess.Popen(
        [*torchrun, *command, *flags],
        cwd=REPOSITORY,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(),
    )


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": REPOSITORY}


def list_family(pid):
    """A process and its descendants. torchrun puts its workers into sessions of their own."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    pids = [pid]
    for child in found.stdout.split():
        pids += list_family(int(child))
    return pids


def kill(process, pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


# ---- kills ----


def kill_trainers(kills, names, out, seed):
    """Kill each trainer so many times, and compare all runs that end with an undisturbed one."""
    commands = make_toy_world(out)
    results = {}
    for name in names:
        short = [
            flag for flag in commands[name] if not flag.startswith(("--max_steps", "--epochs"))
        ]
        folder = os.path.join(out, name)
        os.makedirs(folder)
        with open(os.path.join(folder, "log.txt"), "w") as log:
            results[name] = kill_trainer([*short, *STEPS[name]], folder, kills, seed, log)
        print(name, json.dumps(results[name]), flush=True)
        write_json(results, out, "crash.json")
    columns = list(next(iter(results.values())))
    table = [["trainer", *columns]]
    for name, counts in results.items():
        table.append([name] + [counts[column] for column in columns])
    print(format_table(table))


def make_toy_world(out):
    """Empty a folder and make the toy world in it: {trainer: command}."""
    shutil.rmtree(out, ignore_errors=True)
    os.environ["NANOSAFE_CACHE"] = os.path.join(out, "cache")
    world = make_world(load_toy(), Path(out, "world"))
    return {name: [str(word) for word in words] for name, words in trainer_flags(world).items()}


def kill_trainer(command, folder, kills, seed, log):
    """Kill one trainer's runs so many times; returns {what: how often}."""
    undisturbed = os.path.join(folder, "whole")
    if start(command, undisturbed, log).wait():
        stop(f"the run that nobody kills failed: {log.name}")
    draw = random.Random(f"{seed} {os.path.basename(folder)}")
    counts = {"kills": 0, "runs, all bit-equal": 0, **dict.fromkeys(INSTANTS, 0), "half-written": 0}
    bar = tqdm(total=kills, desc=os.path.basename(folder), unit="kill")
    while counts["kills"] < kills:
        run = os.path.join(folder, str(counts["runs, all bit-equal"]))
        ended = run_until_killed(command, run, draw, log)
        if ended in INSTANTS:
            counts[ended] += 1
            counts["half-written"] += bool(find_half_written(run))
            counts["kills"] += 1
            bar.update()
            if counts["kills"] < kills:
                continue
            ended = "done" if start(command, run, log).wait() == 0 else "failed"
        if ended == "failed":
            stop(f"a run that was killed does not go on: {log.name}")
        compare_runs(undisturbed, run)
        counts["runs, all bit-equal"] += 1
    bar.close()
    return counts


def run_until_killed(command, out_dir, draw, log):
    """Let a run live until it ends or is killed: "done", "failed", or the instant of INSTANTS."""
    before = progress_of(out_dir)
    process = start(command, out_dir, log)
    began = time.time()
    instant = draw.choices(list(INSTANTS), list(INSTANTS.values()))[0]
    wait = draw.uniform(0, 12) if instant == "starting" else draw.expovariate(1)
    trains_since = began if instant == "starting" else None
    if instant == "saving":
        wait = wait / 2
    while process.poll() is None:
        if trains_since is None and progress_of(out_dir) != before:
            trains_since = time.time()
        is_due = trains_since is not None and time.time() - trains_since > wait
        if is_due and instant == "saving":
            is_due = bool(find_half_written(out_dir))
        if is_due:
            pids = list_family(process.pid)
            if instant == "one process" and len(pids) > 2:
                os.kill(draw.choice(pids[1:]), signal.SIGKILL)
                process.wait()
            else:
                kill(process, pids)
            return instant
        time.sleep(0.001 if instant == "saving" else 0.01)
    return "done" if process.returncode == 0 else "failed"


def progress_of(out_dir):
    """What changes as soon as a run trains: the size of its metrics, the step of its last state."""
    metrics = os.path.join(out_dir, "metrics.jsonl")
    size = os.path.getsize(metrics) if os.path.exists(metrics) else 0
    return size, last_saved_step(out_dir)


def last_saved_step(out_dir):
    states = run_state.list_states(out_dir)
    return int(states[-1].removeprefix("step_")) if states else 0


def find_half_written(out_dir):
    """Folders that only an unfinished save has."""
    found = []
    for pattern in ("state/*.tmp", "state/*.old", "model.tmp", "model.old"):
        found += glob.glob(os.path.join(out_dir, pattern))
    return found


def compare_runs(undisturbed, run):
    assert same_state(undisturbed, run)
    check_every_row_once(run)
    assert not find_half_written(run), run


def check_every_row_once(run):
    steps = [row["step"] for row in rows_of(os.path.join(run, "metrics.jsonl"))]
    assert steps == list(range(len(steps))), run


# ---- soak ----


def run_soak(hours, demo, out, seed):
    """Run PPO-Lag for hours from the demo's models, with eight samples of each prompt and smaller
    steps, and kill it every two to six minutes."""
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    run = os.path.join(out, "run")
    command = [
        "train_ppo_lag.py",
        "config/toy/ppo_lag.py",
        f"--actor_model={demo}/sft/model",
        f"--reward_model={demo}/reward/model",
        f"--cost_model={demo}/cost/model",
        "--num_samples=8",
        "--batch_size=512",
        "--actor_learning_rate=2e-4",
        "--critic_learning_rate=5e-4",
        "--actor_lr_schedule=constant",
        "--lambda_lr=0.004",
        "--save_interval=10",
        "--epochs=10000",
    ]
    began = time.time()
    with open(os.path.join(out, "log.txt"), "w") as log:
        states = kill_for_hours(command, run, hours, random.Random(seed), log)
    check_every_row_once(run)
    toy = load_toy()
    reference = f"{demo}/sft/model"
    found = {
        "hours": (time.time() - began) / 3600,
        "kills": len(states),
        "steps": len(rows_of(os.path.join(run, "metrics.jsonl"))),
        "states": states,
        "sft": judge(toy, reference, reference),
        "ppo_lag": judge(toy, os.path.join(run, "model"), reference),
    }
    write_json(found, out, "soak.json")
    print(json.dumps(found, indent=2))


def kill_for_hours(command, run, hours, draw, log):
    """Kill a run every two to six minutes, then let it end; returns the last state at each kill."""
    began = time.time()
    max_steps = 2000
    states = []
    while True:
        must_end = time.time() - began > hours * 3600
        if must_end:
            max_steps = last_saved_step(run) + 10
        process = start([*command, f"--max_steps={max_steps}"], run, log)
        until = time.time() + draw.uniform(120, 360)
        while process.poll() is None and (must_end or time.time() < until):
            time.sleep(0.5)
        if process.poll() == 0:
            return states
        if process.poll() is not None:
            stop(f"the run stopped by itself, exit {process.poll()}: {log.name}")
        kill(process, list_family(process.pid))
        states.append(last_saved_step(run))
        minutes = (time.time() - began) / 60
        print(f"{minutes:.0f} min: kill {len(states)}, last state {states[-1]}", flush=True)


# ---- memory ----


def watch_memory(steps, names, out):
    """Print the resident memory of long runs: at a tenth of the run, at its end, and the greatest
    between."""
    commands = make_toy_world(out)
    smaller = ["--rollout_size=4", "--batch_size=2", "--max_new_tokens=4", "--ptx_coef=0"]
    replaced = ("--max_steps", "--epochs", "--save_interval")
    table = [("trainer", "MB at a tenth", "at the end", "greatest between")]
    for name in names:
        command = [flag for flag in commands[name] if not flag.startswith(replaced)]
        command += [f"--max_steps={steps}", "--epochs=1e9", "--save_interval=1000"]
        if name == "ppo_lag":
            command += smaller
        sizes = watch_run(command, steps, os.path.join(out, name))
        later = [sizes[percent] for percent in sorted(sizes) if percent >= 10]
        table.append((name, f"{later[0]:.1f}", f"{later[-1]:.1f}", f"{max(later):.1f}"))
        print(format_table(table), flush=True)


def watch_run(command, steps, out_dir):
    """Run a trainer; returns {percent of its steps: MB of resident memory}."""
    with open(out_dir + ".txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, f"--out_dir={out_dir}"],
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            env=environment(),
        )
    sizes = {}
    bar = tqdm(total=steps, desc=os.path.basename(out_dir), unit="step")
    while process.poll() is None:
        step = last_logged_step(os.path.join(out_dir, "metrics.jsonl"))
        size = resident_megabytes(process.pid)
        if step is not None and size:
            sizes[100 * step // steps] = size
            bar.update(step - bar.n)
        time.sleep(0.2)
    bar.close()
    if process.returncode:
        stop(f"the run failed: {out_dir}.txt")
    return sizes


def last_logged_step(metrics):
    """The step of the last whole row; None: there is none yet."""
    if not os.path.exists(metrics):
        return None
    with open(metrics, "rb") as f:
        f.seek(max(0, os.path.getsize(metrics) - 4000))
        lines = f.read().split(b"\n")[:-1]  # what follows the last line end may be half a row
    return json.loads(lines[-1])["step"] if lines else None


def resident_megabytes(pid):
    """0 for a process that has ended."""
    try:
        with open(f"/proc/{pid}/status") as f:
            for line in f:
                if line.startswith("VmRSS"):
                    return int(line.split()[1]) / 1e3
    except FileNotFoundError:
        pass
    return 0.0


if __name__ == "__main__":
    main()
