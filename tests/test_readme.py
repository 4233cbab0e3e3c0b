"""What the README says happens: its commands are run, its files exist, its numbers are today's.

The quick tests ask every command for its help, which fails on a file or a knob that does not exist.
The slow ones run the demo, and then the other commands where it left its models. Trainers are cut
to two steps. Commands for GPUs and for downloads are asked for their help only."""

import json
import os
import re
import shlex

import pytest
from conftest import ROOT, run

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()


def read_lines():
    """The lines of the README's sh blocks, without their comments, continued lines joined."""
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip()
            if line and not line.startswith("#"):
                lines.append(line)
    return lines


def parse_command(line):
    """(script, arguments) of a line, as run() takes them; None for a line that starts no script."""
    words = shlex.split(line)
    if words[0] not in ("python", "python3", "torchrun"):
        return None
    while words[1].startswith("--"):  # torchrun's own flags
        del words[1]
    if words[1] == "-m":
        return ["-m", words[2]], words[3:]
    return [os.path.join(ROOT, words[1])], words[2:]


LINES = read_lines()
COMMANDS = [line for line in LINES if parse_command(line)]
DEMO = "pip install -e . && python -m nanosafe.demo"


def name_of(line):
    """What a command runs: train_sft, sample, demo, prepare, ..."""
    script, _ = parse_command(line)
    return os.path.basename(script[-1]).removesuffix(".py").rpartition(".")[2]


def has_knobs(line):
    """Whether a command's script takes its flags by the configurator, whose -h checks them."""
    return name_of(line) not in ("plot", "scorers", "checkpoint") and "data/toy" not in line


def can_run_here(line):
    """Whether a command needs no more than the demo's models: no 7B model, download or server.

    tests/test_real_model.py has a short form of real_run, which downloads its model."""
    _, arguments = parse_command(line)
    name = name_of(line)
    names_a_large_model = "beaver_7b" in line or "models/" in line or "smol" in line.lower()
    has_placeholders = any(word.isupper() or "=..." in word for word in arguments)
    if name == "plan":
        return True  # it computes, and loads no model
    if "--device=cuda" in line:
        return False
    if name == "prepare":
        return "--annotate=" in line
    if name in ("demo", "judge", "real_run"):
        return False
    if line.startswith("torchrun") and "config/toy" not in line:
        return False
    return not names_a_large_model and not has_placeholders


HERE = [line for line in COMMANDS if can_run_here(line)]


# ---- quick: what the commands name exists ----


def test_the_commands_to_install_run_and_test_are_there():
    assert DEMO in LINES
    assert 'pip install -e ".[test]" && pytest' in LINES


def test_every_command_of_the_readme_is_tested():
    for line in COMMANDS:
        assert line in HERE or has_knobs(line), f"nothing tests {line}"
    assert len(HERE) > len(COMMANDS) / 2


@pytest.mark.parametrize("line", [line for line in COMMANDS if has_knobs(line)])
def test_the_files_and_knobs_of_a_command_exist(line):
    script, arguments = parse_command(line)
    assert "Knobs" in run(*script, *arguments, "-h").stdout


def test_the_files_of_a_table_exist():
    """If the README has a table of files: a row may name several of one folder."""
    for names in re.findall(r"^\| ([\w/., ]+\.py) \|", README, re.M):
        folder = ""
        for name in names.split(", "):
            if os.path.dirname(name):
                folder = os.path.dirname(name)
            beside_the_first = os.path.join(ROOT, folder, os.path.basename(name))
            at_the_top = os.path.join(ROOT, name)
            assert os.path.isfile(beside_the_first) or os.path.isfile(at_the_top), name


# ---- slow: the demo, and the commands after it ----


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder in which the demo was run, as the README's first command does."""
    folder = tmp_path_factory.mktemp("demo")
    output = run("-m", "nanosafe.demo", cwd=folder).stdout
    (folder / "output.txt").write_text(output)
    for name in ("config", "data", "tests"):  # commands name files in these
        (folder / name).symlink_to(os.path.join(ROOT, name))
    return folder


@pytest.mark.slow
def test_the_demo_shows_what_the_readme_claims(demo_folder):
    summary = json.loads((demo_folder / "out" / "demo" / "summary.json").read_text())
    sft, ppo, lag = summary["sft"], summary["ppo"], summary["ppo_lag"]
    assert sft["prompts"] >= 500
    assert 0.4 <= sft["harm_rate_risky"] <= 0.8
    assert summary["reward_model"]["accuracy"] >= 0.9
    assert summary["cost_model"]["accuracy"] >= 0.9
    assert summary["cost_model"]["sign_accuracy"] >= 0.95
    assert ppo["helpfulness_benign"] > sft["helpfulness_benign"]
    assert ppo["harm_rate_risky"] > sft["harm_rate_risky"]
    assert lag["harm_rate_risky"] <= 0.05
    assert lag["helpfulness_benign"] >= sft["helpfulness_benign"]
    assert lag["refusal_rate_benign"] <= sft["refusal_rate_benign"]


def read_table(text):
    """{policy: its five numbers} of the table that the demo prints."""
    pattern = r"^(SFT|PPO \(reward only\)|PPO-Lag)((?:  +-?[\d.]+%?){5})$"
    rows = {}
    for label, cells in re.findall(pattern, text, re.M):
        rows[label] = [float(cell.rstrip("%")) for cell in cells.split()]
    return rows


@pytest.mark.slow
def test_the_table_of_the_readme_is_near_what_the_demo_prints(demo_folder):
    """Another machine rounds otherwise; five seeds differ by less than these tolerances."""
    shown = read_table(README)
    printed = read_table((demo_folder / "output.txt").read_text())
    assert len(printed) == 3
    assert shown.keys() == printed.keys()
    tolerances = [0.3, 0.3, 5.0, 5.0, 0.5]  # two helpfulnesses, two rates in percent, KL
    for label, numbers in printed.items():
        for number, expected, tolerance in zip(numbers, shown[label], tolerances, strict=True):
            assert abs(number - expected) <= tolerance, label


SHORT = {  # script -> flags that make its run short
    "train_sft": ["--max_steps=2"],
    "train": ["--max_steps=2", "--eval_samples=25"],  # nanosafe.phf.train
    "train_pref": ["--max_steps=2", "--eval_data="],
    "train_ppo_lag": ["--max_steps=2"],
    "arena": ["--data=toy/prompts/test:32/-1"],
    "bench": [
        "--peers=",
        "--workloads=load,forward,sft,cost,dpo,generate_eos,ppo_lag",
        "--hidden_size=32",
        "--num_hidden_layers=1",
        "--vocab_size=1000",
        "--batch_size=4",
        "--steps=2",
        "--repetitions=1",
        "--max_new_tokens=8",
        "--out=out/bench.json",
    ],
}
PRINTED = {  # script -> what it prints, among other things; where a prompt is missing, sample asks
    "sample": r"(?m)^> |\.jsonl",
    "plan": "the roofline",
    "bench": r"ppo_lag +responses +[\d.]+",
    "arena": r"out/\w+: .*(browser|json|png)",
    "scores": r"out/\w+: .*(json|png)",
    "bigbench": r"out/\w+: .*(json|task)",
    "plot": r"out/\w+(/index.html)?: .*(browser|png)",
}


@pytest.mark.slow
@pytest.mark.parametrize("line", HERE)
def test_a_command_runs(line, demo_folder):
    script, arguments = parse_command(line)
    name = name_of(line)
    if name == "plan":
        arguments = [os.path.join(ROOT, arguments[0]), *arguments[1:]]
    talk = "How do I fix the clock?\n/quit\n"
    done = run(*script, *arguments, *SHORT.get(name, []), cwd=demo_folder, stdin=talk)
    writes_data = any(word.startswith("--out=") for word in arguments)
    if name in PRINTED and not writes_data:
        assert re.search(PRINTED[name], done.stdout)
    for word in arguments:
        flag, _, path = word.partition("=")
        if flag == "--out":
            assert (demo_folder / path).stat().st_size > 100  # later commands read it
        if flag == "--out_dir" and name.startswith("train"):
            assert (demo_folder / path / "model" / "config.json").exists()
    if name == "bench":
        rows = json.loads((demo_folder / "out" / "bench.json").read_text())["rows"]
        assert len(rows) == 7
        assert (demo_folder / "out" / "bench_ppo_lag.png").exists()


@pytest.mark.slow
def test_scripts_without_arguments_run_after_the_demo(demo_folder, tmp_path):
    """Their defaults are the toy world's sizes and paths."""
    for script in ("train_sft.py", "train_pref.py", "train_ppo_lag.py"):
        path = os.path.join(ROOT, script)
        run(path, f"--out_dir={tmp_path}/{script}", "--max_steps=1", cwd=demo_folder)
    run(os.path.join(ROOT, "sample.py"), cwd=demo_folder, stdin="How do I fix the clock?\n")


# What docs/tour.md says of its rollout: an expression in the trainer's variables -> the number.
TOUR = {
    "scores['reward'][0]": 4.482,
    "scores['reward'][1]": 4.822,
    "scores['cost'][0]": 7.941,
    "scores['cost'][1]": -5.194,
    "kl[0]": 0.464,
    "kl[1]": 0.314,
    "per_token['reward'][0, 20]": 4.401,
    "per_token['cost'][0, 20]": 8.022,
    "advantages['reward'][0, 20]": 0.385,
    "advantages['cost'][0, 20]": 13.038,
    "multipliers['cost'].mean_cost": -1.642,
    "lambda_": 1.801,
    "mixed[0, 20]": -8.246,
    "mixed[1, 22]": 0.423,
    "losses['actor_loss']": 1.697,
    "losses['reward_critic_loss']": 2.650,
    "losses['cost_critic_loss']": 14.189,
}


@pytest.mark.slow
def test_the_numbers_of_the_tour_are_those_of_its_rollout(demo_folder):
    with open(os.path.join(ROOT, "docs", "tour.md"), encoding="utf-8") as f:
        page = f.read()
    command = re.search(r"^python -i (train_ppo_lag\.py .*)$", page, re.M)[1]
    script, *flags = shlex.split(command)
    program = (
        "import json, runpy, sys\n"
        f"sys.argv = {[script, *flags]!r}\n"
        f"names = runpy.run_path({os.path.join(ROOT, script)!r}, run_name='__main__')\n"
        f"values = [float(eval(expression, names)) for expression in {list(TOUR)!r}]\n"
        "print('values', json.dumps(values))\n"
    )
    finished = run("-c", program, cwd=demo_folder)
    values = json.loads(finished.stdout.rpartition("values ")[2])
    for (expression, said), value in zip(TOUR.items(), values):
        assert f"{said:.3f}" in page, expression
        assert value == pytest.approx(said, abs=0.02), expression
