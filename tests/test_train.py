"""The trainers as users run them: they learn, resume bit-equally, stop on signals, and compute the
same on several ranks as on one."""

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
from in_process import run_in_process

from nanosafe import checkpoint, tokenizer
from nanosafe.checkpoint import init_from_scratch, run_state
from nanosafe.tools import demo


def without(flags, name):
    """A command without the flag --name=..."""
    return [flag for flag in flags if not flag.startswith(f"--{name}=")]


def assert_rows_are_close(rows, others, rel_tol, abs_tol):
    """That two runs logged the same numbers, up to rounding."""
    for row, other in zip(rows, others):
        for name, value in row.items():
            is_close = math.isclose(value, other[name], rel_tol=rel_tol, abs_tol=abs_tol)
            assert is_close, (name, row, other)


@pytest.mark.parametrize("name", ["sft", "reward", "cost", "ppo_lag"])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(name, trainers, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(*trainers[name], f"--out_dir={whole}", "--keep=9")
    shutil.copytree(whole, resumed)
    (resumed / "state" / "latest").write_text("step_000004\n")  # as if it had died after step 4
    run(*trainers[name], f"--out_dir={resumed}", "--keep=9", "--resume=True")
    assert same_state(whole, resumed)
    steps = [row["step"] for row in rows_of(whole / "metrics.jsonl")]
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize("multiplier", ["pid", "optimistic", "bounded"])
def test_a_resumed_run_with_another_multiplier_is_bit_equal(multiplier, trainers, tmp_path):
    flags = [*trainers["ppo_lag"], f"--multiplier={multiplier}", "--keep=9", "--lambda_lookback=2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(*flags, f"--out_dir={whole}")
    shutil.copytree(whole, resumed)
    (resumed / "state" / "latest").write_text("step_000004\n")
    run(*flags, f"--out_dir={resumed}", "--resume=True")
    assert same_state(whole, resumed)
    lambdas = {row["lambda"] for row in rows_of(whole / "metrics.jsonl")}
    assert len(lambdas) == 4  # of four rollouts


@pytest.mark.parametrize("name", ["sft", "ppo_lag"])
def test_a_longer_run_continues_a_finished_one_bit_equally(name, trainers, tmp_path):
    """With a constant learning rate. Any other would jump, which is refused."""
    schedule = "--actor_lr_schedule" if name == "ppo_lag" else "--lr_schedule"
    flags = [*without(trainers[name], "max_steps"), f"{schedule}=constant"]
    flags = without(flags, "eval_data")  # which is evaluated at each end
    long, short = tmp_path / "long", tmp_path / "short"
    run(*flags, f"--out_dir={long}", "--max_steps=12")
    run(*flags, f"--out_dir={short}", "--max_steps=8")
    again = [*flags, f"--out_dir={short}", "--max_steps=12", "--resume=True"]
    done = run(*again, f"{schedule}=cosine", check=False)
    assert done.returncode == 1
    assert "lr_schedule='cosine' would jump at step 8" in done.stderr.splitlines()[-1]
    assert "max_steps 8 -> 12" in run(*again).stdout
    assert rows_of(long / "metrics.jsonl") == rows_of(short / "metrics.jsonl")


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--ppo_epochs=2", "ppo_epochs 1 -> 2"),
        ("--prompts={world}/data/prompts/test.jsonl", "prompts "),
        ("--reward_model={world}/other", "reward_model "),
        ("--advantage=grpo --num_samples=2", "advantage 'gae' -> 'grpo'"),
        ("--multiplier=pid", "multiplier 'lagrange' -> 'pid'"),
    ],
)
def test_a_resumed_run_of_ppo_refuses_what_its_state_was_not_made_with(
    flag, words, trainers, world, tmp_path
):
    if not (world / "other").exists():
        config = checkpoint.load(world / "reward").config
        model = init_from_scratch(config, "score", seed=99)
        checkpoint.save(model, world / "other", tokenizer.load(world / "tokenizer"))
    command = [*trainers["ppo"], f"--out_dir={tmp_path}/a"]
    run(*command, "--max_steps=4")
    flags = flag.format(world=world).split()
    done = run(*command, "--max_steps=4", *flags, "--resume=True", check=False)
    assert done.returncode == 1
    assert "was made with something else" in done.stderr.splitlines()[-1]
    assert words in done.stderr.splitlines()[-1]


def test_a_resumed_run_says_what_has_changed_and_goes_on_with_it(trainers, tmp_path):
    command = [*trainers["ppo_lag"], f"--out_dir={tmp_path}/a"]
    run(*command)
    (tmp_path / "a" / "state" / "latest").write_text("step_000006\n")
    changes = ["--critic_learning_rate=5e-4", "--kl_coef=0.25", "--resume=True"]
    done = run(*command, *changes)
    assert "critic_learning_rate 0.001 -> 0.0005, kl_coef 0.01 -> 0.25" in done.stdout
    row = rows_of(tmp_path / "a" / "metrics.jsonl")[-1]
    assert row["kl_coef"] == 0.25
    assert row["critic_lr"] == 5e-4


def test_help_shows_the_knobs_as_a_run_has_saved_them(trainers, tmp_path):
    run(*trainers["sft"], f"--out_dir={tmp_path}/a")
    config = run(trainers["sft"][0], tmp_path / "a" / "config.py", "-h").stdout
    assert f'out_dir = "{tmp_path}/a"' in config


def test_a_run_is_not_overwritten_and_resume_needs_a_run(trainers, tmp_path):
    run(*trainers["reward"], f"--out_dir={tmp_path}/a")
    again = [*trainers["reward"], f"--out_dir={tmp_path}/a"]
    resume_nothing = [*trainers["reward"], f"--out_dir={tmp_path}/b", "--resume=True"]
    for command, words in ((again, "holds a run"), (resume_nothing, "has no run")):
        done = run(*command, check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "signal_number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_with_0_and_the_run_can_go_on(signal_number, trainers, tmp_path):
    flags = [*without(trainers["sft"], "max_steps"), "--max_steps=40", "--save_interval=0"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(*flags, f"--out_dir={whole}")
    process = subprocess.Popen(
        [sys.executable, *flags, f"--out_dir={stopped}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ROOT},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    metrics = stopped / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        time.sleep(0.02)
    process.send_signal(signal_number)
    assert process.wait(timeout=900) == 0
    latest = (stopped / "state" / "latest").read_text()
    assert 3 <= int(latest.split("_")[1]) <= 40
    assert run_state.is_unfinished(stopped) == (int(latest.split("_")[1]) < 40)
    run(*flags, f"--out_dir={stopped}", "--resume=True")
    assert not run_state.is_unfinished(stopped)
    assert same_state(whole, stopped)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_ppo_lag_on_two_ranks_computes_what_one_computes(layout, trainers, tmp_path):
    command = trainers["ppo_lag"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*command, f"--out_dir={one}")
    run(*command, f"--out_dir={two}", f"--parallel={layout}", "--max_tokens=512", ranks=2)
    expected, rows = rows_of(one / "metrics.jsonl"), rows_of(two / "metrics.jsonl")
    for row, other in zip(expected, rows):
        assert row.keys() == other.keys()
    assert_rows_are_close(expected, rows, rel_tol=2e-3, abs_tol=2e-4)

    (two / "state" / "latest").write_text("step_000006\n")
    run(*command, f"--out_dir={two}", "--resume=True")  # on one rank, what two ranks saved
    rows = rows_of(two / "metrics.jsonl")
    assert_rows_are_close(expected[-1:], rows[-1:], rel_tol=2e-3, abs_tol=2e-4)


@pytest.mark.parametrize("name, batch_size", [("sft", 8), ("cost", 8), ("cost", 1)])
def test_two_ranks_train_as_one(name, batch_size, trainers, tmp_path):
    """Over small micro-batches; with a batch of one example, one rank has no work."""
    flags = [*trainers[name], f"--batch_size={batch_size}"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*flags, f"--out_dir={one}")
    run(*flags, f"--out_dir={two}", "--parallel=fsdp", "--max_tokens=400", ranks=2)
    rows, others = rows_of(one / "metrics.jsonl"), rows_of(two / "metrics.jsonl")
    assert_rows_are_close(rows, others, rel_tol=1e-3, abs_tol=1e-4)


METRICS_OF_PPO_LAG = """
    reward reward_with_kl_penalty reward_advantage reward_return reward_value kl entropy eos_rate
    length max_length cost cost_with_kl_penalty cost_advantage cost_return cost_value unsafe_rate
    lambda episode_cost slack actor_loss reward_critic_loss cost_critic_loss ptx_loss clip_fraction
    approx_kl sampler_gap sampler_k3 sampler_gap_max actor_lr critic_lr actor_grad_norm
    reward_critic_grad_norm cost_critic_grad_norm skips
"""


def test_ppo_lag_logs_its_metrics_and_samples_and_exports_its_policy(trainers, tmp_path):
    run(*trainers["ppo_lag"], f"--out_dir={tmp_path}", "--cost_limit=-100", "--lambda_lr=0.001")
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert set(METRICS_OF_PPO_LAG.split()) <= set(rows[0])
    assert len(rows) == 8
    assert rows[0]["kl"] == 0
    assert rows[0]["clip_fraction"] == 0
    for row in rows:  # in float32 the sampler computes what the trainer computes
        assert 0 < row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4
        assert 0 <= row["sampler_k3"] < 1e-8
    lambdas = [row["lambda"] for row in rows[::2]]  # one value for each rollout of two updates
    assert lambdas == sorted(lambdas)  # the cost is far above the limit, so lambda rises
    assert lambdas[0] > 1
    for row in rows:
        assert row["slack"] == pytest.approx(-100 - row["episode_cost"], abs=1e-4)
    with open(tmp_path / "samples.jsonl") as f:
        sample = json.loads(f.readline())
    assert {"step", "prompt", "response", "reward", "cost", "kl"} == set(sample)
    vocab_size = checkpoint.load(tmp_path / "model").config.vocab_size
    assert tokenizer.load(tmp_path / "model").vocab_size == vocab_size


def test_truncated_importance_sampling_changes_nothing_where_the_sampler_is_the_trainer(
    trainers, tmp_path
):
    """On a CPU in float32 all weights are 1 up to rounding; a cap below 1 scales the advantages."""
    for name, flags in (("off", []), ("on", ["--is_cap=2"]), ("cut", ["--is_cap=0.5"])):
        run(*trainers["ppo"], "--max_steps=1", *flags, f"--out_dir={tmp_path}/{name}")
    off, on, cut = (rows_of(tmp_path / name / "metrics.jsonl")[0] for name in ("off", "on", "cut"))
    assert on["actor_loss"] == pytest.approx(off["actor_loss"], rel=1e-3, abs=1e-6)
    assert cut["actor_loss"] == pytest.approx(off["actor_loss"] / 2, rel=1e-3, abs=1e-6)


def test_indicator_costs_are_what_the_limit_is_compared_with(trainers, tmp_path):
    """The metric "cost" stays the cost model's score."""
    flags = ["--cost_kind=unsafe", "--cost_limit=0.05", "--cost_scale=10", "--cost_window=8"]
    run(*trainers["ppo_lag"], *flags, f"--out_dir={tmp_path}")
    for row in rows_of(tmp_path / "metrics.jsonl"):
        assert row["episode_cost"] == pytest.approx(row["unsafe_rate"])
        assert row["slack"] == pytest.approx(0.05 - row["unsafe_rate"], abs=1e-6)
        kl_penalty = row["kl_coef"] * row["kl"]
        assert row["cost_with_kl_penalty"] == pytest.approx(
            10 * row["unsafe_rate"] + kl_penalty, abs=1e-4
        )
        assert row["cost"] != pytest.approx(row["unsafe_rate"])


@pytest.mark.parametrize(
    "flags",
    [
        "--advantage=grpo --normalize_groups=each --cost_kind=unsafe --cost_limit=0.05",
        "--surrogate=gspo --clip_ratio=0.0003 --clip_ratio_high=0.0004",
        "--surrogate=cispo --clip_ratio=1 --clip_ratio_high=4 --loss_mean=token",
        "--advantage=grpo --loss_mean=constant",
    ],
)
def test_the_neighbours_of_ppo_train(flags, trainers, tmp_path):
    options = ["--num_samples=2", "--rollout_size=4", *flags.split()]
    run(*trainers["ppo_lag"], *options, f"--out_dir={tmp_path}")
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert len(rows) == 8
    assert ("flat_cost_groups" in rows[0]) == ("grpo" in flags)
    for row in rows:
        assert row["skips"] == 0
        assert row["actor_grad_norm"] > 0


def test_plain_ppo_has_no_cost_and_no_lambda(trainers, tmp_path):
    run(*trainers["ppo"], f"--out_dir={tmp_path}", "--num_samples=2", "--ppo_epochs=2")
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert "cost" not in rows[0]
    assert "lambda" not in rows[0]
    assert len(rows) == 8
    assert len({row["reward"] for row in rows}) == 1  # all eight steps are of one rollout


def test_lambda_is_fixed_when_its_learning_rate_is_0(trainers, tmp_path):
    run(*trainers["ppo_lag"], f"--out_dir={tmp_path}", "--lambda_lr=0", "--lambda_init=0.7")
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert {row["lambda"] for row in rows} == {0.7}


def test_a_learning_signal_is_learned(trainers, world, tmp_path):
    run(
        *without(trainers["sft"], "max_steps"),
        f"--out_dir={tmp_path}",
        "--max_steps=60",
        "--learning_rate=3e-3",
        "--save_interval=0",
    )
    losses = [row["loss"] for row in rows_of(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.6 * losses[0]


def test_non_finite_gradients_are_skipped_counted_and_end_the_run(trainers, world, tmp_path):
    model = checkpoint.load(world / "policy")
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    checkpoint.save(model, tmp_path / "bad", tokenizer.load(world / "tokenizer"))
    done = run(
        *without(trainers["reward"], "init_from"),
        f"--init_from={tmp_path}/bad",
        f"--out_dir={tmp_path}/a",
        "--max_skips=3",
        check=False,
    )
    assert done.returncode == 1
    assert "4 updates had a non-finite gradient" in done.stderr
    assert "warning: step 0, rank 0: the gradient is not finite in" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_reward_model_may_have_another_tokenizer_but_a_critic_may_not(trainers, world, tmp_path):
    tok = demo.train_tokenizer(["Sure. First, get the rope."] * 99, 280, str(tmp_path / "other"))
    model = init_from_scratch(small_config(vocab_size=tok.vocab_size), "score")
    checkpoint.save(model, tmp_path / "reward", tok)
    flags = [*without(trainers["ppo"], "reward_model"), f"--reward_model={tmp_path}/reward"]
    done = run(*flags, f"--out_dir={tmp_path}/a", check=False)
    assert done.returncode == 1
    assert "has another tokenizer" in done.stderr
    assert "reward_critic" in done.stderr
    run(*flags, f"--out_dir={tmp_path}/b", f"--reward_critic={world}/reward")


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--reward_model={world}/cost", "cost' is given as a reward model, but its config.json"),
        ("--cost_model={world}/reward", "reward' is given as a cost model, but its config.json"),
        ("--reward_model={world}/policy", "policy' is a policy: it has no score head"),
        ("--cost_model={world}/policy", "policy' is a policy: it has no score head"),
    ],
)
def test_a_wrong_reward_or_cost_model_is_refused(flag, words, trainers, world, tmp_path):
    flags = [*trainers["ppo_lag"], f"--out_dir={tmp_path}", flag.format(world=world)]
    done = run(*flags, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_critic_may_begin_as_a_policy_and_a_cost_model_as_a_reward_model(
    trainers, world, tmp_path
):
    critics = [f"--reward_critic={world}/policy", f"--cost_critic={world}/reward"]
    done = run(*trainers["ppo_lag"], *critics, "--max_steps=2", f"--out_dir={tmp_path}/ppo")
    assert done.stdout.count("no score head there: a new one is drawn") == 1
    flags = [*without(trainers["cost"], "init_from"), f"--init_from={world}/reward"]
    run(*flags, "--max_steps=1", f"--out_dir={tmp_path}/cost")
    assert checkpoint.load(tmp_path / "cost" / "model").config.score_type == "cost"


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--dtype=float16", "overflows"),
        ("--parallel=zero3", "parallel='zero3'"),
        ("--data=nowhere", "prepare.py first"),
        ("--init_from=nowhere", "no "),
        ("--lr_schedule=linaer", "lr_schedule='linaer'"),
        ("--max_tokens=50", "raise max_tokens"),
        ("--objective=rewards", "choose one of reward, cost, dpo, ipo, simpo"),
        ("--normalizer=std", "choose one of ema, running, none"),
    ],
)
def test_a_user_s_mistake_is_answered_with_one_line(flag, words, trainers, tmp_path):
    done = run(*trainers["reward"], f"--out_dir={tmp_path}/a", flag, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 1
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "script, flag, words",
    [
        ("train_sft.py", "--log_interval=0", "log_interval=0 must be at least 1"),
        ("train_sft.py", "--num_key_value_heads=3", "must be a multiple of"),
        ("train_pref.py", "--beta=0", "beta=0.0 must be above 0"),
        ("train_ppo_lag.py", "--lambda_init=0", "lambda_init=0.0 must be above 0"),
        ("nanosafe/phf/train.py", "--eval_top_p=0", "must be above 0 and at most 1"),
        ("sample.py", "--keep=0", "keep=0 must be at least 1"),
        ("nanosafe/eval/arena.py", "--temperature=-1", "must be at least 0"),
        ("nanosafe/eval/judge.py", "--timeout=0", "must be above 0 and at most 3600"),
        ("nanosafe/eval/bigbench.py", "--shots=-1", "must be at least 0"),
        ("nanosafe/eval/scores.py", "--seed=0", "unknown knob 'seed'"),
        ("nanosafe/eval/scores.py", "--worst=-1", "must be at least 0"),
    ],
)
def test_a_number_outside_its_range_stops_a_script_before_any_work(
    script, flag, words, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = "out=~/made.jsonl" if script == "sample.py" else "out_dir=~/made"
    flags = [f"--{out}", flag]
    outcome = run_in_process(script, *flags, monkeypatch=monkeypatch, capsys=capsys, check=False)
    assert words in outcome.error
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature=0"], "they are all the same"),
        (["--top_k=1"], "they are all the same"),
        (["--advantage=gae", "--kl_target=6", "--kl_coef=0"], "kl_coef=0 would stay 0"),
        (["--normalize_groups=each"], "it needs advantage=grpo and costs"),
        (["--cost_kind=unsafe", "--cost_limit=-5.2"], "makes cost_limit a share of answers"),
    ],
)
def test_knobs_with_which_nothing_would_be_learned_are_refused(flags, words, monkeypatch, capsys):
    flags = ["--advantage=rloo", "--num_samples=2", *flags]
    outcome = run_in_process(
        "train_ppo_lag.py", *flags, monkeypatch=monkeypatch, capsys=capsys, check=False
    )
    assert words in outcome.error


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_a_score_model_without_a_deviation_is_not_normalised(kind, trainers, world, tmp_path):
    model = checkpoint.load(world / kind)
    model.config.var = [0.0]
    checkpoint.save(model, tmp_path / "flat", tokenizer.load(world / "tokenizer"))
    done = run(
        *without(trainers["ppo_lag"], f"{kind}_model"),
        f"--{kind}_model={tmp_path}/flat",
        f"--normalize_{kind}=True",
        f"--out_dir={tmp_path}/a",
        check=False,
    )
    assert done.returncode == 1
    assert "states var=0.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_equal_rewards_and_a_short_horizon_are_said(trainers, world, tmp_path):
    """The reward model gives everything 0.7, and a rollout is eight times the horizon."""
    model = checkpoint.load(world / "reward")
    with torch.no_grad():
        model.score_head.weight.zero_()
        model.score_head.bias = torch.nn.Parameter(torch.full((1,), 0.7))
    model.config.score_bias = True
    checkpoint.save(model, tmp_path / "constant", tokenizer.load(world / "tokenizer"))
    done = run(
        *without(without(trainers["ppo"], "reward_model"), "max_steps"),
        f"--reward_model={tmp_path}/constant",
        f"--reward_critic={world}/reward",
        f"--out_dir={tmp_path}/a",
        "--max_steps=4",
        "--reward_scaling=first",
        "--kl_target=6",
        "--kl_horizon=1",
    )
    assert "all rewards so far are equal" in done.stderr
    assert "kl_horizon=1.0 is shorter than a rollout of 8 responses" in done.stdout
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert rows[0]["reward"] == pytest.approx(0.7)
    assert abs(rows[0]["reward_return"]) < 1
    assert all(row["kl_coef"] > 0 for row in rows)


def test_a_reward_model_s_config_has_the_moments_of_its_scores(trainers, tmp_path):
    run(*trainers["reward"], f"--out_dir={tmp_path}")
    config = checkpoint.load(tmp_path / "model").config
    assert config.normalizer_type == "ExponentialMovingAverage"
    assert config.momentum == 0.9
    assert config.mean != [0.0]
    assert config.var != [1.0]
    assert not config.do_normalize
    assert config.score_type == "reward"
