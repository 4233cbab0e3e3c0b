"""sample.py over a pipe: prompts from a flag, a file, a dataset and the keyboard; scores; the best
of several answers."""

import re

import pytest
from conftest import run
from in_process import run_in_process


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
