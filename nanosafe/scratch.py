"""
Weights to begin from, where there is no checkpoint.
"""

import math
import zlib

import torch

from nanosafe import parallel
from nanosafe.checkpoint import build


def scratch(config, head="lm", seed=0, place=None):
    """A LLaMA with random weights, the same for every layout.

    N(0, initializer_range); outputs into the residual stream are scaled by depth, as in GPT-2.
    """
    model = build(config, head, place or parallel.Place(torch.device("cpu")), torch.float32)
    for name, p in parallel.parameters(model):
        draw(model, name, p, seed)
    return model


@torch.no_grad()
def draw(model, name, p, seed):
    """Initialise this rank's rows of a parameter from a generator of the parameter's own, so that
    no layout changes them."""
    rows, start, count, _ = parallel.local_rows(p)
    if name.endswith("norm.weight"):
        rows.fill_(1.0)
    elif name.endswith(".bias"):
        rows.zero_()
    else:
        std = model.config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * model.config.num_hidden_layers)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        rows.copy_(torch.normal(0.0, std, p.shape, generator=generator)[start:start + count])
