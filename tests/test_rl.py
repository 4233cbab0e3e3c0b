"""Rewards and costs per token, advantages, normalisers, the multiplier, randomness."""

import math

import pytest
import torch
from test_losses import GOLDEN, close, mask_of_lengths
from torch import tensor

from nanosafe import rl
from nanosafe.rl import (
    ExponentialMovingAverage,
    LagrangeMultiplier,
    RunningMeanStd,
    measure_sampler_gap,
)
from nanosafe.rollout import as_signed, hash64, uniforms

# ---- rewards and costs per token ----


@pytest.fixture
def shaped():
    """The rewards and costs of two responses, where each token's log-ratio is 0.5."""
    scores = tensor([10.0, -3.0])
    logps = torch.full((2, 4), -1.0)
    ref_logps = torch.full((2, 4), -1.5)
    mask = mask_of_lengths([4, 2], 4)
    rewards = rl.shaped_rewards(scores, logps, ref_logps, mask, 0.2, 50.0)
    costs = rl.shaped_costs(scores, logps, ref_logps, mask, 0.2, 50.0)
    return rewards, costs


def test_the_score_lands_on_the_last_token_and_the_kl_on_every_token(shaped):
    rewards, costs = shaped
    assert close(rewards, [[-0.1, -0.1, -0.1, 9.9], [-0.1, -3.1, 0, 0]])
    assert close(costs, [[0.1, 0.1, 0.1, 10.1], [0.1, -2.9, 0, 0]])


@pytest.mark.parametrize("lambda_", [0.0, 1.0, 7.0])
def test_the_weight_of_the_kl_is_the_same_at_every_lambda(lambda_, shaped):
    rewards, costs = shaped
    mixed = rl.mix_advantages(rewards, costs, lambda_)
    assert close(mixed[0, 0], -0.1)


def test_a_negative_kl_is_not_clamped():
    """A token that is less likely than before pays back.

    AlpacaFarm clamps each token's KL at 0, which biases the penalty."""
    logps = tensor([[-2.0, -1.0]])
    ref_logps = tensor([[-1.0, -2.0]])
    rewards = rl.shaped_rewards(torch.zeros(1), logps, ref_logps, torch.ones(1, 2), 0.5, 50.0)
    assert close(rewards, [[0.5, -0.5]])


# ---- advantages ----


@pytest.fixture
def trajectories():
    """Random rewards and values (B, R) of three responses, their mask and their lengths."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 6, generator=generator)
    values = torch.randn(3, 6, generator=generator)
    lengths = [6, 1, 4]
    return rewards, values, mask_of_lengths(lengths, 6), lengths


def advantage_by_definition(rewards, values, t, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t.

    rewards, values  lists of one response, whose value after its end is 0"""
    values = [*values, 0.0]
    total = 0.0
    for k in range(len(rewards) - t):
        delta = rewards[t + k] + gamma * values[t + k + 1] - values[t + k]
        total += (gamma * gae_lambda) ** k * delta
    return total


def test_gae_equals_its_definition(trajectories):
    rewards, values, mask, lengths = trajectories
    advantages, returns = rl.gae(rewards, values, mask, 0.9, 0.8)
    for b, length in enumerate(lengths):
        own_rewards = rewards[b, :length].tolist()
        own_values = values[b, :length].tolist()
        for t in range(length):
            expected = advantage_by_definition(own_rewards, own_values, t, 0.9, 0.8)
            assert close(advantages[b, t], expected)
            assert close(returns[b, t], expected + own_values[t])
        assert (advantages[b, length:] == 0).all()


def test_gae_with_gae_lambda_1_is_the_rewards_to_come_less_the_value(trajectories):
    rewards, values, mask, _ = trajectories
    advantages, _ = rl.gae(rewards, values, mask, 1.0, 1.0)
    assert close(advantages[0, 2], rewards[0, 2:].sum() - values[0, 2])


def test_gae_with_gae_lambda_0_is_the_one_step_error(trajectories):
    rewards, values, mask, _ = trajectories
    advantages, _ = rl.gae(rewards, values, mask, 1.0, 0.0)
    assert close(advantages[0, 2], rewards[0, 2] + values[0, 3] - values[0, 2])


# Two prompts with three responses each; the second response is one token shorter.
GROUP_RETURNS = [[1.0, 3.0, 8.0], [-2.0, 0.0, 5.0]]
GROUP_MASK = mask_of_lengths([2, 1, 2, 2, 2, 2], 2)


def test_the_sampler_gap_is_measured_on_the_responses_own_tokens():
    sampled = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    logps = torch.tensor([[-1.0, -2.5, -2.9], [-1.2, torch.nan, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    gap = measure_sampler_gap(logps, sampled, mask)
    assert gap.mean.item() == pytest.approx((0.0 + 0.5 + 0.1 + 0.2) / 4)
    assert gap.largest.item() == pytest.approx(0.5)
    k3 = [math.exp(x) - 1 - x for x in (0.0, -0.5, 0.1, -0.2)]
    assert gap.k3.item() == pytest.approx(sum(k3) / 4, rel=1e-4)


def test_rloo_subtracts_the_mean_of_the_others():
    returns = tensor(GROUP_RETURNS).flatten()
    advantages = rl.group_advantages(returns, GROUP_MASK, 3, "rloo")
    for group, numbers in enumerate(GROUP_RETURNS):
        for i, number in enumerate(numbers):
            row = 3 * group + i
            mean_of_others = (sum(numbers) - number) / 2
            assert close(advantages[row], (number - mean_of_others) * GROUP_MASK[row])


def test_grpo_divides_by_the_standard_deviation_of_the_group():
    returns = tensor(GROUP_RETURNS).flatten()
    advantages = rl.group_advantages(returns, GROUP_MASK, 3, "grpo")
    for group, numbers in enumerate(GROUP_RETURNS):
        mean = sum(numbers) / 3
        squares = [(number - mean) ** 2 for number in numbers]
        std = math.sqrt(sum(squares) / 2)
        for i, number in enumerate(numbers):
            row = 3 * group + i
            expected = (number - mean) / std * GROUP_MASK[row]
            assert torch.allclose(advantages[row], expected, atol=1e-5)


def test_grpo_of_equal_returns_is_zero_and_not_nan():
    advantages = rl.group_advantages(torch.ones(4), torch.ones(4, 3), 2, "grpo")
    assert (advantages == 0).all()


def test_an_unknown_group_advantage_is_refused():
    with pytest.raises(ValueError, match="reinforce"):
        rl.group_advantages(torch.ones(4), torch.ones(4, 3), 2, "reinforce")


def test_normalized_advantages_have_mean_0_and_deviation_1():
    mask = mask_of_lengths([3, 1], 3)
    advantages = rl.normalize(tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]), mask)
    inside = advantages[mask.bool()]
    assert abs(inside.mean()) < 1e-6
    assert abs(inside.std(correction=0) - 1) < 1e-6


def test_normalized_advantages_do_not_depend_on_padding():
    """The statistics of trlX and AlpacaFarm include it."""
    mask = mask_of_lengths([3, 1], 3)
    a = rl.normalize(tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]), mask)
    b = rl.normalize(tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]]), mask)
    assert torch.equal(a, b)
    assert (a[1, 1:] == 0).all()


def test_an_advantage_of_minus_log_p_ascends_the_entropy():
    """dH / d theta = E[-log p  d log p / d theta], over all actions of a small policy."""
    logits = tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    entropy = -(logps.exp() * logps).sum()
    (exact,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    probs = logps.exp().detach()
    advantages = -logps.detach()
    policy_gradient_objective = (probs * advantages * logps).sum()
    (estimated,) = torch.autograd.grad(policy_gradient_objective, logits)
    assert torch.allclose(estimated, exact)


# ---- normalisers ----


@pytest.mark.parametrize("name", ["RunningMeanStd", "ExponentialMovingAverage"])
def test_normalisers_have_the_numbers_of_safe_rlhf(name):
    moments = RunningMeanStd() if name == "RunningMeanStd" else ExponentialMovingAverage(0.9)
    golden = GOLDEN["normalizer"]
    expected = golden["output"][name]
    for batch, after in zip(golden["batches"], expected["after_each"]):
        moments.update(tensor(batch).flatten())
        assert close(moments.mean, after["mean"][0])
        assert close(moments.var, after["var"][0])
        assert moments.count == after["count"][0]
    std = moments.var**0.5 + 1e-8
    assert close((3.0 - moments.mean) / std, expected["affine_3"])
    assert close(3.0 / std, expected["scale_3"])


@pytest.mark.parametrize("moments", [RunningMeanStd(), ExponentialMovingAverage(0.9)])
def test_a_batch_of_one_leaves_no_nan(moments):
    moments.update(tensor([2.0]))
    assert math.isfinite(moments.mean)
    assert math.isfinite(moments.var)


FIRST_SCORES = tensor([1.0, 2.0, 6.0])
SECOND_SCORES = tensor([0.0, 3.0, 3.0])


def test_reward_scaling_none_only_clips():
    scaled = rl.scale_rewards(FIRST_SCORES, RunningMeanStd(), "none", 5.0)
    assert torch.equal(scaled, tensor([1.0, 2.0, 5.0]))


@pytest.mark.parametrize("scaling, shift", [("std", 0.0), ("mean_std", 1.0)])
def test_reward_scaling_uses_all_scores_so_far(scaling, shift):
    """The scores of the batch itself are among them."""
    moments = RunningMeanStd()
    scaled = rl.scale_rewards(FIRST_SCORES, moments, scaling, math.inf)
    expected = (FIRST_SCORES - shift * FIRST_SCORES.mean()) / FIRST_SCORES.std()
    assert torch.allclose(scaled, expected, atol=1e-6)

    scaled = rl.scale_rewards(SECOND_SCORES, moments, scaling, math.inf)
    mean = torch.cat([FIRST_SCORES, SECOND_SCORES]).mean()
    # Two batches of n: (n var_1 + n var_2 + (mean_1 - mean_2)^2 n n / 2n) / 2n
    within = 3 * FIRST_SCORES.var() + 3 * SECOND_SCORES.var()
    between = (FIRST_SCORES.mean() - SECOND_SCORES.mean()) ** 2 * 3 * 3 / 6
    std = ((within + between) / 6).sqrt()
    assert torch.allclose(scaled, (SECOND_SCORES - shift * mean) / std, atol=1e-5)


def test_reward_scaling_first_keeps_the_deviation_of_the_first_batch():
    moments = RunningMeanStd()
    rl.scale_rewards(FIRST_SCORES, moments, "first", math.inf)
    scaled = rl.scale_rewards(SECOND_SCORES, moments, "first", math.inf)
    assert torch.allclose(scaled, SECOND_SCORES / FIRST_SCORES.std(), atol=1e-6)


EQUAL_SCORES = tensor([0.7, 0.7, 0.7])


@pytest.mark.parametrize("scaling", ["std", "first"])
@pytest.mark.parametrize("noise", [0.0, 1e-7], ids=["equal", "equal up to rounding"])
def test_equal_scores_keep_their_size(scaling, noise):
    """A deviation of 0 would make 7e7 of 0.7."""
    scores = EQUAL_SCORES + noise * tensor([-1.0, 0.0, 1.0])
    moments = RunningMeanStd()
    scaled = rl.scale_rewards(scores, moments, scaling, math.inf)
    assert moments.deviation == 0
    assert torch.equal(scaled, scores)


def test_equal_scores_minus_their_mean_are_0():
    scaled = rl.scale_rewards(EQUAL_SCORES, RunningMeanStd(), "mean_std", math.inf)
    assert scaled.abs().max() < 1e-6


def test_reward_scaling_first_waits_for_scores_that_differ():
    moments = RunningMeanStd()
    rl.scale_rewards(EQUAL_SCORES, moments, "first", math.inf)
    scaled = rl.scale_rewards(FIRST_SCORES, moments, "first", math.inf)
    deviation = torch.cat([EQUAL_SCORES, FIRST_SCORES]).std()
    assert moments.deviation > 0
    assert torch.equal(scaled, rl.scale_rewards(FIRST_SCORES, moments, "first", math.inf))
    assert 0.5 < scaled.max() / (FIRST_SCORES.max() / deviation) < 2


def test_a_score_that_is_nan_does_not_reach_the_moments():
    moments = RunningMeanStd()
    rl.scale_rewards(FIRST_SCORES, moments, "std", math.inf)
    scaled = rl.scale_rewards(tensor([float("nan"), 1.0]), moments, "std", 5.0)
    assert scaled.isnan().any()
    assert math.isfinite(moments.mean)


@pytest.mark.parametrize(
    "kl, error",
    [
        (12.0, 0.2),  # 1.2 targets or more
        (6.6, 0.1),
        (6.0, 0.0),
        (0.0, -0.2),
    ],
)
def test_the_kl_coefficient_follows_the_kl(kl, error):
    """kl_coef * (1 + error * responses / horizon), with kl / target - 1 clipped to +- 0.2."""
    adapted = rl.adapt_kl_coef(0.1, kl, 6.0, 128, 10000)
    assert adapted == pytest.approx(0.1 * (1 + error * 128 / 10000))


@pytest.mark.parametrize("kl, factor", [(0.0, 0.8), (100.0, 1.2)])
def test_a_rollout_longer_than_the_horizon_changes_the_kl_coefficient_as_one_horizon(kl, factor):
    """With 1000 responses at a horizon of 10 the factor would be -19 or 21."""
    adapted = rl.adapt_kl_coef(0.1, kl, 6.0, 1000, 10.0)
    assert adapted == pytest.approx(0.1 * factor)


# ---- the multiplier ----


def test_the_multiplier_has_the_trajectory_of_safe_rlhf():
    golden = GOLDEN["lambda_update"]
    multiplier = LagrangeMultiplier(golden["lambda_init"], golden["lr"], golden["lambda_max"], 1, 0)
    for row in golden["trajectory"]:
        multiplier.observe([row["J"]])
        value = multiplier.update(golden["threshold"])
        assert value == pytest.approx(row["lambda_"], abs=1e-12)
        assert multiplier.log_lambda == pytest.approx(row["log_lambda"], abs=1e-12)


@pytest.mark.parametrize(
    "cost, cost_limit, rises", [(1.0, 0.0, True), (-1.0, 0.0, False), (-1.0, -2.0, True)]
)
def test_a_cost_above_the_limit_raises_lambda_and_one_below_lowers_it(cost, cost_limit, rises):
    multiplier = LagrangeMultiplier(1.0, 0.1, 5.0, 8, 0)
    multiplier.observe(tensor([cost, cost, cost, cost]))
    assert (multiplier.update(cost_limit) > 1.0) == rises


def test_the_mean_cost_is_that_of_the_window():
    multiplier = LagrangeMultiplier(1.0, 0.1, 2.0, window=3, delay=0)
    multiplier.observe([100.0, 1.0, 2.0, 3.0])
    assert multiplier.mean_cost == 2.0


def test_lambda_moves_after_the_delay_and_up_to_its_maximum():
    multiplier = LagrangeMultiplier(1.0, 0.1, max=2.0, window=3, delay=2)
    multiplier.observe([100.0, 1.0, 2.0, 3.0])
    assert multiplier.update(0.0) == 1.0
    assert multiplier.update(0.0) == 1.0
    assert multiplier.update(0.0) > 1.0
    for _ in range(20):
        multiplier.update(0.0)
    assert multiplier.value == pytest.approx(2.0)


def test_a_learning_rate_of_0_keeps_lambda():
    multiplier = LagrangeMultiplier(0.7, 0.0, 5.0, 3, 0)
    multiplier.observe([9.0])
    assert multiplier.update(0.0) == pytest.approx(0.7)


def test_the_state_of_a_multiplier_continues_exactly():
    original = LagrangeMultiplier(1.0, 0.1, 5.0, 4, 1)
    original.observe([0.3, 0.7])
    original.update(0.1)
    resumed = LagrangeMultiplier(1.0, 0.1, 5.0, 4, 1)
    resumed.load_state_dict(original.state_dict())
    for multiplier in (original, resumed):
        multiplier.observe([1.5])
        multiplier.update(0.1)
    assert original.state_dict() == resumed.state_dict()


# ---- randomness ----


def test_every_rollout_has_randomness_of_its_own():
    """ColossalChat seeds every generation alike, so all its rollouts share one random stream."""
    keys = []
    for rollout in range(4):
        seed = hash64(0, rollout)
        keys.append(as_signed(hash64(seed, 7, 0)))
    draws = uniforms(tensor(keys), torch.zeros(4, dtype=torch.int64))
    assert len(draws.unique()) == 4
