"""nanosafe.eval.overoptimisation: policies by proxy and judge, against their KL."""

import csv
import json
import math

import pytest
import torch
from conftest import ROOT
from in_process import run_in_process

from nanosafe import checkpoint, tokenizer
from nanosafe.inference import ScoreModel
from nanosafe.parallel import init

PROMPTS = ["How do I fix the clock?", "How can I forge the ticket?", "What is the way to the sea?"]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def policies(world, tmp_path_factory):
    """{name: folder} of two policies that differ from the world's by a little and by a lot."""
    folder = tmp_path_factory.mktemp("policies")
    tok = tokenizer.load(world / "policy")
    for name, amount in (("near", 0.01), ("far", 0.1)):
        model = checkpoint.load(world / "policy")
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += amount * torch.randn(parameter.shape, generator=generator)
        checkpoint.save(model, folder / name, tok)
    return {"Run@1": folder / "near", "Run@2": folder / "far"}


@pytest.fixture(scope="module")
def judge(world, tmp_path_factory):
    """A second cost model."""
    folder = tmp_path_factory.mktemp("judge") / "cost"
    model = checkpoint.load(world / "cost")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    checkpoint.save(model, folder, tokenizer.load(world / "policy"))
    return folder


@pytest.fixture
def measure(world, policies, judge, tmp_path, monkeypatch, capsys):
    """Runs the command; returns what it printed, and the folder of its files."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": text}) + "\n" for text in PROMPTS))

    def measure(*flags, check=True):
        models = ",".join(f"{name}={folder}" for name, folder in policies.items())
        command = [
            f"--reference=SFT={world}/policy",
            f"--models={models}",
            f"--reward_models=proxy={world}/reward",
            f"--cost_models=proxy={world}/cost,judge={judge}",
            f"--data={prompts}",
            "--max_new_tokens=8",
            f"--out_dir={tmp_path}/out",
            *flags,
        ]
        fixtures = {"monkeypatch": monkeypatch, "capsys": capsys}
        script = "nanosafe/eval/overoptimisation.py"
        return run_in_process(script, *command, check=check, **fixtures), tmp_path / "out"

    return measure


def test_each_scorer_is_asked_about_the_answers_of_each_policy(measure, judge):
    _, out = measure()
    rows = read_jsonl(out / "answers.jsonl")
    assert [row["policy"] for row in rows] == ["SFT"] * 3 + ["Run@1"] * 3 + ["Run@2"] * 3
    assert [row["prompt"] for row in rows[:3]] == [[text] for text in PROMPTS]
    scorer = ScoreModel(judge, init("cpu"), torch.float32)
    for row in rows:
        if row["ended"]:  # a text that was cut has no end-of-sequence token, so it reads otherwise
            conversation = [{"role": "user", "content": row["prompt"][0]}]
            conversation.append({"role": "assistant", "content": row["answer"]})
            ids = scorer.tok.finished_conversation(conversation).ids
            assert row["cost"]["judge"] == pytest.approx(scorer.score([ids])[0], abs=1e-3)


def test_the_kl_is_the_mean_of_log_ratios_and_grows_with_the_distance(measure):
    _, out = measure()
    policies = json.loads((out / "summary.json").read_text())["policies"]
    rows = read_jsonl(out / "answers.jsonl")
    for name, summary in policies.items():
        ratios = [row["log_ratio"] for row in rows if row["policy"] == name]
        assert summary["kl"][0] == pytest.approx(sum(ratios) / len(ratios))
    assert policies["SFT"]["kl"][0] == 0
    assert abs(policies["Run@1"]["kl"][0]) < policies["Run@2"]["kl"][0]


def test_gains_are_measured_from_the_reference_in_its_own_deviations(measure):
    _, out = measure()
    rows = read_jsonl(out / "answers.jsonl")
    before = [row["reward"]["proxy"] for row in rows if row["policy"] == "SFT"]
    after = [row["reward"]["proxy"] for row in rows if row["policy"] == "Run@2"]
    mean = sum(before) / 3
    deviation = math.sqrt(sum((score - mean) ** 2 for score in before) / 3)
    gain = sum(after) / 3 - mean
    policies = json.loads((out / "summary.json").read_text())["policies"]
    measured = policies["Run@2"]["reward"]["proxy"]
    assert measured["gain"][0] == pytest.approx(gain)
    assert measured["standardised"] == pytest.approx(gain / deviation)
    assert policies["SFT"]["reward"]["proxy"]["standardised"] == 0


def test_the_same_command_goes_on_and_another_one_measures_anew(measure):
    measure()
    outcome, out = measure()
    assert outcome.printed.count("its answers and scores are in") == 3
    (out / "Run@2.json").unlink()
    outcome, _ = measure()
    assert outcome.printed.count("its answers and scores are in") == 2
    outcome, _ = measure("--seed=1")
    assert "its answers and scores are in" not in outcome.printed


def test_the_table_has_a_line_for_each_policy_and_the_picture_is_drawn(measure):
    pytest.importorskip("matplotlib")
    outcome, out = measure()
    with open(out / "table.csv", newline="") as f:
        table = list(csv.reader(f))
    assert [row[0] for row in table] == ["", "SFT", "Run@1", "Run@2"]
    assert table[0][4:] == [
        "reward, proxy",
        "cost, proxy",
        "unsafe, proxy",
        "cost, judge",
        "unsafe, judge",
    ]
    assert (out / "overoptimisation.png").stat().st_size > 10000
    assert "Run@2" in outcome.printed


def test_two_policies_of_one_name_are_refused(measure, policies):
    outcome, _ = measure(f"--models=A={policies['Run@1']},A={policies['Run@2']}", check=False)
    assert "give each a name of its own" in outcome.error


def test_a_policy_is_no_score_model(measure, world):
    outcome, _ = measure(f"--cost_models=proxy={world}/policy", check=False)
    assert "is no score model" in outcome.error or "policy" in outcome.error
    assert "Traceback" not in outcome.error


def test_a_function_may_score_and_is_named_in_the_tables(measure, policies):
    function = f"{ROOT}/nanosafe/score_functions.py:measure_length"
    flags = (f"--models=Run@1={policies['Run@1']}", f"--reward_models=length={function}")
    first, out = measure(*flags)
    assert "reward, length" in first.printed
    assert "3 prompts [95 %" in first.printed
    assert json.loads((out / "summary.json").read_text())["dropped"] == 0
    again, _ = measure(*flags)
    assert "Run@1: its answers and scores are in" in again.printed
