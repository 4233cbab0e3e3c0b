"""
What a query sees, in the models where that is not all that came before: sliding windows (Mistral)
and ALiBi (Baichuan-13B).
"""

import math

import torch


def limit(seqs, config):
    """An attention.Packed or attention.Step with the mask that a model's config asks for."""
    device, window = seqs.rows.device, config.sliding_window
    slopes = alibi_slopes(config.num_attention_heads, device) if config.alibi else None
    if hasattr(seqs, "cu_seqlens"):
        if window < seqs.max_seqlen or config.alibi:
            places = torch.arange(seqs.max_seqlen, device=device)
            mask = visible(places[:, None] - places, window, slopes)  # (L, L) or (H, L, L)
            return seqs._replace(window=window, mask=mask)
        return seqs
    back = seqs.positions[:, None] - torch.arange(seqs.mask.shape[-1], device=device)
    return seqs._replace(mask=visible(back[:, None], window, slopes))  # (n, 1 or H, extent)


def visible(back, window, slopes):
    """The mask of keys that are `back` (.., queries, keys) positions behind their query: True where
    it sees them. With slopes (H,), in float32, what is added to a head's logits: ALiBi
    (arXiv:2108.12409)."""
    seen = (back >= 0) & (back < window) if window else back >= 0
    if slopes is None:
        return seen
    fall = -slopes[:, None, None] * back if back.dim() == 2 else -slopes[:, None] * back
    return fall.masked_fill(~seen, float("-inf"))


def alibi_slopes(heads, device=None):
    """ALiBi's slope of each head (H,) float32: 2^(-8 i / P) for the power of two P below, and
    between these for the heads beyond P."""
    P = 2**int(math.log2(heads))
    count = torch.arange(1, heads + 1, device=device)
    return torch.exp2(-8 / P * torch.where(count <= P, count, count - P - 0.5))
