"""How a model is moved: AdamW, the learning rate's course, and one guarded step."""

import math
import torch
from nanosafe import parallel

SCHEDULES = ("cosine", "linear", "constant")


def make_adamw(model, weight_decay, beta1, beta2):
    """AdamW (arXiv:1711.05101) with decay on matrices only, not on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=1e-8, fused=True)


def learning_rate_at(step, steps, peak, schedule, warmup_ratio):
    """The learning rate of step 0 .. steps - 1: up from 0 over the warm-up, then as scheduled."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return peak * fall[schedule]


def guarded_step(model, optimizer, lr, grad_clip, where=""):
    """Clip the gradients to norm `grad_clip` (0: do not), move the weights, clear the gradients.
    Returns the norm before clipping. If it is not finite no rank moves, and a line says `where`."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = parallel.gradient_norm(parameters).item()
    if math.isfinite(norm):
        if grad_clip > 0 and norm > grad_clip:
            torch._foreach_mul_([p.grad for p in parameters], grad_clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        bad = [
            name
            for name, p in model.named_parameters()
            if p.grad is not None and not torch.isfinite(parallel.local_part(p.grad)).all()
        ]
        names = ", ".join(bad[:3]) + (" and more" if len(bad) > 3 else "")
        print(
            f"warning: {where}, rank {parallel.rank()}: the gradient is not finite in "
            f"{names or 'no tensor of this rank'}; the update is skipped",
            flush=True,
        )
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def update_ema(average, model, decay):
    """Move a model's moving average: average <- decay * average + (1 - decay) * model."""
    for (_, a), (_, p) in zip(
        parallel.named_local_parameters(average), parallel.named_local_parameters(model)
    ):
        parallel.local_part(a.data).lerp_(parallel.local_part(p.data), 1 - decay)


def count_skips(skips, limit, *norms):
    """Updates skipped so far, with those of the last `norms`; stops the run above `limit`."""
    skips += sum(not math.isfinite(norm) for norm in norms)
    if skips > limit:
        raise SystemExit(
            f"error: {skips} updates had a non-finite gradient: lower the learning "
            "rate, or look for bad data"
        )
    return skips
