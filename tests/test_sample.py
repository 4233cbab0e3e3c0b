"""sample.py over a pipe: prompts from a flag, a file, a dataset and the keyboard; scores; best of n."""

import re

import pytest
from conftest import run


@pytest.fixture
def ask(world):
    def call(*flags, stdin=None, check=True):
        return run(
            "sample.py",
            f"--model={world}/policy",
            "--max_new_tokens=8",
            *flags,
            stdin=stdin,
            check=check,
        )

    return call


def test_a_prompt_from_a_flag_is_answered_the_same_each_time(ask):
    first = ask("--prompt=How do I paint the boat?", "--num_samples=2").stdout
    assert (
        "> How do I paint the boat?" in first
        and first == ask("--prompt=How do I paint the boat?", "--num_samples=2").stdout
    )
    assert first != ask("--prompt=How do I paint the boat?", "--num_samples=2", "--seed=1").stdout


def test_prompts_from_a_file_and_a_dataset(ask, world, tmp_path):
    (tmp_path / "p.txt").write_text("One?\n\nTwo?\n")
    assert re.findall(r"^> (.*)$", ask(f"--prompts={tmp_path}/p.txt").stdout, re.M) == [
        "One?",
        "Two?",
    ]
    out = ask(f"--prompts={world}/data/prompts/test.jsonl:3/-1", "--temperature=0").stdout
    assert len(re.findall(r"^> ", out, re.M)) == 3


def test_scores_and_best_of_n(ask, world):
    models = [f"--reward_model={world}/reward", f"--cost_model={world}/cost"]
    out = ask("--prompt=Hello?", *models).stdout
    assert re.search(r"\[reward -?\d+\.\d\d  cost -?\d+\.\d\d\]", out)
    reward = lambda text: float(re.search(r"reward (-?[\d.]+)", text)[1])
    best = ask("--prompt=Hello?", "--best_of=8", *models).stdout
    singles = [
        reward(ask("--prompt=Hello?", "--best_of=1", f"--seed={s}", *models).stdout)
        for s in range(3)
    ]
    assert reward(best) >= min(singles)
    refused = ask("--prompt=Hello?", "--best_of=4", check=False)
    assert refused.returncode == 1 and "needs --reward_model" in refused.stderr


def test_a_conversation_at_the_keyboard(ask):
    out = ask(stdin="Hi.\nAnd then?\n\nNew topic.\n").stdout
    assert out.count("\n> ") == 5 and "(a new conversation)" in out


def test_mistakes_are_one_line(ask, world):
    for flag, words in (
        (f"--model={world}/reward", "is a score model"),
        ("--model=nowhere", "no tokenizer at"),
        ("--dtype=int8", "dtype='int8'"),
    ):
        done = ask("--prompt=x", flag, check=False)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
