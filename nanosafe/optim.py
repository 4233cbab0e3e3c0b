"""AdamW, learning-rate schedules, and an optimizer step that skips non-finite gradients."""

import math

import torch

from nanosafe import parallel
from nanosafe.errors import stop

SCHEDULES = ("cosine", "linear", "constant")


def make_adamw(model, weight_decay, beta1, beta2):
    """AdamW (arXiv:1711.05101) that decays matrices only, not norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=1e-8, fused=True)


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
