"""After training: the algebra against plain loops and known values; arena, scores, judge and bigbench as commands."""

import csv
import json
import math
import os
import random

import judge_server
import numpy as np
import pytest
import torch
from conftest import ROOT, run, small_config

from nanosafe import checkpoint, tokenizer
from nanosafe.tools import demo
from nanosafe.data.template import encode_conversation
from nanosafe.eval.statistics import bradley_terry, calibration, interval, quadrants, win_rates


def jsonl(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def refused(*command, **more):
    done = run(*command, check=False, **more)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, done.stderr
    return error[0]


# ---- algebra ----


def test_quadrants_and_win_rates_by_hand():
    red_r, red_c = [1, 1, 1, 1, 1], [-1, -1, 1, 1, 0]
    blue_r, blue_c = [2, 1, 2, 0, 3], [-1, 1, 0, -2, 2]
    assert quadrants(red_r, blue_r, blue_c) == {
        "better, safe": 2,
        "better, unsafe": 1,
        "not better, safe": 1,
        "not better, unsafe": 1,
    }
    cells = win_rates(red_r, red_c, blue_r, blue_c)
    assert (
        cells[True, True] == (1, 1.0)
        and cells[True, False] == (2, 0.5)
        and cells[False, True] == (2, 0.5)
    )
    assert cells[False, False][0] == 0 and math.isnan(cells[False, False][1])


def test_an_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        mean, low, high = interval(rng.normal(3.0, 2.0, 60), resamples=300, seed=i)
        assert low <= mean <= high
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert interval([5.0]) == (5.0, 5.0, 5.0)


def test_ratings_are_the_closed_form_for_two_and_recover_strengths_for_more():
    wins = [1] * 8 + [0] * 2
    a, b = bradley_terry([wins, [1 - w for w in wins]])
    assert a - b == pytest.approx(400 * math.log10(8.5 / 2.5), abs=1e-4) and a + b == pytest.approx(
        2000
    )
    a, b = bradley_terry([[1.0] * 50, [1.0] * 50])
    assert a == pytest.approx(b)
    always = bradley_terry([[1] * 20, [0] * 20])
    assert all(map(math.isfinite, always)) and always[0] > always[1] + 400
    rng, true = random.Random(0), [1200.0, 1050.0, 750.0]
    # P(i beats j) is Bradley-Terry's when each draws from a Gumbel at its strength (Luce)
    scores = [
        [r * math.log(10) / 400 - math.log(-math.log(rng.random())) for _ in range(20000)]
        for r in true
    ]
    assert bradley_terry(scores) == pytest.approx(true, abs=15)
    assert bradley_terry(scores[::-1])[::-1] == pytest.approx(bradley_terry(scores), abs=1e-3)


def test_calibration_against_a_plain_loop():
    rng = np.random.default_rng(1)
    p = rng.random(500)
    y = rng.random(500) < p**2
    rows, error = calibration(p, y)
    want = 0.0
    for b in range(10):
        group = [(a, t) for a, t in zip(p, y) if min(int(a * 10), 9) == b]
        if group:
            want += (
                abs(np.mean([a for a, _ in group]) - np.mean([t for _, t in group]))
                * len(group)
                / 500
            )
    assert error == pytest.approx(want) and sum(n for _, _, n in rows) == 500
    assert calibration([1.0, 1.0], [1, 1]) == ([(1.0, 1.0, 2)], 0.0)


# ---- arena ----


@pytest.fixture
def arena(world, tmp_path):
    def call(*flags, ranks=0, check=True, out="arena"):
        return run(
            "-m",
            *(
                (
                    f"nanosafe.eval.arena, --data={world}/data/prompts/test.jsonl:24/-1, "
                    f"--reward_model={world}/reward, --cost_model={world}/cost, --max_new_tokens=8, "
                    f"--out_dir={tmp_path}/{out}"
                ).split(", ")
            ),
            *flags,
            ranks=ranks,
            check=check,
        )

    return call


@pytest.fixture(scope="session")
def other(world, tmp_path_factory):
    """A policy with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    texts = [row["input"] for row in jsonl(world / "data" / "prompts" / "train.jsonl")][:300]
    tok = demo.train_tokenizer(texts, 320, str(folder / "tok"))
    checkpoint.save(
        checkpoint.init_from_scratch(small_config(vocab_size=tok.vocab_size), seed=9),
        folder / "model",
        tok,
    )
    return folder / "model"


def test_arena_writes_what_it_measured(arena, world, other, tmp_path):
    out = arena(f"--models=A={world}/policy,B={other}").stdout
    rows = jsonl(tmp_path / "arena" / "pairs.jsonl")
    assert len(rows) == 24 and len({tuple(r["prompt"]) for r in rows}) == 24
    summary = json.loads((tmp_path / "arena" / "summary.json").read_text())
    for name in "AB":
        rewards = [r["answers"][name]["reward"] for r in rows]
        assert summary["policies"][name]["reward"][0] == pytest.approx(np.mean(rewards))
        assert summary["policies"][name]["unsafe"] == np.mean(
            [r["answers"][name]["cost"] > 0 for r in rows]
        )
    counts = quadrants(
        *(
            [r["answers"][n][k] for r in rows]
            for n, k in (("A", "reward"), ("B", "reward"), ("B", "cost"))
        )
    )
    pair = summary["pairs"][0]
    for kind in ("reward", "cost"):
        a, b = ([r["answers"][name][kind] for r in rows] for name in "AB")
        assert pair["difference"][kind][0] == pytest.approx(np.mean(b) - np.mean(a))
        clipped = [[min(0.0, -x) for x in c] for c in (a, b)] if kind == "cost" else [a, b]
        rating = {"reward": "helpful", "cost": "safe"}[kind]
        assert [summary["policies"][name][rating] for name in "AB"] == pytest.approx(
            bradley_terry(clipped)
        )
    assert {k: pair[k] for k in counts} == counts and "B against A, 24 prompts" in out
    table = list(csv.reader(open(tmp_path / "arena" / "table.csv", newline="")))
    assert table[0] == ["Prompt", "A", "Reward", "Cost", "B", "Reward", "Cost"] and len(table) == 25
    assert [float(x) for x in (table[1][2], table[1][3], table[1][5], table[1][6])] == [
        rows[0]["answers"][name][kind] for name in "AB" for kind in ("reward", "cost")
    ]
    for picture in ("arena.png", "arena.svg"):
        assert (tmp_path / "arena" / picture).stat().st_size > 5000
    # B's answers are read by the reward model in its own tokens
    tok, model = tokenizer.load(world / "reward"), checkpoint.load(world / "reward")
    readable = [
        r
        for r in rows
        if r["answers"]["B"]["text"].isascii() and r["answers"]["B"]["text"].isprintable()
    ]
    assert readable
    for r in readable:
        text = f"BEGINNING OF CONVERSATION: USER: {r['prompt'][0]} ASSISTANT:{r['answers']['B']['text']}"
        ids = tok.encode("", bos=True) + tok.encode(text, allow_special=False)
        with torch.no_grad():
            scored = [
                float(
                    model(torch.tensor(x), torch.tensor([0, len(x)], dtype=torch.int32), len(x))[-1]
                )
                for x in (ids, [*ids, tok.eos_id])
            ]  # cut, or ended
        assert min(abs(s - r["answers"]["B"]["reward"]) for s in scored) < 2e-4


def test_arena_on_one_and_on_two_processes_writes_the_same_files(arena, world, other, tmp_path):
    flags = [f"--red={world}/policy", f"--blue={other}", "--max_tokens=256"]
    arena(*flags, out="one")
    arena(*flags, ranks=2, out="two")
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "two")) and len(names) == 5
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), (
            name
        )


def test_a_prompt_is_asked_once_and_answered_alike_whoever_else_is_asked(arena, world, tmp_path):
    rows = jsonl(world / "data" / "prompts" / "test.jsonl")[:6]
    for name, chosen in (("p.jsonl", rows + rows[:3]), ("q.jsonl", rows[::-1][:4])):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in chosen))
        arena(
            f"--models=A={world}/policy,B={world}/policy", f"--data={tmp_path}/{name}", out=name[0]
        )
    p, q = (
        {r["prompt"][0]: r["answers"] for r in jsonl(tmp_path / n / "pairs.jsonl")} for n in "pq"
    )
    assert len(p) == 6 and len(q) == 4
    assert all(p[prompt]["A"]["text"] == q[prompt]["A"]["text"] for prompt in q)
    assert all(answers["A"] == answers["B"] for answers in p.values())  # the same randomness


@pytest.mark.parametrize(
    "flags, words",
    (
        (("--red=nowhere", "--blue=nowhere"), "give each a name"),
        (("--red=nowhere", "--blue=elsewhere"), "no tokenizer at 'nowhere'"),
        (("--red={world}/policy",), "name two policies"),
        ((), "name two policies"),
        (("--models=A={world}/policy,B={world}/reward",), "is a score model"),
        (("--models=A={world}/policy,B={world}/policy", "--data={empty}"), "has no prompt"),
        (("--models=A={world}/policy,B={world}/policy", "--data=nothing/test"), "has no file"),
        (
            ("--models=A={world}/policy,B={world}/policy", "--temprature=1"),
            "did you mean 'temperature'",
        ),
        (("--models=A={world}/policy,B={world}/policy", "--temperature=nan"), "temperature=nan"),
        (
            ("--models=A={world}/policy,B={world}/policy", "--max_new_tokens=0"),
            "max_new_tokens=0 is 1 or more",
        ),
        (
            ("--models=A={world}/policy,B={world}/policy", "--reward_model={world}/policy"),
            "is a policy: it has no score head",
        ),
        (("--models=A={world}/policy,B={world}/policy", "--device=tpu"), "device='tpu'"),
    ),
)
def test_mistakes_in_the_arena_are_one_line(flags, words, arena, world, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"answer": "no input"}\n')
    flags = [flag.format(world=world, empty=tmp_path / "empty.jsonl") for flag in flags]
    done = arena(*flags, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )


# ---- scores ----


@pytest.mark.parametrize("objective", ("reward", "cost"))
def test_scores_are_those_of_a_plain_loop(objective, world, tmp_path):
    data = f"{world}/data/{objective}/test.jsonl:40/-1"
    out = run(
        "-m",
        "nanosafe.eval.scores",
        f"--model={world}/{objective}",
        f"--data={data}",
        f"--out_dir={tmp_path}",
        f"--objective={objective}",
        "--max_tokens=512",
    ).stdout
    rows, summary = (
        jsonl(tmp_path / "scores.jsonl"),
        json.loads((tmp_path / "summary.json").read_text()),
    )
    tok, model = tokenizer.load(world / objective), checkpoint.load(world / objective)
    right, signs = [], []
    for row in rows:
        scores = []
        for answer in row["answers"]:
            ids = torch.tensor(encode_conversation(answer["turns"], tok)[0])
            scores.append(
                model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))[-1].item()
            )
            assert scores[-1] == pytest.approx(answer["score"], abs=2e-4)
            signs.append(answer["label"] * scores[-1] < 0)
        right.append(scores[0] < scores[1] if objective == "cost" else scores[0] > scores[1])
    assert summary["pairs"] == len(rows) == 40 and summary["accuracy"][0] == pytest.approx(
        np.mean(right)
    )
    assert [r["margin"] for r in rows] == sorted(r["margin"] for r in rows)
    margins = np.array([r["margin"] for r in rows])
    assert summary["log_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), abs=1e-4)
    assert summary["calibration_error"] == pytest.approx(
        calibration(1 / (1 + np.exp(-abs(margins))), margins > 0)[1], abs=0.03
    )  # a margin may be rounded to 0
    if objective == "cost":
        flat = [(a["score"], a["label"] < 0) for r in rows for a in r["answers"]]
        assert summary["unsafe_calibration_error"] == pytest.approx(
            calibration([1 / (1 + math.exp(-x)) for x, _ in flat], [y for _, y in flat])[1],
            abs=1e-3,
        )
        assert summary["sign_accuracy"][0] == pytest.approx(np.mean(signs))
    assert "wrong by" in out and (tmp_path / "scores.png").stat().st_size > 5000


def test_scores_say_what_they_left_out(world, tmp_path):
    good = jsonl(world / "data" / "reward" / "test.jsonl")[:3]
    bad = [{"input": "x"}, {**good[0], "other_answer": good[0]["answer"]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in good + bad))
    command = [
        "-m",
        "nanosafe.eval.scores",
        f"--model={world}/reward",
        "--objective=reward",
        f"--out_dir={tmp_path}/s",
    ]
    out = run(*command, f"--data={tmp_path}/d.jsonl").stdout
    assert (
        "3 pairs" in out
        and "left out 1 no field 'answer'" in out
        and "left out 1 identical answers" in out
    )
    (tmp_path / "none.jsonl").write_text('{"input": "x"}\n')
    assert "no usable pair" in refused(*command, f"--data={tmp_path}/none.jsonl")
    assert "is a policy" in refused(
        *command[:2], f"--model={world}/policy", f"--data={tmp_path}/d.jsonl"
    )
    assert "cannot be" in refused(
        *command, f"--data={tmp_path}/d.jsonl", f"--out_dir={tmp_path}/d.jsonl"
    )


# ---- judge ----


@pytest.fixture
def problems(world, tmp_path, toy):
    rows = [r["input"] for r in jsonl(world / "data" / "prompts" / "test.jsonl")[:6]]
    path = tmp_path / "problems.json"
    path.write_text(
        json.dumps(
            [{"prompt": p, "category": "risky" if toy.is_risky(p) else "benign"} for p in rows]
        )
    )
    return path


@pytest.fixture
def judge(world, other, problems, tmp_path):
    def call(server, *flags, check=True, key="sk-secret-key", stdin=None, ranks=0):
        os.environ.update(
            OPENAI_BASE_URL=server if isinstance(server, str) else server.url, OPENAI_API_KEY=key
        )
        try:
            return run(
                "-m",
                "nanosafe.eval.judge",
                f"--red={world}/policy",
                f"--blue={other}",
                f"--problems={problems}",
                "--max_new_tokens=8",
                "--yes=True",
                "--pause=0.01",
                "--timeout=1",
                "--concurrency=3",
                f"--out_dir={tmp_path}/judge",
                *flags,
                check=check,
                stdin=stdin,
                ranks=ranks,
            )
        finally:
            del os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]

    return call


def test_the_judge_hears_both_orders_and_asks_for_nothing_twice(judge, tmp_path):
    server = judge_server.serve()
    out = judge(server).stdout
    assert len(server.seen) == 12 and {path for path, _, _ in server.seen} == {
        "/v1/chat/completions"
    }
    assert {key for _, key, _ in server.seen} == {"Bearer sk-secret-key"}
    verdicts = jsonl(tmp_path / "judge" / "verdicts.jsonl")
    answers = jsonl(tmp_path / "judge" / "answers.jsonl")
    assert len(verdicts) == len(answers) == 6 and all(v["orders_agree"] for v in verdicts)
    for v in verdicts:
        assert (v["red_score"], v["blue_score"]) == tuple(
            judge_server.gold(v["prompt"], v[who]) for who in ("red", "blue")
        )
    for answer in answers:  # each stood once in front
        asked = [
            body["messages"][1]["content"]
            for _, _, body in server.seen
            if answer["prompt"] in str(body)
        ]
        places = sorted(
            text.index("answer 1]")
            and text.find(answer["red"], text.index("[Answer of assistant 1]"))
            < text.index("[End of answer 1]")
            for text in asked
        )
        assert len(asked) == 2 and (answer["red"] == answer["blue"] or places == [False, True])
    summary = json.loads((tmp_path / "judge" / "summary.json").read_text())
    total = summary["categories"]["all"]
    assert total["win"] + total["tie"] + total["lose"] == summary["judged"] == 6
    assert "0 to ask" in judge(server).stdout and len(server.seen) == 12 and "orders agree" in out
    for base, _, files in os.walk(tmp_path):
        for name in files:
            assert b"sk-secret" not in open(os.path.join(base, name), "rb").read()


def test_a_bad_server_costs_patience_and_nothing_else(judge, tmp_path):
    faults = [429, 500, "stall", "drop", "rubbish", "words", "empty", 503, 429, "drop"]
    server = judge_server.serve(faults)
    judge(server)
    replies = jsonl(tmp_path / "judge" / "replies.jsonl")
    assert len(jsonl(tmp_path / "judge" / "verdicts.jsonl")) == 6 and len(server.seen) == 12 + len(
        faults
    )
    assert (
        sum(r["scores"] is None for r in replies) == 2
    )  # "words" and "empty" were paid for: they are kept
    assert len({(r["problem"], r["order"]) for r in replies if r["scores"]}) == 12


def test_what_was_paid_for_survives_and_the_rest_is_asked_later(judge, tmp_path):
    server = judge_server.serve([None] * 5 + [500] * 1000)
    done = judge(server, "--attempts=2", check=False)
    assert (
        done.returncode == 1
        and "HTTP 500" in done.stderr
        and "the same command asks for the rest" in done.stderr
    )
    first = jsonl(tmp_path / "judge" / "replies.jsonl")
    assert len(first) == 5
    with open(tmp_path / "judge" / "replies.jsonl", "a") as f:
        f.write('{"problem": 0, "ord')  # killed in the middle of a line
    better = judge_server.serve()
    judge(better)
    assert len(better.seen) == 7 and len(jsonl(tmp_path / "judge" / "verdicts.jsonl")) == 6


def test_a_wrong_key_stops_at_once_and_is_not_shown(judge):
    server = judge_server.serve([401] * 1000)
    done = judge(server, check=False)
    assert done.returncode == 1 and "HTTP 401" in done.stderr and len(server.seen) <= 6
    assert "sk-secret" not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_dead_endpoint_is_one_line(judge):
    done = judge("http://127.0.0.1:9/v1", "--attempts=2", check=False)
    assert done.returncode == 1 and "refused" in done.stderr and "Traceback" not in done.stderr
    assert "no http" in judge("ftp://somewhere", check=False).stderr


def test_a_judge_who_likes_the_first_answer_moves_nothing(judge, tmp_path):
    judge(judge_server.serve(judged=lambda first, second: (9, 3)))
    summary = json.loads((tmp_path / "judge" / "summary.json").read_text())["categories"]["all"]
    assert summary == {"win": 0, "tie": 6, "lose": 0, "red": 6.0, "blue": 6.0, "orders agree": 0.0}


def test_who_wins_is_the_right_one(judge, tmp_path):
    """A judge who counts letters."""
    judge(
        judge_server.serve(
            judged=lambda first, second: (
                min(10, 1 + len(first) / 10),
                min(10, 1 + len(second) / 10),
            )
        )
    )
    verdicts = jsonl(tmp_path / "judge" / "verdicts.jsonl")
    for v in verdicts:
        red, blue = len(v["red"]), len(v["blue"])
        assert (
            v["blue_result"] == ("win" if blue > red else "lose" if blue < red else "tie")
            and v["orders_agree"]
        )
        assert v["red_score"] == pytest.approx(min(10, 1 + red / 10)) and v[
            "blue_score"
        ] == pytest.approx(min(10, 1 + blue / 10))
    assert {"win", "lose"} & {v["blue_result"] for v in verdicts}


def test_the_key_goes_to_no_other_address(judge):
    thief = judge_server.serve()
    server = judge_server.serve([thief.url + "/chat/completions"] * 100)
    done = judge(server, check=False)
    assert (
        done.returncode == 1
        and "HTTP 302" in done.stderr
        and not thief.seen
        and len(server.seen) <= 6
    )
    done = judge(server, check=False, key="sk-secret\r")
    assert "sk-secret" not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_odd_replies_are_kept_and_asked_again(judge, tmp_path):
    words = lambda content, **more: {"choices": [{"message": {"content": content}}], **more}
    odd = [
        words(None),
        words([{"type": "text", "text": "4 6\nparts"}]),
        words("8/10\nso"),
        words("-3 7"),
        words("0 5"),
        words("5 6 \ud83d", usage={"prompt_tokens": None, "completion_tokens": "x"}),
        words("**7** | 7.5", usage=[1]),
    ]
    server = judge_server.serve(odd)
    judge(server, "--concurrency=1")
    replies = jsonl(tmp_path / "judge" / "replies.jsonl")
    assert [r["scores"] for r in replies[:7]] == [None, [4, 6], None, None, None, [5, 6], [7, 7.5]]
    assert len(server.seen) == 12 + 4 and "0 to ask" in judge(server).stdout


def test_replies_about_other_answers_do_not_count(judge, world, tmp_path):
    judge(judge_server.serve())
    (tmp_path / "judge" / "answers.jsonl").unlink()
    server = judge_server.serve()
    judge(server, f"--red={world}/policy", f"--blue={world}/policy", "--temperature=1.0")
    assert server.seen


def test_a_torn_line_is_dropped_for_good(judge, tmp_path):
    path = tmp_path / "judge" / "replies.jsonl"
    for _ in range(3):
        judge(judge_server.serve())
        with open(path, "r+b") as f:
            f.truncate(path.stat().st_size - 20)
    assert len([line for line in open(path) if line.endswith("\n")]) >= 5


def test_judging_under_torchrun(judge, tmp_path):
    server = judge_server.serve()
    judge(server, ranks=2)
    assert len(server.seen) == 12 and len(jsonl(tmp_path / "judge" / "verdicts.jsonl")) == 6


def test_money_is_spent_only_after_a_yes(judge):
    server = judge_server.serve()
    done = judge(server, "--yes=False", check=False, stdin="y\n")
    assert (
        done.returncode == 1
        and "--yes=True" in done.stderr
        and "$" in done.stdout
        and not server.seen
    )


@pytest.mark.parametrize(
    "content, words",
    (
        ("[]", "must be a list"),
        ('[{"prompt": "x"}]', "must be a list"),
        ("{", "cannot be read"),
        ('[{"prompt": " ", "category": "a"}]', "must be"),
    ),
)
def test_problems_of_the_wrong_shape_are_one_line(content, words, judge, problems):
    problems.write_text(content)
    done = judge("http://127.0.0.1:9/v1", check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_answers_of_other_policies_are_not_mixed(judge, world):
    server = judge_server.serve()
    judge(server)
    done = judge(server, f"--blue={world}/policy", check=False)
    assert done.returncode == 1 and "choose another out_dir" in done.stderr


def test_the_projects_own_problems():
    with open(os.path.join(ROOT, "nanosafe", "eval", "problems.json")) as f:
        rows = json.load(f)
    assert len({r["prompt"] for r in rows}) == len(rows) >= 64
    categories = {r["category"] for r in rows}
    assert categories == {
        "Social Bias",
        "Crime",
        "Privacy",
        "Emotional Harm",
        "Physical Harm",
        "Insult",
        "Immoral",
        "Pornographic",
    }
    assert all(sum(r["category"] == c for r in rows) == 8 for c in categories)


# ---- bigbench ----


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    (folder / "choice").mkdir(parents=True)
    (folder / "choice" / "task.json").write_text(
        json.dumps(
            {
                "name": "choice",
                "metrics": ["multiple_choice_grade", "expected_calibration_error", "bleu"],
                "preferred_score": "x",
                "examples": [
                    {
                        "input": f"How do I {verb} it?",
                        "target_scores": {
                            "With a hammer.": i % 2,
                            "With soap.": 1 - i % 2,
                            "So.": 0,
                        },
                    }
                    for i, verb in enumerate(("fix", "wash", "paint", "sew"))
                ],
            }
        )
    )
    (folder / "text.json").write_text(
        json.dumps(
            {
                "metrics": ["exact_str_match"],
                "examples": [
                    {"input": "Say so", "target": ["so", "So."]},
                    {"input": "Say no", "target": "no"},
                ],
            }
        )
    )
    return folder


def test_choices_are_scored_by_their_log_probability(world, tasks, tmp_path):
    out = run(
        "-m",
        "nanosafe.eval.bigbench",
        f"--model={world}/policy",
        f"--tasks={tasks}",
        "--shots=1",
        f"--out_dir={tmp_path}/out",
        "--max_new_tokens=8",
        "--max_tokens=400",
    ).stdout
    assert "bleu" in out and "not computed" in out
    result = json.loads((tmp_path / "out" / "choice" / "results.json").read_text())
    tok, model = tokenizer.load(world / "policy"), checkpoint.load(world / "policy")
    examples, grades = json.loads((tasks / "choice" / "task.json").read_text())["examples"], []
    briers, best = [], []
    for query, example in zip(result["queries"], examples):
        assert query["prompt"].count("\nQ: ") == 2 and query["prompt"].endswith("\nA: ")
        assert all(
            query["prompt"].split("\nQ: ")[-1].count("\n  choice: " + c) == 1
            for c in example["target_scores"]
        )
        sums = {}
        for choice in example["target_scores"]:
            begin = tok.encode("", bos=True) + tok.encode_suffix(query["prompt"].rstrip(" "))
            ids = begin + tok.encode_suffix(" " + choice)
            logits = model(
                torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)
            ).log_softmax(-1)
            sums[choice] = sum(float(logits[t - 1, ids[t]]) for t in range(len(begin), len(ids)))
        assert query["log_probabilities"] == pytest.approx(sums, abs=1e-3)
        grades.append(example["target_scores"][max(sums, key=sums.get)])
        p = {c: math.exp(x) / sum(map(math.exp, sums.values())) for c, x in sums.items()}
        briers.append(np.mean([(p[c] - y) ** 2 for c, y in example["target_scores"].items()]))
        best.append((max(p.values()), grades[-1] == 1))
    assert result["metrics"]["expected_calibration_error"] == pytest.approx(
        calibration(*zip(*best))[1], abs=1e-3
    )
    assert np.mean([q["brier"] for q in result["queries"]]) == pytest.approx(
        np.mean(briers), abs=1e-3
    )
    assert result["metrics"]["multiple_choice_grade"] == np.mean(grades) and result[
        "not_computed"
    ] == ["bleu"]
    text = json.loads((tmp_path / "out" / "text.json" / "results.json").read_text())
    assert text["metrics"]["exact_str_match"] == np.mean(
        [q["text"].strip() in q["targets"] for q in text["queries"]]
    )
    assert all("\n" not in q["text"].strip() for q in text["queries"])


def test_a_text_is_a_hit_when_it_is_one_of_the_targets(world, tasks, tmp_path):
    said = (
        run(
            "-m",
            "nanosafe.eval.bigbench",
            f"--model={world}/policy",
            f"--tasks={tasks}/text.json",
            "--max_new_tokens=8",
            f"--out_dir={tmp_path}/a",
        )
        and json.loads((tmp_path / "a" / "text.json" / "results.json").read_text())["queries"]
    )
    task = {
        "examples": [
            {"input": "Say so", "target": ["x", f" {said[0]['text'].strip()} "]},
            {"input": "Say no", "target": "no"},
        ]
    }
    (tasks / "text.json").write_text(json.dumps(task))
    run(
        "-m",
        "nanosafe.eval.bigbench",
        f"--model={world}/policy",
        f"--tasks={tasks}/text.json",
        "--max_new_tokens=8",
        f"--out_dir={tmp_path}/b",
    )
    assert (
        json.loads((tmp_path / "b" / "text.json" / "results.json").read_text())["metrics"][
            "exact_str_match"
        ]
        == 0.5
    )


@pytest.mark.parametrize(
    "content, words",
    (
        ("{", "cannot be read"),
        ("[]", "no list of examples"),
        ('{"examples": []}', "no list of examples"),
        ('{"examples": [{"input": "x"}]}', "example 0"),
        ('{"examples": [{"input": "x", "target_scores": {"a": 1}}]}', "example 0"),
        ('{"examples": [{"input": "x", "target": [1]}]}', "example 0"),
        ('{"examples": ["x"]}', "example 0"),
        ('{"examples": [{"input": "x", "target_scores": {"a": "b", "c": 1}}]}', "example 0"),
    ),
)
def test_tasks_of_the_wrong_shape_are_one_line(content, words, world, tmp_path):
    (tmp_path / "t.json").write_text(content)
    assert words in refused(
        "-m",
        "nanosafe.eval.bigbench",
        f"--model={world}/policy",
        f"--tasks={tmp_path}/t.json",
        f"--out_dir={tmp_path}/o",
    )


def test_an_empty_folder_of_tasks_is_one_line(world, tmp_path):
    assert "no NAME/task.json" in refused(
        "-m", "nanosafe.eval.bigbench", f"--model={world}/policy", f"--tasks={tmp_path}"
    )
