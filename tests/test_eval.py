"""The evaluations: statistics against plain loops and known values; arena, scores, judge and
bigbench as commands."""

import csv
import json
import math
import os
import random
import shutil
import re

import judge_server
import numpy as np
import pytest
import torch
from conftest import ROOT, encode_texts, run, small_config
from in_process import run_in_process

from nanosafe import checkpoint, tokenizer
from nanosafe.eval.statistics import (
    bootstrap_interval,
    count_quadrants,
    count_wins,
    fit_bradley_terry,
    measure_calibration,
)
from nanosafe.tools import demo


def read_json(path):
    return json.loads(path.read_text())


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_jsonl(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command of nanosafe.eval."""

    def call(command, *flags, check=True, stdin=""):
        script = f"nanosafe/eval/{command}.py"
        pytest_fixtures = {"monkeypatch": monkeypatch, "capsys": capsys}
        return run_in_process(script, *flags, check=check, stdin=stdin, **pytest_fixtures)

    return call


def score_at_end(model, ids):
    """A score model's score of a text, in a forward of its own."""
    ids = torch.as_tensor(ids)
    with torch.no_grad():
        scores = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    return scores[-1].item()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- statistics ----


def test_quadrants_and_win_rates_by_hand():
    red_rewards, red_costs = [1, 1, 1, 1, 1], [-1, -1, 1, 1, 0]
    blue_rewards, blue_costs = [2, 1, 2, 0, 3], [-1, 1, 0, -2, 2]
    assert count_quadrants(red_rewards, blue_rewards, blue_costs) == {
        "better, safe": 2,
        "better, unsafe": 1,
        "not better, safe": 1,
        "not better, unsafe": 1,
    }
    rates = count_wins(red_rewards, red_costs, blue_rewards, blue_costs)
    assert rates[True, True] == (1, 1.0)
    assert rates[True, False] == (2, 0.5)
    assert rates[False, True] == (2, 0.5)
    assert rates[False, False].count == 0
    assert math.isnan(rates[False, False].share)


def test_an_interval_covers_the_mean_as_often_as_it_promises():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        mean, low, high = bootstrap_interval(rng.normal(3.0, 2.0, 60), resamples=300, seed=i)
        assert low <= mean <= high
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert bootstrap_interval([5.0]) == (5.0, 5.0, 5.0)


def test_ratings_of_two_players_have_a_closed_form():
    wins = [1] * 8 + [0] * 2
    losses = [1 - won for won in wins]
    a, b = fit_bradley_terry([wins, losses])
    assert a - b == pytest.approx(400 * math.log10(8.5 / 2.5), abs=1e-4)
    assert a + b == pytest.approx(2000)
    a, b = fit_bradley_terry([[1.0] * 50, [1.0] * 50])
    assert a == pytest.approx(b)
    a, b = fit_bradley_terry([[1] * 20, [0] * 20])  # one wins always
    assert math.isfinite(a) and math.isfinite(b)
    assert a > b + 400


def test_ratings_recover_the_strengths_of_three_players():
    """P(i beats j) is Bradley-Terry's when each score is a Gumbel draw at its strength (Luce)."""
    rng = random.Random(0)
    strengths = [1200.0, 1050.0, 750.0]
    scores = []
    for strength in strengths:
        location = strength * math.log(10) / 400
        scores.append([location - math.log(-math.log(rng.random())) for _ in range(20000)])
    ratings = fit_bradley_terry(scores)
    assert ratings == pytest.approx(strengths, abs=15)
    assert fit_bradley_terry(scores[::-1])[::-1] == pytest.approx(ratings, abs=1e-3)


def test_calibration_against_a_plain_loop():
    rng = np.random.default_rng(1)
    probabilities = rng.random(500)
    outcomes = rng.random(500) < probabilities**2
    bins, error = measure_calibration(probabilities, outcomes)
    expected = 0.0
    for b in range(10):
        promised, came_true = [], []
        for probability, outcome in zip(probabilities, outcomes):
            if min(int(probability * 10), 9) == b:
                promised.append(probability)
                came_true.append(outcome)
        if promised:
            distance = abs(np.mean(promised) - np.mean(came_true))
            expected += distance * len(promised) / 500
    assert error == pytest.approx(expected)
    assert sum(filled.count for filled in bins) == 500
    assert measure_calibration([1.0, 1.0], [1, 1]) == ([(1.0, 1.0, 2)], 0.0)


# ---- arena ----


@pytest.fixture
def arena_flags(world):
    return [
        f"--data={world}/data/prompts/test.jsonl:24/-1",
        f"--reward_model={world}/reward",
        f"--cost_model={world}/cost",
        "--max_new_tokens=8",
    ]


@pytest.fixture
def arena(call, arena_flags, tmp_path):
    def arena(*flags, out="arena", check=True):
        return call("arena", *arena_flags, f"--out_dir={tmp_path}/{out}", *flags, check=check)

    return arena


@pytest.fixture(scope="session")
def other(world, tmp_path_factory):
    """A policy with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    rows = read_jsonl(world / "data" / "prompts" / "train.jsonl")
    texts = [row["input"] for row in rows[:300]]
    tok = demo.train_tokenizer(texts, 320, str(folder / "tok"))
    config = small_config(vocab_size=tok.vocab_size)
    model = checkpoint.init_from_scratch(config, seed=9)
    checkpoint.save(model, folder / "model", tok)
    return folder / "model"


@pytest.fixture
def fought(arena, world, other, tmp_path):
    """An arena of the policies A and B, the latter with another tokenizer."""
    printed = arena(f"--models=A={world}/policy,B={other}").printed
    return printed, tmp_path / "arena"


def list_scores(rows, name, kind):
    return [row["answers"][name][kind] for row in rows]


def test_the_arenas_summary_agrees_with_its_rows(fought):
    printed, folder = fought
    rows = read_jsonl(folder / "pairs.jsonl")
    assert len(rows) == 24
    assert len({tuple(row["prompt"]) for row in rows}) == 24
    summary = read_json(folder / "summary.json")
    for name in "AB":
        policy = summary["policies"][name]
        assert policy["reward"][0] == pytest.approx(np.mean(list_scores(rows, name, "reward")))
        costs = list_scores(rows, name, "cost")
        assert policy["unsafe"] == np.mean([cost > 0 for cost in costs])
    pair = summary["pairs"][0]
    for kind, rating in (("reward", "helpful"), ("cost", "safe")):
        a, b = list_scores(rows, "A", kind), list_scores(rows, "B", kind)
        assert pair["difference"][kind][0] == pytest.approx(np.mean(b) - np.mean(a))
        if kind == "cost":
            a = [min(0.0, -cost) for cost in a]
            b = [min(0.0, -cost) for cost in b]
        ratings = [summary["policies"][name][rating] for name in "AB"]
        assert ratings == pytest.approx(fit_bradley_terry([a, b]))
    counts = count_quadrants(
        list_scores(rows, "A", "reward"),
        list_scores(rows, "B", "reward"),
        list_scores(rows, "B", "cost"),
    )
    assert {quadrant: pair[quadrant] for quadrant in counts} == counts
    assert "B against A, 24 prompts" in printed

    with open(folder / "table.csv", newline="") as f:
        table = list(csv.reader(f))
    assert table[0] == ["Prompt", "A", "Reward", "Cost", "B", "Reward", "Cost"]
    assert len(table) == 25
    a, b = rows[0]["answers"]["A"], rows[0]["answers"]["B"]
    numbers = [float(table[1][column]) for column in (2, 3, 5, 6)]
    assert numbers == [a["reward"], a["cost"], b["reward"], b["cost"]]
    for picture in ("arena.png", "arena.svg"):
        assert (folder / picture).stat().st_size > 5000


def test_a_score_model_reads_answers_with_its_own_tokenizer(fought, world):
    _, folder = fought
    tok, model = tokenizer.load(world / "reward"), checkpoint.load(world / "reward")
    readable = 0
    for row in read_jsonl(folder / "pairs.jsonl"):
        answer = row["answers"]["B"]
        if answer["text"].isascii() and answer["text"].isprintable():
            readable += 1
            prompt = f"BEGINNING OF CONVERSATION: USER: {row['prompt'][0]} ASSISTANT:"
            text = prompt + answer["text"]
            cut = tok.encode("", bos=True) + tok.encode(text, allow_special=False)
            ended = [*cut, tok.eos_id]
            errors = [abs(score_at_end(model, x) - answer["reward"]) for x in (cut, ended)]
            assert min(errors) < 2e-4
    assert readable


def test_the_arena_on_one_and_on_two_processes_writes_the_same_files(
    arena_flags, world, other, tmp_path
):
    command = ["-m", "nanosafe.eval.arena", *arena_flags, "--max_tokens=256"]
    command += [f"--red={world}/policy", f"--blue={other}"]
    run(*command, f"--out_dir={tmp_path}/one")
    run(*command, f"--out_dir={tmp_path}/two", ranks=2)
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "two"))
    assert len(names) == 5
    for name in names:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert one.read_bytes() == two.read_bytes(), name


def test_an_answer_depends_on_its_prompt_and_not_on_the_others(arena, world, tmp_path):
    rows = read_jsonl(world / "data" / "prompts" / "test.jsonl")[:6]
    answers = {}
    for name, chosen in (("p", rows + rows[:3]), ("q", rows[::-1][:4])):
        write_jsonl(chosen, tmp_path / f"{name}.jsonl")
        policies = f"--models=A={world}/policy,B={world}/policy"
        arena(policies, f"--data={tmp_path}/{name}.jsonl", out=name)
        pairs = read_jsonl(tmp_path / name / "pairs.jsonl")
        answers[name] = {row["prompt"][0]: row["answers"] for row in pairs}
    p, q = answers["p"], answers["q"]
    assert len(p) == 6  # a prompt that is repeated is asked once
    assert len(q) == 4
    for prompt in q:
        assert p[prompt]["A"]["text"] == q[prompt]["A"]["text"]
    for answer in p.values():
        assert answer["A"] == answer["B"]  # both have the same random numbers


@pytest.mark.parametrize(
    "models, names, missing",
    [
        ("{a},{b}", ["lr=1e-5", "lr=2e-5"], ""),  # paths with "=", without names
        ("A={a},B={b}", ["A", "B"], ""),
        ("lr=1={a},~/lr=2e-5", ["lr=1", "lr=2e-5"], ""),  # a name with "=" as well
        ("A=~/lr=1e-5,B={b}", ["A", "B"], ""),
        ("A=no=where,B={b}", [], "'no=where'"),
        ("no/lr=1e-5,{b}", [], "'no/lr=1e-5'"),
    ],
)
def test_models_and_their_names_may_hold_an_equals_sign(
    models, names, missing, arena, world, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for rate in ("1e-5", "2e-5"):
        (tmp_path / f"lr={rate}").symlink_to(world / "policy")
    models = models.format(a=tmp_path / "lr=1e-5", b=tmp_path / "lr=2e-5")
    if missing:
        assert f"no tokenizer at {missing}" in arena(f"--models={models}", check=False).error
    else:
        arena(f"--models={models}", "--max_new_tokens=1")
        policies = read_json(tmp_path / "arena" / "summary.json")["policies"]
        assert list(policies) == names
        folders = [str(tmp_path / "lr=1e-5"), str(tmp_path / "lr=2e-5")]
        assert [policy["folder"] for policy in policies.values()] == folders


TWICE = "--models=A={world}/policy,B={world}/policy"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--red=nowhere", "--blue=nowhere"], "give each a name"),
        (["--red=nowhere", "--blue=elsewhere"], "no tokenizer at 'nowhere'"),
        (["--red={world}/policy"], "name two policies"),
        ([], "name two policies"),
        (["--models=A={world}/policy,B={world}/reward"], "is a score model"),
        ([TWICE, "--data={empty}"], "has no prompt"),
        ([TWICE, "--data=nothing/test"], "has no file"),
        ([TWICE, "--temprature=1"], "did you mean 'temperature'"),
        ([TWICE, "--temperature=nan"], "temperature=nan"),
        ([TWICE, "--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        ([TWICE, "--reward_model={world}/policy"], "is a policy: it has no score head"),
        ([TWICE, "--reward_model={world}/cost"], "is given as a reward model, but its config.json"),
        ([TWICE, "--cost_model={world}/reward"], "is given as a cost model, but its config.json"),
        ([TWICE, "--device=tpu"], "device='tpu'"),
    ],
)
def test_a_mistake_in_the_arena_is_one_line(flags, words, arena, world, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"answer": "no input"}\n')
    flags = [flag.format(world=world, empty=tmp_path / "empty.jsonl") for flag in flags]
    assert words in arena(*flags, check=False).error


# ---- scores ----


@pytest.mark.parametrize("objective", ["reward", "cost"])
def test_scores_are_those_of_a_plain_loop(objective, call, world, tmp_path):
    printed = call(
        "scores",
        f"--model={world}/{objective}",
        f"--data={world}/data/{objective}/test.jsonl:40/-1",
        f"--out_dir={tmp_path}",
        f"--objective={objective}",
        "--max_tokens=512",
    ).printed
    rows = read_jsonl(tmp_path / "scores.jsonl")
    summary = read_json(tmp_path / "summary.json")
    tok, model = tokenizer.load(world / objective), checkpoint.load(world / objective)
    right, signs = [], []
    for row in rows:
        scores = []
        for answer in row["answers"]:
            score = score_at_end(model, encode_texts(answer["turns"], tok)[0])
            assert score == pytest.approx(answer["score"], abs=2e-4)
            scores.append(score)
            signs.append(answer["label"] * score < 0)
        preferred, rejected = scores
        right.append(preferred < rejected if objective == "cost" else preferred > rejected)
    assert summary["pairs"] == len(rows) == 40
    assert summary["accuracy"][0] == pytest.approx(np.mean(right))

    margins = [row["margin"] for row in rows]
    assert margins == sorted(margins)
    margins = np.array(margins)
    assert summary["log_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), abs=1e-4)
    confidence = 1 / (1 + np.exp(-abs(margins)))
    error = measure_calibration(confidence, margins > 0).error
    assert summary["calibration_error"] == pytest.approx(error, abs=0.03)  # some round to 0
    if objective == "cost":
        probabilities, unsafe = [], []
        for row in rows:
            for answer in row["answers"]:
                probabilities.append(sigmoid(answer["score"]))
                unsafe.append(answer["label"] < 0)
        error = measure_calibration(probabilities, unsafe).error
        assert summary["unsafe_calibration_error"] == pytest.approx(error, abs=1e-3)
        assert summary["sign_accuracy"][0] == pytest.approx(np.mean(signs))
    assert "wrong by" in printed
    assert (tmp_path / "scores.png").stat().st_size > 5000


def test_a_score_model_is_tested_as_what_its_config_says(call, world, tmp_path):
    def error(name, objective):
        model, data = f"--model={world}/{name}", f"--data={world}/data/cost/test.jsonl:9/-1"
        flags = [model, data, f"--objective={objective}", f"--out_dir={tmp_path}/s"]
        return call("scores", *flags, check=False).error

    assert "given as a reward model, but its config.json says score_type 'cost'" in error(
        "cost", "reward"
    )
    assert "given as a cost model, but its config.json says score_type 'reward'" in error(
        "reward", "cost"
    )


def test_a_score_model_that_states_no_type_is_tested_as_a_reward_model(call, world, tmp_path):
    """Unless objective says otherwise. What it is taken as is printed once."""
    folder = tmp_path / "untyped"
    shutil.copytree(world / "cost", folder)
    config = read_json(folder / "config.json")
    del config["score_type"]
    (folder / "config.json").write_text(json.dumps(config))
    data = f"--data={world}/data/cost/test.jsonl:9/-1"
    for objective, taken in (("auto", "reward"), ("cost", "cost")):
        flags = [f"--model={folder}", data, f"--objective={objective}", f"--out_dir={tmp_path}/s"]
        printed = call("scores", *flags).printed
        assert printed.count(f"states no score_type: it is taken as a {taken} model") == 1
        assert f" pairs ({taken})" in printed


def test_dropped_rows_are_counted_by_their_reason(call, world, tmp_path):
    good = read_jsonl(world / "data" / "reward" / "test.jsonl")[:3]
    bad = [{"input": "x"}, {**good[0], "other_answer": good[0]["answer"]}]
    write_jsonl(good + bad, tmp_path / "d.jsonl")
    data = f"--data={tmp_path}/d.jsonl"
    out = f"--out_dir={tmp_path}/s"
    printed = call("scores", f"--model={world}/reward", "--objective=reward", data, out).printed
    assert "3 pairs" in printed
    assert "left out 1 no field 'answer'" in printed
    assert "left out 1 identical answers" in printed


def make_answers(texts):
    """Three answers to one request, each longer than the one before, as RM-Bench has them."""
    return [texts[0], " ".join(texts[:2]), "\n".join(["**Answer**", *texts])]


@pytest.fixture
def benchmark(tmp_path):
    """A file of rows of RewardBench and of RM-Bench, and the pairs that are in them:
    (subset, styles, prompt, chosen, rejected)."""
    steps = ["First, get the hammer.", "Then, fix the clock.", "Next, check the clock."]
    refusals = ["I will not do this.", "Please do not ask me this.", "No."]
    rows, pairs = [], []
    for verb, subset in (("fix", "tools"), ("wash", "tools"), ("paint", "colours")):
        prompt = f"How do I {verb} the clock?"
        row = {"prompt": prompt, "chosen": steps[0], "rejected": refusals[0], "subset": subset}
        rows.append({**row, "chosen_model": "human", "id": len(rows)})
        pairs.append((subset, None, prompt, steps[0], refusals[0]))
    messages = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": steps[1]}]
    other = [messages[0], {"role": "assistant", "content": refusals[1]}]
    rows.append({"prompt": "How?", "chosen": messages, "rejected": other, "subset": "tools"})
    pairs.append(("tools", None, "How?", steps[1], refusals[1]))
    for thing in ("clock", "boat"):
        prompt = f"Please help me fix the {thing}."
        chosen, rejected = make_answers(steps), make_answers(refusals)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": "chat"}
        rows.append(row)
        for i in range(3):
            for j in range(3):
                pairs.append(("chat", (i, j), prompt, chosen[i], rejected[j]))
    rows.append({**rows[-1], "rejected": rows[-1]["chosen"]})
    write_jsonl(rows, tmp_path / "benchmark.jsonl")
    return tmp_path / "benchmark.jsonl", pairs


def test_benchmarks_of_reward_models_are_counted_by_subset_and_by_style(
    benchmark, call, world, tmp_path
):
    path, pairs = benchmark
    flags = [f"--model={world}/reward", f"--data={path}", f"--out_dir={tmp_path}/s"]
    printed = call("scores", *flags).printed
    summary = read_json(tmp_path / "s" / "summary.json")
    tok, model = tokenizer.load(world / "reward"), checkpoint.load(world / "reward")
    right = {}
    for subset, styles, prompt, chosen, rejected in pairs:
        scores = []
        for answer in (chosen, rejected):
            scores.append(score_at_end(model, encode_texts([prompt, answer], tok)[0]))
        groups = [subset]
        if styles:
            i, j = styles
            difficulty = "easy" if i > j else "hard" if i < j else "normal"
            groups += [difficulty, f"{subset}: {difficulty}", styles]
        for group in groups:
            right.setdefault(group, []).append(scores[0] > scores[1])
    assert summary["pairs"] == len(pairs) == 4 + 18
    assert summary["dropped"] == {"identical answers": 1}
    subsets = summary["subsets"]
    assert list(subsets)[:6] == ["chat", "colours", "tools", "easy", "normal", "hard"]
    assert list(subsets)[6:] == ["chat: easy", "chat: normal", "chat: hard"]
    for group, measured in subsets.items():
        assert measured["accuracy"] == pytest.approx(np.mean(right[group])), group
        assert measured["pairs"] == len(right[group])
        assert measured["low"] <= measured["accuracy"] <= measured["high"]
    for i in range(3):
        for j in range(3):
            assert summary["styles"][i][j] == np.mean(right[i, j])
    rows = read_jsonl(tmp_path / "s" / "scores.jsonl")
    assert sum(row["subset"] == "chat" and len(row["styles"]) == 2 for row in rows) == 18
    assert "chat: hard" in printed
    if rows[0]["margin"] < 0:
        assert f"({rows[0]['subset']}): wrong by" in printed


def test_a_mistake_in_scores_is_one_line(call, world, tmp_path):
    def error(*flags):
        return call("scores", "--objective=reward", *flags, check=False).error

    model, data = f"--model={world}/reward", f"--data={tmp_path}/d.jsonl"
    write_jsonl([{"input": "x"}], tmp_path / "d.jsonl")
    out = f"--out_dir={tmp_path}/s"
    assert "no usable pair" in error(model, data, out)
    assert "is a policy" in error(f"--model={world}/policy", data, out)
    assert "cannot be" in error(model, data, f"--out_dir={tmp_path}/d.jsonl")


# ---- judge ----


@pytest.fixture
def problems(world, tmp_path, toy):
    rows = []
    for row in read_jsonl(world / "data" / "prompts" / "test.jsonl")[:6]:
        category = "risky" if toy.is_risky(row["input"]) else "benign"
        rows.append({"prompt": row["input"], "category": category})
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def judge_flags(world, other, problems, tmp_path):
    return [
        f"--red={world}/policy",
        f"--blue={other}",
        f"--problems={problems}",
        "--max_new_tokens=8",
        "--yes=True",
        "--pause=0.01",
        "--timeout=1",
        "--concurrency=3",
        f"--out_dir={tmp_path}/judge",
    ]


@pytest.fixture
def judge(call, judge_flags, monkeypatch):
    def judge(server, *flags, check=True, key="sk-secret-key", stdin=""):
        url = server if isinstance(server, str) else server.url
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        return call("judge", *judge_flags, *flags, check=check, stdin=stdin)

    return judge


def first_answer(text):
    """The answer that stands first in a question to the judge."""
    begin = "[Answer of assistant 1]\n"
    return text[text.index(begin) + len(begin) : text.index("\n[End of answer 1]")]


def test_the_judge_sees_both_orders(judge, tmp_path):
    server = judge_server.serve()
    printed = judge(server).printed
    assert "orders agree" in printed
    assert len(server.seen) == 12
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert {key for _, key, _ in server.seen} == {"Bearer sk-secret-key"}
    verdicts = read_jsonl(tmp_path / "judge" / "verdicts.jsonl")
    answers = read_jsonl(tmp_path / "judge" / "answers.jsonl")
    assert len(verdicts) == len(answers) == 6
    for verdict in verdicts:
        assert verdict["orders_agree"]
        assert verdict["red_score"] == judge_server.gold(verdict["prompt"], verdict["red"])
        assert verdict["blue_score"] == judge_server.gold(verdict["prompt"], verdict["blue"])
    texts = [body["messages"][1]["content"] for _, _, body in server.seen]
    for answer in answers:
        first = sorted(first_answer(text) for text in texts if answer["prompt"] in text)
        assert first == sorted([answer["red"], answer["blue"]])
    summary = read_json(tmp_path / "judge" / "summary.json")
    total = summary["categories"]["all"]
    assert total["win"] + total["tie"] + total["lose"] == summary["judged"] == 6


def test_the_judge_is_asked_nothing_twice_and_the_key_is_written_nowhere(judge, tmp_path):
    server = judge_server.serve()
    judge(server)
    assert "0 to ask" in judge(server).printed
    assert len(server.seen) == 12
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"sk-secret" not in path.read_bytes()


def test_requests_that_fail_are_repeated(judge, tmp_path):
    faults = [429, 500, "stall", "drop", "rubbish", None]
    faults += ["words", None, None, "empty", None, 503, 429, "drop"]
    server = judge_server.serve(faults)
    judge(server, "--concurrency=1")
    assert len(read_jsonl(tmp_path / "judge" / "verdicts.jsonl")) == 6
    assert len(server.seen) == 12 + len([fault for fault in faults if fault])
    replies = read_jsonl(tmp_path / "judge" / "replies.jsonl")
    unreadable = [row for row in replies if row["scores"] is None]
    assert len(unreadable) == 2  # "words" and "empty" were paid for, so they are kept
    assert len({(row["problem"], row["order"]) for row in replies if row["scores"]}) == 12


def test_replies_survive_a_crash_and_only_the_others_are_asked_again(judge, tmp_path):
    server = judge_server.serve([None] * 5 + [500] * 1000)
    error = judge(server, "--attempts=2", check=False).error
    assert "HTTP 500" in error
    assert "the same command asks for the rest" in error
    replies = tmp_path / "judge" / "replies.jsonl"
    assert len(read_jsonl(replies)) == 5
    with open(replies, "a") as f:
        f.write('{"problem": 0, "ord')  # as if it were killed in the middle of a line
    better = judge_server.serve()
    judge(better)
    assert len(better.seen) == 7
    assert len(read_jsonl(tmp_path / "judge" / "verdicts.jsonl")) == 6


def test_a_wrong_key_stops_at_once_and_is_not_printed(judge):
    server = judge_server.serve([401] * 1000)
    printed, error = judge(server, check=False)
    assert "HTTP 401" in error
    assert len(server.seen) <= 6
    assert "sk-secret" not in printed + error


def test_a_dead_endpoint_is_one_line(judge):
    assert "refused" in judge("http://127.0.0.1:9/v1", "--attempts=2", check=False).error
    assert "is not an http" in judge("ftp://somewhere", check=False).error


def test_a_judge_who_prefers_the_first_answer_decides_nothing(judge, tmp_path):
    judge(judge_server.serve(judged=lambda first, second: (9, 3)))
    summary = read_json(tmp_path / "judge" / "summary.json")["categories"]["all"]
    assert summary == {
        "win": 0,
        "tie": 6,
        "lose": 0,
        "red": 6.0,
        "blue": 6.0,
        "orders agree": 0.0,
        "refused": 0,
        "unread": 0,
        "missing": 0,
    }


def count_letters(text):
    return min(10, 1 + len(text) / 10)


def test_scores_belong_to_the_right_policy(judge, tmp_path):
    def count_both(first, second):
        return count_letters(first), count_letters(second)

    judge(judge_server.serve(judged=count_both))
    verdicts = read_jsonl(tmp_path / "judge" / "verdicts.jsonl")
    for verdict in verdicts:
        red, blue = len(verdict["red"]), len(verdict["blue"])
        result = "win" if blue > red else "lose" if blue < red else "tie"
        assert verdict["blue_result"] == result
        assert verdict["orders_agree"]
        assert verdict["red_score"] == pytest.approx(count_letters(verdict["red"]))
        assert verdict["blue_score"] == pytest.approx(count_letters(verdict["blue"]))
    assert {"win", "lose"} & {verdict["blue_result"] for verdict in verdicts}


def test_the_key_is_not_sent_to_another_address(judge):
    thief = judge_server.serve()
    server = judge_server.serve([thief.url + "/chat/completions"] * 100)
    assert "HTTP 302" in judge(server, check=False).error
    assert not thief.seen
    assert len(server.seen) <= 6


def test_a_key_with_a_line_end_is_not_printed(judge):
    server = judge_server.serve([302] * 100)
    printed, error = judge(server, check=False, key="sk-secret\r")
    assert "sk-secret" not in printed + error


def make_reply(content, **more):
    return {"choices": [{"message": {"content": content}}], **more}


def test_odd_replies_are_kept_and_asked_for_once_more(judge, tmp_path):
    odd = [
        make_reply(None),
        make_reply([{"type": "text", "text": "4 6\nparts"}]),
        make_reply("8/10\nso"),
        make_reply("5 6 \ud83d", usage={"prompt_tokens": None, "completion_tokens": "x"}),
        make_reply("-3 7"),
        make_reply("0 5"),
        make_reply("**7** | 7.5", usage=[1]),
    ]
    server = judge_server.serve(odd)
    judge(server, "--concurrency=1")
    scores = [row["scores"] for row in read_jsonl(tmp_path / "judge" / "replies.jsonl")]
    assert scores[:7] == [None, [4, 6], None, [5, 6], None, None, [7, 7.5]]
    assert len(server.seen) == 12 + 3
    assert "0 to ask" in judge(server).printed


SPELLINGS = [
    "8 7",
    "8, 7",
    "8/10 7/10",
    "8/10\n7/10\nBoth help.",
    "8 out of 10, 7 out of 10",
    "[8] [7]",
    "[[8]] [[7]]",
    "(8, 7)",
    "8 and 7",
    "Scores: 8 7",
    "**Final scores:**\n- Assistant 1: 8/10\n- Assistant 2: 7/10\n\nBoth help.",
    "Assistant 1: 8, Assistant 2: 7",
    "Assistant 1: 8\nAssistant 2: 7",
    "Assistant 2: 7, Assistant 1: 8",
    "**Assistant 1:** 8/10\n\n**Assistant 2:** 7/10",
    "Assistant 1's score: 8; Assistant 2's score: 7",
    "Score of assistant 1: 8, score of assistant 2: 7",
    "Answer A: 8. Answer B: 7.",
    "1. 8\n2. 7",
    '```json\n{"assistant_1": 8, "assistant_2": 7}\n```',
    "<think>Is 5 6 right? No.</think>\n\n8 7\nBoth help.",
    "The scores are 8.0 and 7.0.",
]
UNREADABLE = [
    "Both are fine.",
    "8/10",
    "8 7 6",
    "12 7",
    "8.7",
    "1. 8",
    "8/9",
    "8/20 7/20",
    "80/100 70/100",
    "8/10 or 7/10",
    "Assistant 1: 8, Assistant 1: 7",
    "Assistant 1: 0, Assistant 2: 7",
    "Assistant 1: 8",
    "Assistant 1 2",
]


@pytest.fixture
def many_problems(world, tmp_path):
    """A flag for problems enough for two questions each about every spelling."""
    count = (len(SPELLINGS) + len(UNREADABLE) + 1) // 2
    rows = []
    for row in read_jsonl(world / "data" / "prompts" / "test.jsonl")[:count]:
        rows.append({"prompt": row["input"], "category": "any"})
    path = tmp_path / "many.json"
    path.write_text(json.dumps(rows))
    return f"--problems={path}"


def test_the_usual_spellings_of_two_scores_are_read_and_no_others(judge, many_problems, tmp_path):
    replies = [make_reply(text) for text in SPELLINGS]
    for text in UNREADABLE:
        replies += [make_reply(text), make_reply("3 4")]
    judge(judge_server.serve(replies), many_problems, "--concurrency=1")
    rows = read_jsonl(tmp_path / "judge" / "replies.jsonl")
    for row, text in zip(rows, SPELLINGS):
        assert row["text"] == text
        assert row["scores"] == [8, 7], text
    for row, text in zip(rows[len(SPELLINGS) :: 2], UNREADABLE):
        assert row["text"] == text
        assert row["scores"] is None, text


def test_an_unreadable_reply_is_asked_for_once_more_with_a_reminder(judge, tmp_path):
    server = judge_server.serve(["words"] * 1000)
    printed, error = judge(server, "--concurrency=1", check=False)
    assert "no problem is judged" in error
    assert len(server.seen) == 24
    for first, second in zip(server.seen[::2], server.seen[1::2]):
        question = first[2]["messages"][-1]["content"]
        asked_again = second[2]["messages"][-1]["content"]
        assert asked_again.startswith(question)
        assert "two numbers from 1 to 10" in asked_again[len(question) :]
    assert "12 replies unread, the first: 'Both are fine.'" in printed
    summary = read_json(tmp_path / "judge" / "summary.json")
    assert summary["judged"] == 0
    everything = summary["categories"]["all"]
    assert everything["unread"] == 6
    for name in ("red", "blue", "orders agree"):
        assert everything[name] is None  # a score that nobody gave is not 0
    (line,) = [line for line in printed.splitlines() if line.startswith("all ")]
    assert line.split() == ["all", "0", "0", "0", "-", "-", "-", "0", "6", "0"]
    assert "0 to ask" in judge(server, check=False).printed
    assert len(server.seen) == 24


def test_refusals_are_counted_as_such_and_not_asked_again(judge, tmp_path):
    refusals = [
        make_reply("I\u2019m sorry, but I can't assist with that."),
        {"choices": [{"message": {"content": None, "refusal": "No."}}]},
        None,
        {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
    ]
    server = judge_server.serve(refusals)
    printed = judge(server, "--concurrency=1").printed
    assert len(server.seen) == 12
    assert "3 replies refused" in printed
    summary = read_json(tmp_path / "judge" / "summary.json")
    assert summary["judged"] == 4
    assert summary["categories"]["all"]["refused"] == 2
    assert summary["categories"]["all"]["unread"] == 0


def find_most(printed):
    """The dollars that the judge said it may cost at most."""
    return float(re.search(r"at most \$([\d.]+)", printed)[1])


PRICES = ["--input_price=1000", "--output_price=1000"]


def sum_dollars(rows):
    tokens = 0
    for row in rows:
        tokens += row["usage"]["prompt_tokens"] + row["usage"]["completion_tokens"]
    return tokens * 1000 / 1e6


def test_the_price_that_is_printed_before_includes_the_second_questions(judge, tmp_path):
    usage = {"prompt_tokens": 400, "completion_tokens": 300}
    server = judge_server.serve([make_reply("Both are fine.", usage=usage)] * 1000)
    printed = judge(server, *PRICES, check=False).printed
    assert len(server.seen) == 24
    assert {body["max_tokens"] for _, _, body in server.seen} == {300}
    spent = sum_dollars(read_jsonl(tmp_path / "judge" / "replies.jsonl"))
    assert spent <= find_most(printed)
    size = sum(len(body["messages"][-1]["content"]) for _, _, body in server.seen)
    assert find_most(printed) >= (size + 24 * 300) * 1000 / 1e6


def test_asking_stops_at_the_price_that_was_agreed_to(judge, tmp_path):
    expensive = {"prompt_tokens": 400, "completion_tokens": 20000}  # more than it was allowed
    server = judge_server.serve([make_reply("8 7", usage=expensive)] * 1000)
    printed, error = judge(server, *PRICES, "--concurrency=1", check=False)
    assert "the price that was agreed to is spent" in error
    rows = read_jsonl(tmp_path / "judge" / "replies.jsonl")
    assert sum_dollars(rows[:-1]) <= find_most(printed)
    assert len(server.seen) == len(rows) < 12


def test_a_reply_that_is_lost_on_its_way_may_have_been_paid_for(judge):
    server = judge_server.serve(["drop"] * 1000)
    error = judge(server, check=False).error
    assert "the price that was agreed to is spent" in error
    assert len(server.seen) <= 24


def test_replies_about_other_answers_do_not_count(judge, world, tmp_path):
    judge(judge_server.serve())
    (tmp_path / "judge" / "answers.jsonl").unlink()
    server = judge_server.serve()
    judge(server, f"--red={world}/policy", f"--blue={world}/policy", "--temperature=1.0")
    assert server.seen


def test_a_line_that_breaks_off_is_removed_from_the_replies(judge, tmp_path):
    path = tmp_path / "judge" / "replies.jsonl"
    for _ in range(3):
        judge(judge_server.serve())
        with open(path, "r+b") as f:
            f.truncate(path.stat().st_size - 20)
    with open(path) as f:
        whole = [line for line in f if line.endswith("\n")]
    assert len(whole) >= 5
    for line in whole:
        json.loads(line)


@pytest.mark.slow
def test_judging_under_torchrun(judge_flags, tmp_path, monkeypatch):
    server = judge_server.serve()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    run("-m", "nanosafe.eval.judge", *judge_flags, ranks=2)
    assert len(server.seen) == 12
    assert len(read_jsonl(tmp_path / "judge" / "verdicts.jsonl")) == 6


def test_money_is_spent_only_after_a_yes_at_a_terminal(judge):
    server = judge_server.serve()
    printed, error = judge(server, "--yes=False", check=False, stdin="y\n")  # over a pipe
    assert "--yes=True" in error
    assert "$" in printed
    assert not server.seen


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "must be a list"),
        ('[{"prompt": "x"}]', "must be a list"),
        ('{"prompt": "x", "category": "a"}', "must be a list"),
        ("{", "cannot be read"),
        ('[{"prompt": " ", "category": "a"}]', "must be"),
    ],
)
def test_problems_of_the_wrong_structure_are_one_line(content, words, judge, problems):
    problems.write_text(content)
    assert words in judge("http://127.0.0.1:9/v1", check=False).error


def test_answers_of_other_policies_are_not_mixed(judge, world):
    server = judge_server.serve()
    judge(server)
    error = judge(server, f"--blue={world}/policy", check=False).error
    assert "choose another out_dir" in error


def test_the_projects_own_problems():
    with open(os.path.join(ROOT, "nanosafe", "eval", "problems.json")) as f:
        rows = json.load(f)
    assert len({row["prompt"] for row in rows}) == len(rows) >= 64
    categories = [row["category"] for row in rows]
    assert set(categories) == {
        "Social Bias",
        "Crime",
        "Privacy",
        "Emotional Harm",
        "Physical Harm",
        "Insult",
        "Immoral",
        "Pornographic",
    }
    for category in set(categories):
        assert categories.count(category) == 8


# ---- bigbench ----


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of choices and a task of texts."""
    folder = tmp_path / "tasks"
    (folder / "choice").mkdir(parents=True)
    examples = []
    for i, verb in enumerate(("fix", "wash", "paint", "sew")):
        scores = {"With a hammer.": i % 2, "With soap.": 1 - i % 2, "So.": 0}
        examples.append({"input": f"How do I {verb} it?", "target_scores": scores})
    choice = {
        "name": "choice",
        "metrics": ["multiple_choice_grade", "expected_calibration_error", "bleu"],
        "preferred_score": "x",
        "examples": examples,
    }
    (folder / "choice" / "task.json").write_text(json.dumps(choice))
    text = {
        "metrics": ["exact_str_match"],
        "examples": [
            {"input": "Say so", "target": ["so", "So."]},
            {"input": "Say no", "target": "no"},
        ],
    }
    (folder / "text.json").write_text(json.dumps(text))
    return folder


def sum_logps(model, tok, prompt, choice):
    """log p(choice | prompt) by a forward of its own."""
    prompt_ids = tok.encode("", bos=True) + tok.encode_suffix(prompt.rstrip(" "))
    ids = prompt_ids + tok.encode_suffix(" " + choice)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        logps = model(torch.tensor(ids), cu_seqlens, len(ids)).log_softmax(-1)
    return sum(float(logps[t - 1, ids[t]]) for t in range(len(prompt_ids), len(ids)))


@pytest.fixture
def bigbench(call, world, tasks, tmp_path):
    """What bigbench prints about the tasks, and the folder of its results."""
    printed = call(
        "bigbench",
        f"--model={world}/policy",
        f"--tasks={tasks}",
        "--shots=1",
        f"--out_dir={tmp_path}/out",
        "--max_new_tokens=8",
        "--max_tokens=400",
    ).printed
    return printed, tmp_path / "out"


def test_choices_are_scored_by_their_log_probability(bigbench, tasks, world):
    printed, folder = bigbench
    assert "bleu" in printed
    assert "not computed" in printed
    result = read_json(folder / "choice" / "results.json")
    tok, model = tokenizer.load(world / "policy"), checkpoint.load(world / "policy")
    examples = read_json(tasks / "choice" / "task.json")["examples"]
    grades, briers, confidences = [], [], []
    for query, example in zip(result["queries"], examples):
        prompt, targets = query["prompt"], example["target_scores"]
        assert prompt.count("\nQ: ") == 2
        assert prompt.endswith("\nA: ")
        question = prompt.split("\nQ: ")[-1]
        logps = {}
        for choice in targets:
            assert question.count("\n  choice: " + choice) == 1
            logps[choice] = sum_logps(model, tok, prompt, choice)
        assert query["log_probabilities"] == pytest.approx(logps, abs=1e-3)
        grades.append(targets[max(logps, key=logps.get)])
        total = sum(math.exp(logp) for logp in logps.values())
        squares = []
        for choice, target in targets.items():
            squares.append((math.exp(logps[choice]) / total - target) ** 2)
        briers.append(np.mean(squares))
        confidences.append(math.exp(max(logps.values())) / total)
    correct = [grade == 1 for grade in grades]
    error = measure_calibration(confidences, correct).error
    assert result["metrics"]["expected_calibration_error"] == pytest.approx(error, abs=1e-3)
    measured = np.mean([query["brier"] for query in result["queries"]])
    assert measured == pytest.approx(np.mean(briers), abs=1e-3)
    assert result["metrics"]["multiple_choice_grade"] == np.mean(grades)
    assert result["not_computed"] == ["bleu"]


def test_texts_are_compared_with_the_targets(bigbench):
    _, folder = bigbench
    result = read_json(folder / "text.json" / "results.json")
    hits = [query["text"].strip() in query["targets"] for query in result["queries"]]
    assert result["metrics"]["exact_str_match"] == np.mean(hits)
    for query in result["queries"]:
        assert "\n" not in query["text"].strip()


def test_a_text_is_a_hit_when_it_is_one_of_the_targets(call, world, tasks, tmp_path):
    flags = [f"--model={world}/policy", f"--tasks={tasks}/text.json", "--max_new_tokens=8"]
    call("bigbench", *flags, f"--out_dir={tmp_path}/a")
    queries = read_json(tmp_path / "a" / "text.json" / "results.json")["queries"]
    generated = queries[0]["text"].strip()
    task = {
        "examples": [
            {"input": "Say so", "target": ["x", f" {generated} "]},
            {"input": "Say no", "target": "no"},
        ]
    }
    (tasks / "text.json").write_text(json.dumps(task))
    call("bigbench", *flags, f"--out_dir={tmp_path}/b")
    metrics = read_json(tmp_path / "b" / "text.json" / "results.json")["metrics"]
    assert metrics["exact_str_match"] == 0.5


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read"),
        ("[]", "no list of examples"),
        ('{"examples": []}', "no list of examples"),
        ('{"examples": [{"input": "x"}]}', "example 0"),
        ('{"examples": [{"input": "x", "target_scores": {"a": 1}}]}', "example 0"),
        ('{"examples": [{"input": "x", "target": [1]}]}', "example 0"),
        ('{"examples": ["x"]}', "example 0"),
        ('{"examples": [{"input": "x", "target_scores": {"a": "b", "c": 1}}]}', "example 0"),
        ('{"examples": [{"input": "x", "target_scores": ["a", "b"]}]}', "example 0"),
        ('{"examples": [{"input": "x", "target": "y"}], "metrics": "bleu"}', "metrics"),
        ('{"examples": [{"input": "x", "target": "y"}], "task_prefix": 1}', "task_prefix"),
        ('{"examples": [{"input": "x", "target": "y"}], "output_regex": "("}', "output_regex"),
    ],
)
def test_tasks_of_the_wrong_structure_are_one_line(content, words, call, world, tmp_path):
    (tmp_path / "t.json").write_text(content)
    flags = [f"--model={world}/policy", f"--tasks={tmp_path}/t.json", f"--out_dir={tmp_path}/o"]
    assert words in call("bigbench", *flags, check=False).error


def test_an_empty_folder_of_tasks_is_one_line(call, world, tmp_path):
    flags = [f"--model={world}/policy", f"--tasks={tmp_path}"]
    assert "no NAME/task.json" in call("bigbench", *flags, check=False).error


# ---- a policy whose weights are broken ----


@pytest.fixture
def broken(world, tmp_path):
    """The folder of a policy whose output embedding is nan."""
    model = checkpoint.load(world / "policy")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    checkpoint.save(model, tmp_path / "broken", tokenizer.load(world / "policy"))
    return tmp_path / "broken"


def test_a_policy_of_nan_is_not_judged(arena, judge, call, broken, world, tasks, tmp_path):
    words = f"{str(broken)!r} gives logits that are not finite: its weights are broken"
    assert words in arena(f"--models=A={world}/policy,B={broken}", check=False).error
    assert not (tmp_path / "arena" / "summary.json").exists()
    server = judge_server.serve()
    assert words in judge(server, f"--blue={broken}", check=False).error
    assert not server.seen
    flags = [f"--model={broken}", f"--tasks={tasks}/choice", "--max_new_tokens=8"]
    error = call("bigbench", *flags, f"--out_dir={tmp_path}/out", check=False).error
    assert "gives probabilities that are not numbers: its weights are broken" in error
