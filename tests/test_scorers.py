"""Scorers, statistics of samples, and data that sample.py makes of samples."""

import json
import math
import random
from collections import Counter

import pytest
import torch
from conftest import encode_texts, run

from nanosafe import checkpoint, data, parallel, tokenizer
from nanosafe.data.batching import collate
from nanosafe.phf import scorers

WORLD = parallel.World(0, 1, torch.device("cpu"), True)
slow = pytest.mark.slow


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def last_score(model, ids):
    """A score model's score of a text, by a plain forward."""
    batch = collate([ids], [[0] * len(ids)], "cpu")
    with torch.no_grad():
        return model.scores(batch)[-1].item()


def assert_one_line_error(done, words):
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# ---- scorers ----


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
def test_personal_data_is_found(text, kinds):
    assert sorted(kind for kind, _ in scorers.find_pii(text)) == sorted(kinds)
    score = scorers.load_scorer("pii", WORLD)([text])[0]
    assert score == len(kinds) / max(1, len(text))


def test_pep8_counts_violations_per_character():
    score = scorers.load_scorer("pep8", WORLD)
    bad = "x=1 \nimport os\n"
    assert score(["x = 1\n"]) == [0.0]
    assert score([bad])[0] >= 3 / len(bad)
    assert score([""]) == [0.0]


def test_a_cost_model_scores_whole_texts(world):
    texts = ["Hello.", "a longer text than the other"]
    scores = scorers.load_scorer(str(world / "cost"), WORLD)(texts)
    tok = tokenizer.load(world / "cost")
    model = checkpoint.load(world / "cost")
    for text, score in zip(texts, scores):
        ids = tok.encode(text, bos=True, eos=True)
        assert score == pytest.approx(last_score(model, ids), abs=1e-5)


def test_a_reward_model_is_not_a_scorer_of_harm(world):
    with pytest.raises(SystemExit, match="is given as a cost model, but its config.json"):
        scorers.load_scorer(str(world / "reward"), WORLD)


def test_a_function_of_the_user_s_own_is_a_scorer(tmp_path):
    (tmp_path / "own.py").write_text("def shout(text):\n    return text.count('!')\n")
    score = scorers.load_scorer(f"{tmp_path}/own.py:shout", WORLD)
    assert score(["a!!", "b"]) == [2.0, 0.0]


@pytest.mark.parametrize(
    "name, words",
    [
        ("{folder}/own.py:none", "no function 'none'"),
        ("{folder}/no.py:f", "there is no file"),
        ("vibes", "choose pii"),
    ],
)
def test_an_unknown_scorer_is_a_one_line_error(tmp_path, name, words):
    (tmp_path / "own.py").write_text("")
    with pytest.raises(SystemExit, match=words):
        scorers.load_scorer(name.format(folder=tmp_path), WORLD)


def test_the_command_adds_scores_to_a_file(tmp_path):
    text = "Mail a@b.org. Or not."
    rows = [
        {"text": text, "id": 7},
        {"texts": ["x", "c@d.org"]},
        {"other": 1},
        {"text": ""},
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    done = run("-m", "nanosafe.scorers", "pii", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert "2 rows; 2 left out" in done.stdout
    first, second = read_jsonl(tmp_path / "out.jsonl")
    assert first["id"] == 7
    assert "".join(first["texts"]) == text
    assert first["scores"][0] > 0
    assert first["scores"][1] == 0
    assert first["avg_score"] == sum(first["scores"]) / 2
    assert second["scores"] == [0.0, 1 / 7]


def test_the_command_tells_its_usage(capsys):
    with pytest.raises(SystemExit, match="usage"):
        scorers.main(["pii"])
    scorers.main(["-h"])
    assert "SCORER IN.jsonl OUT.jsonl" in capsys.readouterr().out


# ---- statistics of samples ----


def test_score_max_at_25_is_the_mean_of_the_worst_of_every_25():
    rng = random.Random(0)
    uniform = [rng.random() for _ in range(4096)]
    found = scorers.text_statistics(["a b"] * 4096, uniform, 0.5)
    assert found["score_max@25"] == pytest.approx(25 / 26, abs=0.01)
    assert found["score"] == pytest.approx(0.5, abs=0.02)
    assert found["hits"] == pytest.approx(0.5, abs=0.03)


def test_score_max_at_25_counts_whole_groups_only():
    few = scorers.text_statistics(["a"] * 24, [1.0] * 24, 0.5)
    assert math.isnan(few["score_max@25"])
    assert few["hits"] == 1
    five_left_over = scorers.text_statistics(["a"] * 30, [0.0] * 25 + [9.0] * 5, 0.5)
    assert five_left_over["score_max@25"] == 0


def count_ngrams(words, n):
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def plain_bleu(texts, i):
    """BLEU-5 of texts[i] (lists of words) with all others as references, by the definition."""
    others = texts[:i] + texts[i + 1 :]
    log_precision = 0.0
    for n in range(1, 6):
        own = count_ngrams(texts[i], n)
        matches = 0
        for ngram, count in own.items():
            matches += min(count, max(count_ngrams(words, n)[ngram] for words in others))
        log_precision += math.log((matches or 0.1) / max(1, own.total())) / 5
    length = len(texts[i])
    _, closest = min((abs(len(words) - length), len(words)) for words in others)
    return math.exp(log_precision + min(0.0, 1 - closest / length))


def test_self_bleu_is_the_mean_of_bleu_against_the_others():
    rng = random.Random(1)
    texts = [[rng.choice("abcde") for _ in range(rng.randint(3, 9))] for _ in range(12)]
    expected = sum(plain_bleu(texts, i) for i in range(12)) / 12
    assert scorers.self_bleu(texts) == pytest.approx(expected)
    assert scorers.self_bleu([list("abcdef")] * 5) == pytest.approx(1.0)
    assert math.isnan(scorers.self_bleu([["a"]]))


def test_distinct_ngrams_and_length_are_means_over_texts():
    found = scorers.text_statistics(["a a b", "c d"], [0.0, 0.0], 0.5)
    assert found["distinct_1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["distinct_2"] == 1
    assert found["length"] == 4


# ---- data that sample.py makes ----


@pytest.fixture
def sample(world, tmp_path):
    """Run sample.py on six prompts; returns the finished process."""

    def run_sample(*flags, ranks=0, out="rows.jsonl", check=True):
        return run(
            "sample.py",
            f"--model={world}/policy",
            f"--prompts={world}/data/prompts/test.jsonl:6/-1",
            "--max_new_tokens=8",
            "--num_samples=4",
            "--keep_cut=True",  # a random policy hardly ever ends an answer
            f"--out={tmp_path}/{out}",
            *flags,
            ranks=ranks,
            check=check,
        )

    return run_sample


@pytest.fixture
def make_rows(sample, tmp_path):
    """The rows that sample.py writes."""

    def run_and_read(*flags, ranks=0, out="rows.jsonl"):
        sample(*flags, ranks=ranks, out=out)
        return read_jsonl(tmp_path / out)

    return run_and_read


def test_answers_with_scores_are_what_rrhf_takes(make_rows, world, tmp_path):
    rows = make_rows(f"--reward_model={world}/reward", f"--cost_model={world}/cost")
    assert len(rows) == 6
    for row in rows:
        assert len(row["answers"]) == len(row["scores"]) == len(row["costs"])
        assert len(row["answers"]) <= 4
    tok = tokenizer.load(world / "reward")
    model = checkpoint.load(world / "reward")
    conversation = [rows[0]["input"], rows[0]["answers"][0]]
    ids = list(encode_texts(conversation, tok)[0])
    ended = last_score(model, ids)
    cut = last_score(model, ids[:-1])  # by max_new_tokens
    score = rows[0]["scores"][0]
    assert min(abs(ended - score), abs(cut - score)) < 1e-2
    data.tokenize(str(tmp_path / "rows.jsonl"), tok, "rank", 200)


@slow
def test_answers_do_not_depend_on_ranks(make_rows, world):
    models = [f"--reward_model={world}/reward", f"--cost_model={world}/cost"]
    one = make_rows(*models)
    two = make_rows(*models, ranks=2, out="two.jsonl")
    assert [row["answers"] for row in two] == [row["answers"] for row in one]
    for a, b in zip(one, two):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)


@pytest.fixture
def answers(make_rows, world):
    """{prompt: its row} of all answers, with scores and costs."""
    rows = make_rows(f"--reward_model={world}/reward", f"--cost_model={world}/cost")
    return {row["input"]: row for row in rows}


def test_sft_rows_are_the_best_answers(answers, make_rows, world, tmp_path):
    best = make_rows(f"--reward_model={world}/reward", "--write=sft", "--keep=2", out="sft.jsonl")
    for row in best:
        known = answers[row["input"]]
        ranked = sorted(zip(known["scores"], known["answers"]), reverse=True)
        assert row["answer"] in [answer for _, answer in ranked[:2]]
    tok = tokenizer.load(world / "policy")
    data.tokenize(str(tmp_path / "sft.jsonl"), tok, "sft", 200)


@slow
def test_sft_rows_are_safe_if_there_is_a_cost_model(answers, make_rows, world):
    models = [f"--reward_model={world}/reward", f"--cost_model={world}/cost"]
    safe = make_rows(*models, "--write=sft", out="safe.jsonl")
    for row in safe:
        known = answers[row["input"]]
        assert known["costs"][known["answers"].index(row["answer"])] <= 0
    assert len(safe) == sum(min(row["costs"]) <= 0 for row in answers.values())


@slow
def test_pairs_are_the_best_and_the_worst_answer(answers, make_rows, world, tmp_path):
    models = [f"--reward_model={world}/reward", f"--cost_model={world}/cost"]
    for row in make_rows(*models, "--write=pairs", out="pairs.jsonl"):
        known = answers[row["input"]]
        best = known["answers"].index(row["answer"])
        worst = known["answers"].index(row["other_answer"])
        assert known["scores"][best] == max(known["scores"])
        assert known["scores"][worst] == min(known["scores"])
        assert row["better"]
        assert row["safer"] == (known["costs"][best] < known["costs"][worst])
        assert row["is_safe"] == (known["costs"][best] <= 0)
    tok = tokenizer.load(world / "policy")
    for task in ("reward", "cost"):
        data.tokenize(str(tmp_path / "pairs.jsonl"), tok, task, 200)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--write=sft"], "needs --reward_model"),
        (["--write=both"], "choose one of answers, sft, pairs"),
        (["--write=pairs", "--num_samples=1"], "two answers or more"),
        (["--prompts="], "out needs --prompts"),
    ],
)
def test_a_wrong_flag_of_sample_is_a_one_line_error(sample, flags, words):
    assert_one_line_error(sample(*flags, check=False), words)


def test_a_file_without_prompts_is_a_one_line_error(sample, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    done = sample(f"--prompts={tmp_path}/none.txt", check=False)
    assert_one_line_error(done, "has no prompt that can be asked")


def test_stop_texts_end_an_answer(make_rows):
    full_answers = []
    for row in make_rows(out="full.jsonl"):
        full_answers += row["answers"]
    letter, _ = Counter("".join(full_answers)).most_common(1)[0]
    assert letter.strip()
    assert any(letter in answer for answer in full_answers)
    for row in make_rows(f"--stop_at=never said||{letter}", out="stopped.jsonl"):
        for answer in row["answers"]:
            assert letter not in answer
            # The text before the letter. A last character that was cut in half is U+FFFD.
            start = answer.rstrip("\ufffd")
            assert any(full.startswith(start) for full in full_answers)


@slow
def test_stop_texts_end_an_answer_that_is_printed(world):
    command = ["sample.py", f"--model={world}/policy", "--prompt=Hi?", "--max_new_tokens=30"]
    full = answer_to(run(*command).stdout)
    letter, _ = Counter(character for character in full if character.isalpha()).most_common(1)[0]
    assert letter not in answer_to(run(*command, f"--stop_at={letter}").stdout)


def answer_to(output):
    """The answer that sample.py prints to the prompt Hi?."""
    return output.split("> Hi?")[1].split("[cut")[0]


def test_a_text_is_continued_without_a_template(world):
    flags = ["--prompt=First, get", "--template=none", "--max_new_tokens=5"]
    output = run("sample.py", f"--model={world}/policy", *flags).stdout
    assert "> First, get" in output


def test_the_toy_s_gold_functions_label_a_policy_s_answers(toy, tmp_path):
    two_answers = {
        "input": "How do I fix the lamp?",
        "answers": ["Sure. First, get the hammer.", "I will not do this.", ""],
    }
    one_answer_twice = {
        "input": "How do I rob the bank?",
        "answers": ["Sure. First, get the knife.", "Sure. First, get the knife."],
    }
    write_jsonl(tmp_path / "a.jsonl", [two_answers, one_answer_twice])
    run("data/toy/prepare.py", f"--annotate={tmp_path}/a.jsonl", f"--out={tmp_path}/pairs.jsonl")
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert len(rows) == 1
    row = rows[0]
    helpful, refusal = two_answers["answers"][:2]
    assert {row["answer"], row["other_answer"]} == {helpful, refusal}
    assert row["better"] == (row["answer"] == helpful)
    assert row["is_safe"]
    assert row["is_other_safe"]
