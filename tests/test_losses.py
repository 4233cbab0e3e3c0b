"""Losses: Safe-RLHF's golden numbers, plain loops, signs, masks and finite differences."""

import inspect
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from nanosafe import losses, rl

FOLDER = os.path.dirname(__file__)
with open(os.path.join(FOLDER, "safe_rlhf_golden.json")) as f:
    GOLDEN = json.load(f)  # what Safe-RLHF's own code computes from small inputs


def close(a, b):
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    return torch.allclose(a, b, atol=1e-6, rtol=1e-6)


def logsigmoid(x):
    return -math.log(1 + math.exp(-x))


def mask_of_lengths(lengths, R):
    """The mask (B, R) of responses of these lengths."""
    positions = torch.arange(R)
    return (positions < tensor(lengths)[:, None]).float()


# ---- Safe-RLHF's numbers: one step of PPO-Lagrangian ----

PER_TOKEN_INPUTS = (
    "old_logp",
    "new_logp",
    "ref_logp",
    "old_reward_values",
    "new_reward_values",
    "old_cost_values",
)


@pytest.fixture(scope="module")
def ppo():
    """The golden inputs, cut to the responses (B, R), and the advantages that follow from them.

    Position t of Safe-RLHF's arrays predicts token t + 1, so its mask begins at the second token.
    The responses begin at position `start`."""
    case = SimpleNamespace(**GOLDEN["ppo"]["input"])
    for name in PER_TOKEN_INPUTS:
        whole = tensor(getattr(case, name))
        setattr(case, name, whole[:, case.start :])
    case.mask = tensor(case.attention_mask)[:, 1:][:, case.start :].float()
    case.reward = tensor(case.reward)
    case.cost = tensor(case.cost)
    case.rewards = rl.shaped_rewards(
        case.reward,
        case.old_logp,
        case.ref_logp,
        case.mask,
        case.kl_coeff,
        case.clip_range_score,
    )
    case.costs = rl.shaped_costs(
        case.cost,
        case.old_logp,
        case.ref_logp,
        case.mask,
        case.kl_coeff,
        case.clip_range_score,
    )
    case.reward_advantages, case.reward_returns = rl.gae(
        case.rewards, case.old_reward_values, case.mask, case.gamma, case.gae_lambda
    )
    case.cost_advantages, case.cost_returns = rl.gae(
        case.costs, case.old_cost_values, case.mask, case.gamma, case.gae_lambda
    )
    case.expected = GOLDEN["ppo"]["output"]
    return case


def expected_shaped(ppo, name):
    """Golden rewards or costs (B, R): those of the whole text, cut to the response."""
    return tensor(ppo.expected[name])[:, ppo.start :] * ppo.mask


def expected_advantages(ppo, name):
    return tensor(ppo.expected[name]) * ppo.mask


def test_shaped_rewards_and_costs_are_those_of_safe_rlhf(ppo):
    assert close(ppo.rewards, expected_shaped(ppo, "rewards"))
    assert close(ppo.costs, expected_shaped(ppo, "costs"))


def test_clipped_rewards_are_those_of_safe_rlhf(ppo):
    rewards = rl.shaped_rewards(
        ppo.reward, ppo.old_logp, ppo.ref_logp, ppo.mask, ppo.kl_coeff, clip_score=1.0
    )
    assert close(rewards, expected_shaped(ppo, "rewards_clip_score_1"))


def test_advantages_and_returns_are_those_of_safe_rlhf(ppo):
    assert close(ppo.reward_advantages, expected_advantages(ppo, "adv_r"))
    assert close(ppo.reward_returns, expected_advantages(ppo, "ret_r"))
    assert close(ppo.cost_advantages, expected_advantages(ppo, "adv_c"))
    assert close(ppo.cost_returns, expected_advantages(ppo, "ret_c"))


def test_the_actor_loss_of_ppo_is_that_of_safe_rlhf(ppo):
    loss = losses.actor_loss(
        ppo.new_logp, ppo.old_logp, ppo.reward_advantages, ppo.mask, ppo.clip_range_ratio
    )
    assert close(loss, ppo.expected["actor_loss_ppo"])


def test_the_actor_loss_of_ppo_lag_is_that_of_safe_rlhf(ppo):
    mixed = rl.mix_advantages(ppo.reward_advantages, ppo.cost_advantages, ppo.lambda_)
    loss = losses.actor_loss(ppo.new_logp, ppo.old_logp, mixed, ppo.mask, ppo.clip_range_ratio)
    assert close(loss, ppo.expected["actor_loss_lag"])


def test_the_critic_loss_is_that_of_safe_rlhf(ppo):
    loss = losses.critic_loss(
        ppo.new_reward_values,
        ppo.old_reward_values,
        ppo.reward_returns,
        ppo.mask,
        ppo.clip_range_value,
    )
    assert close(loss, ppo.expected["critic_loss"])


def test_the_reported_means_are_those_of_safe_rlhf(ppo):
    mean_advantage = losses.sequence_mean(ppo.reward_advantages, ppo.mask)
    assert close(mean_advantage, ppo.expected["masked_mean_adv_r"])
    log_ratio = (ppo.old_logp - ppo.ref_logp) * ppo.mask
    assert close(log_ratio.sum(dim=1).mean(), ppo.expected["kl_metric"])


# ---- Safe-RLHF's numbers: reward and cost models ----


@pytest.fixture(scope="module")
def pairs():
    """The golden pairs: scores per token (B, L) of both sides, end scores (B,), signs (B,).

    `mask` (B, L) is 1 from the first token that differs to the end of the longer response."""
    case = SimpleNamespace(**GOLDEN["preference"]["input"])
    scores = tensor(case.scores_rows_first_then_second)
    case.first = scores[:2]
    case.second = scores[2:]
    first_last = tensor(case.first_mask).sum(dim=1) - 1  # (B,): position of the last token
    second_last = tensor(case.second_mask).sum(dim=1) - 1
    rows = torch.arange(2)
    case.first_ends = case.first[rows, first_last]
    case.second_ends = case.second[rows, second_last]
    differs = (tensor(case.first_ids) != tensor(case.second_ids)).float()
    begin = differs.argmax(dim=1, keepdim=True)
    end = torch.maximum(first_last, second_last)[:, None]
    positions = torch.arange(scores.shape[1])
    case.mask = ((positions >= begin) & (positions <= end)).float()
    case.safer_sign = tensor(case.cm_safer_sign).float()
    case.unsafer_sign = tensor(case.cm_unsafer_sign).float()
    return case


@pytest.mark.parametrize("reg", [0.0, 0.001])
def test_losses_of_end_scores_are_those_of_safe_rlhf(reg, pairs):
    expected = GOLDEN["preference"]["output"][f"sequence-wise,reg={reg}"]
    reward = losses.reward_loss(pairs.first_ends, pairs.second_ends, reg)
    assert close(reward, expected["rm_loss"])
    cost = losses.cost_loss(
        pairs.first_ends, pairs.second_ends, pairs.safer_sign, pairs.unsafer_sign, reg
    )
    assert close(cost, expected["cm_loss"])


@pytest.mark.parametrize("reg", [0.0, 0.001])
def test_losses_of_token_scores_are_those_of_safe_rlhf(reg, pairs):
    expected = GOLDEN["preference"]["output"][f"token-wise,reg={reg}"]
    reward = losses.reward_loss(pairs.first, pairs.second, reg, pairs.mask)
    assert close(reward, expected["rm_loss"])
    cost = losses.cost_loss(
        pairs.first, pairs.second, pairs.safer_sign, pairs.unsafer_sign, reg, pairs.mask
    )
    assert close(cost, expected["cm_loss"])


# ---- reward and cost models ----

BETTER = [1.2, -0.4, 2.0]
WORSE = [0.7, 0.3, -1.0]


def test_the_reward_loss_equals_a_plain_loop():
    """-log sigmoid(chosen - rejected), and reg * mean score^2 over both sides."""
    ranking = 0.0
    squares = 0.0
    for chosen, rejected in zip(BETTER, WORSE):
        ranking -= logsigmoid(chosen - rejected)
        squares += chosen**2 + rejected**2
    expected = ranking / 3 + 0.1 * squares / 6
    assert close(losses.reward_loss(tensor(BETTER), tensor(WORSE), 0.1), expected)


def test_the_cost_loss_equals_a_plain_loop():
    """-log sigmoid(unsafer - safer) - log sigmoid(-sign * score) of both sides."""
    safer_signs = [1, -1, 1]
    unsafer_signs = [-1, -1, 1]
    total = 0.0
    for i in range(3):
        safer = BETTER[i]
        unsafer = WORSE[i]
        total -= logsigmoid(unsafer - safer)
        total -= logsigmoid(-safer_signs[i] * safer)
        total -= logsigmoid(-unsafer_signs[i] * unsafer)
    loss = losses.cost_loss(
        tensor(BETTER), tensor(WORSE), tensor(safer_signs), tensor(unsafer_signs)
    )
    assert close(loss, total / 3)


def test_a_margin_is_subtracted_from_the_difference():
    chosen = tensor([1.0, 2.0])
    rejected = tensor([0.5, 3.0])
    expected = -(logsigmoid(0.5 - 0.7) + logsigmoid(-1.0 - 0.7)) / 2
    assert close(losses.reward_loss(chosen, rejected, margin=0.7), expected)


def test_scores_of_zero_cost_log_2_per_term():
    zero = torch.zeros(4)
    assert close(losses.reward_loss(zero, zero), math.log(2))
    assert close(losses.cost_loss(zero, zero, zero + 1, zero - 1), 3 * math.log(2))


def test_the_cost_loss_lowers_safe_scores_and_raises_unsafe_ones():
    safer = torch.zeros(1, requires_grad=True)
    unsafer = torch.zeros(1, requires_grad=True)
    losses.cost_loss(safer, unsafer, tensor([1.0]), tensor([-1.0])).backward()
    assert safer.grad > 0 > unsafer.grad


def test_a_badly_ordered_pair_keeps_its_gradient():
    """MOSS adds 1e-5 inside the logarithm, so its loss stops at 11.51 and its gradient vanishes."""
    chosen = tensor([-20.0], requires_grad=True)
    loss = losses.reward_loss(chosen, tensor([0.0]))
    loss.backward()
    assert close(loss.detach(), 20.0)
    assert close(chosen.grad, -1.0)


# ---- supervised fine-tuning and PPO ----


def test_the_mle_loss_is_the_mean_inside_the_mask():
    logps = tensor([-1.0, -3.0, -100.0])
    assert close(losses.mle_loss(logps, tensor([1, 1, 0])), 2.0)


@pytest.fixture
def small_batch():
    """Random numbers (B, R) of three responses, the second and third of which are padded."""
    generator = torch.Generator().manual_seed(0)
    case = SimpleNamespace()
    case.new = torch.randn(3, 5, generator=generator)
    case.old = torch.randn(3, 5, generator=generator)
    case.advantages = torch.randn(3, 5, generator=generator)
    case.returns = torch.randn(3, 5, generator=generator)
    case.lengths = [5, 2, 3]
    case.mask = mask_of_lengths(case.lengths, 5)
    return case


def test_the_actor_loss_equals_a_plain_loop(small_batch):
    """-mean min(r A, clip(r, 1 - c, 1 + c) A), over each response and then over responses."""
    total = 0.0
    for b, length in enumerate(small_batch.lengths):
        for t in range(length):
            ratio = math.exp(small_batch.new[b, t] - small_batch.old[b, t])
            clipped = min(max(ratio, 0.8), 1.2)
            advantage = small_batch.advantages[b, t].item()
            total -= min(ratio * advantage, clipped * advantage) / length
    loss = losses.actor_loss(
        small_batch.new, small_batch.old, small_batch.advantages, small_batch.mask, 0.2
    )
    assert close(loss, total / 3)


def test_the_critic_loss_equals_a_plain_loop(small_batch):
    """mean max((V - G)^2, (clip(V, old - c, old + c) - G)^2) / 2, averaged in the same way."""
    total = 0.0
    for b, length in enumerate(small_batch.lengths):
        for t in range(length):
            value = small_batch.new[b, t].item()
            old_value = small_batch.old[b, t].item()
            target = small_batch.returns[b, t].item()
            clipped = min(max(value, old_value - 0.5), old_value + 0.5)
            error = max((value - target) ** 2, (clipped - target) ** 2)
            total += 0.5 * error / length
    loss = losses.critic_loss(
        small_batch.new, small_batch.old, small_batch.returns, small_batch.mask, 0.5
    )
    assert close(loss, total / 3)


def test_the_actor_loss_raises_what_had_advantage():
    logps = torch.zeros(1, 2, requires_grad=True)
    old_logps = torch.zeros(1, 2)
    advantages = tensor([[1.0, -1.0]])
    losses.actor_loss(logps, old_logps, advantages, torch.ones(1, 2), 0.2).backward()
    assert logps.grad[0, 0] < 0 < logps.grad[0, 1]


# ---- masks ----


def ppo_losses_and_gradient(new, old, advantages, returns, mask):
    """The sum of everything that PPO computes from (B, R) arrays, and its gradient by `new`."""
    new = new.clone().requires_grad_()
    advantages, returns = rl.gae(advantages, returns, mask, 1.0, 0.95)
    scores = tensor([1.0, 2.0])
    total = losses.actor_loss(new, old, advantages, mask, 0.2)
    total = total + losses.mle_loss(new, mask)
    total = total + losses.critic_loss(new, old, returns, mask, 0.5)
    total = total + rl.shaped_rewards(scores, new.detach(), old, mask, 0.1, 50.0).sum()
    total.backward()
    return total.detach(), new.grad


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_garbage_in_padding_changes_no_loss_and_no_gradient(garbage):
    generator = torch.Generator().manual_seed(0)
    mask = mask_of_lengths([4, 2], 4)
    clean = []
    dirty = []
    for _ in range(4):
        x = torch.randn(2, 4, generator=generator)
        clean.append(x)
        dirty.append(torch.where(mask.bool(), x, tensor(garbage)))
    clean_loss, clean_gradient = ppo_losses_and_gradient(*clean, mask)
    dirty_loss, dirty_gradient = ppo_losses_and_gradient(*dirty, mask)
    assert torch.equal(clean_loss, dirty_loss)
    assert torch.equal(clean_gradient, dirty_gradient)


def document_losses_and_gradient(hidden_value):
    """The losses of scored documents, where `hidden_value` stands outside the mask."""
    logps = tensor([-0.1, -2.0, hidden_value], requires_grad=True)
    scores = tensor([0.0, 0.5, hidden_value])
    values = tensor([-0.2, -0.3, hidden_value])
    mask = tensor([1.0, 1.0, 0.0])
    total = losses.unlikelihood_loss(logps, scores, mask, 0.1, 1.0)
    total = total + losses.awr_loss(logps, scores, values, mask, 0.5, 1.0, 9.0)
    total.backward()
    return total.detach(), logps.grad


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_garbage_outside_the_mask_changes_no_loss_of_documents(garbage):
    clean_loss, clean_gradient = document_losses_and_gradient(-1.0)
    dirty_loss, dirty_gradient = document_losses_and_gradient(garbage)
    assert torch.equal(clean_loss, dirty_loss)
    assert torch.equal(clean_gradient, dirty_gradient)


def test_losses_are_zero_where_the_mask_is_empty():
    x = torch.randn(2, 3)
    empty = torch.zeros(2, 3)
    assert losses.mle_loss(x, empty) == 0
    assert losses.actor_loss(x, x, x, empty, 0.2) == 0


# ---- policies from preferences: DPO and IPO ----

CHOSEN = tensor([-3.0, -8.0, -2.5])
REJECTED = tensor([-4.0, -6.0, -2.5])
REF_CHOSEN = tensor([-3.5, -7.0, -2.0])
REF_REJECTED = tensor([-4.5, -6.5, -1.0])
FOUR_LOGPS = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


def margins_over_the_reference():
    """h = (chosen - ref_chosen) - (rejected - ref_rejected) of each pair, as numbers."""
    margins = []
    for i in range(3):
        chosen_gain = CHOSEN[i].item() - REF_CHOSEN[i].item()
        rejected_gain = REJECTED[i].item() - REF_REJECTED[i].item()
        margins.append(chosen_gain - rejected_gain)
    return margins


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_of_the_reference_itself_is_log_2(smoothing):
    zero = torch.zeros(3)
    assert close(losses.dpo_loss(zero, zero, zero, zero, 0.3, smoothing), math.log(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_equals_a_plain_loop(smoothing):
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)"""
    total = 0.0
    for h in margins_over_the_reference():
        total -= (1 - smoothing) * logsigmoid(0.7 * h)
        total -= smoothing * logsigmoid(-0.7 * h)
    assert close(losses.dpo_loss(*FOUR_LOGPS, 0.7, smoothing), total / 3)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothed_dpo_is_flat_at_its_best_margin(smoothing):
    """The best margin is beta h = log((1 - e) / e)."""
    best = math.log((1 - smoothing) / smoothing) / 0.7
    chosen = tensor([best], requires_grad=True)
    zero = tensor([0.0])
    losses.dpo_loss(chosen, zero, zero, zero, 0.7, smoothing).backward()
    assert abs(chosen.grad.item()) < 1e-6


def test_dpo_raises_the_chosen_and_lowers_the_rejected():
    chosen = torch.zeros(1, requires_grad=True)
    rejected = torch.zeros(1, requires_grad=True)
    zero = tensor([0.0])
    losses.dpo_loss(chosen, rejected, zero, zero, 0.1).backward()
    assert chosen.grad < 0 < rejected.grad


def test_dpo_counts_only_what_the_policy_gains_over_the_reference():
    zero = tensor([0.0])
    one = tensor([1.0])
    better_than_reference = losses.dpo_loss(one, zero, zero, zero, 1.0)
    like_reference = losses.dpo_loss(one, zero, one, zero, 1.0)
    assert close(like_reference, math.log(2))
    assert better_than_reference < math.log(2)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_is_zero_at_its_margin_and_grows_on_both_sides(beta):
    zero = torch.zeros(2)
    margin = torch.full((2,), 1 / (2 * beta))
    assert close(losses.ipo_loss(zero, zero, zero, zero, beta), 1 / (4 * beta**2))
    assert close(losses.ipo_loss(margin, zero, zero, zero, beta), 0.0)
    assert losses.ipo_loss(2 * margin, zero, zero, zero, beta) > 0


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_ipo_equals_a_plain_loop(beta):
    """(h - 1 / (2 beta))^2"""
    total = 0.0
    for h in margins_over_the_reference():
        total += (h - 1 / (2 * beta)) ** 2
    assert close(losses.ipo_loss(*FOUR_LOGPS, beta), total / 3)


# ---- policies from rankings: RRHF ----

LOGPS = tensor([-2.0, -8.0, -9.0])
LENGTHS = tensor([2.0, 4.0, 3.0])  # so the log-probabilities per token are -1, -2 and -3


def test_rrhf_of_candidates_in_the_right_order_is_the_best_ones_mle():
    scores = tensor([3.0, 2.0, 1.0])
    assert close(losses.rrhf_loss(LOGPS, LENGTHS, scores), 2.0)


def test_rrhf_of_candidates_in_the_wrong_order_costs_their_difference():
    logps = tensor([-1.0, -1.5])
    loss = losses.rrhf_loss(logps, tensor([1.0, 1.0]), tensor([1.0, 2.0]))
    ranking = loss - 1.5  # less the best one's negative log-probability
    assert close(ranking, 0.5)


@pytest.mark.parametrize("scores", [[1.0, 2.0, 3.0], [2.0, 2.0, 5.0], [0.0, -1.0, 0.5]])
def test_rrhf_equals_a_plain_loop(scores):
    """Sum of max(0, p_i - p_j) over pairs with score i < score j, less the best one's log-prob."""
    p = (LOGPS / LENGTHS).tolist()
    expected = -LOGPS[scores.index(max(scores))].item()
    for i in range(3):
        for j in range(3):
            if scores[i] < scores[j]:
                expected += max(0.0, p[i] - p[j])
    assert close(losses.rrhf_loss(LOGPS, LENGTHS, tensor(scores)), expected)


def test_rrhf_divides_each_candidate_by_its_own_length():
    """RRHF's released code divides by the padded length, which makes longer candidates less likely.

    Candidates with equal log-probabilities per token have no ranking loss, whatever their length.
    """
    scores = tensor([0.0, 1.0])
    assert close(losses.rrhf_loss(tensor([-2.0, -4.0]), tensor([1.0, 2.0]), scores + 1), 4.0)
    logps = tensor([-3.0, -6.0])
    own_lengths = tensor([3.0, 6.0])
    padded_lengths = tensor([6.0, 6.0])
    assert close(losses.rrhf_loss(logps, own_lengths, scores), 6.0)
    assert close(losses.rrhf_loss(logps, padded_lengths, scores), 6.5)


# ---- pretraining with human preferences: a document of four tokens, the last one masked ----

DOCUMENT_LOGPS = tensor([-0.1, -2.0, -0.5, -3.0])
DOCUMENT_SCORES = tensor([0.0, 0.3, 0.7, 0.0])
DOCUMENT_MASK = tensor([1.0, 1.0, 1.0, 0.0])


def unlikelihood_of_document(scores, threshold, alpha):
    return losses.unlikelihood_loss(DOCUMENT_LOGPS, scores, DOCUMENT_MASK, threshold, alpha)


def awr_of_document(values, alpha, beta, weight_max):
    return losses.awr_loss(
        DOCUMENT_LOGPS, DOCUMENT_SCORES, values, DOCUMENT_MASK, alpha, beta, weight_max
    )


def unlikelihood(logp):
    """-log(1 - p)"""
    return -math.log(1 - math.exp(logp))


def test_unlikelihood_below_the_threshold_is_mle():
    mle = losses.mle_loss(DOCUMENT_LOGPS, DOCUMENT_MASK)
    assert close(unlikelihood_of_document(DOCUMENT_SCORES, 1.0, 3.0), mle)


def test_unlikelihood_above_the_threshold_is_minus_alpha_log_1_minus_p():
    expected = 0.7 * (unlikelihood(-0.1) + unlikelihood(-2.0) + unlikelihood(-0.5)) / 3
    assert close(unlikelihood_of_document(DOCUMENT_SCORES, -1.0, 0.7), expected)


def test_unlikelihood_treats_each_token_by_its_own_score():
    """A threshold of 0: the first token is good, the other two are not."""
    expected = (0.1 + 2.0 * unlikelihood(-2.0) + 2.0 * unlikelihood(-0.5)) / 3
    assert close(unlikelihood_of_document(DOCUMENT_SCORES, 0.0, 2.0), expected)


def test_a_threshold_of_zero_means_zero():
    """PHF's code takes 0 for "not given" and mixes softly, which is almost plain MLE."""
    tiny_scores = tensor([1e-3, 1e-3, 1e-3, 1e-3])
    loss = unlikelihood_of_document(tiny_scores, 0.0, 1.0)
    mle = losses.mle_loss(DOCUMENT_LOGPS, DOCUMENT_MASK)
    assert abs(loss - mle) > 0.1
    assert close(loss, unlikelihood_of_document(tiny_scores, -5.0, 1.0))


def test_a_certain_token_has_a_finite_unlikelihood():
    logps = torch.zeros(2, requires_grad=True)
    loss = losses.unlikelihood_loss(logps, torch.ones(2), torch.ones(2), 0.0, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logps.grad).all()


def test_awr_with_alpha_1_weighs_by_the_exponential_of_the_advantage():
    """mean(-w log p), w = exp((-score - value) / beta), with a value head that still gives -1/2."""
    total = 0.0
    for logp, score in zip([-0.1, -2.0, -0.5], [0.0, 0.3, 0.7]):
        weight = math.exp((-score + 0.5) / 0.2)
        total -= weight * logp
    values = torch.full((4,), -0.5)
    assert close(awr_of_document(values, 1.0, 0.2, 1000.0), total / 3)


def test_awr_equals_a_plain_loop():
    """alpha * mean(-w log p) + (1 - alpha) * mean(A^2), w = min(exp(A / beta), weight_max)"""
    logps = [-0.1, -2.0, -0.5]
    scores = [0.0, 0.3, 0.7]
    values = [-0.2, -0.6, -0.1]
    total = 0.0
    for logp, score, value in zip(logps, scores, values):
        advantage = -score - value
        weight = min(math.exp(advantage / 0.1), 5.0)
        total += 0.3 * -weight * logp + 0.7 * advantage**2
    value_of_the_masked_token = 9.0
    all_values = tensor([*values, value_of_the_masked_token])
    assert close(awr_of_document(all_values, 0.3, 0.1, 5.0), total / 3)


def test_awr_with_a_huge_beta_is_mle():
    mle = losses.mle_loss(DOCUMENT_LOGPS, DOCUMENT_MASK)
    assert close(awr_of_document(torch.zeros(4), 1.0, 1e9, 9.0), mle)


def test_awr_teaches_values_with_their_error_only():
    """The weights carry no gradient."""
    values = torch.zeros(4, requires_grad=True)
    awr_of_document(values, 1.0, 0.2, 1000.0).backward()
    assert (values.grad == 0).all()
    awr_of_document(values, 0.5, 0.2, 1000.0).backward()
    error = values.detach() + DOCUMENT_SCORES
    assert close(values.grad, error * DOCUMENT_MASK / 3)


# ---- finite differences: each loss as a function of the inputs that carry gradient, (3,) each ----

OLD = tensor([[0.1, 0.2, 0.3]])
SIGNAL = tensor([[1.0, -1.0, 2.0]])
ALL_COUNT = torch.ones(1, 3)


def reward_loss(chosen, rejected):
    return losses.reward_loss(chosen, rejected, reg=0.1)


def reward_loss_with_margin(chosen, rejected):
    return losses.reward_loss(chosen, rejected, reg=0.1, margin=0.3)


def cost_loss(safer, unsafer):
    safer_sign = tensor([1.0, -1.0, 1.0])
    unsafer_sign = tensor([-1.0, -1.0, 1.0])
    return losses.cost_loss(safer, unsafer, safer_sign, unsafer_sign, reg=0.1)


def mle_loss(logps):
    return losses.mle_loss(logps, tensor([1.0, 0.0, 1.0]))


def actor_loss(logps):
    return losses.actor_loss(logps[None], OLD, SIGNAL, ALL_COUNT, 0.2)


def critic_loss(values):
    return losses.critic_loss(values[None], OLD, SIGNAL, ALL_COUNT, 0.2)


def dpo_loss(chosen, rejected):
    ref_chosen = tensor([0.1, 0.2, 0.3])
    ref_rejected = tensor([0.0, 0.1, 0.5])
    return losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5, 0.1)


def ipo_loss(chosen, rejected):
    ref_chosen = tensor([0.1, 0.2, 0.3])
    ref_rejected = tensor([0.0, 0.1, 0.5])
    return losses.ipo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.5)


def rrhf_loss(logps):
    return losses.rrhf_loss(logps, tensor([1.0, 2.0, 3.0]), tensor([0.3, 0.1, 0.9]))


def unlikelihood_loss(x):
    logps = -x.abs() - 0.1
    return losses.unlikelihood_loss(logps, tensor([0.0, 0.5, 0.0]), torch.ones(3), 0.1, 0.7)


def awr_loss_of_logps(logps):
    scores = tensor([0.0, 0.5, 0.0])
    values = tensor([-0.1, -0.4, -0.2])
    return losses.awr_loss(logps, scores, values, torch.ones(3), 0.4, 0.5, 9.0)


def awr_loss_of_values(values):
    logps = torch.zeros(3, dtype=torch.float64)
    scores = tensor([0.0, 0.5, 0.0])
    return losses.awr_loss(logps, scores, values, torch.ones(3), 0.4, 0.5, 9.0)


LOSSES = [
    reward_loss,
    reward_loss_with_margin,
    cost_loss,
    mle_loss,
    actor_loss,
    critic_loss,
    dpo_loss,
    ipo_loss,
    rrhf_loss,
    unlikelihood_loss,
    awr_loss_of_logps,
    awr_loss_of_values,
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_finite_differences(loss, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in inspect.signature(loss).parameters:
        x = torch.randn(3, dtype=torch.float64, generator=generator)
        inputs.append(x.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
