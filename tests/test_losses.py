"""Losses: Safe-RLHF's numbers, plain loops, masks, signs."""

import json
import math
import os

import pytest
import torch

from nanosafe import losses, rl

with open(os.path.join(os.path.dirname(__file__), "safe_rlhf_golden.json")) as f:
    GOLDEN = json.load(f)
T = torch.tensor
logsigmoid = lambda x: -math.log(1 + math.exp(-x))


def ppo_case():
    """Inputs of the PPO case, cut to the response: position t of theirs predicts token t + 1."""
    case = GOLDEN["ppo"]["input"]
    start = case["start"]
    mask = T(case["attention_mask"])[:, 1:][:, start:].float()
    return {
        **case,
        **{
            k: T(v)[:, start:]
            for k, v in case.items()
            if isinstance(v, list) and len(v) == 2 and isinstance(v[0], list)
        },
        "mask": mask,
        "reward": T(case["reward"]),
        "cost": T(case["cost"]),
    }


def close(a, b):
    return torch.allclose(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        atol=1e-6,
        rtol=1e-6,
    )


def test_ppo_golden_numbers():
    c, out = ppo_case(), GOLDEN["ppo"]["output"]
    s, m = c["start"], c["mask"]
    args = (c["old_logp"], c["ref_logp"], m, c["kl_coeff"])
    rewards = rl.shaped_rewards(c["reward"], *args, c["clip_range_score"])
    assert close(rewards, T(out["rewards"])[:, s:] * m)
    assert close(
        rl.shaped_rewards(c["reward"], *args, 1.0), T(out["rewards_clip_score_1"])[:, s:] * m
    )
    costs = rl.shaped_costs(c["cost"], *args, c["clip_range_score"])
    assert close(costs, T(out["costs"])[:, s:] * m)
    adv_r, ret_r = rl.gae(rewards, c["old_reward_values"], m, c["gamma"], c["gae_lambda"])
    adv_c, ret_c = rl.gae(costs, c["old_cost_values"], m, c["gamma"], c["gae_lambda"])
    for ours, name in ((adv_r, "adv_r"), (ret_r, "ret_r"), (adv_c, "adv_c"), (ret_c, "ret_c")):
        assert close(ours, T(out[name]) * m), name
    loss = losses.actor_loss(c["new_logp"], c["old_logp"], adv_r, m, c["clip_range_ratio"])
    assert close(loss, out["actor_loss_ppo"])
    mixed = rl.mix_advantages(adv_r, adv_c, c["lambda_"])
    loss = losses.actor_loss(c["new_logp"], c["old_logp"], mixed, m, c["clip_range_ratio"])
    assert close(loss, out["actor_loss_lag"])
    loss = losses.critic_loss(
        c["new_reward_values"], c["old_reward_values"], ret_r, m, c["clip_range_value"]
    )
    assert close(loss, out["critic_loss"])
    assert close(losses.sequence_mean(adv_r, m), out["masked_mean_adv_r"])
    assert close(((c["old_logp"] - c["ref_logp"]) * m).sum(1).mean(), out["kl_metric"])


def test_preference_golden_numbers():
    case = GOLDEN["preference"]["input"]
    rows = T(case["scores_rows_first_then_second"])
    first, second = rows[:2], rows[2:]
    ends = [T(case[name]).sum(1) - 1 for name in ("first_mask", "second_mask")]
    differs = (T(case["first_ids"]) != T(case["second_ids"])).float()
    column = torch.arange(rows.shape[1])
    begin, end = differs.argmax(1, keepdim=True), torch.maximum(*ends)[:, None]
    mask = ((column >= begin) & (column <= end)).float()
    signs = T(case["cm_safer_sign"]).float(), T(case["cm_unsafer_sign"]).float()
    pick = lambda scores, end: scores[torch.arange(2), end]
    for reg in (0.0, 0.001):
        out = GOLDEN["preference"]["output"][f"sequence-wise,reg={reg}"]
        a, b = pick(first, ends[0]), pick(second, ends[1])
        assert close(losses.reward_loss(a, b, reg), out["rm_loss"])
        assert close(losses.cost_loss(a, b, *signs, reg), out["cm_loss"])
        out = GOLDEN["preference"]["output"][f"token-wise,reg={reg}"]
        assert close(losses.reward_loss(first, second, reg, mask), out["rm_loss"])
        assert close(losses.cost_loss(first, second, *signs, reg, mask), out["cm_loss"])


def test_reward_and_cost_loss_equal_plain_loops():
    chosen, rejected = [1.2, -0.4, 2.0], [0.7, 0.3, -1.0]
    loop = sum(-logsigmoid(c - r) for c, r in zip(chosen, rejected)) / 3
    loop += 0.1 * sum(x * x for x in chosen + rejected) / 6
    assert close(losses.reward_loss(T(chosen), T(rejected), 0.1), loop)
    s_sign, u_sign = [1, -1, 1], [-1, -1, 1]
    loop = (
        sum(
            -logsigmoid(u - s) - logsigmoid(-ss * s) - logsigmoid(-us * u)
            for s, u, ss, us in zip(chosen, rejected, s_sign, u_sign)
        )
        / 3
    )
    assert close(losses.cost_loss(T(chosen), T(rejected), T(s_sign), T(u_sign)), loop)


def test_known_values():
    zero = torch.zeros(4)
    assert close(losses.reward_loss(zero, zero), math.log(2))
    assert close(losses.cost_loss(zero, zero, zero + 1, zero - 1), 3 * math.log(2))
    assert close(losses.mle_loss(T([-1.0, -3.0, -100.0]), T([1, 1, 0])), 2.0)


def test_signs():
    """A cost model lowers safe scores, raises unsafe ones; an actor raises what had advantage."""
    safer, unsafer = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    losses.cost_loss(safer, unsafer, T([1.0]), T([-1.0])).backward()
    assert safer.grad > 0 > unsafer.grad
    logps = torch.zeros(1, 2, requires_grad=True)
    losses.actor_loss(logps, torch.zeros(1, 2), T([[1.0, -1.0]]), torch.ones(1, 2), 0.2).backward()
    assert logps.grad[0, 0] < 0 < logps.grad[0, 1]


def test_actor_and_critic_loss_equal_plain_loops():
    g = torch.Generator().manual_seed(0)
    new, old, adv, ret = (torch.randn(3, 5, generator=g) for _ in range(4))
    lengths = [5, 2, 3]
    mask = (torch.arange(5) < T(lengths)[:, None]).float()
    actor = critic = 0.0
    for b, n in enumerate(lengths):
        for t in range(n):
            ratio, a = math.exp(new[b, t] - old[b, t]), adv[b, t].item()
            actor -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / n / 3
            clipped = min(max(new[b, t], old[b, t] - 0.5), old[b, t] + 0.5)
            error = max((new[b, t] - ret[b, t]) ** 2, (clipped - ret[b, t]) ** 2).item()
            critic += 0.5 * error / n / 3
    assert close(losses.actor_loss(new, old, adv, mask, 0.2), actor)
    assert close(losses.critic_loss(new, old, ret, mask, 0.5), critic)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_garbage_in_padding_changes_no_loss_and_no_gradient(garbage):
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(4) < T([4, 2])[:, None]).float()
    clean = [torch.randn(2, 4, generator=g) for _ in range(4)]
    dirty = [torch.where(mask.bool(), x, T(garbage)) for x in clean]

    def everything(x, old, adv, ret):
        x = x.clone().requires_grad_()
        adv, ret = rl.gae(adv, ret, mask, 1.0, 0.95)
        loss = (
            losses.actor_loss(x, old, adv, mask, 0.2)
            + losses.mle_loss(x, mask)
            + losses.critic_loss(x, old, ret, mask, 0.5)
            + rl.shaped_rewards(T([1.0, 2.0]), x.detach(), old, mask, 0.1, 50.0).sum()
        )
        loss.backward()
        return loss.detach(), x.grad

    for a, b in zip(everything(*clean), everything(*dirty)):
        assert torch.equal(a, b)


def test_no_loss_is_nan_when_nothing_counts():
    x, none = torch.randn(2, 3), torch.zeros(2, 3)
    assert losses.mle_loss(x, none) == 0 and losses.actor_loss(x, x, x, none, 0.2) == 0


@pytest.mark.parametrize(
    "loss, n",
    [
        (lambda a, b: losses.reward_loss(a, b, 0.1), 2),
        (lambda a, b: losses.cost_loss(a, b, T([1.0, -1, 1]), T([-1.0, -1, 1]), 0.1), 2),
        (lambda a: losses.mle_loss(a, T([1.0, 0, 1])), 1),
        (
            lambda a: losses.actor_loss(
                a[None], T([[0.1, 0.2, 0.3]]), T([[1.0, -1, 2]]), torch.ones(1, 3), 0.2
            ),
            1,
        ),
        (
            lambda a: losses.critic_loss(
                a[None], T([[0.1, 0.2, 0.3]]), T([[1.0, -1, 2]]), torch.ones(1, 3), 0.2
            ),
            1,
        ),
    ],
)
def test_gradients_equal_finite_differences(loss, n):
    g = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(3, dtype=torch.float64, generator=g, requires_grad=True) for _ in range(n)
    ]
    assert torch.autograd.gradcheck(loss, inputs)


# ---- preference policies and scored documents: other_methods' known values, plain loops, peers' defects ----

PAIR = [T([-3.0, -8.0, -2.5]), T([-4.0, -6.0, -2.5]), T([-3.5, -7.0, -2.0]), T([-4.5, -6.5, -1.0])]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_known_values_and_a_plain_loop(smoothing):
    zero = torch.zeros(3)
    assert close(losses.dpo_loss(zero, zero, zero, zero, 0.3, smoothing), math.log(2))
    loop = 0.0
    for c, r, rc, rr in zip(*(x.tolist() for x in PAIR)):
        h = 0.7 * ((c - rc) - (r - rr))
        loop -= ((1 - smoothing) * logsigmoid(h) + smoothing * logsigmoid(-h)) / 3
    assert close(losses.dpo_loss(*PAIR, 0.7, smoothing), loop)
    if smoothing:  # the best margin is log((1 - e) / e), and the loss is flat there
        best = T([math.log((1 - smoothing) / smoothing) / 0.7], requires_grad=True)
        losses.dpo_loss(best, T([0.0]), T([0.0]), T([0.0]), 0.7, smoothing).backward()
        assert abs(best.grad.item()) < 1e-6


def test_dpo_moves_up_what_was_chosen_and_knows_the_reference():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    losses.dpo_loss(chosen, rejected, T([0.0]), T([0.0]), 0.1).backward()
    assert chosen.grad < 0 < rejected.grad
    better = losses.dpo_loss(T([1.0]), T([0.0]), T([0.0]), T([0.0]), 1.0)
    assert close(
        losses.dpo_loss(T([1.0]), T([0.0]), T([1.0]), T([0.0]), 1.0), math.log(2)
    )  # no better than before
    assert better < math.log(2)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_known_values_and_a_plain_loop(beta):
    zero = torch.zeros(2)
    assert close(losses.ipo_loss(zero, zero, zero, zero, beta), 1 / (4 * beta**2))
    margin = torch.full((2,), 1 / (2 * beta))
    assert close(losses.ipo_loss(margin, zero, zero, zero, beta), 0.0)  # reached: nothing left
    assert losses.ipo_loss(2 * margin, zero, zero, zero, beta) > 0  # and not to be passed
    loop = (
        sum(
            ((c - rc) - (r - rr) - 1 / (2 * beta)) ** 2
            for c, r, rc, rr in zip(*(x.tolist() for x in PAIR))
        )
        / 3
    )
    assert close(losses.ipo_loss(*PAIR, beta), loop)


def test_rrhf_known_values_and_a_plain_loop():
    ft = lambda logps, scores: -logps[scores.argmax()]
    logps, lengths = T([-2.0, -8.0, -9.0]), T([2.0, 4.0, 3.0])  # p = -1, -2, -3
    right, wrong = T([3.0, 2.0, 1.0]), T([1.0, 2.0, 3.0])
    assert close(
        losses.rrhf_loss(logps, lengths, right), ft(logps, right)
    )  # in order: no rank loss
    assert close(losses.rrhf_loss(T([-2.0, -4.0]), T([1.0, 2.0]), T([1.0, 2.0])), 4.0)  # equal p
    d = losses.rrhf_loss(T([-1.0, -1.5]), T([1.0, 1.0]), T([1.0, 2.0])) - 1.5
    assert close(d, 0.5)  # two swapped by d
    for scores in (wrong, T([2.0, 2.0, 5.0]), T([0.0, -1.0, 0.5])):
        p, loop = (logps / lengths).tolist(), 0.0
        for i in range(3):
            for j in range(3):
                if scores[i] < scores[j]:
                    loop += max(0.0, p[i] - p[j])
        assert close(losses.rrhf_loss(logps, lengths, scores), loop + ft(logps, scores))


def test_rrhf_divides_each_candidate_by_its_own_length():
    """RRHF's released code divides by the padded length: twice the tokens of one p would be twice as unlikely."""
    scores = T([0.0, 1.0])
    assert close(
        losses.rrhf_loss(T([-3.0, -6.0]), T([3.0, 6.0]), scores), 6.0
    )  # p equal: no rank loss
    assert close(losses.rrhf_loss(T([-3.0, -6.0]), T([6.0, 6.0]), scores), 6.5)


DOCUMENT = dict(
    logps=T([-0.1, -2.0, -0.5, -3.0]), scores=T([0.0, 0.3, 0.7, 0.0]), mask=T([1.0, 1, 1, 0])
)


def test_unlikelihood_known_values_and_a_plain_loop():
    l, s, m = DOCUMENT.values()
    assert close(
        losses.unlikelihood_loss(l, s, m, 1.0, 3.0), losses.mle_loss(l, m)
    )  # all below: MLE
    unlikely = -sum(math.log(1 - math.exp(x)) for x in (-0.1, -2.0, -0.5)) / 3
    assert close(losses.unlikelihood_loss(l, s, m, -1.0, 0.7), 0.7 * unlikely)  # none below
    mixed = (0.1 - 2.0 * math.log(1 - math.exp(-2.0)) - 2.0 * math.log(1 - math.exp(-0.5))) / 3
    assert close(losses.unlikelihood_loss(l, s, m, 0.0, 2.0), mixed)


def test_a_threshold_of_zero_means_zero():
    """PHF's code takes 0 for "none given" and mixes softly: almost plain MLE."""
    l, m = DOCUMENT["logps"], DOCUMENT["mask"]
    tiny = T([1e-3, 1e-3, 1e-3, 1e-3])
    assert abs(losses.unlikelihood_loss(l, tiny, m, 0.0, 1.0) - losses.mle_loss(l, m)) > 0.1
    assert close(
        losses.unlikelihood_loss(l, tiny, m, 0.0, 1.0),
        losses.unlikelihood_loss(l, tiny, m, -5.0, 1.0),
    )


def test_a_certain_token_has_a_finite_unlikelihood():
    x = torch.zeros(2, requires_grad=True)
    loss = losses.unlikelihood_loss(x, torch.ones(2), torch.ones(2), 0.0, 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()


def test_awr_known_values_and_a_plain_loop():
    l, s, m = DOCUMENT.values()
    half = torch.full((4,), -0.5)  # of a head that is zero, through -sigmoid
    weights = [math.exp((0.5 - x) / 0.2) for x in (0.0, 0.3, 0.7)]
    loop = sum(w * p for w, p in zip(weights, (0.1, 2.0, 0.5))) / 3
    assert close(losses.awr_loss(l, s, half, m, 1.0, 0.2, 1000.0), loop)
    values = T([-0.2, -0.6, -0.1, 9.0])
    a = [-x - v for x, v in zip((0.0, 0.3, 0.7), (-0.2, -0.6, -0.1))]
    loop = (
        sum(0.3 * min(math.exp(x / 0.1), 5.0) * p + 0.7 * x * x for x, p in zip(a, (0.1, 2.0, 0.5)))
        / 3
    )
    assert close(losses.awr_loss(l, s, values, m, 0.3, 0.1, 5.0), loop)
    assert close(
        losses.awr_loss(l, s, torch.zeros(4), m, 1.0, 1e9, 9.0), losses.mle_loss(l, m)
    )  # RWR, no preference


def test_awr_teaches_values_with_their_error_only():
    l, s, m = DOCUMENT.values()
    v = torch.zeros(4, requires_grad=True)
    losses.awr_loss(l, s, v, m, 1.0, 0.2, 1000.0).backward()
    assert (v.grad == 0).all()  # weights carry no gradient
    losses.awr_loss(l, s, v, m, 0.5, 0.2, 1000.0).backward()
    assert close(v.grad, (v.detach() + s) * m / 3)


def test_margin_and_token_wise_reward_loss():
    a, b = T([1.0, 2.0]), T([0.5, 3.0])
    assert close(
        losses.reward_loss(a, b, margin=0.7), -sum(logsigmoid(x) for x in (-0.2, -1.7)) / 2
    )


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_garbage_where_nothing_counts_does_not_reach_documents_losses(garbage):
    def everything(value):
        x = T([-0.1, -2.0, value], requires_grad=True)
        scores, values = T([0.0, 0.5, value]), T([-0.2, -0.3, value])
        mask = T([1.0, 1.0, 0.0])
        loss = losses.unlikelihood_loss(x, scores, mask, 0.1, 1.0) + losses.awr_loss(
            x, scores, values, mask, 0.5, 1.0, 9.0
        )
        loss.backward()
        return loss.detach(), x.grad

    for a, b in zip(everything(-1.0), everything(garbage)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "loss, n",
    [
        (lambda a, b: losses.dpo_loss(a, b, T([0.1, 0.2, 0.3]), T([0.0, 0.1, 0.5]), 0.5, 0.1), 2),
        (lambda a, b: losses.ipo_loss(a, b, T([0.1, 0.2, 0.3]), T([0.0, 0.1, 0.5]), 0.5), 2),
        (lambda a: losses.rrhf_loss(a, T([1.0, 2.0, 3.0]), T([0.3, 0.1, 0.9])), 1),
        (
            lambda a: losses.unlikelihood_loss(
                -a.abs() - 0.1, T([0.0, 0.5, 0.0]), torch.ones(3), 0.1, 0.7
            ),
            1,
        ),
        (
            lambda a: losses.awr_loss(
                a, T([0.0, 0.5, 0.0]), T([-0.1, -0.4, -0.2]), torch.ones(3), 0.4, 0.5, 9.0
            ),
            1,
        ),
        (
            lambda v: losses.awr_loss(
                torch.zeros(3).double(), T([0.0, 0.5, 0.0]), v, torch.ones(3), 0.4, 0.5, 9.0
            ),
            1,
        ),
        (lambda a, b: losses.reward_loss(a, b, 0.1, margin=0.3), 2),
    ],
)
def test_gradients_of_the_other_losses_equal_finite_differences(loss, n):
    g = torch.Generator().manual_seed(2)
    inputs = [
        torch.randn(3, dtype=torch.float64, generator=g, requires_grad=True) for _ in range(n)
    ]
    assert torch.autograd.gradcheck(loss, inputs)


def test_a_badly_ordered_pair_keeps_its_gradient():
    """MOSS adds 1e-5 inside the logarithm: its loss stops at 11.51 and its gradient vanishes there."""
    chosen = T([-20.0], requires_grad=True)
    loss = losses.reward_loss(chosen, T([0.0]))
    loss.backward()
    assert close(loss.detach(), 20.0) and close(chosen.grad, -1.0)
