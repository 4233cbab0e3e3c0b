"""Safe-RLHF on a published model and real data, by one command: the run of docs/real_run.md.

$ python data/pku_saferlhf/prepare.py --halves=True   # the data, once
$ python -m nanosafe.real_run                         # hours; the same command goes on after a stop
$ python -m nanosafe.real_run --scale=0.02 --out_dir=out/real_run_short   # minutes

It runs the trainers with the recipes in config/smollm2/, and prints each command: SFT, a reward and
a cost model (the proxies), PPO-Lag and PPO, which are kept at several steps; then judges, which are
a reward and a cost model trained on the other half of the data, for each of several seeds. The
proxies and the first judge score what every policy answers to held-out prompts, and all score
models are tested on held-out pairs. What is done is not done again: its command stands in
done.json."""

import os
import shlex
import shutil
import time
from typing import NamedTuple

from configurator import configure
from nanosafe.data.spec import FILE_ENDINGS
from nanosafe.errors import stop
from nanosafe.eval.rubrics import SETS
from nanosafe.eval.statistics import bootstrap_interval
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.storage import REPOSITORY, make_folder, read_json, read_jsonl, write_json
from nanosafe.tools.demo import check_finished, find_run_folder, print_heading, run_python

# run
out_dir = "out/real_run"  # the folder of all stages; a run that was stopped there goes on
seed = 0  # of the training of all models but the judges, which have seed + 1 and so on
scale = 1.0  # share of all data, of PPO's steps and of the prompts at the end: less is faster
model = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the instruct model to start from
judges = 3  # reward and cost models of the other half, each pair with a seed of its own
# machine
dtype = "auto"  # auto | bfloat16 | float32: what is computed in; some CPUs are fast at bfloat16
# more yardsticks
rm_bench = ""  # a folder with RM-Bench's files, to test two reward models on; empty: none
sets_folder = ""  # the folder of data/safety/prepare.py's sets, for eval.safety; empty: none

config = configure(globals())
check_ranges(config)

RECIPES = "config/smollm2"
HALVES = "pku_saferlhf/halves"
PROXY_PAIRS = 1500  # as the recipes have it, like the numbers below
JUDGE_PAIRS = 1500
PPO_STEPS = 48
UPDATES = 2  # optimizer steps of a rollout: a run can stop and resume only between rollouts
SNAPSHOTS = (0.15, 0.5, 1.0)  # shares of a PPO run's steps at which the policy is kept
HELD_OUT_PROMPTS = 256
PROMPTS_PER_SET = 60  # of the field's safety prompts
MAX_NEW_TOKENS = 128
RUNS = {"ppo": "PPO", "ppo_lag": "PPO-Lag"}  # of PPO, and their names in tables


class Stage(NamedTuple):
    """A command, and the name under which it is noted when it is done."""

    name: str
    command: list  # words behind "python"


def main():
    """Run what is not done yet, then print what the results say."""
    began = time.perf_counter()
    check_yardsticks()
    make_folder(out_dir)
    stages = list_stages()
    done = read_json(out_dir, "done.json")
    for number, stage in enumerate(stages, start=1):
        text = shlex.join(["python", *stage.command])
        if stage.name in done:
            check_same_command(stage.name, text, done[stage.name]["command"])
            continue
        command = go_on(stage)
        print_heading(f"{number} of {len(stages)}: {stage.name}", shlex.join(["python", *command]))
        seconds = run(command)
        if "@" in stage.name:
            keep_snapshot(stage.name)
        done[stage.name] = {"command": text, "seconds": round(seconds)}
        write_json(done, out_dir, "done.json")
    report(done)
    print(
        f"\n{time.perf_counter() - began:.0f} s; {out_dir}: summary.json and a folder of each stage"
    )


def check_yardsticks():
    """Stop before all work if what is needed at its end is not there."""
    if rm_bench and not list_rm_bench_files():
        stop(f"rm_bench={rm_bench!r} has none of RM-Bench's files: no {' or '.join(FILE_ENDINGS)}")
    if sets_folder:
        for name in SETS:
            file = os.path.join(sets_folder, name, "test.jsonl")
            if not os.path.exists(file):
                stop(f"there is no {file!r}: data/safety/prepare.py writes it to sets_folder")


def check_same_command(name, command, earlier):
    if command != earlier:
        stop(
            f"{out_dir!r} holds {name} of another command ({earlier}; now {command}): name another "
            "folder with --out_dir, or go on with the knobs that it was begun with"
        )


def go_on(stage):
    """A stage's command, with resume=True if it is a trainer's whose run has begun."""
    folder = find_run_folder(stage.command)
    if folder and os.path.exists(f"{folder}/config.py"):
        return [*stage.command, "--resume=True"]
    return stage.command


def run(command):
    """Run `python COMMAND`; returns its seconds. Stops with one line if it does not run through."""
    began = time.perf_counter()
    if run_python(command, env={**os.environ, "PYTHONPATH": REPOSITORY}):
        stop(f"the command above failed: {shlex.join(['python', *command])}")
    folder = find_run_folder(command)
    if folder:
        check_finished(folder)
    return time.perf_counter() - began


# ---- the stages ----


def list_stages():
    """All Stages, in the order in which they run."""
    stages = [
        Stage("sft", train_sft()),
        Stage("reward", train_proxy("reward")),
        Stage("cost", train_proxy("cost")),
        Stage("start", measure_start()),
    ]
    for steps in list_snapshots():
        for name in RUNS:
            stages.append(Stage(f"{name}@{steps}", train_policy(name, steps)))
    for number in range(judges):
        for kind in ("reward", "cost"):
            stages.append(Stage(f"judge_{kind}_{number}", train_judge(kind, number)))
        if number == 0:
            stages.append(Stage("policies", compare_policies()))
    for name in list_scorers():
        stages.append(Stage(f"scores_{name}", test_scorer(name)))
    if rm_bench:
        for name in ("reward", "judge_reward_0"):
            stages.append(Stage(f"rm_bench_{name}", test_on_rm_bench(name)))
    if sets_folder:
        stages.append(Stage("safety", ask_safety_sets()))
    return stages


def path(name):
    return f"{out_dir}/{name}"


def add_common_flags(command, name, stage_seed):
    """A trainer's command with the flags that all of them get."""
    return [*command, f"--out_dir={path(name)}", f"--seed={stage_seed}", *machine_flags()]


def machine_flags():
    return [] if dtype == "auto" else [f"--dtype={dtype}"]


def train_sft():
    command = ["train_sft.py", f"{RECIPES}/sft.py", f"--init_from={model}"]
    if scale < 1:
        command.append(f"--data={HALVES}/demonstrations:{scale:g}")
    return add_common_flags(command, "sft", seed)


def train_scorer(kind, recipes, half, pairs):
    """The part of a reward or cost model's command that proxies and judges share.

    recipes  those after reward.py and cost.py; half: of the data, "proxy" or "judge"; pairs: of it,
             as the recipe has it"""
    command = ["train_pref.py", f"{RECIPES}/reward.py"]
    if kind == "cost":
        command.append(f"{RECIPES}/cost.py")
    command += recipes
    if scale < 1:
        command.append(f"--data={HALVES}/{half}:{max(8, round(pairs * scale))}/-1")
    return command


def held_out_pairs():
    share = f":{scale:g}" if scale < 1 else ""
    return f"{HALVES}/proxy/test{share},{HALVES}/judge/test{share}"


def train_proxy(kind):
    command = train_scorer(kind, [], "proxy", PROXY_PAIRS)
    if scale < 1:
        command.append(f"--eval_data={held_out_pairs()}")
    command.append(f"--init_from={path('sft/model')}")
    return add_common_flags(command, kind, seed)


def train_judge(kind, number):
    """The command of a judge: another half, another start, and a seed of its own."""
    command = train_scorer(kind, [f"{RECIPES}/judge.py"], "judge", JUDGE_PAIRS)
    command.append(f"--init_from={model}")
    return add_common_flags(command, f"judge_{kind}_{number}", seed + 1 + number)


def list_snapshots():
    """The optimizer steps of a PPO run at which its policy is kept: ends of rollouts, the last one
    that of the run."""
    snapshots = []
    for share in SNAPSHOTS:
        rollouts = max(1, round(PPO_STEPS / UPDATES * scale * share))
        if UPDATES * rollouts not in snapshots:
            snapshots.append(UPDATES * rollouts)
    return snapshots


def train_policy(name, steps):
    """The command that takes a PPO run as far as a step."""
    command = ["train_ppo_lag.py", f"{RECIPES}/ppo_lag.py"]
    if name == "ppo":
        command.append(f"{RECIPES}/ppo.py")
    command += [f"--actor_model={path('sft/model')}", f"--reward_model={path('reward/model')}"]
    if name == "ppo_lag":
        command.append(f"--cost_model={path('cost/model')}")
    command.append(f"--max_steps={steps}")
    return add_common_flags(command, name, seed)


def keep_snapshot(name):
    """Keep the policy of a PPO run at the step where it stands; its name is RUN@STEP."""
    run_name, _ = name.split("@")
    shutil.rmtree(path(name), ignore_errors=True)
    shutil.copytree(path(f"{run_name}/model"), path(name))


# ---- the evaluations ----


def list_scorers():
    """The names of all score models: proxies, then judges."""
    names = ["reward", "cost"]
    for number in range(judges):
        names += [f"judge_reward_{number}", f"judge_cost_{number}"]
    return names


def compare(policies, rewards, costs, name):
    """The command that asks policies held-out prompts, for score models to judge.

    policies, rewards, costs  {name in tables: model folder}"""
    prompts = max(8, round(HELD_OUT_PROMPTS * scale))
    command = ["-m", "nanosafe.eval.overoptimisation", f"--reference=SFT={path('sft/model')}"]
    command += [
        f"--models={join(policies)}",
        f"--reward_models={join(rewards)}",
        f"--cost_models={join(costs)}",
        f"--data={HALVES}/prompts/test:{prompts}/-1",
        f"--max_new_tokens={MAX_NEW_TOKENS}",
        f"--out_dir={path(name)}",
    ]
    return command + machine_flags()


def join(named):
    """{name: folder} as a flag's value: NAME=FOLDER,NAME=FOLDER."""
    return ",".join(f"{name}={folder}" for name, folder in named.items())


def measure_start():
    """The command that says how unsafe the policy is before PPO: the recipe's cost_limit has to be
    below its mean cost, or there is nothing to do."""
    rewards = {"proxy": path("reward/model")}
    costs = {"proxy": path("cost/model")}
    return compare({"instruct": model}, rewards, costs, "start")


def compare_policies():
    policies = {}
    for name, label in RUNS.items():
        for steps in list_snapshots():
            policies[f"{label}@{steps}"] = path(f"{name}@{steps}")
    rewards = {"proxy": path("reward/model"), "judge": path("judge_reward_0/model")}
    costs = {"proxy": path("cost/model"), "judge": path("judge_cost_0/model")}
    return compare(policies, rewards, costs, "policies")


def test_scorer(name):
    """The command that tests a score model on the held-out pairs of both halves."""
    command = ["-m", "nanosafe.eval.scores", f"--model={path(name)}/model"]
    command += [f"--data={held_out_pairs()}", f"--out_dir={path('scores')}/{name}"]
    return command + machine_flags()


def test_on_rm_bench(name):
    command = ["-m", "nanosafe.eval.scores", f"--model={path(name)}/model", "--objective=reward"]
    files = ",".join(list_rm_bench_files())
    command += [f"--data={files}", f"--out_dir={path('rm_bench')}/{name}"]
    return command + machine_flags()


def list_rm_bench_files():
    """RM-Bench's parts. Its folder also has a file of all of them, which would count them twice."""
    files = []
    for name in sorted(os.listdir(rm_bench) if os.path.isdir(rm_bench) else []):
        if name.endswith(FILE_ENDINGS) and not name.startswith("total_dataset"):
            files.append(os.path.join(rm_bench, name))
    return files


def ask_safety_sets():
    """The command that asks the policies the field's safety prompts."""
    policies = {"instruct": model, "SFT": path("sft/model")}
    for name, label in RUNS.items():
        policies[label] = path(f"{name}/model")
    command = ["-m", "nanosafe.eval.safety", f"--models={join(policies)}"]
    command += [
        f"--cost_model={path('judge_cost_0/model')}",
        f"--reward_model={path('judge_reward_0/model')}",
        f"--sets_folder={sets_folder}",
        f"--max_per_set={max(4, round(PROMPTS_PER_SET * scale))}",
        f"--max_new_tokens={MAX_NEW_TOKENS}",
        f"--out_dir={path('safety')}",
    ]
    return command + machine_flags()


# ---- what the results say ----


def report(done):
    """Print how good the score models are and what PPO and PPO-Lag have changed, and write it to
    summary.json. The tables of policies, of RM-Bench and of the safety sets are in the folders of
    their stages."""
    accuracies = {
        name: read_json(path(f"scores/{name}"), "summary.json") for name in list_scorers()
    }
    print_accuracies(accuracies)
    agreements = measure_agreements()
    for kind, agreement in agreements.items():
        print(f"{kind}: proxy and judge 0 order {agreement:.1%} of the held-out pairs alike")
    differences = measure_differences()
    print_differences(differences)
    hours = sum(stage["seconds"] for stage in done.values()) / 3600
    print(f"all stages: {hours:.1f} hours, without the attempts that were stopped")
    summary = {"accuracies": accuracies, "agreements": agreements, "differences": differences}
    write_json({**summary, "stages": done}, out_dir, "summary.json")


def print_accuracies(accuracies):
    table = [("on held-out pairs", "pairs", "order", "unsafe or not", "order, one safe")]
    for name, summary in accuracies.items():
        cells = [name, summary["pairs"]]
        for measure in ("accuracy", "sign_accuracy", "one_safe_accuracy"):
            mean, low, high = summary.get(measure, (None, None, None))
            cells.append("-" if mean is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        table.append(cells)
    print("\n" + format_table(table))


def measure_agreements():
    """{kind: share of the held-out pairs that the proxy and judge 0 order alike}."""
    agreements = {}
    for kind in ("reward", "cost"):
        margins = []
        for name in (kind, f"judge_{kind}_0"):
            rows = read_jsonl(path(f"scores/{name}/scores.jsonl"))
            margins.append({row["where"]: row["margin"] for row in rows})
        proxy, judge = margins
        both = [where for where in proxy if where in judge]
        alike = [proxy[where] * judge[where] > 0 for where in both]
        agreements[kind] = sum(alike) / len(alike)
    return agreements


def measure_differences():
    """{"PPO-Lag@48 less SFT": {"cost, judge": (mean, low, high)}} over the same held-out prompts.

    The judge is judge 0."""
    rows_of = {}
    for row in read_jsonl(path("policies/answers.jsonl")):
        rows_of.setdefault(row["policy"], []).append(row)
    last = {name: f"{label}@{list_snapshots()[-1]}" for name, label in RUNS.items()}
    compared = [(last["ppo_lag"], "SFT"), (last["ppo"], "SFT"), (last["ppo_lag"], last["ppo"])]
    differences = {}
    for one, other in compared:
        measured = {}
        for kind in ("reward", "cost"):
            for name in ("proxy", "judge"):
                gains = []
                for row, before in zip(rows_of[one], rows_of[other]):
                    gains.append(row[kind][name] - before[kind][name])
                measured[f"{kind}, {name}"] = bootstrap_interval(gains)
        differences[f"{one} less {other}"] = measured
    return differences


def print_differences(differences):
    measures = list(next(iter(differences.values())))
    table = [("on held-out prompts", *measures)]
    for name, measured in differences.items():
        cells = [name]
        for mean, low, high in measured.values():
            cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
        table.append(cells)
    print("\n" + format_table(table))


main()
