"""AdamW, learning-rate schedules, and an optimizer step that skips non-finite gradients."""

import math
from functools import cache

import torch

from nanosafe import parallel
from nanosafe.errors import stop
from nanosafe.rollout import hash64

SCHEDULES = ("cosine", "linear", "constant")
MOMENTS = ("float32", "bfloat16")
EPS = 1e-8  # of AdamW
# Elements that Bfloat16AdamW updates together. On a CPU its float32 copies of so many stay in the
# cache. On a GPU a launch must be worth its time; without use_compile they take half a GB.
SLICE = {"cpu": 2**16, "cuda": 2**24}


def make_adamw(model, weight_decay, beta1, beta2, moments="float32", seed=0, use_compile=False):
    """AdamW (arXiv:1711.05101) that decays matrices only, not norms and biases.

    moments      float32 | bfloat16: what its two moments are stored in; see Bfloat16AdamW
    seed         of the rounding to bfloat16
    use_compile  torch.compile the update with bfloat16 moments; float32's is one kernel anyway"""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (beta1, beta2)
    if moments == "bfloat16":
        return Bfloat16AdamW(groups, betas, seed, use_compile)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=EPS, fused=True)


# ---- moments in bfloat16 ----


class Bfloat16AdamW(torch.optim.Optimizer):
    """AdamW whose moments are stored in bfloat16: 4 bytes per parameter in place of 8.

    A step computes in float32, and rounds the new moments stochastically (round_stochastically).
    Rounded to the nearest, the second moment would get stuck: with beta2 = 0.999 a step changes it
    by at most a thousandth when it shrinks, and neighbours in bfloat16 differ by 1/256 to 1/128.

    The random bits are a function of (seed, step, parameter, element of the whole parameter). So
    no random state is saved, and a row is rounded alike on whichever rank it lies."""

    def __init__(self, groups, betas, seed, use_compile):
        # run_state.make_moments() reads moment_dtype.
        super().__init__(groups, {"lr": 0.0, "betas": betas, "moment_dtype": torch.bfloat16})
        self.seed = seed
        self.use_compile = use_compile

    @torch.no_grad()
    def step(self):
        index = 0  # of a parameter among all
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_parameter(parameter, group, index)
                index += 1

    def step_parameter(self, parameter, group, index):
        """Update this rank's rows of a parameter, and their moments."""
        state = self.state[parameter]
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter.data, dtype=torch.bfloat16)
        steps = int(state.get("step", 0)) + 1  # a tensor only in a state that has just been loaded
        state["step"] = steps
        local = parallel.local_rows(parameter)
        weights = local.rows.view(-1)
        gradients = parallel.local_part(parameter.grad).reshape(-1)
        exp_avg = parallel.local_part(state["exp_avg"]).view(-1)
        exp_avg_sq = parallel.local_part(state["exp_avg_sq"]).view(-1)
        betas = group["betas"]
        factors = compute_factors(steps, group["lr"], group["weight_decay"], *betas)
        factors = factors.to(weights.device)
        row_size = math.prod(parameter.shape[1:])
        counter = hash64(self.seed, steps, index) + local.first * row_size
        update = update_elements
        if self.use_compile and weights.is_cuda:  # with offload=all they are on the CPU
            update = compile_update()
        length = SLICE[weights.device.type]
        for begin in range(0, len(weights), length):
            end = begin + length
            update(
                weights[begin:end],
                gradients[begin:end],
                exp_avg[begin:end],
                exp_avg_sq[begin:end],
                factors,
                betas,
                wrap_int32(counter + begin),
            )


def compute_factors(steps, lr, weight_decay, beta1, beta2):
    """The numbers of a parameter's update number `steps`, which counts from 1: (3,) float32.

    They are what the weights are multiplied by, the learning rate over the first moment's bias
    correction, and the root of the second moment's bias correction."""
    decay = 1 - lr * weight_decay
    step_size = lr / (1 - beta1**steps)
    correction = math.sqrt(1 - beta2**steps)
    return torch.tensor([decay, step_size, correction])


def update_elements(weights, gradients, exp_avg, exp_avg_sq, factors, betas, counter):
    """A step of AdamW (arXiv:1711.05101, algorithm 2) on n elements, in place.

    weights, gradients   (n,) float32
    exp_avg, exp_avg_sq  (n,) bfloat16: the moments
    factors              compute_factors(): a tensor, because a new number would compile anew
    counter              the first element's number in draw_bits()"""
    beta1, beta2 = betas
    decay, step_size, correction = factors.unbind()
    first_moment = exp_avg.float().lerp_(gradients, 1 - beta1)
    second_moment = exp_avg_sq.float().mul_(beta2)
    second_moment.addcmul_(gradients, gradients, value=1 - beta2)
    denominator = second_moment.sqrt().div_(correction).add_(EPS)
    change = (first_moment / denominator).mul_(step_size)
    weights.mul_(decay).sub_(change)

    bits = draw_bits(counter, len(weights), weights.device)
    exp_avg.copy_(round_stochastically(first_moment, bits & 0xFFFF))
    exp_avg_sq.copy_(round_stochastically(second_moment, shift_right(bits, 16)))


@cache
def compile_update():
    """update_elements() as one kernel. It is compiled once, and not for each model or length."""
    return torch.compile(update_elements, dynamic=True)


def round_stochastically(x, bits):
    """Round float32 to one of the two nearest bfloat16, by chance so that the mean is x.

    A bfloat16 is the upper half of a float32's bits. The lower half, out of 65,536, is how far x is
    on the way from the bfloat16 below it in magnitude to the one above. Added to uniform bits, it
    carries into the upper half with just this probability. Infinities have a lower half of 0, so
    they stay; a NaN could be carried into another number, so it is left out.
    Source: arXiv:2010.06192, which trains in bfloat16 with stochastic rounding.

    x     float32
    bits  int32 of x's shape, uniform over 0 .. 65,535"""
    sums = x.view(torch.int32) + bits
    rounded = (sums >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), rounded)


def draw_bits(counter, count, device):
    """32 random bits for each of the numbers counter, counter + 1, ..: (count,) int32.

    A hash of the numbers, which are taken modulo 2^32: lowbias32 of
    https://github.com/skeeto/hash-prospector. Products wrap around, as they should."""
    h = torch.arange(count, dtype=torch.int32, device=device) + counter
    h = (h ^ shift_right(h, 16)) * wrap_int32(0x7FEB352D)
    h = (h ^ shift_right(h, 15)) * wrap_int32(0x846CA68B)
    return h ^ shift_right(h, 16)


def shift_right(x, bits):
    """A right shift of int32 that fills with zeros."""
    return (x >> bits) & (2 ** (32 - bits) - 1)


def wrap_int32(number):
    """The int32 with the lowest 32 bits of a whole number."""
    return (number + 2**31) % 2**32 - 2**31


# ---- a step ----


def learning_rate_at(step, steps, peak, schedule, warmup_ratio):
    """The learning rate of step 0 .. steps - 1: it rises from 0, then follows the schedule."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak


def guarded_step(model, optimizer, lr, grad_clip, where=""):
    """Clip the gradients to norm `grad_clip` (0: do not), update the weights, clear the gradients.

    If the norm is not finite, the model is not updated on any rank, and a warning names the
    tensors. A model without gradients stays as it is.

    where  what the warning calls the step
    Returns the norm before clipping."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = parallel.gradient_norm(parameters).item()
    if math.isfinite(norm):
        if grad_clip > 0 and norm > grad_clip:
            torch._foreach_mul_([p.grad for p in parameters], grad_clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        warn_of_gradients(model, where)
    optimizer.zero_grad(set_to_none=True)
    return norm


def warn_of_gradients(model, where):
    """Print which tensors of this rank have a gradient that is not finite."""
    names = []
    for name, p in model.named_parameters():
        if p.grad is not None and not torch.isfinite(parallel.local_part(p.grad)).all():
            names.append(name)
    shown = ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
    print(
        f"warning: {where}, rank {parallel.rank()}: the gradient is not finite in "
        f"{shown or 'no tensor of this rank'}; the update is skipped",
        flush=True,
    )


def count_skips(skips, limit, *norms):
    """Skipped updates so far, those among `norms` included. Stops the run above `limit`."""
    skips += sum(not math.isfinite(norm) for norm in norms)
    if skips > limit:
        stop(
            f"{skips} updates had a non-finite gradient: lower the learning rate, or look for bad "
            "data"
        )
    return skips


@torch.no_grad()
def update_ema(average, model, decay):
    """Move an average of a model's weights: average <- decay * average + (1 - decay) * model."""
    averages = parallel.named_local_parameters(average)
    weights = parallel.named_local_parameters(model)
    for (_, a), (_, w) in zip(averages, weights):
        parallel.local_part(a.data).lerp_(parallel.local_part(w.data), 1 - decay)
