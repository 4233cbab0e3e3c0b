"""train_ppo_lag.py under several constraints, on every answer, with a bound, and with answers that
were cut: what it logs is compared with plain loops over what it computed."""

import json
import math
import os
import runpy
import shutil
import sys

import pytest
import torch
from conftest import ROOT, rows_of, run, same_state
from in_process import run_in_process
from test_constrained import golden_cases
from test_train import assert_rows_are_close

from nanosafe import checkpoint, lora, parallel, rl, tokenizer
from nanosafe.checkpoint import init_from_scratch
from nanosafe.storage import read_json, write_json
from nanosafe.tools.toy_world import find_latest_state, trainer_flags

SCRIPT = "train_ppo_lag.py"
LENGTH = f"{ROOT}/nanosafe/score_functions.py:measure_length"
GROUPS = ["--advantage=grpo", "--num_samples=4", "--rollout_size=2"]


@pytest.fixture(scope="module")
def other_cost(world, tmp_path_factory):
    """A second cost model, with weights of its own."""
    config = checkpoint.load(world / "cost").config
    folder = tmp_path_factory.mktemp("costs") / "other"
    model = init_from_scratch(config, "score", seed=77)
    checkpoint.save(model, folder, tokenizer.load(world / "tokenizer"))
    return folder


@pytest.fixture
def train(trainers, tmp_path, monkeypatch):
    """A function that runs PPO-Lag in this process, and returns the script's globals at the end."""

    def call(*flags, name="run"):
        command = [*trainers["ppo_lag"], *flags, f"--out_dir={tmp_path}/{name}"]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        return runpy.run_path(SCRIPT, run_name="__main__")

    return call


@pytest.fixture
def refusal(trainers, tmp_path, monkeypatch, capsys):
    """A function that runs PPO-Lag with flags that it must refuse, and returns its one line."""

    def call(*flags):
        command = [*trainers["ppo_lag"][1:], f"--out_dir={tmp_path}/refused", *flags]
        outcome = run_in_process(
            SCRIPT, *command, monkeypatch=monkeypatch, capsys=capsys, check=False
        )
        return outcome.error

    return call


def rows_in(folder):
    return rows_of(os.path.join(folder, "metrics.jsonl"))


# ---- several constraints ----

LIMITS = (-1000.0, 1000.0, 50.0)  # of a cost model, of another, and of a function


@pytest.fixture(scope="module")
def three_flags(world, other_cost):
    """Two cost models and a function; log lambda moves by a tenth where the limit is far away."""
    limits = ",".join(map(str, LIMITS))
    return [
        f"--cost_model={world}/cost, {other_cost},{LENGTH}",
        f"--cost_limit={limits}",
        "--lambda_lr=1e-4",
        "--pessimism=0.1",
        "--keep=9",
    ]


@pytest.fixture
def command(trainers, three_flags):
    """PPO-Lag under the three constraints."""
    return [*trainers["ppo_lag"], *three_flags]


@pytest.fixture(scope="module")
def whole(world, three_flags, tmp_path_factory):
    """The folder of such a run, on one process and without a break."""
    folder = tmp_path_factory.mktemp("three") / "whole"
    run(*trainer_flags(world)["ppo_lag"], *three_flags, f"--out_dir={folder}")
    return folder


def test_each_constraint_has_its_own_limit_multiplier_critic_and_metrics(whole):
    rows = rows_in(whole)
    assert len(rows) == 8
    for row in rows:
        for suffix, limit in zip(("", "_2", "_3"), LIMITS):
            assert row[f"slack{suffix}"] == pytest.approx(limit - row[f"episode_cost{suffix}"])
            assert row[f"pessimistic_cost{suffix}"] > row[f"episode_cost{suffix}"]
            assert 0 <= row[f"unsafe_rate{suffix}"] <= 1
            assert row[f"cost{suffix}_critic_loss"] > 0
            assert row[f"cost{suffix}_critic_grad_norm"] > 0
            for name in ("return", "value", "advantage", "with_kl_penalty"):
                assert f"cost{suffix}_{name}" in row
        assert len({row["cost"], row["cost_2"], row["cost_3"]}) == 3
        assert row["lambda"] > 1 > row["lambda_2"] > 0
    first = rows[0]
    for suffix, limit in zip(("", "_2", "_3"), LIMITS):
        excess = first[f"pessimistic_cost{suffix}"] - limit
        assert math.log(first[f"lambda{suffix}"]) == pytest.approx(1e-4 * excess, abs=1e-6)
    with open(whole / "samples.jsonl") as f:
        sample = json.loads(f.readline())
    assert {"reward", "cost", "cost_2", "cost_3"} <= set(sample)
    assert sample["cost_3"] == pytest.approx(len(sample["response"]) / 100)


def test_the_advantage_is_the_mixture_of_all_constraints(three_flags, train):
    """(A_r - sum lambda_i A_i) / (1 + sum lambda_i), token by token."""
    done = train(*three_flags, "--max_steps=2", "--batch_size=8", "--ptx_data=")
    advantages = done["advantages"]
    lambdas = [multiplier.value for multiplier in done["multipliers"].values()]
    assert len(set(lambdas)) == 3
    total = 1 + sum(lambdas)
    for i, answer in enumerate(done["answers"]):
        for t in range(len(answer)):
            mixed = advantages["reward"][i, t].item()
            for name, lambda_ in zip(("cost", "cost_2", "cost_3"), lambdas):
                mixed -= lambda_ * advantages[name][i, t].item()
            assert done["mixed"][i, t].item() == pytest.approx(mixed / total, abs=1e-5)


def test_a_constraint_whose_lambda_has_fallen_to_0_changes_nothing(
    train, world, other_cost, tmp_path
):
    """Bit by bit: its limit is so far away that its first step takes lambda to 0."""
    train(f"--cost_model={world}/cost", "--max_steps=4", name="one")
    models = f"--cost_model={world}/cost,{other_cost}"
    train(models, "--cost_limit=0,1e6", "--max_steps=4", name="two")
    rows = rows_in(tmp_path / "one")
    others = rows_in(tmp_path / "two")
    assert others[0]["lambda_2"] == 0
    for row, other in zip(rows, others, strict=True):
        assert row == {name: other[name] for name in row}


def test_a_constraint_given_twice_weighs_twice(train, world, tmp_path):
    models = f"--cost_model={world}/cost,{world}/cost"
    train("--lambda_lr=0", "--lambda_init=1.4", "--max_steps=4", name="once")
    train(models, "--lambda_lr=0", "--lambda_init=0.7", "--max_steps=4", name="twice")
    rows = rows_in(tmp_path / "once")
    others = rows_in(tmp_path / "twice")
    for row, other in zip(rows, others, strict=True):
        assert other["lambda"] == other["lambda_2"] == 0.7
        assert other["cost_critic_loss"] == other["cost_2_critic_loss"]
        for name in row.keys() - {"lambda"}:
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name


def test_a_resumed_run_under_three_constraints_is_bit_equal(command, whole, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    (resumed / "state" / "latest").write_text("step_000004\n")  # as if it had died after step 4
    run(*command, f"--out_dir={resumed}", "--resume=True")
    assert same_state(whole, resumed)


@pytest.mark.parametrize("layout", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_under_three_constraints_compute_what_one_computes(
    layout, command, whole, tmp_path
):
    flags = [f"--parallel={layout}", "--max_tokens=512", f"--out_dir={tmp_path}/two"]
    run(*command, *flags, ranks=2)
    rows = rows_in(whole)
    others = rows_in(tmp_path / "two")
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
    assert_rows_are_close(rows, others, rel_tol=2e-3, abs_tol=2e-4)


def test_a_state_from_before_these_knobs_is_resumed(train, tmp_path):
    """It has one multiplier, and its record knows nothing of the knobs that have come since."""
    train("--keep=9", name="whole")
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "whole", old)
    (old / "state" / "latest").write_text("step_000004\n")
    folder = find_latest_state(old)
    record = read_json(folder, "record.json")
    for name in ("constraint", "pessimism", "pessimism_test", "mask_cut", "cut_penalty"):
        del record["knobs"][name]
    write_json(record, folder, "record.json")
    sums = read_json(folder, "checksums.json")
    del sums["record.json"]
    write_json(sums, folder, "checksums.json")
    state = read_json(folder, "state.json")
    assert "multiplier" in state
    assert "multiplier_2" not in state
    train("--keep=9", "--resume=True", name="old")
    assert rows_in(old) == rows_in(tmp_path / "whole")


def test_the_record_of_one_cost_model_is_what_it_was_before_there_could_be_two(world, other_cost):
    """So that states of older runs still fit. Of several models, the order counts, too."""
    fingerprint = checkpoint.run_state.fingerprint
    one = str(world / "cost")
    other = str(other_cost)
    assert fingerprint([one]) == fingerprint(one)
    numbers = {fingerprint(models) for models in ([one], [other], [one, other], [other, one])}
    assert len(numbers) == 4


@pytest.mark.parametrize("models", ["{cost}", "{other},{cost},{length}", "{cost},{other}", ""])
def test_resuming_with_other_cost_models_is_refused(
    models, refusal, whole, world, other_cost, tmp_path
):
    """Fewer, in another order, or none."""
    shutil.copytree(whole, tmp_path / "refused")
    names = models.format(cost=world / "cost", other=other_cost, length=LENGTH)
    error = refusal(f"--cost_model={names}", "--cost_limit=0", "--resume=True")
    assert "was made with something else" in error
    assert "cost_model " in error


def test_resuming_with_one_more_cost_model_is_refused(train, refusal, other_cost, world, tmp_path):
    """Without critics, where no missing file of a critic's would tell."""
    train(*GROUPS, "--max_steps=2", name="refused")
    models = f"--cost_model={world}/cost,{other_cost}"
    error = refusal(*GROUPS, "--max_steps=2", models, "--resume=True")
    assert "was made with something else" in error
    assert "cost_model " in error


def test_resuming_with_other_contents_of_the_second_cost_model_is_refused(
    train, refusal, other_cost, world, tmp_path
):
    shutil.copytree(other_cost, tmp_path / "own")
    models = f"--cost_model={world}/cost,{tmp_path}/own"
    train(models, "--max_steps=2", name="refused")
    model = init_from_scratch(checkpoint.load(other_cost).config, "score", seed=78)
    checkpoint.save(model, tmp_path / "own", tokenizer.load(other_cost))
    error = refusal(models, "--max_steps=2", "--resume=True")
    assert "the same name with other contents" in error


def test_two_cost_models_that_are_adapters_share_one_base(train, world, tmp_path):
    on_cpu = parallel.Placement(torch.device("cpu"), dtype=torch.float32)
    placements = parallel.Placements(on_cpu, on_cpu)
    low_rank = lora.Lora(2, 8.0, "all")
    tok = tokenizer.load(world / "policy")
    for number, name in enumerate(("reward", "cost", "cost_2")):
        score_type = "reward" if name == "reward" else "cost"
        model = checkpoint.load_trained(
            str(world / "policy"),
            "score",
            placements,
            {},
            low_rank,
            score_type=score_type,
            seed=number,
        )
        checkpoint.save(model, tmp_path / name, tok)
    done = train(
        f"--reward_model={tmp_path}/reward",
        f"--cost_model={tmp_path}/cost,{tmp_path}/cost_2",
        "--lora_rank=2",
        "--max_steps=2",
    )
    assert len(done["bases"]) == 1
    base = done["actor"].base
    for scorer in done["scorers"].values():
        assert scorer.model.base is base
    for model in done["models"].values():
        assert model.base is base
    row = rows_in(tmp_path / "run")[0]
    assert row["cost"] != row["cost_2"]
    assert row["cost_2_critic_grad_norm"] > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--cost_limit=0,1"], "cost_limit=[0.0, 1.0] has 2 limits for 1 cost models"),
        (["--cost_model=", "--cost_limit=0,1"], "has 2 limits for 0 cost models"),
        (["--cost_kind=unsafe", "--cost_model={cost},{cost}", "--cost_limit=0.1,2"], "=2.0 must"),
        (["--cost_model={cost},{reward}"], "is given as a cost model"),
        (["--cost_model={cost},nowhere"], "nowhere"),
        (
            [*GROUPS, "--normalize_groups=gdpo", "--cost_model=,"],
            "it needs advantage=grpo and costs",
        ),
        (["--pessimism=0.1", "--cost_window=1"], "needs the deviation of several costs"),
        (["--pessimism=0.1", "--pessimism_test=1"], "needs the deviation of several costs"),
        (["--constraint=answer"], "choose one of mean, prompt"),
    ],
)
def test_constraints_that_cannot_be_kept_are_answered_with_one_line(flags, words, refusal, world):
    given = [flag.format(cost=world / "cost", reward=world / "reward") for flag in flags]
    assert words in refusal(*given)


def test_a_critic_with_another_tokenizer_is_reported_with_its_knob(refusal, world, tmp_path):
    shutil.copytree(world / "cost", tmp_path / "other_words")
    (tmp_path / "other_words" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = read_json(tmp_path / "other_words", "tokenizer_config.json")
    write_json(
        {**config, "add_bos_token": False}, tmp_path / "other_words", "tokenizer_config.json"
    )
    error = refusal(f"--cost_model={world}/cost,{tmp_path}/other_words")
    assert "set cost_critic, or advantage=rloo" in error


# ---- a limit for every answer, and a bound on the mean ----


def test_a_limit_for_every_answer_counts_what_is_above_it(train, tmp_path):
    """RePO: max(0, c - d) stands in the place of the cost, and lambda never falls."""
    limit = 0.02
    flags = ["--constraint=prompt", f"--cost_limit={limit}", "--cost_window=8", "--lambda_lr=0.5"]
    done = train(*flags)
    excess = []
    for cost in done["scores"]["cost"].tolist():
        excess.append(max(0.0, cost - limit))
    assert min(excess) == 0 < max(excess)
    assert done["per_response"]["cost"].tolist() == pytest.approx(excess, abs=1e-6)
    rows = rows_in(tmp_path / "run")
    assert rows[-1]["episode_cost"] == pytest.approx(sum(excess) / 8, abs=1e-6)
    lambdas = [row["lambda"] for row in rows]
    assert lambdas == sorted(lambdas)
    assert lambdas[-1] > lambdas[0]
    for row in rows:
        assert row["slack"] == -row["episode_cost"]


def test_answers_that_all_keep_their_limit_leave_lambda_where_it_is(train, tmp_path):
    train("--constraint=prompt", "--cost_limit=1000", "--max_steps=4")
    for row in rows_in(tmp_path / "run"):
        assert row["lambda"] == 1
        assert row["slack"] == 0


def test_a_pessimistic_run_holds_a_bound_against_the_limit(train, tmp_path):
    """Of 8 costs and a test of 5, k = t(0.9, 7) / sqrt 8 + t(0.9, 4) / sqrt 5, from a table."""
    k = 1.41492 / math.sqrt(8) + 1.53321 / math.sqrt(5)
    train("--pessimism=0.1", "--pessimism_test=5", "--cost_window=8", "--max_steps=2")
    row = rows_in(tmp_path / "run")[0]
    deviation = (row["pessimistic_cost"] - row["episode_cost"]) / k
    assert math.log(row["lambda"]) == pytest.approx(0.1 * row["pessimistic_cost"], abs=1e-7)
    assert row["slack"] == -row["episode_cost"]
    # The policy's costs are c + k (c - mean)^2 / (2 std), and the first rollout has no KL.
    surplus = row["cost_with_kl_penalty"] - row["cost"]
    assert row["kl"] == 0
    assert surplus == pytest.approx(k * deviation * 7 / 8 / 2, rel=1e-3)
    assert deviation > 0


def test_without_pessimism_the_size_of_a_later_test_changes_nothing(train, tmp_path):
    train("--max_steps=2", name="plain")
    train("--max_steps=2", "--pessimism_test=5", name="other")
    rows = rows_in(tmp_path / "plain")
    assert rows == rows_in(tmp_path / "other")
    assert "pessimistic_cost" not in rows[0]


def standardise(values):
    """Numbers minus their mean, divided by their unbiased standard deviation."""
    mean = sum(values) / len(values)
    squares = [(value - mean) ** 2 for value in values]
    deviation = math.sqrt(sum(squares) / (len(values) - 1))
    return [(value - mean) / (deviation + 1e-6) for value in values]


@pytest.mark.parametrize("order", ["each", "gdpo"])
def test_rewards_and_costs_are_standardised_in_their_groups_one_by_one(order, train, other_cost):
    """And gdpo's mixture once more over the whole rollout. The KL counts in the reward only."""
    costs = [f"--cost_model={other_cost},{LENGTH}", "--cost_limit=0,0.1"]
    flags = [*costs, "--lambda_lr=0.5", "--kl_coef=5"]
    done = train(*GROUPS, f"--normalize_groups={order}", *flags, "--max_steps=4")
    lambdas = [multiplier.value for multiplier in done["multipliers"].values()]
    assert lambdas[0] != lambdas[1]
    rewards = done["per_token"]["reward"].sum(1).tolist()
    costs = [done["per_response"][name].tolist() for name in ("cost", "cost_2")]
    mixed = []
    for first in (0, 4):
        group = standardise(rewards[first : first + 4])
        group_costs = [standardise(of_all[first : first + 4]) for of_all in costs]
        for i in range(4):
            penalty = lambdas[0] * group_costs[0][i] + lambdas[1] * group_costs[1][i]
            mixed.append((group[i] - penalty) / (1 + sum(lambdas)))
    if order == "gdpo":
        mixed = standardise(mixed)
    for i, answer in enumerate(done["answers"]):
        for t in range(len(answer)):
            assert done["mixed"][i, t].item() == pytest.approx(mixed[i], rel=1e-2, abs=1e-3)


# ---- answers that were cut ----


@pytest.fixture(scope="module")
def ending_policy(world, tmp_path_factory):
    """The policy with a head that often ends an answer, so that only some are cut."""
    folder = tmp_path_factory.mktemp("ending") / "policy"
    model = checkpoint.load(world / "policy")
    tok = tokenizer.load(world / "policy")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        row = model.lm_head.weight[tok.eos_id]
        row.copy_(0.7 * torch.randn(row.shape, generator=generator))
    checkpoint.save(model, folder, tok)
    return folder


WITHOUT_DECAY = ["--actor_weight_decay=0", "--ptx_data=", "--mask_cut=True"]


@pytest.mark.parametrize("loss_mean", ["response", "token", "constant"])
def test_a_rollout_of_cut_answers_trains_the_critics_only(loss_mean, train, world, tmp_path):
    """The random policy ends none so early: no minibatch has an answer to learn from."""
    flags = ["--max_new_tokens=4", "--max_steps=2", "--seed=1"]
    done = train(*WITHOUT_DECAY, f"--loss_mean={loss_mean}", *flags)
    rows = rows_in(tmp_path / "run")
    for row in rows:
        assert row["eos_rate"] == 0
        assert row["actor_grad_norm"] == 0
        assert row["actor_loss"] == 0
        assert row["reward_critic_grad_norm"] > 0
        assert row["cost_critic_grad_norm"] > 0
        assert row["skips"] == 0
        assert row["ratio"] == pytest.approx(1, abs=1e-5)
    start = checkpoint.load(world / "policy")
    for before, after in zip(start.parameters(), done["actor"].parameters()):
        assert torch.equal(before, after)


@pytest.mark.parametrize("loss_mean", ["response", "token", "constant"])
def test_the_policy_learns_from_the_answers_that_ended(loss_mean, train, ending_policy, tmp_path):
    """At the first update all ratios are 1, so that the loss is minus the mean advantage."""
    flags = [f"--actor_model={ending_policy}", "--batch_size=8", "--max_steps=1"]
    done = train(*WITHOUT_DECAY, f"--loss_mean={loss_mean}", *flags)
    total = 0.0
    tokens = 0
    for i, answer in enumerate(done["answers"]):
        if answer[-1] not in done["tok"].eos_ids:
            continue
        advantages = done["mixed"][i, : len(answer)].tolist()
        tokens += len(answer)
        if loss_mean == "response":
            total += sum(advantages) / len(answer) / 8
        elif loss_mean == "constant":
            total += sum(advantages) / 12 / 8  # max_new_tokens
        else:
            total += sum(advantages)
    if loss_mean == "token":
        total /= tokens
    (row,) = rows_in(tmp_path / "run")
    assert 0 < row["eos_rate"] < 1
    assert row["actor_loss"] == pytest.approx(-total, abs=1e-6)
    assert row["actor_grad_norm"] > 0
    # Metrics of the update are of all answers: those that were cut are no ratio of 0.
    assert row["ratio"] == pytest.approx(1, abs=1e-5)


def test_masking_changes_nothing_where_every_answer_ends(train, ending_policy, tmp_path):
    flags = [f"--actor_model={ending_policy}", "--max_new_tokens=100", "--max_steps=2"]
    for mask_cut in (False, True):
        train(*flags, f"--mask_cut={mask_cut}", name=str(mask_cut))
    rows = rows_in(tmp_path / "True")
    assert rows[0]["eos_rate"] == 1
    assert rows == rows_in(tmp_path / "False")


@pytest.mark.parametrize("given, expected", golden_cases("dapo_loss"))
def test_the_penalty_for_length_is_dapos(given, expected):
    lengths = torch.tensor(given["answer_lengths"])
    longest = torch.full_like(lengths, given["max_len"])
    was_cut = torch.zeros_like(lengths).bool()
    penalties = rl.length_penalties(lengths, was_cut, longest, given["cache"])
    assert (-penalties).tolist() == pytest.approx(expected["soft_overlong"])


def test_the_penalty_for_length_equals_a_plain_loop():
    """Each response has its own greatest length: the shorter one of max_new_tokens and max_len."""
    lengths = torch.tensor([1, 7, 8, 9, 10, 5, 5, 3])
    longest = torch.tensor([10, 10, 10, 10, 10, 5, 6, 5])
    was_cut = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0]).bool()
    assert rl.length_penalties(lengths, was_cut, longest, 0).tolist() == was_cut.tolist()
    for buffer in (1, 3, 20):
        penalties = rl.length_penalties(lengths, was_cut, longest, buffer).tolist()
        for length, greatest, penalty in zip(lengths.tolist(), longest.tolist(), penalties):
            begin = greatest - buffer
            if length <= begin:
                assert penalty == 0
            else:
                assert penalty == pytest.approx((length - begin) / buffer)


@pytest.mark.parametrize("buffer", [0, 6])
def test_long_answers_lose_reward(buffer, train, ending_policy, tmp_path):
    """The first rollout has no KL, so that the penalty is all that the metrics differ by."""
    flags = [f"--actor_model={ending_policy}", "--cut_penalty=3", f"--cut_buffer={buffer}"]
    done = train(*flags, "--max_steps=2")
    penalties = []
    for answer in done["answers"]:
        penalty = float(answer[-1] not in done["tok"].eos_ids)
        if buffer:
            penalty = max(0.0, (len(answer) - (12 - buffer)) / buffer)
        penalties.append(3 * penalty)
    assert len(set(penalties)) > 1
    row = rows_in(tmp_path / "run")[0]
    expected = row["reward"] - sum(penalties) / len(penalties)
    assert row["reward_with_kl_penalty"] == pytest.approx(expected, abs=1e-5)
    lost = done["scores"]["reward"] - done["per_response"]["reward"]
    assert lost.tolist() == pytest.approx(penalties, abs=1e-5)
