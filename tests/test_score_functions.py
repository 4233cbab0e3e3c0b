"""Rewards and costs that are Python functions, and reward models that speak in other words."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, rows_of, run

from nanosafe import checkpoint, score_functions, tokenizer
from nanosafe.data.batching import collate
from nanosafe.data.examples import Prompt, make_turns
from nanosafe.inference import ScoreFunction, ScoreModel, encode_answered
from nanosafe.parallel import init

FUNCTIONS = f"{ROOT}/nanosafe/score_functions.py"
CHATML = """\
{%- for message in messages %}{{- 'Turn of ' + message.role + ':' + message.content + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Turn of assistant:' }}{%- endif %}"""


def ask(question, answer):
    return make_turns([question, answer])


# ---- the functions ----


def test_a_length_is_counted_in_hundreds_of_characters():
    assert score_functions.measure_length([ask("q", "x" * 250), ask("q", "")]) == [2.5, 0]


def test_personal_data_is_counted():
    answers = ["Write to a.b@example.com or call 555-123-4567.", "I cannot say."]
    conversations = [ask("q", answer) for answer in answers]
    assert score_functions.count_personal_data(conversations) == [2, 0]


@pytest.mark.parametrize(
    "question, answer, reward",
    [
        ("What is 12 * 34?", "It is 408.", 1),
        ("What is 12 * 34?", "12 * 34 = 407", 0),
        ("Compute 5 - 9", "-4", 1),
        ("999 + 1?", "That makes 1,000", 1),
        ("999 + 1?", "I do not know.", 0),
    ],
)
def test_arithmetic_is_right_or_wrong(question, answer, reward):
    assert score_functions.solve_arithmetic([ask(question, answer)]) == [reward]


def test_a_question_without_an_operation_is_an_error():
    with pytest.raises(ValueError, match="no operation in the question 'Hello'"):
        score_functions.solve_arithmetic([ask("Hello", "4")])


def test_a_function_reads_the_conversation_with_its_answer(tmp_path, world):
    (tmp_path / "f.py").write_text("def f(conversations):\n    return map(len, conversations)\n")
    tok = tokenizer.load(world / "tokenizer")
    scorer = ScoreFunction(f"{tmp_path}/f.py:f", init("cpu"))
    prompts = [Prompt(make_turns(["q"], "Be brief.")), Prompt(make_turns(["q", "a", "r"]))]
    answers = [[*tok.encode_suffix("yes"), tok.eos_id]] * 2
    assert scorer.score_answers(prompts, [[], []], answers, tok) == [3, 4]


@pytest.mark.parametrize("result", ["[1]", "(1,)", "np.ones(1)", "torch.ones(1)", "map(len, 'x')"])
def test_a_function_may_return_numbers_in_several_ways(tmp_path, result):
    body = "import numpy as np\nimport torch\ndef f(conversations):\n    return "
    (tmp_path / "f.py").write_text(body + result)
    assert ScoreFunction(f"{tmp_path}/f.py:f", init("cpu"))([ask("q", "a")]) == [1]


def test_a_function_cannot_change_the_prompts(tmp_path, world):
    (tmp_path / "f.py").write_text(
        "def f(conversations):\n"
        "    for turns in conversations:\n"
        "        turns[0]['content'] = 'changed'\n"
        "    return [1] * len(conversations)\n"
    )
    tok = tokenizer.load(world / "tokenizer")
    scorer = ScoreFunction(f"{tmp_path}/f.py:f", init("cpu"))
    prompt = Prompt(make_turns(["q"]))
    scorer.score_answers([prompt], [[]], [[tok.eos_id]], tok)
    assert prompt == Prompt(make_turns(["q"]))


@pytest.mark.parametrize(
    "body, message",
    [
        ("def g(conversations): return []", "has no function 'f'"),
        ("def f(conversations): return []", "must return a list"),
        ("def f(conversations): return [float('nan')]", "must return a list"),
        ("f = 3", "has no function 'f'"),
        ("def f(prompt, answer): return [1]", "a list of conversations, and cannot be"),
        ("def f(conversations): return None", "and returned None"),
        ("def f(conversations): return [None]", "must return a list"),
        ("def f(conversations): return '1'", "must return a list"),
        ("def f(conversations): return {1: 2}", "must return a list"),
        ("def f(conversations): return [1e300]", "must return a list"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_line(tmp_path, body, message):
    (tmp_path / "f.py").write_text(body)
    with pytest.raises(SystemExit, match=message):
        ScoreFunction(f"{tmp_path}/f.py:f", init("cpu"))([ask("q", "a")])


# ---- in the scripts ----


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_policy_learns_from_functions(trainers, tmp_path, ranks):
    """Without critics, with a length limit as the cost. The reward is the length, too, so that both
    metrics must agree."""
    flags = [
        f"--reward_model={FUNCTIONS}:measure_length",
        f"--cost_model={FUNCTIONS}:measure_length",
        "--advantage=rloo",
        "--num_samples=2",
        "--max_steps=4",
        f"--out_dir={tmp_path}/run",
    ]
    run(*trainers["ppo"], *flags, ranks=ranks)
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    assert all(row["reward"] == row["cost"] > 0 for row in rows)
    for sample in samples:
        assert sample["reward"] == pytest.approx(len(sample["response"]) / 100)


def test_critics_begin_as_the_actor_where_a_function_scores(trainers, tmp_path):
    flags = [f"--cost_model={FUNCTIONS}:measure_length", f"--out_dir={tmp_path}/run"]
    done = run(*trainers["ppo"], *flags, "--max_steps=2")
    assert "a new one is drawn" in done.stdout
    assert rows_of(tmp_path / "run" / "metrics.jsonl")[0]["cost_critic_loss"] > 0


def test_a_run_with_another_function_file_is_not_resumed(trainers, tmp_path):
    shutil.copy(FUNCTIONS, tmp_path / "own.py")
    flags = [f"--reward_model={tmp_path}/own.py:measure_length", f"--out_dir={tmp_path}/run"]
    flags += ["--advantage=rloo", "--num_samples=2"]
    run(*trainers["ppo"], *flags, "--max_steps=4")
    with open(tmp_path / "own.py", "a") as f:
        f.write("\nLONGEST = 3\n")
    done = run(*trainers["ppo"], *flags, "--resume=True", check=False)
    assert "reward_model" in done.stderr and "other contents" in done.stderr


def test_normalizing_a_function_is_refused(trainers, tmp_path):
    flags = [f"--reward_model={FUNCTIONS}:measure_length", "--normalize_reward=True"]
    done = run(*trainers["ppo"], *flags, f"--out_dir={tmp_path}/run", check=False)
    assert "it has no moments" in done.stderr


def test_sample_and_arena_score_by_functions(world, tmp_path):
    policy = f"--model={world}/policy"
    scorers = [f"--reward_model={FUNCTIONS}:measure_length"]
    flags = ["--prompt=hello", "--max_new_tokens=8", "--num_samples=3"]
    run("sample.py", policy, *scorers, *flags, f"--out={tmp_path}/rows.jsonl", "--keep_cut=True")
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["scores"] == pytest.approx([len(text) / 100 for text in row["answers"]])
    run(
        "-m",
        "nanosafe.eval.arena",
        f"--models=A={world}/policy,B={world}/policy",
        *scorers,
        f"--cost_model={world}/cost",
        f"--data={world}/data/prompts/test.jsonl:4/-1",
        f"--out_dir={tmp_path}/arena",
        "--max_new_tokens=8",
    )
    for line in open(tmp_path / "arena" / "pairs.jsonl"):
        for answer in json.loads(line)["answers"].values():
            assert answer["reward"] == pytest.approx(len(answer["text"]) / 100)


# ---- a reward model with words of its own ----


@pytest.fixture
def other_words(world, tmp_path):
    """The reward model with another chat template."""
    shutil.copytree(world / "reward", tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(CHATML)
    return tmp_path / "other"


def test_an_answer_is_rendered_in_the_words_of_its_reader(world, other_words):
    source, target = tokenizer.load(world / "policy"), tokenizer.load(other_words)
    prompt = Prompt(make_turns(["hello"]))
    answer = source.encode_suffix("good day")
    question = source.conversation(prompt.turns).ids
    whole = encode_answered(prompt, question, [*answer, source.eos_id], source, target)
    cut = encode_answered(prompt, question, answer, source, target)
    text = "Turn of user:hello</s>Turn of assistant:good day"
    assert cut == target.encode(text)
    assert whole == [*target.encode(text), target.eos_id]
    assert encode_answered(prompt, question, answer, source, source) == question + answer


def test_a_reward_model_in_other_words_scores_what_it_would_read(trainers, other_words, tmp_path):
    flags = [f"--reward_model={other_words}", "--advantage=rloo", "--num_samples=2"]
    run(*trainers["ppo"], *flags, "--max_steps=4", f"--out_dir={tmp_path}/run")
    tok = tokenizer.load(other_words)
    model = checkpoint.load(other_words)
    for line in open(tmp_path / "run" / "samples.jsonl"):
        sample = json.loads(line)
        user = sample["prompt"].partition("USER: ")[2].rpartition(" ASSISTANT:")[0]
        turns = make_turns([user, sample["response"]])
        candidates = [tok.conversation(turns).ids, tok.finished_conversation(turns).ids]
        scores = [score_at_end(model, ids) for ids in candidates]
        assert min(abs(score - sample["reward"]) for score in scores) < 1e-3


@torch.no_grad()
def score_at_end(model, ids):
    batch = collate([np.array(ids)], [np.zeros(len(ids), np.uint8)], "cpu")
    return model.scores(batch)[-1].item()


def test_a_template_that_refuses_the_prompts_stops_the_run_at_its_beginning(
    trainers, world, tmp_path
):
    shutil.copytree(world / "reward", tmp_path / "other")
    template = "{{ raise_exception('no user may speak') }}"
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    flags = [f"--reward_model={tmp_path}/other", "--advantage=rloo", "--num_samples=2"]
    done = run(*trainers["ppo"], *flags, f"--out_dir={tmp_path}/run", check=False)
    assert done.returncode and "Traceback" not in done.stderr


def test_a_score_model_reads_answers_in_its_own_words(world, other_words):
    parallel_world = init("cpu")
    same = ScoreModel(world / "reward", parallel_world)
    other = ScoreModel(other_words, parallel_world)
    source = tokenizer.load(world / "policy")
    prompt = Prompt(make_turns(["hello"]))
    question = source.conversation(prompt.turns).ids
    answer = [*source.encode_suffix("good day"), source.eos_id]
    asked = ([prompt], [question], [answer], source)
    assert same.score_answers(*asked) == same.score([question + answer])
    turns = make_turns(["hello", "good day"])
    expected = other.score([other.tok.finished_conversation(turns).ids])
    assert other.score_answers(*asked) == pytest.approx(expected)
    assert other.score_answers(*asked) != same.score_answers(*asked)
