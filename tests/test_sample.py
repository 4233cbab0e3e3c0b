"""sample.py over a pipe: prompts from a flag, a file, a dataset and the keyboard; scores; the best
of several answers."""

import json
import re

import pytest
import torch
from conftest import run
from in_process import run_in_process

from nanosafe import checkpoint, tokenizer


@pytest.fixture
def script_flags(world):
    return [f"--model={world}/policy", "--max_new_tokens=8"]


@pytest.fixture
def ask(script_flags, monkeypatch, capsys):
    """Runs sample.py."""

    def ask(*flags, check=True):
        pytest_fixtures = {"monkeypatch": monkeypatch, "capsys": capsys}
        return run_in_process("sample.py", *script_flags, *flags, check=check, **pytest_fixtures)

    return ask


def find_prompts(printed):
    return re.findall(r"^> (.*)$", printed, re.M)


def find_reward(printed):
    return float(re.search(r"reward (-?[\d.]+)", printed)[1])


def test_an_answer_depends_on_the_prompt_and_the_seed(ask):
    flags = ["--prompt=How do I paint the boat?", "--num_samples=2"]
    first = ask(*flags).printed
    assert find_prompts(first) == ["How do I paint the boat?"]
    assert ask(*flags).printed == first
    assert ask(*flags, "--seed=1").printed != first


def test_prompts_from_a_file_and_from_a_dataset(ask, world, tmp_path):
    (tmp_path / "p.txt").write_text("One?\n\nTwo?\n")
    assert find_prompts(ask(f"--prompts={tmp_path}/p.txt").printed) == ["One?", "Two?"]
    data = f"--prompts={world}/data/prompts/test.jsonl:3/-1"
    assert len(find_prompts(ask(data, "--temperature=0").printed)) == 3


def test_a_prompt_that_is_asked_twice_gets_two_different_answers(ask, world, tmp_path):
    """The first answer is the one that it gets alone."""
    (tmp_path / "p.txt").write_text("One?\nTwo?\nOne?\n")
    (tmp_path / "once.txt").write_text("One?\n")
    answers = split_answers(ask(f"--prompts={tmp_path}/p.txt", "--num_samples=2").printed)
    once = split_answers(ask(f"--prompts={tmp_path}/once.txt", "--num_samples=2").printed)
    assert once[0] == answers[0]
    assert answers[2] != answers[0]
    best = [f"--reward_model={world}/reward", "--best_of=2"]
    answers = split_answers(ask(f"--prompts={tmp_path}/p.txt", *best).printed)
    assert answers[2] != answers[0]


def split_answers(printed):
    """What sample.py printed to each question."""
    return [part.partition("\n")[2] for part in printed.split("\n> ")[1:]]


def test_scores_and_the_best_of_several_answers(ask, world):
    flags = ["--prompt=Hello?", f"--reward_model={world}/reward", f"--cost_model={world}/cost"]
    one = ask(*flags, "--best_of=1").printed
    assert re.search(r"\[reward -?\d+\.\d\d  cost -?\d+\.\d\d\]", one)
    best = ask(*flags, "--best_of=8").printed
    rewards = [find_reward(one)]
    for seed in (1, 2):
        rewards.append(find_reward(ask(*flags, f"--seed={seed}").printed))
    assert find_reward(best) >= min(rewards)
    assert "needs --reward_model" in ask("--prompt=Hello?", "--best_of=4", check=False).error


def test_a_conversation_at_the_keyboard(script_flags):
    lines = "Hi.\nAnd then?\n\nNew topic.\n"
    printed = run("sample.py", *script_flags, stdin=lines).stdout
    assert printed.count("\n> ") == 5
    assert "(a new conversation)" in printed


# ---- data ----


@pytest.fixture
def make_data(ask, world, tmp_path):
    """Runs sample.py with --out; returns the rows and what is printed."""

    def make_data(*flags):
        out = tmp_path / "rows.jsonl"
        prompts = f"--prompts={world}/data/prompts/test.jsonl:6/-1"
        reward = f"--reward_model={world}/reward"
        printed = ask(prompts, "--num_samples=4", reward, f"--out={out}", *flags).printed
        return [json.loads(line) for line in out.read_text().splitlines()], printed

    return make_data


def test_answers_that_were_cut_are_left_out_and_counted(make_data):
    """Answers end at the letter e here, for a random policy hardly ever says EOS."""
    full, _ = make_data("--keep_cut=True")
    all_rows, printed = make_data("--keep_cut=True", "--stop_at=e")
    assert "cut at" not in printed
    rows, printed = make_data("--stop_at=e")
    cut = 0
    expected = {}
    for row, full_row in zip(all_rows, full):
        ended = []
        for answer in row["answers"]:
            if answer in full_row["answers"]:  # it has no e
                cut += 1
            else:
                ended.append(answer)
        if ended:
            expected[row["input"]] = ended
    assert cut and expected
    assert {row["input"]: row["answers"] for row in rows} == expected
    assert f"answers left out: {cut} cut at max_new_tokens" in printed
    for write in ("sft", "pairs"):
        for row in make_data("--stop_at=e", f"--write={write}")[0]:
            assert row["answer"] in expected[row["input"]]


@pytest.mark.parametrize("write", ["answers", "sft", "pairs"])
def test_no_row_is_made_of_answers_that_were_all_cut(write, make_data):
    rows, printed = make_data("--max_new_tokens=1", f"--write={write}")
    assert rows == []
    assert "0 rows of 6 prompts x 4 answers; answers left out: 24 cut at" in printed
    assert "max_new_tokens=1: raise it, or keep them with keep_cut" in printed


def test_the_line_says_why_there_is_no_row(make_data, world):
    flags = ["--write=sft", "--keep_cut=True", f"--cost_model={world}/cost"]
    rows, printed = make_data(*flags)
    unsafe = int(re.search(r"left out: (\d+) unsafe", printed)[1])
    assert 24 - len(rows) >= unsafe > 0


# ---- what stops, and what is said ----


@pytest.fixture
def broken(world, tmp_path):
    """The folder of a policy whose output embedding is nan."""
    model = checkpoint.load(world / "policy")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    checkpoint.save(model, tmp_path / "broken", tokenizer.load(world / "policy"))
    return tmp_path / "broken"


def test_a_policy_of_nan_is_one_line(ask, broken, world, tmp_path):
    words = "gives logits that are not finite: its weights are broken"
    error = ask("--prompt=Hi?", f"--model={broken}", check=False).error
    assert f"{str(broken)!r} {words}" in error
    out = tmp_path / "rows.jsonl"
    prompts = f"--prompts={world}/data/prompts/test.jsonl:6/-1"
    assert words in ask(prompts, f"--model={broken}", f"--out={out}", check=False).error
    assert not out.exists()


def test_more_tokens_than_a_model_has_positions_are_said_once(ask, world, tmp_path):
    (tmp_path / "p.txt").write_text("One?\nTwo?\n")
    prompts = f"--prompts={tmp_path}/p.txt"
    flags = ["--max_new_tokens=250", "--stop_at=e||a||o||i||u||t||n"]
    words = f"'{world}/policy' was made for 256 (max_position_embeddings)"
    printed = ask(prompts, *flags).printed
    assert printed.count(words) == 1
    printed = ask(prompts, *flags, f"--out={tmp_path}/rows.jsonl").printed
    assert printed.count(words) == 1
    assert "max_position_embeddings" not in ask(prompts).printed


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--model={world}/reward", "is a score model"),
        ("--model=nowhere", "no tokenizer at"),
        ("--reward_model={world}/cost", "is given as a reward model, but its config.json"),
        ("--cost_model={world}/reward", "is given as a cost model, but its config.json"),
        ("--cost_model={world}/policy", "is a policy: it has no score head"),
        ("--dtype=int8", "dtype='int8'"),
    ],
)
def test_a_mistake_is_one_line(flag, words, ask, world):
    assert words in ask("--prompt=x", flag.format(world=world), check=False).error
