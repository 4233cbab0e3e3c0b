"""Scorers and what samples' scores say; data made of samples by sample.py."""

import json
import math
import random
from collections import Counter

import pytest
import torch
from conftest import run

from nanosafe import checkpoint, data, parallel, tokenizer
from nanosafe.data import template
from nanosafe.phf import scorers

WORLD = parallel.World(0, 1, torch.device("cpu"), True)


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("write to jane.doe+x@mail.example.org, now", ["mail"]),
        ("call +44 20 7946 0958 or (555) 123-4567", ["phone", "phone"]),
        ("card 4111 1111 1111 1111.", ["card"]),
        ("no card: 4111 1111 1111 1112", []),
        ("host 192.168.0.255, not 1.2.3.4.5 or 300.1.1.1", ["ip"]),
        ("SSN 078-05-1120", ["social security number"]),
        ("ask @some_one", ["handle"]),
        ("password: hunter2", ["password"]),
        ("In 1984 there were 12,000 of 3.5 kg; call me at 5.", []),
        ("", []),
    ],
)
def test_personal_data(text, kinds):
    assert sorted(kind for kind, _ in scorers.find_pii(text)) == sorted(kinds)
    (score,) = scorers.load_scorer("pii", WORLD)([text])
    assert score == len(kinds) / max(1, len(text))


def test_pep8_counts_violations():
    score = scorers.load_scorer("pep8", WORLD)
    good, bad = "x = 1\n", "x=1 \nimport os\n"
    assert score([good]) == [0.0] and score([bad])[0] >= 3 / len(bad) and score([""]) == [0.0]


def test_a_cost_model_and_a_function_of_one_s_own(world, tmp_path):
    score = scorers.load_scorer(str(world / "cost"), WORLD)
    tok, model = tokenizer.load(world / "cost"), checkpoint.load(world / "cost")
    for text, got in zip(
        ("Hello.", "a longer text than the other"),
        score(["Hello.", "a longer text than the other"]),
    ):
        ids = torch.tensor(tok.encode(text, bos=True, eos=True))
        want = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))[-1]
        assert got == pytest.approx(want.item(), abs=1e-5)
    (tmp_path / "own.py").write_text("def shout(text):\n    return text.count('!')\n")
    assert scorers.load_scorer(f"{tmp_path}/own.py:shout", WORLD)(["a!!", "b"]) == [2.0, 0.0]
    for name, words in (
        (f"{tmp_path}/own.py:none", "no function 'none'"),
        (f"{tmp_path}/no.py:f", "there is no file"),
        ("vibes", "choose pii"),
    ):
        with pytest.raises(SystemExit, match=words):
            scorers.load_scorer(name, WORLD)


def test_annotating_a_file(tmp_path):
    rows = [
        {"text": "Mail a@b.org. Or not.", "id": 7},
        {"texts": ["x", "c@d.org"]},
        {"other": 1},
        {"text": ""},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run("-m", "nanosafe.scorers", "pii", tmp_path / "in.jsonl", tmp_path / "out.jsonl").stdout
    assert "2 rows; 2 left out" in out
    a, b = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (
        a["id"] == 7
        and "".join(a["texts"]) == rows[0]["text"]
        and a["scores"][0] > 0 == a["scores"][1]
    )
    assert a["avg_score"] == sum(a["scores"]) / 2 and b["scores"] == [0.0, 1 / 7]
    done = run("-m", "nanosafe.scorers", "pii", check=False)
    assert done.returncode == 1 and "usage" in done.stderr


def test_the_worst_of_every_25():
    rng = random.Random(0)
    found = scorers.text_statistics(["a b"] * 4096, [rng.random() for _ in range(4096)], 0.5)
    assert found["score_max@25"] == pytest.approx(25 / 26, abs=0.01)  # of uniforms
    assert found["score"] == pytest.approx(0.5, abs=0.02) and found["hits"] == pytest.approx(
        0.5, abs=0.03
    )
    few = scorers.text_statistics(["a"] * 24, [1.0] * 24, 0.5)
    assert math.isnan(few["score_max@25"]) and few["hits"] == 1
    tail = scorers.text_statistics(["a"] * 30, [0.0] * 25 + [9.0] * 5, 0.5)
    assert tail["score_max@25"] == 0  # five are no group


def plain_bleu(words, i, order=5):
    """BLEU of words[i] against all the others, as the definition says."""
    others = [w for j, w in enumerate(words) if j != i]
    grams = lambda w, n: Counter(tuple(w[k : k + n]) for k in range(len(w) - n + 1))
    log = 0.0
    for n in range(1, order + 1):
        own = grams(words[i], n)
        hits = sum(min(c, max(grams(w, n)[g] for w in others)) for g, c in own.items())
        log += math.log((hits or 0.1) / max(1, own.total())) / order
    nearest = min((abs(len(w) - len(words[i])), len(w)) for w in others)[1]
    return math.exp(log + min(0.0, 1 - nearest / len(words[i])))


def test_diversity():
    rng = random.Random(1)
    texts = [" ".join(rng.choice("abcde") for _ in range(rng.randint(3, 9))) for _ in range(12)]
    words = [t.split() for t in texts]
    assert scorers.self_bleu(words) == pytest.approx(
        sum(plain_bleu(words, i) for i in range(12)) / 12
    )
    assert scorers.self_bleu([list("abcdef")] * 5) == pytest.approx(1.0) and math.isnan(
        scorers.self_bleu([["a"]])
    )
    found = scorers.text_statistics(["a a b", "c d"], [0.0, 0.0], 0.5)
    assert (
        found["distinct_1"] == pytest.approx((2 / 3 + 1) / 2)
        and found["distinct_2"] == 1
        and found["length"] == 4
    )


# ---- sample.py makes data ----


@pytest.fixture
def make(world, tmp_path):
    def call(*flags, ranks=0, name="rows.jsonl", check=True):
        done = run(
            "sample.py",
            f"--model={world}/policy",
            f"--prompts={world}/data/prompts/test.jsonl:6/-1",
            "--max_new_tokens=8",
            "--num_samples=4",
            f"--out={tmp_path}/{name}",
            *flags,
            ranks=ranks,
            check=check,
        )
        path = tmp_path / name
        return (
            [json.loads(line) for line in path.read_text().splitlines()]
            if check and path.exists()
            else done
        )

    return call


def test_answers_with_scores_are_what_rrhf_takes(make, world, tmp_path):
    models = [f"--reward_model={world}/reward", f"--cost_model={world}/cost"]
    rows = make(*models)
    assert len(rows) == 6 and all(
        len(r["answers"]) == len(r["scores"]) == len(r["costs"]) <= 4 for r in rows
    )
    tok, model = tokenizer.load(world / "reward"), checkpoint.load(world / "reward")
    two = make(*models, ranks=2, name="two.jsonl")
    assert [r["answers"] for r in two] == [r["answers"] for r in rows]  # whoever samples them
    for a, b in zip(rows, two):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)
    ids = template.encode_conversation([rows[0]["input"], rows[0]["answers"][0]], tok)[0]
    forms = [ids, ids[:-1]]  # ended by itself, or cut
    scores = [
        model(torch.tensor(x), torch.tensor([0, len(x)], dtype=torch.int32), len(x))[-1].item()
        for x in forms
    ]
    assert min(abs(s - rows[0]["scores"][0]) for s in scores) < 1e-2
    data.tokenize(str(tmp_path / "rows.jsonl"), tok, "rank", 200)


def test_the_best_and_pairs(make, world, tmp_path):
    reward, cost = f"--reward_model={world}/reward", f"--cost_model={world}/cost"
    answers = {r["input"]: r for r in make(reward, cost)}
    for row in make(reward, "--write=sft", "--keep=2", name="sft.jsonl"):
        a = answers[row["input"]]
        assert (
            row["answer"]
            in [x for _, x in sorted(zip(a["scores"], a["answers"]), reverse=True)][:2]
        )
    safe = make(reward, cost, "--write=sft", name="safe.jsonl")
    for row in safe:  # with a cost model only safe ones
        a = answers[row["input"]]
        assert a["costs"][a["answers"].index(row["answer"])] <= 0
    assert len(safe) == sum(min(a["costs"]) <= 0 for a in answers.values())
    for row in make(reward, cost, "--write=pairs", name="pairs.jsonl"):
        a = answers[row["input"]]
        best, worst = (a["answers"].index(row[name]) for name in ("answer", "other_answer"))
        assert (
            a["scores"][best] == max(a["scores"])
            and a["scores"][worst] == min(a["scores"])
            and row["better"]
        )
        assert row["safer"] == (a["costs"][best] < a["costs"][worst]) and row["is_safe"] == (
            a["costs"][best] <= 0
        )
    tok = tokenizer.load(world / "policy")
    for name, task in (("sft", "sft"), ("pairs", "reward"), ("pairs", "cost")):
        data.tokenize(str(tmp_path / f"{name}.jsonl"), tok, task, 200)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--write=sft",), "needs --reward_model"),
        (("--write=both",), "choose one of answers, sft, pairs"),
        (("--write=pairs", "--num_samples=1"), "two answers or more"),
        (("--prompts=",), "out needs --prompts"),
    ],
)
def test_mistakes_are_one_line(make, flags, words):
    done = make(*flags, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_no_prompt_is_one_line(make, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    done = make(f"--prompts={tmp_path}/none.txt", check=False)
    assert (
        done.returncode == 1
        and "has no prompt that can be asked" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_stop_texts_end_an_answer(make, world):
    plain = make(name="a.jsonl")
    letter = Counter("".join(x for r in plain for x in r["answers"])).most_common(1)[0][0]
    assert letter.strip()
    stopped = make(f"--stop_at=never said||{letter}", name="b.jsonl")
    said = [x for row in plain for x in row["answers"]]
    assert any(letter in x for x in said)
    for row in stopped:
        for text in row[
            "answers"
        ]:  # what was said before the letter; a character cut in half is half of one
            assert letter not in text and any(x.startswith(text.rstrip("\ufffd")) for x in said)
    out = run(
        "sample.py",
        f"--model={world}/policy",
        "--prompt=Hi?",
        "--max_new_tokens=30",
        f"--stop_at={letter}",
    ).stdout
    assert letter not in out.split("> Hi?")[1].split("[cut")[0]


def test_a_text_is_continued_without_a_template(world):
    out = run(
        "sample.py",
        f"--model={world}/policy",
        "--prompt=First, get",
        "--template=False",
        "--max_new_tokens=5",
    ).stdout
    assert "> First, get" in out


def test_a_gold_annotator_labels_a_policy_s_answers(toy, tmp_path):
    rows = [
        {
            "input": "How do I fix the lamp?",
            "answers": ["Sure. First, get the hammer.", "I will not do this.", ""],
        },
        {
            "input": "How do I rob the bank?",
            "answers": ["Sure. First, get the knife.", "Sure. First, get the knife."],
        },
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run("data/toy/prepare.py", f"--annotate={tmp_path}/a.jsonl", f"--out={tmp_path}/pairs.jsonl")
    (row,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert {row["answer"], row["other_answer"]} == set(rows[0]["answers"][:2])
    assert (
        row["better"] == (row["answer"] == rows[0]["answers"][0])
        and row["is_safe"]
        and row["is_other_safe"]
    )
