"""What comes before a PPO loss: KL-shaped rewards and costs, advantages, normalisers, lambda.

Shapes: B responses, R response positions, float32 and right-padded. `mask` is 1 on a response's own
tokens, its end-of-sequence token included. Position t of logps, values, rewards and advantages
belongs to the response's t-th token: the log-probability of emitting it, and the value of the state
before it."""

import math
from collections import deque
from functools import cache
from typing import NamedTuple

import torch

# ---- rewards and costs per token ----


def shaped_rewards(scores, logps, ref_logps, mask, kl_coef, clip_score):
    """Rewards per token (B, R): -kl_coef * (logp - ref_logp), and the score on the last token.

    scores      (B,): the reward model's
    clip_score  bounds the sum to +- this, at every position"""
    return add_final_score(-kl_coef * (logps - ref_logps), scores, mask, clip_score)


def shaped_costs(scores, logps, ref_logps, mask, kl_coef, clip_score):
    """Costs per token (B, R): the same with +kl_coef.

    So the KL penalty has the weight kl_coef in the mixed advantage, whatever lambda is."""
    return add_final_score(kl_coef * (logps - ref_logps), scores, mask, clip_score)


def add_final_score(penalty, scores, mask, clip_score):
    """penalty (B, R) plus scores (B,) on each last token, clipped, and 0 outside the mask."""
    lengths = mask.sum(dim=1).long()
    positions = torch.arange(mask.shape[1], device=mask.device)
    is_last = positions == (lengths - 1)[:, None]  # (B, R)
    rewards = torch.where(is_last, penalty + scores[:, None], penalty)
    return torch.where(mask.bool(), rewards.clamp(-clip_score, clip_score), 0.0)


def length_penalties(lengths, was_cut, longest, buffer):
    """How much of the penalty for a long response each gets (B,), from 0 to 1.

    lengths, longest  (B,): tokens of each response, and how many it may have at most
    was_cut           (B,): whether a response was cut there, before it ended
    buffer            the penalty grows from 0 to 1 over the last so many tokens, whether a response
                      ended or not (arXiv:2503.14476 Eq. 13); 0: cut responses get 1, others 0"""
    if buffer == 0:
        return was_cut.float()
    return ((lengths - (longest - buffer)) / buffer).clamp(0, 1)


# ---- advantages ----

# One more without critics is a name here and a branch in group_advantages().
ADVANTAGES = ("gae", "rloo", "grpo")


def gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation -> advantages, returns (B, R). arXiv:1506.02438 Eq. 16.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma gae_lambda A_{t+1},  G_t = A_t + V_t

    A response ends with its last token. Nothing is bootstrapped after it, whether it ended by
    itself or was cut at max_new_tokens."""
    rewards = torch.where(mask.bool(), rewards, 0.0)
    values = torch.where(mask.bool(), values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * gae_lambda * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def group_advantages(returns, mask, samples, kind):
    """Advantages without a critic: a response against the others to the same prompt -> (B, R).

    returns  (B,): (R - lambda C) / (1 + lambda), the KL penalty included
    samples  number of consecutive responses that belong to one prompt
    kind     "rloo": minus the others' mean (arXiv:2402.14740)
             "grpo": minus the group's mean, divided by its standard deviation (arXiv:2402.03300)"""
    groups = returns.view(-1, samples)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        # A response's distance from the others' mean is samples / (samples - 1) of its distance
        # from the mean of all.
        advantages = centred * (samples / (samples - 1))
    elif kind == "grpo":
        advantages = centred * (1 / (groups.std(1, keepdim=True) + 1e-6))
    else:
        raise ValueError(f"no such advantage without a critic: {kind!r}")
    return advantages.view(-1, 1) * mask


# What is standardised in a prompt's group by "grpo": "mixed", R - lambda C; "each", R and C apart,
# before they are mixed; "gdpo", the same, and then whiten().
NORMALIZE_GROUPS = ("mixed", "each", "gdpo")


def share_of_flat_groups(scores, samples):
    """The share of prompts whose `samples` consecutive responses all have the same score (B,).

    Such a group says nothing about which response is better."""
    groups = scores.view(-1, samples)
    is_flat = groups.amax(1) == groups.amin(1)
    return is_flat.float().mean()


def mix_advantages(reward_adv, cost_adv, lambda_):
    """(A_r - lambda A_c) / (1 + lambda): the Lagrangian's gradient. arXiv:2310.12773 Eq. 29.

    With several constraints (A_r - sum_i lambda_i A_i) / (1 + sum_i lambda_i): cost_adv is then a
    list of advantages, and lambda_ a list of as many numbers. Empty lists leave A_r as it is."""
    if isinstance(cost_adv, torch.Tensor):
        cost_adv = [cost_adv]
        lambda_ = [lambda_]
    mixed = reward_adv
    for constraint_adv, weight in zip(cost_adv, lambda_, strict=True):
        mixed = mixed - weight * constraint_adv
    return mixed / (1 + sum(lambda_))


def normalize(advantages, mask):
    """Advantages (B, R) minus their mean over all tokens, divided by their standard deviation."""
    x = advantages[mask.bool()]
    return (advantages - x.mean()) / (x.std(correction=0) + 1e-8) * mask


def whiten(advantages, mask):
    """Advantages (B, R) minus their mean over responses, divided by their standard deviation.

    The last step of GDPO, arXiv:2601.05242, as its authors' code has it. A response has the same
    advantage at all of its tokens, and counts once: in verl's GDPO, as in normalize(), it counts as
    often as it has tokens. Division by the deviation undoes mix_advantages()'s by 1 + lambda."""
    x = advantages[:, 0]  # (B,): every response has a first token
    return (advantages - x.mean()) / (x.std() + 1e-4) * mask


# ---- normalisers ----

SMALLEST_DEVIATION = 1e-4  # as a share of the mean: what is smaller is rounding


class RunningMeanStd:
    """Mean and variance of all scores seen. Batch variances are unbiased, as in Safe-RLHF."""

    def __init__(self, mean=0.0, var=1.0, count=0):
        self.mean = mean
        self.var = var
        self.count = count

    def update(self, x):
        n, mean, var = batch_moments(x)
        delta = mean - self.mean
        total = self.count + n
        self.mean += delta * n / total
        between = delta**2 * self.count * n / total
        self.var = (self.var * self.count + var * n + between) / total
        self.count = total

    @property
    def deviation(self):
        """The standard deviation; 0 where the numbers seen are equal up to rounding."""
        deviation = math.sqrt(self.var)
        return deviation if deviation > SMALLEST_DEVIATION * abs(self.mean) else 0.0

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class ExponentialMovingAverage(RunningMeanStd):
    """Exponential moving mean and variance. momentum: the weight of the previous values."""

    def __init__(self, momentum, mean=0.0, var=1.0, count=0):
        super().__init__(mean, var, count)
        self.momentum = momentum

    def update(self, x):
        n, mean, var = batch_moments(x)
        self.mean = self.momentum * self.mean + (1 - self.momentum) * mean
        self.var = self.momentum * self.var + (1 - self.momentum) * var
        self.count += n


def batch_moments(x):
    """Count, mean and unbiased variance of numbers (B,), in float64."""
    x = torch.as_tensor(x, dtype=torch.float64)
    var = x.var().item() if len(x) > 1 else 0.0
    return len(x), x.mean().item(), var


REWARD_SCALINGS = ("none", "std", "mean_std", "first")


def scale_rewards(scores, moments, scaling, clip):
    """Scores (B,) divided by a standard deviation, then clipped to +- clip.

    arXiv:2307.04964 Eq. 18

    moments  a RunningMeanStd, which is updated
    scaling  "std": by the deviation of all scores so far, these included
             "mean_std": the same, after subtracting their mean
             "first": by the deviation of the first batch
             "none": only clipped

    Scores that are all equal have no deviation to divide by: they keep their size, and "first"
    waits for a batch that differs."""
    if scaling == "none":
        return scores.clamp(-clip, clip)
    is_frozen = scaling == "first" and moments.count > 0 and moments.deviation > 0
    if torch.isfinite(scores).all() and not is_frozen:
        moments.update(scores)
    if scaling == "mean_std":
        scores = scores - moments.mean
    if moments.deviation > 0:
        scores = scores / (moments.deviation + 1e-8)
    return scores.clamp(-clip, clip)


def adapt_kl_coef(kl_coef, kl, target, responses, horizon):
    """The KL coefficient after `responses` more that were `kl` nats from the reference.

    It grows while the KL is above the target, by at most 0.2 in `horizon` responses, and by no more
    than that at once: else a rollout longer than the horizon could turn its sign.
    arXiv:1909.08593 Sec. 2.2"""
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * min(responses, horizon) / horizon)


# ---- how far the sampler is from the trainer ----


class SamplerGap(NamedTuple):
    """By how much a sampler's log-probabilities of what it drew differ from the trainer's."""

    mean: torch.Tensor  # of the absolute difference per token, in nats
    k3: torch.Tensor  # an estimate of KL(sampler || trainer) per token, in nats
    largest: torch.Tensor  # absolute difference, in nats


def measure_sampler_gap(logps, sampled_logps, mask):
    """The SamplerGap between log-probabilities of the same tokens (B, R), over all of them.

    k3 is the mean of r - 1 - log r with r = p_trainer / p_sampler. Under top_k or top_p both are
    probabilities of the whole distribution, while tokens are drawn from a part of it, so there k3
    is a distance, no longer an estimate of the KL."""
    tokens = mask.bool()
    log_ratio = (logps - sampled_logps)[tokens]
    distance = log_ratio.abs()
    k3 = log_ratio.expm1() - log_ratio  # ratio - 1 loses its digits near 0
    return SamplerGap(distance.mean(), k3.mean(), distance.max())


# ---- what is constrained ----

COST_KINDS = ("score", "unsafe")


def constrained_costs(scores, kind):
    """What the limit is about (B,): the cost model's scores, or with "unsafe" 1 above 0, else 0.

    The mean of these indicators is the share of unsafe answers. A score that is nan stays nan: it
    would otherwise count as a safe answer."""
    if kind == "score":
        return scores
    return torch.where(scores.isnan(), scores, (scores > 0).to(scores.dtype))


CONSTRAINTS = ("mean", "prompt")


def excess_costs(costs, limit):
    """max(0, c - d): by how much each response (B,) breaks the limit. arXiv:2410.19933 (RePO).

    With constraint="prompt" they stand in the place of the costs, and the multiplier's limit is 0:
    every answer has to keep the limit, and one that is safer than that makes up for no other. Their
    mean is never below 0, so that multipliers that add up, as "lagrange" does, never fall. A cost
    that is nan stays nan."""
    return (costs - limit).clamp(min=0)


# ---- a bound on the mean cost ----


def student_cdf(t, df):
    """P(T <= t) of Student's distribution with a whole number of degrees of freedom, for t >= 0.

    Abramowitz and Stegun 26.7.3 (odd df) and 26.7.4 (even): with tan(angle) = t / sqrt(df),
    P(|T| <= t) is sin(angle) (1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ...) for an even df. For an odd
    one it is 2/pi (angle + sin cos (1 + 2/3 cos^2 + (2 4)/(3 5) cos^4 + ...)). Both end with
    cos^(df - 2)."""
    angle = math.atan(t / math.sqrt(df))
    if df == 1:
        return 0.5 + angle / math.pi
    sine = math.sin(angle)
    cosine = math.cos(angle)
    squared = cosine**2
    is_odd = df % 2
    term = 1.0
    series = 1.0
    for power in range(2 + is_odd, df - 1, 2):
        term *= squared * (power - 1) / power
        series += term
    if is_odd:
        return 0.5 + (angle + sine * cosine * series) / math.pi
    return 0.5 + sine * series / 2


def student_density(t, df):
    """Student's density, the derivative of student_cdf()."""
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    return math.exp(log_scale - (df + 1) / 2 * math.log1p(t**2 / df))


@cache
def student_quantile(p, df):
    """The t with P(T <= t) = p of Student's distribution with a whole number df >= 1.

    By Newton's method from 0. P(T <= t) is concave above 0, so that no step goes beyond the t that
    is sought: the steps end with the first one that, by rounding, does not go up."""
    if not (0 < p < 1 and df >= 1):
        raise ValueError(f"no quantile of Student's distribution: p={p}, df={df}")
    if p < 0.5:
        return -student_quantile(1 - p, df)
    t = 0.0
    while True:
        after_step = t + (p - student_cdf(t, df)) / student_density(t, df)
        if after_step <= t:
            return t
        t = after_step


def pessimism_factor(delta, n, m=0):
    """k: how many standard deviations above the mean of n costs the true mean may well be.

    k = t_{1-delta, n-1} / sqrt n + t_{1-delta, m-1} / sqrt m    arXiv:2506.08266, C1 = C2 = 1

    With the first term alone, mean + k std is below the true mean with a probability of delta, if
    the costs are independent and roughly normal. t is Student's quantile, because a normal one is
    too small where n is.

    m  number of costs in a test at the end, which has an error of its own; 0: no second term
    n, m are 2 or more: a single cost has no deviation"""
    factor = student_quantile(1 - delta, n - 1) / math.sqrt(n)
    if m:
        factor += student_quantile(1 - delta, m - 1) / math.sqrt(m)
    return factor


def pessimistic_costs(costs, k):
    """Costs (B,) whose policy gradient is that of mean + k std: c + k (c - mean)^2 / (2 std).

    arXiv:2506.08266. The authors' code has c + k (c^2 - 2 c mean) / (2 std), which is less by the
    same k mean^2 / (2 std) for all responses. A baseline takes that out, but costs of -5 with a
    small deviation would become so large that clip_score cuts them all to the same number.

    mean, std  of the finite costs; std unbiased. Where it is 0 the costs stay as they are"""
    _, mean, variance = batch_moments(costs[costs.isfinite()])
    if variance == 0:
        return costs
    return costs + k * (costs - mean) ** 2 / (2 * math.sqrt(variance))


# ---- the multipliers ----


class CostWindow:
    """What all multipliers have in common: the window of costs, and when lambda moves.

    window  responses over which J_C is the mean
    delay   the first `delay` updates leave lambda unchanged

    A multiplier below adds `value`, which is lambda, and step(excess), where excess is J_C less the
    limit. `memory` names the attributes that its next step depends on: a run's state keeps them.

    With `pessimism` (the delta of pessimism_factor(), where pessimism_test is its m) the excess is
    that of J_C + k std instead. make_multiplier() sets both."""

    memory = ()
    pessimism = 0.0
    pessimism_test = 0

    def __init__(self, window, delay):
        self.delay = delay
        self.costs = deque(maxlen=window)
        self.updates = 0

    @property
    def mean_cost(self):
        """J_C: the mean cost in the window; nan before there is any."""
        return sum(self.costs) / len(self.costs) if self.costs else math.nan

    @property
    def pessimistic_cost(self):
        """J_C + k std, what is held against the limit; J_C without pessimism, or of one cost."""
        n = len(self.costs)
        if self.pessimism == 0 or n < 2:
            return self.mean_cost
        _, mean, variance = batch_moments(list(self.costs))
        k = pessimism_factor(self.pessimism, n, self.pessimism_test)
        return mean + k * math.sqrt(variance)

    def observe(self, costs):
        """Append new responses' costs, a (B,) tensor or a list; non-finite ones are ignored."""
        for cost in map(float, costs):
            if math.isfinite(cost):
                self.costs.append(cost)

    def update(self, cost_limit):
        """One step against `cost_limit` (Safe-RLHF's threshold, the paper's -d) -> lambda."""
        if self.updates >= self.delay and self.costs:
            self.step(self.pessimistic_cost - cost_limit)
        self.updates += 1
        return self.value

    def state_dict(self):
        state = {name: getattr(self, name) for name in self.memory}
        return {**state, "costs": list(self.costs), "updates": self.updates}

    def load_state_dict(self, state):
        for name in self.memory:
            setattr(self, name, state[name])
        self.costs = deque(state["costs"], self.costs.maxlen)
        self.updates = state["updates"]


class LagrangeMultiplier(CostWindow):
    """Gradient ascent on log lambda: lambda grows while the recent mean cost is above the limit.

    log lambda <- min(log lambda + lr * (J_C - cost_limit) * lambda, log max)    arXiv:2310.12773
                                                                                 Eq. 31
    init, max      first and greatest lambda; max 0: no bound
    lr             step on log lambda; 0 keeps lambda at init, which is fixed reward shaping
    window, delay  as CostWindow has them"""

    memory = ("log_lambda",)

    def __init__(self, init, lr, max, window, delay):
        super().__init__(window, delay)
        self.log_lambda = math.log(init)
        self.lr = lr
        self.log_max = math.log(max) if max > 0 else math.inf

    @property
    def value(self):
        return math.exp(self.log_lambda)

    def step(self, excess):
        if self.lr > 0:
            step = self.lr * excess * self.value
            self.log_lambda = min(self.log_lambda + step, self.log_max)


class PIDMultiplier(CostWindow):
    """A controller that also sees how far the cost is off, and whether it rises.

    With e = J_C - cost_limit and C a moving average of J_C    arXiv:2007.03964 Alg. 2

    I <- I + lr e, not below 0            the integral: alone, this is gradient ascent on lambda
    P <- p_ema P + (1 - p_ema) e          the distance
    D = max(0, C - C of `lookback` updates ago)    the rise; a falling cost does not count
    lambda = kp P + I + kd D, not below 0

    init, lr  first value of I, and its gain
    kp, kd    gains of the distance and of the rise
    p_ema     weight of the previous values in P; d_ema: in C
    max       greatest I and greatest lambda; 0: no bound. The paper bounds neither

    P and C begin at 0 and are not corrected for it, and the C before the first update is 0, as in
    the authors' code. So costs above 0 look like a rise at first, and below 0 like none."""

    memory = ("integral", "proportional", "mean", "past_means", "lambda_")

    def __init__(self, init, lr, max, window, delay, kp, kd, p_ema, d_ema, lookback):
        super().__init__(window, delay)
        self.lr = lr
        self.kp = kp
        self.kd = kd
        self.p_ema = p_ema
        self.d_ema = d_ema
        self.lookback = lookback
        self.max = max if max > 0 else math.inf
        self.integral = init
        self.proportional = 0.0
        self.mean = 0.0  # C
        self.past_means = [0.0]  # the latest values of C, the oldest first
        self.lambda_ = init

    @property
    def value(self):
        return self.lambda_

    def step(self, excess):
        self.integral = clip(self.integral + self.lr * excess, 0.0, self.max)
        self.proportional = self.p_ema * self.proportional + (1 - self.p_ema) * excess
        self.mean = self.d_ema * self.mean + (1 - self.d_ema) * self.mean_cost
        rise = max(0.0, self.mean - self.past_means[0])
        self.past_means = [*self.past_means, self.mean][-self.lookback :]
        lambda_ = self.kp * self.proportional + self.integral + self.kd * rise
        self.lambda_ = clip(lambda_, 0.0, self.max)


class OptimisticMultiplier(CostWindow):
    """Gradient ascent on lambda that expects the next gradient to change as the last one did.

    lambda <- lambda + lr (2 g_t - g_{t-1}), from 0 to max; g_t = J_C - cost_limit, g_{-1} = 0

    This is the standard form. In arXiv:2602.22146 the policy takes such steps too; here only lambda
    does.

    init, max  first and greatest lambda; max 0: no bound
    lr         step on lambda, not on its logarithm"""

    memory = ("lambda_", "last_excess")

    def __init__(self, init, lr, max, window, delay):
        super().__init__(window, delay)
        self.lr = lr
        self.max = max if max > 0 else math.inf
        self.lambda_ = init
        self.last_excess = 0.0

    @property
    def value(self):
        return self.lambda_

    def step(self, excess):
        expected = 2 * excess - self.last_excess
        self.lambda_ = clip(self.lambda_ + self.lr * expected, 0.0, self.max)
        self.last_excess = excess


class BoundedMultiplier(CostWindow):
    """A share s = sigmoid(l), from 0 to 1, of the advantage belongs to the cost. arXiv:2310.04373.

    v <- 0.1 v + s (1 - s) (J_C - cost_limit), the product clipped to +- 0.5;  l <- l + lr v

    mix_advantages() with lambda = s / (1 - s) = e^l is (1 - s) A_r - s A_c, the authors' mixture
    for one constraint. Theirs standardises both advantages first; here they are taken as they are.
    With several constraints the weights of A_r and the A_i are softmax(0, l_1, ..., l_N), where the
    authors' are N - sum s_i and s_i.

    init, max  first and greatest lambda; max 0: no other bound than that of l
    lr         step on l

    s hardly moves where it is near 0 or 1, so an l that has gone far takes long to come back: it
    stays within +- 5."""

    memory = ("logit", "velocity")
    momentum = 0.1
    greatest_gradient = 0.5
    greatest_logit = 5.0

    def __init__(self, init, lr, max, window, delay):
        super().__init__(window, delay)
        self.lr = lr
        log_max = math.log(max) if max > 0 else math.inf
        self.logit_max = min(log_max, self.greatest_logit)
        self.logit = math.log(init)
        self.velocity = 0.0

    @property
    def value(self):
        return math.exp(self.logit)

    def step(self, excess):
        if self.lr == 0:
            return
        share = self.value / (1 + self.value)
        slope = share * (1 - share) * excess
        gradient = clip(slope, -self.greatest_gradient, self.greatest_gradient)
        self.velocity = self.momentum * self.velocity + gradient
        self.logit += self.lr * self.velocity
        self.logit = clip(self.logit, -self.greatest_logit, self.logit_max)


def clip(x, low, high):
    """A number, or the end of the range low .. high that it is beyond."""
    return min(max(x, low), high)


MULTIPLIERS = ("lagrange", "pid", "optimistic", "bounded")


def make_multiplier(
    kind,
    init,
    lr,
    max,
    window,
    delay,
    kp,
    kd,
    ema,
    lookback,
    pessimism=0.0,
    pessimism_test=0,
):
    """The multiplier of a kind in MULTIPLIERS. From kp to lookback: for "pid" only.

    pessimism, pessimism_test  as CostWindow has them"""
    if kind == "lagrange":
        multiplier = LagrangeMultiplier(init, lr, max, window, delay)
    elif kind == "pid":
        multiplier = PIDMultiplier(init, lr, max, window, delay, kp, kd, ema, ema, lookback)
    elif kind == "optimistic":
        multiplier = OptimisticMultiplier(init, lr, max, window, delay)
    elif kind == "bounded":
        multiplier = BoundedMultiplier(init, lr, max, window, delay)
    else:
        raise ValueError(f"no such multiplier: {kind!r}")
    multiplier.pessimism = pessimism
    multiplier.pessimism_test = pessimism_test
    return multiplier
