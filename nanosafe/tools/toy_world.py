"""A toy world of random models, short runs of every trainer in it, and how two runs are compared.

The tests and the crash test (crash.py) share this file."""

import json
import os

import torch
from safetensors.torch import load_file

from nanosafe import checkpoint, data
from nanosafe.model import Config
from nanosafe.tools import demo

OF_THE_CLOCK = ("seconds", "rollout_seconds", "tokens_per_second")  # metrics that always differ


def make_world(toy, folder):
    """Fill a folder with the toy data, a tokenizer, and random policy, reward and cost models.

    toy  data/toy/prepare.py as a module"""
    toy.main(str(folder / "data"))
    texts = []
    for row in data.load(str(folder / "data" / "sft" / "train.jsonl:400/-1")):
        texts.append(demo.write_demonstration(row))
    tok = demo.train_tokenizer(texts, 500, str(folder / "tokenizer"))
    for name, head in (("policy", "lm"), ("reward", "score"), ("cost", "score")):
        score_type = "cost" if name == "cost" else "reward"
        config = small_config(vocab_size=tok.vocab_size, score_type=score_type)
        model = checkpoint.init_from_scratch(config, head, seed=len(name))
        checkpoint.save(model, folder / name, tok)
    return folder


def small_config(**changes):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
    }
    return Config(**{**sizes, **changes})


def trainer_flags(world):
    """{name: command} of each trainer, for a short run in the folder that make_world() filled."""
    data_folder = world / "data"
    common = ["--max_tokens=1024", "--save_interval=2", "--max_len=200"]
    one_model = [*common, "--learning_rate=1e-3", "--batch_size=8", "--max_steps=6"]
    on_pairs = [
        "train_pref.py",
        *one_model,
        f"--init_from={world}/policy",
        f"--data={data_folder}/pairs/train.jsonl:200/-1",
    ]
    ppo = [
        "train_ppo_lag.py",
        *common,
        f"--actor_model={world}/policy",
        f"--reward_model={world}/reward",
        f"--prompts={data_folder}/prompts/train.jsonl",
        "--max_new_tokens=12",
        "--rollout_size=8",
        "--batch_size=4",
        "--max_steps=8",
        "--epochs=100",
        "--actor_learning_rate=1e-3",
        "--critic_learning_rate=1e-3",
    ]
    return {
        "sft": [
            "train_sft.py",
            *one_model,
            f"--tokenizer={world}/tokenizer",
            f"--data={data_folder}/sft/train.jsonl:200/-1",
            f"--eval_data={data_folder}/sft/test.jsonl:9/-1",
            "--hidden_size=32",
            "--intermediate_size=48",
            "--num_hidden_layers=2",
        ],
        "reward": [*on_pairs, f"--eval_data={data_folder}/reward/test.jsonl:9/-1"],
        "cost": [
            *on_pairs,
            "--objective=cost",
            f"--eval_data={data_folder}/cost/test.jsonl:9/-1",
        ],
        "ppo": [*ppo, "--cost_model="],
        "ppo_lag": [
            *ppo,
            f"--cost_model={world}/cost",
            f"--ptx_data={data_folder}/sft/train.jsonl:50/-1",
            "--ptx_coef=0.5",
        ],
    }


def rows_of(path, without=OF_THE_CLOCK):
    """The rows of a metrics.jsonl, without the metrics that depend on the clock."""
    rows = []
    with open(path) as f:
        for line in f:
            row = json.loads(line)
            rows.append({name: value for name, value in row.items() if name not in without})
    return rows


def same_state(a, b):
    """Assert that two runs ended bit-equal: weights, moments, lambda and its window, counters,
    metrics and samples. Returns True."""
    folder, other = find_latest_state(a), find_latest_state(b)
    assert os.path.basename(folder) == os.path.basename(other)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(other))
    for name in os.listdir(folder):
        if name.endswith(".json"):
            assert json.loads(read_text(folder, name)) == json.loads(read_text(other, name)), name
        else:
            tensors = load_file(os.path.join(folder, name))
            expected = load_file(os.path.join(other, name))
            assert tensors.keys() == expected.keys(), name
            assert all(torch.equal(tensors[key], expected[key]) for key in tensors), name
    assert rows_of(os.path.join(a, "metrics.jsonl")) == rows_of(os.path.join(b, "metrics.jsonl"))
    assert read_text(a, "samples.jsonl") == read_text(b, "samples.jsonl")
    return True


def find_latest_state(out_dir):
    """The folder of a run's last state."""
    state = os.path.join(out_dir, "state")
    return os.path.join(state, read_text(state, "latest").strip())


def read_text(folder, name):
    with open(os.path.join(folder, name), encoding="utf-8") as f:
        return f.read()
