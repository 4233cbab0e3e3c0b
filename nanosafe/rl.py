"""What comes before a PPO loss: KL-shaped rewards and costs, GAE, normalisers, lambda.

Shapes: B responses, R response positions, float32 and right-padded; `mask` is 1 on a response's own
tokens, the end-of-sequence token included. Position t of logps, values, rewards and advantages
belongs to the response's t-th token: log p of emitting it, and the value of the state before it."""

import math
from collections import deque
import torch


def shaped_rewards(scores, logps, ref_logps, mask, kl_coef, clip_score):
    """Per-token rewards: -kl_coef * (logp - ref_logp), the score on the last token added, clipped.

    scores (B,): the reward model's. clip_score bounds the sum, at every position. -> (B, R)"""
    return add_final_score(scores, -kl_coef * (logps - ref_logps), mask, clip_score)


def shaped_costs(scores, logps, ref_logps, mask, kl_coef, clip_score):
    """Per-token costs: the same with +kl_coef. So the mixed advantage has it at every lambda."""
    return add_final_score(scores, kl_coef * (logps - ref_logps), mask, clip_score)


def add_final_score(scores, penalty, mask, clip_score):
    lengths = mask.sum(dim=1).long()
    last = torch.arange(mask.shape[1], device=mask.device) == (lengths - 1)[:, None]  # (B, R)
    rewards = torch.where(last, penalty + scores[:, None], penalty).clamp(-clip_score, clip_score)
    return torch.where(mask.bool(), rewards, 0.0)


def gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (arXiv:1506.02438 Eq. 16) -> advantages, returns (B, R).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1},  G_t = A_t + V_t.
    A response ends with its last token: nothing is bootstrapped behind it, cut by length or not."""
    rewards, values = (torch.where(mask.bool(), x, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def group_advantages(returns, mask, samples, kind):
    """Advantages without a critic: a response against the others to its prompt -> (B, R).

    returns (B,): (R - lambda C) / (1 + lambda), KL included; `samples` in a row are one prompt's.
    "rloo": less the others' mean (arXiv:2402.14740); "grpo": standardised (arXiv:2402.03300)."""
    groups = returns.view(-1, samples)
    centred = groups - groups.mean(dim=1, keepdim=True)
    scale = samples / (samples - 1) if kind == "rloo" else 1 / (groups.std(1, keepdim=True) + 1e-6)
    return (centred * scale).view(-1, 1) * mask


def normalize(advantages, mask):
    """Advantages (B, R) less their mean over all tokens, over their standard deviation."""
    x = advantages[mask.bool()]
    return (advantages - x.mean()) / (x.std(correction=0) + 1e-8) * mask


REWARD_SCALINGS = ("none", "std", "mean_std", "first")


def scale_rewards(scores, moments, scaling, clip):
    """Scores (B,) over the standard deviation of all so far, these included ("mean_std": less the
    mean first; "first": over the first batch's), clipped to +- clip. arXiv:2307.04964 Eq. 18."""
    if scaling != "none":
        if torch.isfinite(scores).all() and not (scaling == "first" and moments.count):
            moments.update(scores)
        scores = scores - moments.mean if scaling == "mean_std" else scores
        scores = scores / (math.sqrt(moments.var) + 1e-8)
    return scores.clamp(-clip, clip)


def adapt_kl_coef(kl_coef, kl, target, responses, horizon):
    """The KL weight after `responses` more that were `kl` nats away. arXiv:1909.08593 Sec. 2.2."""
    return kl_coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * responses / horizon)


def mix_advantages(reward_adv, cost_adv, lambda_):
    """(A_r - lambda A_c) / (1 + lambda): the Lagrangian's gradient. arXiv:2310.12773 Eq. 29."""
    return (reward_adv - lambda_ * cost_adv) / (1 + lambda_)


class LagrangeMultiplier:
    """Gradient ascent on log lambda: lambda grows while the recent mean cost is above the limit.

    log lambda <- min(log lambda + lr * (J_C - cost_limit) * lambda, log max)   (Eq. 31)

    init, max  first and greatest lambda (max 0: no bound)
    lr         step on log lambda; 0 keeps lambda at init, which is fixed reward shaping
    window     responses over which J_C is the mean
    delay      updates to sit out before the first"""

    def __init__(self, init, lr, max, window, delay):
        self.log_lambda = math.log(init)
        self.lr, self.log_max, self.delay = lr, math.log(max) if max > 0 else math.inf, delay
        self.costs = deque(maxlen=window)
        self.updates = 0

    @property
    def value(self):
        return math.exp(self.log_lambda)

    @property
    def mean_cost(self):
        """J_C: the mean cost in the window; nan before there is any."""
        return sum(self.costs) / len(self.costs) if self.costs else math.nan

    def observe(self, costs):
        """Take in the raw costs of new responses, (B,) tensor or list; what is no number is not."""
        self.costs.extend(c for c in map(float, costs) if math.isfinite(c))

    def update(self, cost_limit):
        """One step against `cost_limit` (Safe-RLHF's threshold, the paper's -d) -> lambda."""
        if self.updates >= self.delay and self.lr > 0 and self.costs:
            step = self.lr * (self.mean_cost - cost_limit) * self.value
            self.log_lambda = min(self.log_lambda + step, self.log_max)
        self.updates += 1
        return self.value

    def state_dict(self):
        return {"log_lambda": self.log_lambda, "costs": list(self.costs), "updates": self.updates}

    def load_state_dict(self, state):
        vars(self).update(state, costs=deque(state["costs"], self.costs.maxlen))


class RunningMeanStd:
    """Mean and variance of all scores seen. Batch variances are unbiased, as in Safe-RLHF."""

    def __init__(self, mean=0.0, var=1.0, count=0):
        self.mean, self.var, self.count = mean, var, count

    def update(self, x):
        n, mean, var = batch_moments(x)
        delta, total = mean - self.mean, self.count + n
        self.mean += delta * n / total
        self.var = (self.var * self.count + var * n + delta**2 * self.count * n / total) / total
        self.count = total


class ExponentialMovingAverage(RunningMeanStd):
    """Mean and variance that forget: `momentum` weighs what was known before."""

    def __init__(self, momentum, mean=0.0, var=1.0, count=0):
        super().__init__(mean, var, count)
        self.momentum = momentum

    def update(self, x):
        n, mean, var = batch_moments(x)
        self.mean = self.momentum * self.mean + (1 - self.momentum) * mean
        self.var = self.momentum * self.var + (1 - self.momentum) * var
        self.count += n


def batch_moments(x):
    x = torch.as_tensor(x, dtype=torch.float64)
    return len(x), x.mean().item(), x.var().item() if len(x) > 1 else 0.0
