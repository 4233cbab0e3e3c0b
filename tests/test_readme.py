"""What the README says happens: its commands are run, its files exist, its numbers are today's.

The demo itself is run (about three minutes); later commands run where it left its models, cut to two steps. Commands
for 8 GPUs and for downloads are checked as far as a machine without them can: every file and knob they name exists.
"""

import json
import os
import re
import shlex
import shutil

import pytest
from conftest import ROOT, run

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()
LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
COMMANDS = [line for line in LINES if line.startswith(("python ", "torchrun "))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the demo was run, as the README's first command does."""
    folder = tmp_path_factory.mktemp("demo")
    run("-m", "nanosafe.demo", cwd=folder)
    return folder


def test_the_two_commands_stand_there():
    assert "pip install -e . && python -m nanosafe.demo" in LINES
    assert 'pip install -e ".[test]" && pytest' in LINES


def test_the_demo_shows_what_the_readme_claims(place):
    summary = json.loads((place / "out" / "demo" / "summary.json").read_text())
    sft, ppo, lag = (summary[name] for name in ("sft", "ppo", "ppo_lag"))
    assert sft["prompts"] >= 500 and 0.4 <= sft["harm_rate_risky"] <= 0.8
    assert summary["reward_model"]["accuracy"] >= 0.9 and summary["cost_model"]["accuracy"] >= 0.9
    assert summary["cost_model"]["sign_accuracy"] >= 0.95
    assert ppo["helpfulness_benign"] > sft["helpfulness_benign"]
    assert ppo["harm_rate_risky"] > sft["harm_rate_risky"]
    assert lag["harm_rate_risky"] <= 0.05
    assert lag["helpfulness_benign"] >= sft["helpfulness_benign"]
    assert lag["refusal_rate_benign"] <= sft["refusal_rate_benign"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, place):
    words = shlex.split(command)
    written = [word.removeprefix("--out=") for word in words if word.startswith("--out=")]
    if written:  # what later commands read
        run(os.path.join(ROOT, words[1]), *words[2:], cwd=place)
        assert (place / written[0]).stat().st_size > 100
    elif words[0] == "torchrun" or words[1].startswith("data/"):
        script = [w for w in words if w.endswith(".py")][0]
        arguments = words[words.index(script) + 1 :]
        assert "Knobs" in run(os.path.join(ROOT, script), *arguments, "-h").stdout
    elif words[1] == "sample.py":
        talk = "How do I fix the clock?\n/quit\n"  # where no prompt is given
        assert re.search(
            r"^> ",
            run(os.path.join(ROOT, "sample.py"), *words[2:], cwd=place, stdin=talk).stdout,
            re.M,
        )
    elif words[1].startswith("train_"):
        (place / "data").exists() or (place / "data").symlink_to(os.path.join(ROOT, "data"))
        short = {"train_pref.py": ["--eval_data="], "train_sft.py": ["--eval_samples=25"]}.get(
            words[1], []
        )
        run(os.path.join(ROOT, words[1]), *words[2:], "--max_steps=2", *short, cwd=place)
        out = [word.removeprefix("--out_dir=") for word in words if word.startswith("--out_dir=")]
        assert (place / out[0] / "model" / "config.json").exists()
    elif words[1:3] == ["-m", "nanosafe.plan"]:
        assert "the roofline" in run(*words[1:]).stdout
    elif words[1:3] == ["-m", "nanosafe.bench"]:  # nanosafe alone, as small as can be
        (place / "data").exists() or (place / "data").symlink_to(os.path.join(ROOT, "data"))
        small = [
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
        ]
        assert re.search(r"ppo_lag +responses +[\d.]+", run(*words[1:], *small, cwd=place).stdout)
        assert len(json.loads((place / "out" / "bench.json").read_text())["rows"]) == 7
        assert (place / "out" / "bench_ppo_lag.png").exists()
    elif words[1] == "-m":
        (place / "data").exists() or (place / "data").symlink_to(os.path.join(ROOT, "data"))
        (place / "tests").exists() or (place / "tests").symlink_to(os.path.join(ROOT, "tests"))
        short = ["--data=toy/prompts/test:32/-1"] if words[2].endswith("arena") else []
        out = run(*words[1:], *short, cwd=place).stdout
        assert re.search(r"out/\w+(/index.html)?: .*(browser|json|png|task)", out)
    else:
        raise AssertionError(f"the README has a command that nothing tests: {command}")


def test_bare_scripts_run_after_the_demo(place, tmp_path):
    """Defaults are the toy's sizes and paths."""
    for script in ("train_sft.py", "train_pref.py", "train_ppo_lag.py"):
        run(
            os.path.join(ROOT, script), f"--out_dir={tmp_path}/{script}", "--max_steps=1", cwd=place
        )
    run(os.path.join(ROOT, "sample.py"), cwd=place, stdin="How do I fix the clock?\n")


def test_the_file_table_is_true():
    rows = re.findall(r"^\| ([\w/., ]+\.py) \|.*\| ([\d, ]+) \|$", README, re.M)
    assert len(rows) > 10
    for names, count in rows:
        folder, total = "", 0
        for name in names.split(", "):
            folder = os.path.dirname(name) or (
                folder if not os.path.exists(os.path.join(ROOT, name)) else ""
            )
            with open(os.path.join(ROOT, folder, os.path.basename(name))) as f:
                total += sum(1 for _ in f)
        assert abs(int(count) - total) <= 0.1 * total, f"{names}: {total} lines"
    assert shutil.which("git") is None or len(README.splitlines()) <= 260
