"""What is minimised: every loss of SFT, preference learning and PPO, one pure function each.

All take float tensors and return a scalar. The mean is over what is passed: a trainer that splits a
batch into micro-batches weighs each by its share of the whole.

Shapes: B sequences or pairs, R response positions; a mask is 1 where a value counts and 0
elsewhere, and what stands where the mask is 0 never reaches a loss or a gradient."""

import torch
import torch.nn.functional as F


def masked_mean(x, mask, dim=None):
    """Mean of x where mask is 1; 0 where nothing is."""
    (x,) = zero_outside(mask, x)
    if dim is None:
        return x.sum() / mask.sum().clamp(min=1)
    return x.sum(dim) / mask.sum(dim).clamp(min=1)


def zero_outside(mask, *tensors):
    """The tensors with 0 where mask is 0. Not x * mask: 0 * nan is nan, in values and gradients."""
    return [torch.where(mask.bool(), x, 0.0) for x in tensors]


def sequence_mean(x, mask):
    """Mean over each sequence's own tokens, then over the sequences: long ones weigh no more."""
    return mean_or_zero(masked_mean(x, mask, dim=-1))


def mean_or_zero(x):
    """Mean of x (B,); 0 where B is 0: the share of a rank that got no work."""
    return x.sum() / max(1, len(x))


def mle_loss(logps, mask):
    """Negative log-likelihood per token: -mean log p where mask is 1. Both of any one shape."""
    return -masked_mean(logps, mask)


def reward_loss(chosen, rejected, reg=0.0, mask=None, margin=0.0):
    """-log sigmoid(chosen - rejected - margin) + reg * mean score^2. arXiv:2310.12773 Eq. 6.

    chosen, rejected: end scores (B,); or (B, L), token-wise, with a mask of where they differ."""
    return pair_mean(-F.logsigmoid(chosen - rejected - margin), mask) + reg * square_mean(
        chosen, rejected, mask
    )


def cost_loss(safer, unsafer, safer_sign, unsafer_sign, reg=0.0, mask=None):
    """Rank unsafer above safer, and put zero between safe and unsafe. arXiv:2310.12773 Eq. 7.

    -log sigmoid(unsafer - safer) - log sigmoid(-sign_s * safer) - log sigmoid(-sign_u * unsafer) +
    reg * mean score^2

    safer, unsafer: end scores (B,), cost > 0 means unsafe; or, token-wise, (B, L) with a mask (B,
    L). safer_sign, unsafer_sign: (B,), +1 for a safe response and -1 for an unsafe one."""
    if mask is not None:
        safer_sign, unsafer_sign = safer_sign[:, None], unsafer_sign[:, None]
    loss = (
        -F.logsigmoid(unsafer - safer)
        - F.logsigmoid(-safer_sign * safer)
        - F.logsigmoid(-unsafer_sign * unsafer)
    )
    return pair_mean(loss, mask) + reg * square_mean(safer, unsafer, mask)


def pair_mean(x, mask):
    return mean_or_zero(x) if mask is None else sequence_mean(x, mask)


def square_mean(a, b, mask):
    return (pair_mean(a.square(), mask) + pair_mean(b.square(), mask)) / 2


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h). arXiv:2305.18290 Eq. 7; e: cDPO.

    h = (chosen - ref_chosen) - (rejected - ref_rejected), of responses' summed log-probs (B,). With
    zeros for the reference's it is reference-free. beta * (logp - ref) is the implied reward."""
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -mean_or_zero(
        (1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
    )


def ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(h - 1 / (2 beta))^2, h as in dpo_loss but of per-token means (B,). arXiv:2310.12036 Eq. 17.

    With sums the margin 1 / (2 beta) is a response's, not a token's: another beta fits."""
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return mean_or_zero((h - 1 / (2 * beta)).square())


def rrhf_loss(logps, lengths, scores):
    """Sum of max(0, p_i - p_j) over scores i < j, less the best's log-prob. arXiv:2304.05302 Eq. 5.

    One query's K candidates: summed log-probs, token counts, scores (K,); p is per token."""
    p = logps / lengths
    worse = scores[:, None] < scores  # (K, K): i than j
    return torch.where(worse, F.relu(p[:, None] - p), 0.0).sum() - logps[scores.argmax()]


def unlikelihood_loss(logps, scores, mask, threshold, alpha):
    """-log p of tokens with score <= threshold, -alpha log(1 - p) of the others; their mean.

    All of any one shape; higher scores are worse. arXiv:1908.04319, as arXiv:2302.08582 has it."""
    (logps,) = zero_outside(mask, logps)
    unlikely = alpha * (-torch.expm1(logps)).clamp(min=1e-20).log()
    return -masked_mean(torch.where(scores <= threshold, logps, unlikely), mask)


def awr_loss(logps, scores, values, mask, alpha, beta, weight_max):
    """alpha * mean -w log p + (1 - alpha) * mean A^2, A = -scores - values. arXiv:1910.00177.

    Of any one shape; w = min(exp(A / beta), weight_max), no gradient. RWR: alpha 1, values 0."""
    logps, advantages = zero_outside(mask, logps, -scores - values)
    weights = (advantages.detach() / beta).exp().clamp(max=weight_max)
    return masked_mean((1 - alpha) * advantages.square() - alpha * weights * logps, mask)


def actor_loss(logps, old_logps, advantages, mask, clip_ratio):
    """-mean min(r A, clip(r, 1 - c, 1 + c) A), r = exp(logps - old_logps). arXiv:1707.06347 Eq. 7.

    All (B, R). Only logps carries gradient. Mean over each response, then over responses."""
    logps, old_logps, advantages = zero_outside(mask, logps, old_logps, advantages)
    ratio = (logps - old_logps).exp()
    gain = torch.minimum(
        ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages
    )
    return -sequence_mean(gain, mask)


def critic_loss(values, old_values, returns, mask, clip_value):
    """Half the squared error of the value, or of the value clipped to old +- clip_value.

    All (B, R). Only values carries gradient. Mean over each response, then over responses."""
    values, old_values, returns = zero_outside(mask, values, old_values, returns)
    clipped = torch.clamp(values, old_values - clip_value, old_values + clip_value)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * sequence_mean(error, mask)
