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
            expected = sum(
                (0.9 * 0.8) ** k * (rewards[b, t + k] + 0.9 * value(t + k + 1) - value(t + k))
                for k in range(n - t)
            )
            assert close(advantages[b, t], expected) and close(
                returns[b, t], expected + values[b, t]
            )
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
    for name, n in (
        ("RunningMeanStd", RunningMeanStd()),
        ("ExponentialMovingAverage", ExponentialMovingAverage(0.9)),
    ):
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


def test_group_advantages_equal_plain_loops():
    returns, mask = torch.tensor([1.0, 3.0, 8.0, -2.0, 0.0, 5.0]), torch.ones(6, 2)
    mask[1, 1] = 0
    rloo, grpo = (rl.group_advantages(returns, mask, 3, kind) for kind in ("rloo", "grpo"))
    for group in range(2):
        r = returns[3 * group : 3 * group + 3].tolist()
        mean = sum(r) / 3
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / 2)
        for i in range(3):
            others = sum(x for j, x in enumerate(r) if j != i) / 2
            row = 3 * group + i
            assert close(rloo[row], (r[i] - others) * mask[row])
            assert torch.allclose(grpo[row], (r[i] - mean) / std * mask[row], atol=1e-5)
    assert (
        rl.group_advantages(torch.ones(4), torch.ones(4, 3), 2, "grpo") == 0
    ).all()  # all alike: no nan


def test_normalized_advantages_do_not_see_padding():
    """trlX's and AlpacaFarm's statistics include it."""
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    a = rl.normalize(torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]), mask)
    b = rl.normalize(torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]]), mask)
    assert torch.equal(a, b) and (a[1, 1:] == 0).all()
    x = a[mask.bool()]
    assert abs(x.mean()) < 1e-6 and abs(x.std(correction=0) - 1) < 1e-6


def test_adapted_kl_coef():
    assert rl.adapt_kl_coef(0.1, 2 * 6.0, 6.0, 128, 10000) == pytest.approx(
        0.1 * (1 + 0.2 * 128 / 10000)
    )  # 1.2 targets or more
    assert rl.adapt_kl_coef(0.1, 6.6, 6.0, 128, 10000) == pytest.approx(
        0.1 * (1 + 0.1 * 128 / 10000)
    )
    assert rl.adapt_kl_coef(0.1, 6.0, 6.0, 128, 10000) == pytest.approx(0.1)
    assert rl.adapt_kl_coef(0.1, 0.0, 6.0, 128, 10000) == pytest.approx(
        0.1 * (1 - 0.2 * 128 / 10000)
    )


def test_scaled_rewards():
    first, second = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 3.0, 3.0])
    assert torch.equal(
        rl.scale_rewards(first, RunningMeanStd(), "none", 5.0), torch.tensor([1.0, 2.0, 5.0])
    )
    for scaling, shift in (("std", 0.0), ("mean_std", 1.0)):
        moments = RunningMeanStd()
        out = rl.scale_rewards(
            first, moments, scaling, math.inf
        )  # the batch is part of its history
        assert torch.allclose(out, (first - shift * first.mean()) / first.std(), atol=1e-6)
        out = rl.scale_rewards(second, moments, scaling, math.inf)
        both = torch.cat([first, second])
        mean, var = (
            both.mean(),
            (first.var() * 3 + second.var() * 3 + (first.mean() - second.mean()) ** 2 * 3 * 3 / 6)
            / 6,
        )
        assert torch.allclose(out, (second - shift * mean) / var.sqrt(), atol=1e-5)
    moments = RunningMeanStd()
    rl.scale_rewards(first, moments, "first", math.inf)
    assert torch.allclose(
        rl.scale_rewards(second, moments, "first", math.inf), second / first.std(), atol=1e-6
    )
    assert rl.scale_rewards(
        torch.tensor([float("nan"), 1.0]), moments, "std", 5.0
    ).isnan().any() and math.isfinite(moments.mean)


def test_the_entropy_bonus_is_the_entropy_s_gradient():
    """d H / d theta = E[-log p d log p]: an advantage of -log p, over all actions of a small policy."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad(-(logp.exp() * logp).sum(), logits, retain_graph=True)
    surrogate = (
        logp.exp().detach() * -logp.detach() * logp
    ).sum()  # what policy gradient does with it
    assert torch.allclose(torch.autograd.grad(surrogate, logits)[0], exact)


def test_a_negative_kl_is_not_clamped():
    """AlpacaFarm clamps each token's KL at 0, which biases the penalty: a token less likely than before pays back."""
    logps, ref, mask = torch.tensor([[-2.0, -1.0]]), torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
    assert close(rl.shaped_rewards(torch.zeros(1), logps, ref, mask, 0.5, 50.0), [[0.5, -0.5]])


def test_every_rollout_has_randomness_of_its_own():
    """ColossalChat seeds every generation alike: one random stream for all rollouts."""
    from nanosafe.rollout import hash64, uniforms

    keys = [[hash64(hash64(0, rollout), 7, 0) for rollout in range(4)]]
    signed = torch.tensor([k - 2**64 if k >= 2**63 else k for k in keys[0]])
    assert len(set(uniforms(signed, torch.zeros(4, dtype=torch.int64)).tolist())) == 4
