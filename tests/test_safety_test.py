"""nanosafe.eval.safety_test: its bound against a plain loop, its verdict, and its exit code."""

import json
import math
import os

import pytest
from conftest import run
from in_process import run_in_process

from nanosafe import rl
from nanosafe.storage import write_jsonl

COMMAND = ["-m", "nanosafe.eval.safety_test"]


def read_json(path):
    return json.loads(path.read_text())


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def flags(world, tmp_path):
    """Of a test of twelve answers, by the random models of the tests' world."""
    rows = []
    for i in range(12):
        rows.append({"input": f"How do I fix clock {i}?"})
    write_jsonl([*rows, rows[0], {"input": " "}], tmp_path / "prompts.jsonl")
    return [
        f"--model={world}/policy",
        f"--cost_model={world}/cost",
        f"--prompts={tmp_path}/prompts.jsonl",
        f"--out_dir={tmp_path}/out",
        "--max_new_tokens=6",
    ]


@pytest.fixture
def safety_test(flags, monkeypatch, capsys):
    """Runs the command in this process, where its policy passes or it stops with one line."""

    def safety_test(*more, check=True):
        fixtures = {"monkeypatch": monkeypatch, "capsys": capsys}
        script = "nanosafe/eval/safety_test.py"
        return run_in_process(script, *flags, *more, check=check, **fixtures)

    return safety_test


def write_cost_function(path, body):
    """Write a cost, a function of an answer's text and of the number of its prompt."""
    text = f"""
def cost(conversations):
    costs = []
    for turns in conversations:
        number = int(turns[0]["content"].split()[-1].rstrip("?"))
        costs.append({body})
    return costs
"""
    path.write_text(text)
    return f"--cost_model={path}:cost"


def test_the_bound_is_that_of_a_plain_loop(safety_test, tmp_path):
    printed = safety_test("--cost_limit=100").printed
    costs = [row["cost"] for row in read_jsonl(tmp_path / "out" / "answers.jsonl")]
    assert len(costs) == 12  # the prompt that is there twice is asked once
    mean = sum(costs) / 12
    squares = [(cost - mean) ** 2 for cost in costs]
    deviation = math.sqrt(sum(squares) / 11)
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["mean"] == pytest.approx(mean)
    assert summary["deviation"] == pytest.approx(deviation)
    quantile = 1.363430318  # Student's 0.9 for 11 degrees of freedom, of a printed table
    assert summary["bound"] == pytest.approx(mean + quantile * deviation / math.sqrt(12))
    assert (summary["n"], summary["delta"], summary["dropped"]) == (12, 0.1, 1)
    assert summary["passes"] is True
    assert summary["verdict"].startswith("passes: the upper bound")
    assert summary["verdict"] in printed


def test_a_smaller_delta_asks_for_more(safety_test, tmp_path):
    bounds = []
    for delta in ("0.4", "0.1", "0.001"):
        safety_test("--cost_limit=100", f"--delta={delta}")
        bounds.append(read_json(tmp_path / "out" / "summary.json")["bound"])
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[2]


def test_scripts_can_branch_on_the_exit_code(flags, tmp_path):
    passed = run(*COMMAND, *flags, "--cost_limit=100")
    assert "passes: the upper bound" in passed.stdout
    summary = read_json(tmp_path / "out" / "summary.json")
    between = (summary["mean"] + summary["bound"]) / 2
    failed = run(*COMMAND, *flags, f"--cost_limit={between}", check=False)
    assert failed.returncode == 1
    assert "no policy: the upper bound" in failed.stdout
    assert "Traceback" not in failed.stderr
    again = read_json(tmp_path / "out" / "summary.json")
    assert again["passes"] is False
    assert again["mean"] < between  # a mean below its limit is not enough
    assert again["bound"] == summary["bound"]  # the same answers are sampled again


def test_one_and_two_processes_write_the_same_files(flags, tmp_path):
    files = {}
    for ranks in (0, 2):
        run(*COMMAND, *flags, "--cost_limit=100", ranks=ranks)
        names = sorted(os.listdir(tmp_path / "out"))
        files[ranks] = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    assert files[0] == files[2]
    assert sorted(files[0]) == ["answers.jsonl", "summary.json"]


def test_two_processes_fail_as_one_does(flags):
    failed = run(*COMMAND, *flags, "--cost_limit=-100", ranks=2, check=False)
    assert failed.returncode == 1
    assert failed.stdout.count("no policy") == 1


def test_a_limit_on_the_share_of_unsafe_answers(safety_test, tmp_path):
    cost = write_cost_function(tmp_path / "cost.py", "2.0**-15 if number < 3 else -5.0")
    safety_test(cost, "--cost_kind=unsafe", "--cost_limit=0.5")
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["mean"] == 3 / 12
    deviation = math.sqrt((3 * 0.75**2 + 9 * 0.25**2) / 11)
    factor = rl.pessimism_factor(0.1, 12)
    assert summary["bound"] == pytest.approx(0.25 + factor * deviation)
    assert summary["warnings"] == []
    costs = [row["cost"] for row in read_jsonl(tmp_path / "out" / "answers.jsonl")]
    assert set(costs) == {2.0**-15, -5.0}  # the cost model's own, and not rounded to 0


def test_that_few_answers_were_all_safe_says_little(safety_test, tmp_path):
    """A deviation of 0 makes the bound 0, although one answer in six may be unsafe."""
    cost = write_cost_function(tmp_path / "cost.py", "-5.0")
    printed = safety_test(cost, "--cost_kind=unsafe", "--cost_limit=0.01").printed
    share = 1 - 0.1 ** (1 / 12)
    assert "warning: all 12 costs are equal" in printed
    assert f"up to {share:.1%} may be unsafe" in printed
    assert "may be unsafe" not in safety_test(cost, "--cost_limit=0").printed


@pytest.mark.parametrize(
    "more, words",
    [
        (["--model=nowhere"], "nowhere"),
        (["--model={world}/cost"], "score model"),
        (["--cost_model={world}/reward"], "is given as a cost model"),
        (["--cost_model="], "no model at ''"),
        (["--cost_kind=harm"], "choose one of score, unsafe"),
        (["--cost_kind=unsafe", "--cost_limit=-5.2"], "must be from 0 to 1"),
        (["--delta=0"], "delta=0.0 must be above 0 and below 0.5"),
        (["--delta=0.5"], "delta=0.5 must be above 0 and below 0.5"),
        (["--prompts=nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts={tmp_path}/one.jsonl"], "one prompt only"),
    ],
)
def test_a_mistake_is_one_line(more, words, safety_test, world, tmp_path):
    write_jsonl([{"input": "Why?"}] * 3, tmp_path / "one.jsonl")
    more = [flag.format(world=world, tmp_path=tmp_path) for flag in more]
    assert words in safety_test(*more, check=False).error
    assert not (tmp_path / "out" / "summary.json").exists()
