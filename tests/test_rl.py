"""Rewards, advantages, the multiplier, normalisers."""

import math

import pytest
import torch
from test_losses import GOLDEN, close

from nanosafe import rl
from nanosafe.rl import ExponentialMovingAverage, LagrangeMultiplier, RunningMeanStd


def test_gae_equals_a_plain_loop_and_its_limits():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 6, generator=g), torch.randn(3, 6, generator=g)
    lengths = [6, 1, 4]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).float()
    advantages, returns = rl.gae(rewards, values, mask, 0.9, 0.8)
    for b, n in enumerate(lengths):
        for t in range(n):  # A_t = sum_k (gamma lambda)^k delta_{t+k}
            value = lambda i: values[b, i] if i < n else 0.0
            expected = sum((0.9 * 0.8)**k * (rewards[b, t + k] + 0.9 * value(t + k + 1) - value(t + k))
                           for k in range(n - t))
            assert close(advantages[b, t], expected) and close(returns[b, t], expected + values[b, t])
        assert (advantages[b, n:] == 0).all()
    advantages, _ = rl.gae(rewards, values, mask, 1.0, 1.0)
    assert close(advantages[0, 2], rewards[0, 2:].sum() - values[0, 2])  # sum of rewards - V
    advantages, _ = rl.gae(rewards, values, mask, 1.0, 0.0)
    assert close(advantages[0, 2], rewards[0, 2] + values[0, 3] - values[0, 2])  # one step TD


def test_score_lands_on_the_last_token_and_kl_on_every_token():
    logps, ref = torch.full((2, 4), -1.0), torch.full((2, 4), -1.5)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    rewards = rl.shaped_rewards(torch.tensor([10.0, -3.0]), logps, ref, mask, 0.2, 50.0)
    assert close(rewards, [[-0.1, -0.1, -0.1, 9.9], [-0.1, -3.1, 0, 0]])
    costs = rl.shaped_costs(torch.tensor([10.0, -3.0]), logps, ref, mask, 0.2, 50.0)
    assert close(costs, [[0.1, 0.1, 0.1, 10.1], [0.1, -2.9, 0, 0]])
    for lambda_ in (0.0, 1.0, 7.0):  # the KL weight is the same at every lambda
        assert close(rl.mix_advantages(rewards, costs, lambda_)[0, 0], -0.1)


def test_multiplier_golden_trajectory():
    golden = GOLDEN["lambda_update"]
    m = LagrangeMultiplier(golden["lambda_init"], golden["lr"], golden["lambda_max"], 1, 0)
    for row in golden["trajectory"]:
        m.observe([row["J"]])
        assert m.update(golden["threshold"]) == pytest.approx(row["lambda_"], abs=1e-12)
        assert m.log_lambda == pytest.approx(row["log_lambda"], abs=1e-12)


def test_a_cost_above_the_limit_raises_lambda_and_one_below_lowers_it():
    for cost, limit, up in ((1.0, 0.0, True), (-1.0, 0.0, False), (-1.0, -2.0, True)):
        m = LagrangeMultiplier(1.0, 0.1, 5.0, 8, 0)
        m.observe(torch.tensor([cost] * 4))
        assert (m.update(limit) > 1.0) == up


def test_window_delay_bound_and_fixed_lambda():
    m = LagrangeMultiplier(1.0, 0.1, 2.0, 3, 2)
    m.observe([100.0, 1.0, 2.0, 3.0])
    assert m.mean_cost == 2.0  # the window holds three
    assert [m.update(0.0) for _ in range(2)] == [1.0, 1.0]  # the delay
    assert m.update(0.0) > 1.0
    for _ in range(20):
        m.update(0.0)
    assert m.value == pytest.approx(2.0)  # the bound
    fixed = LagrangeMultiplier(0.7, 0.0, 5.0, 3, 0)
    fixed.observe([9.0])
    assert fixed.update(0.0) == pytest.approx(0.7)


def test_multiplier_state_continues_exactly():
    a, b = (LagrangeMultiplier(1.0, 0.1, 5.0, 4, 1) for _ in range(2))
    a.observe([0.3, 0.7])
    a.update(0.1)
    b.load_state_dict(a.state_dict())
    for m in (a, b):
        m.observe([1.5])
        m.update(0.1)
    assert a.state_dict() == b.state_dict()


def test_normalizer_golden_numbers():
    golden = GOLDEN["normalizer"]
    for name, n in (("RunningMeanStd", RunningMeanStd()),
                    ("ExponentialMovingAverage", ExponentialMovingAverage(0.9))):
        out = golden["output"][name]
        for batch, after in zip(golden["batches"], out["after_each"]):
            n.update([x for row in batch for x in row])
            assert close(n.mean, after["mean"][0]) and close(n.var, after["var"][0])
            assert n.count == after["count"][0]
        std = n.var**0.5 + 1e-8
        assert close((3.0 - n.mean) / std, out["affine_3"]) and close(3.0 / std, out["scale_3"])


def test_a_batch_of_one_leaves_no_nan():
    for n in (RunningMeanStd(), ExponentialMovingAverage(0.9)):
        n.update(torch.tensor([2.0]))
        assert math.isfinite(n.mean) and math.isfinite(n.var)
