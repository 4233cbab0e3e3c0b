"""The trainers as users run them: they learn, resume bit-equally, stop on signals, agree over ranks."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, rows_of, run, same_state, small_config

from nanosafe import checkpoint, tokenizer
from nanosafe.tools import demo
from nanosafe.checkpoint import init_from_scratch


@pytest.mark.parametrize("name", ["sft", "reward", "cost", "ppo_lag"])
def test_resume_is_bit_equal(name, trainers, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    run(*trainers[name], f"--out_dir={a}", "--keep=9")
    shutil.copytree(a, b)
    (b / "state" / "latest").write_text("step_000004\n")  # as if it had died after step 4
    run(*trainers[name], f"--out_dir={b}", "--keep=9", "--resume=True")
    assert same_state(a, b)
    config = run(trainers[name][0], a / "config.py", "-h").stdout
    assert str(a) in config  # -h shows the knobs as they stand
    steps = [row["step"] for row in rows_of(a / "metrics.jsonl")]
    assert steps == list(range(len(steps)))


def test_a_run_is_not_overwritten_and_resume_needs_a_state(trainers, tmp_path):
    run(*trainers["reward"], f"--out_dir={tmp_path}/a")
    for extra, words in (
        ((f"--out_dir={tmp_path}/a",), "holds a run"),
        ((f"--out_dir={tmp_path}/b", "--resume=True"), "has no run"),
    ):
        done = run(*trainers["reward"], *extra, check=False)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0_and_the_run_goes_on(sig, trainers, tmp_path):
    flags = [f for f in trainers["sft"] if "max_steps" not in f] + [
        "--max_steps=40",
        "--save_interval=0",
    ]
    run(*flags, f"--out_dir={tmp_path}/a")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    process = subprocess.Popen(
        [sys.executable, *flags, f"--out_dir={tmp_path}/b"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    metrics = tmp_path / "b" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        time.sleep(0.02)
    process.send_signal(sig)
    assert process.wait(timeout=60) == 0
    state = (tmp_path / "b" / "state" / "latest").read_text()
    assert 3 <= int(state.split("_")[1]) <= 40
    run(*flags, f"--out_dir={tmp_path}/b", "--resume=True")
    assert same_state(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_ppo_lag_on_two_ranks_is_ppo_lag_on_one(layout, trainers, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    run(*trainers["ppo_lag"], f"--out_dir={a}")
    run(*trainers["ppo_lag"], f"--out_dir={b}", f"--parallel={layout}", "--max_tokens=512", ranks=2)
    for x, y in zip(rows_of(a / "metrics.jsonl"), rows_of(b / "metrics.jsonl")):
        assert x.keys() == y.keys()
        assert all(math.isclose(x[k], y[k], rel_tol=2e-3, abs_tol=2e-4) for k in x), (x, y)
    # and what two ranks saved, one continues
    (b / "state" / "latest").write_text("step_000006\n")
    run(*trainers["ppo_lag"], f"--out_dir={b}", "--resume=True")
    x, y = (rows_of(d / "metrics.jsonl")[-1] for d in (a, b))
    assert all(math.isclose(x[k], y[k], rel_tol=2e-3, abs_tol=2e-4) for k in x), (x, y)


@pytest.mark.parametrize("name, batch", [("sft", 8), ("cost", 8), ("cost", 1)])
def test_two_ranks_train_as_one(name, batch, trainers, tmp_path):
    """Over small micro-batches; with a batch of one, one rank has no work."""
    flags = [*trainers[name], f"--batch_size={batch}"]
    run(*flags, f"--out_dir={tmp_path}/a")
    run(*flags, f"--out_dir={tmp_path}/b", "--parallel=fsdp", "--max_tokens=400", ranks=2)
    for x, y in zip(rows_of(tmp_path / "a/metrics.jsonl"), rows_of(tmp_path / "b/metrics.jsonl")):
        assert all(math.isclose(x[k], y[k], rel_tol=1e-3, abs_tol=1e-4) for k in x), (x, y)


def test_metrics_samples_and_the_policy_of_ppo_lag(trainers, tmp_path):
    run(*trainers["ppo_lag"], f"--out_dir={tmp_path}", "--cost_limit=-100", "--lambda_lr=0.001")
    rows = rows_of(tmp_path / "metrics.jsonl")
    names = """reward reward_with_kl_penalty reward_advantage reward_return reward_value kl entropy eos_rate length
        max_length cost cost_with_kl_penalty cost_advantage cost_return cost_value unsafe_rate lambda episode_cost
        slack actor_loss reward_critic_loss cost_critic_loss ptx_loss clip_fraction approx_kl actor_lr critic_lr
        actor_grad_norm reward_critic_grad_norm cost_critic_grad_norm skips""".split()
    assert set(names) <= set(rows[0]) and len(rows) == 8
    assert rows[0]["kl"] == 0 and rows[0]["clip_fraction"] == 0
    lambdas = [row["lambda"] for row in rows[::2]]
    assert lambdas == sorted(lambdas) and lambdas[0] > 1  # far above the limit, lambda rises
    assert all(row["slack"] == pytest.approx(-100 - row["episode_cost"], abs=1e-4) for row in rows)
    samples = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert {"step", "prompt", "response", "reward", "cost", "kl"} == set(samples[0])
    assert (
        tokenizer.load(tmp_path / "model").vocab_size
        == checkpoint.load(tmp_path / "model").config.vocab_size
    )


def test_plain_ppo_and_fixed_shaping(trainers, tmp_path):
    run(*trainers["ppo"], f"--out_dir={tmp_path}/a", "--num_samples=2", "--ppo_epochs=2")
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert (
        "cost" not in rows[0] and "lambda" not in rows[0] and len(rows) == 8
    )  # 8 steps, one rollout
    assert len({row["reward"] for row in rows}) == 1
    run(*trainers["ppo_lag"], f"--out_dir={tmp_path}/b", "--lambda_lr=0", "--lambda_init=0.7")
    assert {row["lambda"] for row in rows_of(tmp_path / "b" / "metrics.jsonl")} == {0.7}


def test_a_learning_signal_is_learned(trainers, world, tmp_path):
    flags = [f for f in trainers["sft"] if "max_steps" not in f]
    run(
        *flags,
        f"--out_dir={tmp_path}",
        "--max_steps=60",
        "--learning_rate=3e-3",
        "--save_interval=0",
    )
    losses = [row["loss"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.6 * losses[0]


def test_non_finite_gradients_are_skipped_counted_and_end_the_run(trainers, world, tmp_path):
    bad = tmp_path / "bad"
    model = checkpoint.load(world / "policy")
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    checkpoint.save(model, bad, tokenizer.load(world / "tokenizer"))
    flags = [f for f in trainers["reward"] if "init_from" not in f]
    done = run(
        *flags, f"--init_from={bad}", f"--out_dir={tmp_path}/a", "--max_skips=3", check=False
    )
    assert done.returncode == 1 and "4 updates had a non-finite gradient" in done.stderr
    assert (
        "warning: step 0, rank 0: the gradient is not finite in" in done.stdout
        and "Traceback" not in done.stderr
    )


def test_a_reward_model_may_have_another_tokenizer_a_critic_may_not(trainers, world, tmp_path):
    tok = demo.train_tokenizer(["Sure. First, get the rope."] * 99, 280, str(tmp_path / "other"))
    checkpoint.save(
        init_from_scratch(small_config(vocab_size=tok.vocab_size), "score"), tmp_path / "rm", tok
    )
    flags = [f for f in trainers["ppo"] if "reward_model" not in f] + [
        f"--reward_model={tmp_path}/rm"
    ]
    done = run(*flags, f"--out_dir={tmp_path}/a", check=False)
    assert (
        done.returncode == 1
        and "has another tokenizer" in done.stderr
        and "reward_critic" in done.stderr
    )
    run(*flags, f"--out_dir={tmp_path}/b", f"--reward_critic={world}/reward")


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--dtype=float16", "overflows"),
        ("--parallel=zero3", "parallel='zero3'"),
        ("--data=nowhere", "prepare.py first"),
        ("--init_from=nowhere", "no "),
        ("--lr_schedule=linaer", "lr_schedule='linaer'"),
        ("--max_tokens=50", "raise max_tokens"),
        ("--objective=rewards", "choose one of reward, cost, dpo, ipo, rrhf"),
        ("--normalizer=std", "choose one of ema, running, none"),
    ],
)
def test_a_user_s_mistake_is_one_line(flag, words, trainers, tmp_path):
    done = run(*trainers["reward"], f"--out_dir={tmp_path}/a", flag, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert (
        done.returncode == 1
        and len(errors) == 1
        and words in errors[0]
        and "Traceback" not in done.stderr
    )


def test_reward_models_carry_their_moments(trainers, tmp_path):
    run(*trainers["reward"], f"--out_dir={tmp_path}")
    config = checkpoint.load(tmp_path / "model").config
    assert config.normalizer_type == "ExponentialMovingAverage" and config.momentum == 0.9
    assert config.mean != [0.0] and config.var != [1.0] and not config.do_normalize
    assert config.score_type == "reward"
