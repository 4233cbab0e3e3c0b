"""What is minimised: every loss of SFT, preference learning and PPO, one pure function each.

All take float tensors and return a scalar. The mean is over what is passed: a trainer that cuts a
batch into micro-batches multiplies each by its share of the whole.

Shapes: B sequences or pairs, R response positions. A mask is 1 where a value counts and 0
elsewhere, and what stands where the mask is 0 never reaches a loss or a gradient."""

import torch
import torch.nn.functional as F

# ---- means ----


def zero_outside(mask, x):
    """x where mask is 1, and 0 elsewhere. Not x * mask, because 0 * nan is nan."""
    return torch.where(mask.bool(), x, 0.0)


def masked_mean(x, mask, dim=None):
    """Mean of x where mask is 1, and 0 if the mask is 0 everywhere."""
    x = zero_outside(mask, x)
    if dim is None:
        return x.sum() / mask.sum().clamp(min=1)
    return x.sum(dim) / mask.sum(dim).clamp(min=1)


def sequence_mean(x, mask):
    """Mean over each sequence's own tokens, then over sequences: long ones weigh no more."""
    return mean_or_zero(masked_mean(x, mask, dim=-1))


def mean_or_zero(x):
    """Mean of x (B,), or 0 if B is 0, as on a rank without work."""
    return x.sum() / max(1, len(x))


# ---- supervised fine-tuning ----


def mle_loss(logps, mask):
    """Negative log-likelihood per token: -mean log p where mask is 1. Both have the same shape."""
    return -masked_mean(logps, mask)


# ---- reward and cost models ----


def reward_loss(chosen, rejected, reg=0.0, mask=None, margin=0.0):
    """-log sigmoid(chosen - rejected - margin) + reg * mean score^2. arXiv:2310.12773 Eq. 6.

    chosen, rejected  end scores (B,); or (B, L), per token, with a mask of where the two differ"""
    ranking = -F.logsigmoid(chosen - rejected - margin)
    return pair_mean(ranking, mask) + reg * mean_square(chosen, rejected, mask)


def cost_loss(safer, unsafer, safer_sign, unsafer_sign, reg=0.0, mask=None):
    """Rank unsafer above safer, and put zero between safe and unsafe. arXiv:2310.12773 Eq. 7.

    -log sigmoid(unsafer - safer) - log sigmoid(-safer_sign * safer)
        - log sigmoid(-unsafer_sign * unsafer) + reg * mean score^2

    safer, unsafer            end scores (B,), above 0 is unsafe; or (B, L) per token, with a mask
    safer_sign, unsafer_sign  (B,): +1 for a safe response, -1 for an unsafe one"""
    if mask is not None:
        safer_sign = safer_sign[:, None]
        unsafer_sign = unsafer_sign[:, None]
    ranking = -F.logsigmoid(unsafer - safer)
    safer_side = -F.logsigmoid(-safer_sign * safer)
    unsafer_side = -F.logsigmoid(-unsafer_sign * unsafer)
    loss = ranking + safer_side + unsafer_side
    return pair_mean(loss, mask) + reg * mean_square(safer, unsafer, mask)


def pair_mean(x, mask):
    """Mean over pairs (B,); or over each pair's tokens (B, L) where mask is 1, then over pairs."""
    return mean_or_zero(x) if mask is None else sequence_mean(x, mask)


def mean_square(a, b, mask):
    """Mean square of the scores of both sides of pairs."""
    return (pair_mean(a.square(), mask) + pair_mean(b.square(), mask)) / 2


# ---- policies from preferences ----


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0, margin=0.0):
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x), x = beta h - margin. arXiv:2305.18290 Eq. 7.

    h = (chosen - ref_chosen) - (rejected - ref_rejected)

    chosen, ...  responses' summed log-probabilities (B,). With zeros for the reference's two the
                 loss is reference-free. beta * (logp - ref_logp) is the implied reward.
    e            label_smoothing: the share of wrong labels (cDPO)
    margin       by how much the implied reward of the chosen response should win, a number or (B,).
                 DPO has none; SimPO, SafeDPO and MODPO below are DPO with one."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    x = beta * h - margin
    right = (1 - label_smoothing) * F.logsigmoid(x)
    wrong = label_smoothing * F.logsigmoid(-x)
    return -mean_or_zero(right + wrong)


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(h - 1 / (2 beta))^2, with h as in dpo_loss. arXiv:2310.12036 Eq. 17.

    chosen, ...  responses' mean log-probabilities per token (B,). With sums instead, the margin
                 1 / (2 beta) is one of responses, not of tokens, and another beta fits."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return mean_or_zero((h - 1 / (2 * beta)).square())


def simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, beta, margin):
    """-log sigmoid(beta (chosen / length - rejected / length) - margin). arXiv:2405.14734 Eq. 6.

    There is no reference. The paper calls the margin gamma, and states it as a share of beta.

    chosen, rejected  responses' summed log-probabilities (B,); their lengths in tokens (B,)"""
    p_chosen = chosen / chosen_lengths
    p_rejected = rejected / rejected_lengths
    none = torch.zeros_like(chosen)
    return dpo_loss(p_chosen, p_rejected, none, none, beta, margin=margin)


def orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, beta):
    """-p_chosen - beta log sigmoid(o_chosen - o_rejected). arXiv:2403.07691 Eq. 6-7.

    p is the log-probability per token, and o = p - log(1 - exp p) its log-odds. There is no
    reference: the first term is that of SFT. The paper calls the weight beta lambda.

    chosen, rejected  responses' summed log-probabilities (B,); their lengths in tokens (B,)"""
    p_chosen = chosen / chosen_lengths
    p_rejected = rejected / rejected_lengths
    ranking = F.logsigmoid(log_odds(p_chosen) - log_odds(p_rejected))
    return -mean_or_zero(p_chosen + beta * ranking)


def log_odds(logps):
    """log(p / (1 - p)) of log-probabilities, finite where p is 1."""
    one_minus_p = -torch.expm1(logps)
    return logps - one_minus_p.clamp(min=1e-20).log()


def kto_loss(logps, ref_logps, desirable, kl, beta, undesirable_weight=1.0):
    """1 - sigmoid(beta (g - z)) of a desirable response, w (1 - sigmoid(beta (z - g))) of another.

    g = logp - ref_logp, z = max(0, kl). arXiv:2402.01306. Responses are not paired: a gain g is
    compared with z, the gain that counts as none, which has no gradient.

    logps, ref_logps    responses' summed log-probabilities (B,)
    desirable           (B,): 1 or 0
    kl                  estimate of KL(policy || reference), a scalar: the mean gain of responses to
                        other prompts than those that they were given to
    undesirable_weight  w. With (number of desirable) / (number of the others) both weigh the same.
    """
    z = kl.detach().clamp(min=0)
    distance = beta * (logps - ref_logps - z)
    loss_if_desirable = torch.sigmoid(-distance)
    loss_if_not = undesirable_weight * torch.sigmoid(distance)
    return mean_or_zero(torch.where(desirable.bool(), loss_if_desirable, loss_if_not))


# ---- policies from preferences, as safe as they are helpful ----
# chosen_unsafe and rejected_unsafe (B,) are 1 where a response is unsafe, and 0 where it is safe.


def safedpo_loss(
    chosen, rejected, ref_chosen, ref_rejected, chosen_unsafe, rejected_unsafe, beta, margin
):
    """-log sigmoid(beta h - margin (rejected_unsafe - chosen_unsafe)). arXiv:2505.20065 Eq. 12.

    h as in dpo_loss. It is made for pairs that examples.parse_safedpo_pair() has reordered: there
    the chosen response is safe. The paper calls the margin Delta; with 0 the loss is DPO's."""
    margins = margin * (rejected_unsafe - chosen_unsafe)
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, margin=margins)


def bso_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    chosen_unsafe,
    rejected_unsafe,
    beta,
    margin,
    generator="sba",
    steepness=0.2,
    scale=4.0,
    limit=30.0,
):
    """f(v), v = -(beta h + margin (chosen_unsafe - rejected_unsafe)). arXiv:2605.12339 Eq. 14.

    h as in dpo_loss. f comes from the convex generator of a Bregman divergence:

    logistic  log(1 + e^v), which is safedpo_loss
    sba       (l e^((1 + l) v) - (1 + l) e^(-l v) + 1) / (l s (1 + l))

    margin     the paper calls it C
    steepness  l, any number but 0 and -1
    scale      s
    limit      v is cut to -limit .. limit, where there is no gradient. It must lie above the
               margin: at C = 30 and a limit of 30 a (safe, unsafe) pair starts without gradient.

    With sba a pair that is won is pushed on, the harder the more it is won (slope e^(-l v) / s): it
    is bounded by the limit only."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    v = -(beta * h + margin * (chosen_unsafe - rejected_unsafe))
    v = v.clamp(-limit, limit)
    if generator == "logistic":
        return mean_or_zero(F.softplus(v))
    assert generator == "sba"
    rising = steepness * ((1 + steepness) * v).exp()
    falling = (1 + steepness) * (-steepness * v).exp()
    return mean_or_zero(rising - falling + 1) / (steepness * scale * (1 + steepness))


def bfpo_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    chosen_unsafe,
    rejected_unsafe,
    beta,
    spread=3.0,
    shift=0.5,
):
    """(h - t / beta)^2, t = (b S_chosen - S_rejected) / (b - 1) - a, S = 1 - unsafe.

    h as in dpo_loss, of pairs ordered by helpfulness. arXiv:2408.15313, as its authors' code has
    it. t is 1/2 if both responses are safe, 1 if only the chosen one is, -1 if only the rejected
    one is, and -1/2 if both are unsafe: of two unsafe responses the less helpful one should win.

    beta    the paper's tau: nats are t / beta
    spread  b, above 1
    shift   a"""
    chosen_safe = 1 - chosen_unsafe
    rejected_safe = 1 - rejected_unsafe
    target = (spread * chosen_safe - rejected_safe) / (spread - 1) - shift
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return mean_or_zero((h - target / beta).square())


def modpo_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    chosen_safety,
    rejected_safety,
    helpful_weight,
    beta,
):
    """-log sigmoid((beta h - (1 - w) (m_chosen - m_rejected)) / w). arXiv:2310.03708 Eq. 14.

    h as in dpo_loss, of pairs ordered by helpfulness; w is helpful_weight, above 0 and at most 1.

    chosen_safety, rejected_safety  m (B,), higher is safer, in the implied reward's unit: minus the
                                    costs, or beta (logp - ref_logp) of a policy of safer responses

    Its best policy is reference * exp((w reward + (1 - w) m) / beta), provided that labels are as
    noisy as Bradley and Terry say. A pair whose chosen response is the less safe one is satisfied
    before it is learnt; without noise no pair says the opposite."""
    margins = (1 - helpful_weight) * (chosen_safety - rejected_safety) / helpful_weight
    beta = beta / helpful_weight
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, margin=margins)


# ---- policies from rankings ----


def rrhf_loss(logps, lengths, scores):
    """Sum of max(0, p_i - p_j) over pairs with score i < score j, minus the best one's log-prob.

    arXiv:2304.05302 Eq. 5, of one query with K candidates; p is the log-probability per token.

    logps, lengths, scores  (K,): summed log-probabilities, token counts, scores"""
    p = logps / lengths
    is_worse = scores[:, None] < scores  # (K, K): candidate i than candidate j
    ranking = torch.where(is_worse, F.relu(p[:, None] - p), 0.0).sum()
    return ranking - logps[scores.argmax()]


# ---- pretraining with human preferences ----


def unlikelihood_loss(logps, scores, mask, threshold, alpha):
    """Mean of -log p for tokens with score <= threshold, and of -alpha log(1 - p) for the others.

    All have the same shape. Higher scores are worse. From arXiv:1908.04319, by way of
    arXiv:2302.08582."""
    logps = zero_outside(mask, logps)
    one_minus_p = (-torch.expm1(logps)).clamp(min=1e-20)
    unlikely = alpha * one_minus_p.log()
    return -masked_mean(torch.where(scores <= threshold, logps, unlikely), mask)


def awr_loss(logps, scores, values, mask, alpha, beta, weight_max):
    """alpha * mean(-w log p) + (1 - alpha) * mean(A^2), A = -scores - values. arXiv:1910.00177.

    w = min(exp(A / beta), weight_max), without gradient. All have the same shape. Higher scores are
    worse. With alpha 1 and values 0 this is reward-weighted regression (RWR)."""
    logps = zero_outside(mask, logps)
    advantages = zero_outside(mask, -scores - values)
    weights = (advantages.detach() / beta).exp().clamp(max=weight_max)
    policy = alpha * weights * logps
    value = (1 - alpha) * advantages.square()
    return masked_mean(value - policy, mask)


# ---- PPO ----


SURROGATES = ("ppo", "gspo", "cispo")
LOSS_MEANS = ("response", "token", "constant")


def policy_ratio(logps, old_logps, mask, surrogate):
    """By how much the policy has moved from the rollout's, at each token (B, R).

    r = exp(logps - old_logps); of "gspo" all tokens of a response have one,
    exp(mean_t (logps - old_logps)): arXiv:2507.18071 Eq. 7"""
    log_ratio = zero_outside(mask, logps) - zero_outside(mask, old_logps)
    if surrogate == "gspo":
        log_ratio = masked_mean(log_ratio, mask, dim=-1)[:, None].expand_as(log_ratio)
    return log_ratio.exp()


def importance_weights(logps, sampled_logps, mask, cap):
    """min(exp(logps - sampled_logps), cap), 0 outside the mask (B, R), without gradient.

    Truncated importance sampling between the sampler and the trainer, which round the same policy
    differently: advantages times these weights make the gradient, from what the sampler drew, that
    from what the trainer would have drawn. As in verl, per token (rollout_corr_helper.py).

    logps          log-probabilities of the sampled tokens by the trainer, before its updates (B, R)
    sampled_logps  the same by the sampler"""
    log_ratio = zero_outside(mask, logps) - zero_outside(mask, sampled_logps)
    return zero_outside(mask, log_ratio.exp().clamp(max=cap)).detach()


def actor_loss(
    logps,
    old_logps,
    advantages,
    mask,
    clip_low,
    clip_high=None,
    surrogate="ppo",
    loss_mean="response",
    length=1,
):
    """-mean min(r A, clip(r, 1 - low, 1 + high) A), r = policy_ratio(). arXiv:1707.06347 Eq. 7.

    All (B, R). Only logps carries gradient.

    clip_high  None: clip_low. A greater one lets unlikely tokens rise further: arXiv:2503.14476
    surrogate  "ppo", or "gspo" with its own ratio, or "cispo": -mean clip(r) A logp, with the ratio
               as a weight only, so that clipped tokens keep a gradient: arXiv:2506.13585
    loss_mean  "response": over each response, then over responses
               "token": over all tokens, so that long responses weigh more: arXiv:2503.14476
               "constant": sums over `length`, then over responses: arXiv:2503.20783"""
    ratio = policy_ratio(logps, old_logps, mask, surrogate)
    advantages = zero_outside(mask, advantages)
    if clip_high is None:
        clip_high = clip_low
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    if surrogate == "cispo":
        gain = clipped_ratio.detach() * advantages * zero_outside(mask, logps)
    else:
        gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    if loss_mean == "token":
        return -masked_mean(gain, mask)
    if loss_mean == "constant":
        return -mean_or_zero(zero_outside(mask, gain).sum(-1) / length)
    return -sequence_mean(gain, mask)


def batch_share(mask, rows, minibatch, loss_mean):
    """What a loss over some rows of a minibatch is multiplied by, so that all together give its
    mean: their share of its tokens, or of its responses.

    mask  (B, R), of all responses; rows, minibatch: indices of some"""
    if loss_mean == "token":
        return mask[rows].sum() / mask[minibatch].sum().clamp(min=1)
    return len(rows) / len(minibatch)


def critic_loss(values, old_values, returns, mask, clip_value):
    """Half the squared error of the value, or of the value clipped to old +- clip_value, whichever
    is larger.

    All (B, R). Only values carries gradient. Mean over each response, then over responses."""
    values = zero_outside(mask, values)
    old_values = zero_outside(mask, old_values)
    returns = zero_outside(mask, returns)
    clipped = torch.clamp(values, old_values - clip_value, old_values + clip_value)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * sequence_mean(error, mask)
