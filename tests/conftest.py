"""What the tests share: a small tokenizer, small models, and ways to run the scripts."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from launcher import Launcher
from safetensors.torch import load_file

from nanosafe import checkpoint, data
from nanosafe.checkpoint import init_from_scratch
from nanosafe.data import template
from nanosafe.model import Config
from nanosafe.tools import demo

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# One thread for each process, here and in all that tests start: OpenMP's idle threads spin, which
# makes everything several times slower where tests run side by side.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"


LONG_FILES = ("test_readme", "test_reliability", "test_train", "test_methods", "test_eval")


def pytest_collection_modifyitems(items):
    """The long files first, so that two processes end together."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONG_FILES))


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    """Token ids are cached in a folder of the test run's own."""
    os.environ["NANOSAFE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def toy():
    """data/toy/prepare.py as a module."""
    path = os.path.join(ROOT, "data", "toy", "prepare.py")
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world(toy, tmp_path_factory):
    """A folder with the toy data, its tokenizer, and random policy, reward and cost models."""
    return make_world(toy, tmp_path_factory.mktemp("world"))


def make_world(toy, folder):
    toy.main(str(folder / "data"))
    rows = data.load(str(folder / "data" / "sft" / "train.jsonl:400/-1"))
    texts = [
        prompt + answer
        for row in rows
        for prompt, answer in template.split_into_segments([row["input"], row["answer"]])
    ]
    tok = demo.train_tokenizer(texts, 500, str(folder / "tokenizer"))
    for name, head in (("policy", "lm"), ("reward", "score"), ("cost", "score")):
        model = init_from_scratch(small_config(vocab_size=tok.vocab_size), head, seed=len(name))
        checkpoint.save(model, folder / name, tok)
    return folder


@pytest.fixture
def trainers(world):
    return trainer_flags(world)


def trainer_flags(world):
    """Each script with flags for a short run on the toy world with random models."""
    d = world / "data"
    common = ["--max_tokens=1024", "--save_interval=2", "--max_len=200", "--learning_rate=1e-3"]
    rl = [
        "train_ppo_lag.py",
        "--max_tokens=1024",
        "--save_interval=2",
        "--max_len=200",
        f"--actor_model={world}/policy",
        f"--reward_model={world}/reward",
        f"--prompts={d}/prompts/train.jsonl",
        "--max_new_tokens=12",
        "--rollout_size=8",
        "--batch_size=4",
        "--max_steps=8",
        "--epochs=100",
        "--actor_learning_rate=1e-3",
        "--critic_learning_rate=1e-3",
    ]
    lag = [
        *rl,
        f"--cost_model={world}/cost",
        f"--ptx_data={d}/sft/train.jsonl:50/-1",
        "--ptx_coef=0.5",
    ]
    return {
        "sft": [
            "train_sft.py",
            *common,
            f"--tokenizer={world}/tokenizer",
            f"--data={d}/sft/train.jsonl:200/-1",
            f"--eval_data={d}/sft/test.jsonl:9/-1",
            "--hidden_size=32",
            "--intermediate_size=48",
            "--num_hidden_layers=2",
            "--batch_size=8",
            "--max_steps=6",
        ],
        "reward": [
            "train_pref.py",
            *common,
            f"--init_from={world}/policy",
            f"--data={d}/pairs/train.jsonl:200/-1",
            f"--eval_data={d}/reward/test.jsonl:9/-1",
            "--batch_size=8",
            "--max_steps=6",
        ],
        "cost": [
            "train_pref.py",
            *common,
            "--objective=cost",
            f"--init_from={world}/policy",
            f"--data={d}/pairs/train.jsonl:200/-1",
            f"--eval_data={d}/cost/test.jsonl:9/-1",
            "--batch_size=8",
            "--max_steps=6",
        ],
        "ppo": [*rl, "--cost_model="],
        "ppo_lag": lag,
    }


def small_config(**changes):
    return Config(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "eos_token_id": 2,
            **changes,
        }
    )


@cache
def start_launcher():
    return Launcher()


def run(*command, ranks=0, check=True, stdin=None, cwd=ROOT):
    """Run a script as a user does, with ranks as under torchrun; returns the finished process."""
    command = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    if command[0] == "-c":
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment,
            input=stdin,
        )
    else:
        done = start_launcher().run(command, cwd, environment, stdin, ranks)
    if check and done.returncode:
        raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def rows_of(path, without=("seconds", "rollout_seconds", "tokens_per_second")):
    """The rows of a metrics.jsonl, less what depends on the clock."""
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


def same_state(a, b):
    """Whether two runs ended bit-equal: weights, moments, lambda, window, counters, rows, samples."""
    latest = [open(os.path.join(x, "state", "latest")).read().strip() for x in (a, b)]
    assert latest[0] == latest[1]
    folders = [os.path.join(x, "state", latest[0]) for x in (a, b)]
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    for name in os.listdir(folders[0]):
        paths = [os.path.join(f, name) for f in folders]
        if name.endswith(".json"):
            assert json.load(open(paths[0])) == json.load(open(paths[1])), name
        else:
            x, y = map(load_file, paths)
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    assert rows_of(os.path.join(a, "metrics.jsonl")) == rows_of(os.path.join(b, "metrics.jsonl"))
    assert (
        open(os.path.join(a, "samples.jsonl")).read()
        == open(os.path.join(b, "samples.jsonl")).read()
    )
    return True
