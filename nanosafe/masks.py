"""
What a query sees, in the models where that is not all that came before: sliding windows (Mistral)
and ALiBi (Baichuan-13B).
"""

import math

import torch

from nanosafe.attention import Step


def limit(seqs, config, x):
    """An attention.Packed or attention.Step with what a model's config asks for, for hidden states
    x (N, D): their device and dtype."""
    window, kv = config.sliding_window, config.num_key_value_heads
    slopes = alibi_slopes(config.num_attention_heads, x.device) if config.alibi else None  # (H,)
    if isinstance(seqs, Step):
        n, extent = len(seqs.positions), seqs.mask.shape[-1]
        back = seqs.positions[:, None] - torch.arange(extent, device=x.device)
        mask = visible(back[:, None], window, slopes, x.dtype)  # (n, 1 or H, extent)
        # A bool (n, 1, 1, extent), or what is added to the logits (n, K, H / K, extent).
        return seqs._replace(mask=mask.view(n, kv, -1, extent) if config.alibi else mask[:, None])
    seqs = seqs._replace(window=window)
    if not config.alibi and (window >= seqs.max_seqlen or x.is_cuda and x.dtype != torch.float32):
        return seqs  # nothing to hide, or the kernel knows windows
    places = torch.arange(seqs.max_seqlen, dtype=torch.int32, device=x.device)
    return seqs._replace(mask=visible(places[:, None] - places, window, slopes, x.dtype))


def visible(back, window, slopes, dtype):
    """The mask of keys that are `back` (.., queries, keys) positions behind their query: True where
    it sees them. With slopes (H,), what is added to a head's logits, in `dtype`: ALiBi
    (arXiv:2108.12409)."""
    seen = (back >= 0) & (back < window) if window else back >= 0
    if slopes is None:
        return seen
    fall = -slopes[:, None, None] * back if back.dim() == 2 else -slopes[:, None] * back
    return fall.masked_fill_(~seen, float("-inf")).to(dtype)


def alibi_slopes(heads, device=None):
    """ALiBi's slope of each head (H,) float32: 2^(-8 i / P) for the power of two P below, and
    between these for the heads beyond P."""
    P = 2**int(math.log2(heads))
    count = torch.arange(1, heads + 1, device=device)
    return torch.exp2(-8 / P * torch.where(count <= P, count, count - P - 0.5))
