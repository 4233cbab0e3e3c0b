"""The only file that knows an attention kernel's name.

A batch is a `Packed` (whole sequences laid end to end: training, scoring, prefill) or a `Step` (one
new token for each of n cached sequences: decoding). Both know how their queries meet their keys:
.attend(q, k, v, cache). limit() adds what LLaMA has not: sliding windows and ALiBi.

Shapes: N packed tokens, B sequences, H heads, K kv heads, E head width, S cache slots, T cached."""

import inspect
import math
from typing import NamedTuple, Optional
import torch
import torch.nn.functional as F

if torch.cuda.is_available():  # FlashAttention-2, packed; elsewhere its import is time lost
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters


class PackedBatch(NamedTuple):
    """Sequences laid end to end, each of which sees itself only, and only backwards."""

    cu_seqlens: torch.Tensor  # (B+1,) int32: where each sequence begins, and N at the end
    max_seqlen: int  # length of the longest
    positions: torch.Tensor  # (N,) position of each token in its sequence
    rows: torch.Tensor  # (N,) the sequence each token belongs to
    slots: Optional[torch.Tensor] = None  # (B,) cache slot of each sequence, for prefill
    window: int = 0  # how many keys a query sees, its own among them; 0: all
    mask: Optional[torch.Tensor] = None  # (L, L) or (H, L, L), where causality is not all there is

    def attend(self, q, k, v, cache):
        """q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
        if cache is not None:
            slots = self.slots[self.rows]
            cache.k[slots, :, self.positions] = k
            cache.v[slots, :, self.positions] = v
        flash = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and self.mask is None
        return self.varlen(q, k, v) if flash else self.padded(q, k, v)

    def varlen(self, q, k, v):
        options = {}
        if k.shape[1] != q.shape[1]:
            if "enable_gqa" in VARLEN_OPTIONS:  # torch 2.12
                options["enable_gqa"] = True
            else:
                k, v = repeat_heads(q, k, v)
        return varlen_attn(
            q,
            k,
            v,
            self.cu_seqlens,
            self.cu_seqlens,
            self.max_seqlen,
            self.max_seqlen,
            window_size=(self.window - 1, 0),
            **options,
        )

    def padded(self, q, k, v):
        """Right-padded SDPA. Causality alone needs no mask: no row looks to its right."""
        B, L = len(self.cu_seqlens) - 1, self.max_seqlen
        k, v = repeat_heads(q, k, v)
        N, H, E = q.shape
        ragged = N != B * L
        if ragged:  # what fills a row up is its last token again: nobody looks there
            begins, ends = self.cu_seqlens[:-1, None].long(), self.cu_seqlens[1:, None].long()
            source = torch.minimum(begins + torch.arange(L, device=q.device), ends - 1).flatten()
            q, k, v = (x.index_select(0, source) for x in (q, k, v))
        q, k, v = (x.view(B, L, H, E).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None)
        out = out.transpose(1, 2).reshape(B * L, H, E)
        return out.index_select(0, self.rows * L + self.positions) if ragged else out


class DecodeBatch(NamedTuple):
    """One new token for each of the first n cache slots."""

    positions: torch.Tensor  # (n,) position of the new token in its sequence
    rows: torch.Tensor  # (n,) 0 .. n-1
    groups: list  # [(slice of rows, (rows, 1, 1, extent): whether a token sees a slot's key)]

    def attend(self, q, k, v, cache):
        """q (n, H, E), k and v (n, K, E) -> (n, H, E)."""
        (n, H, E), K = q.shape, k.shape[1]
        cache.k[self.rows, :, self.positions] = k
        cache.v[self.rows, :, self.positions] = v
        # The heads of a group share their keys: laid out as that many queries, none is repeated.
        q = q.reshape(n, K, H // K, E)
        out = [
            F.scaled_dot_product_attention(
                q[rows],
                cache.k[rows, :, : mask.shape[-1]],
                cache.v[rows, :, : mask.shape[-1]],
                attn_mask=mask,
            )
            for rows, mask in self.groups
        ]
        return torch.cat(out).view(n, H, E)


class Cache(NamedTuple):
    """Keys and values of one layer."""

    k: torch.Tensor  # (S, K, T, E)
    v: torch.Tensor


def pack(cu_seqlens, max_seqlen, n_tokens, slots=None):
    """The `Packed` of sequences that begin at cu_seqlens (B+1,)."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    rows = torch.repeat_interleave(
        torch.arange(len(lengths), device=lengths.device), lengths, output_size=n_tokens
    )
    positions = torch.arange(n_tokens, device=lengths.device) - cu_seqlens.long()[rows]
    return PackedBatch(cu_seqlens, max_seqlen, positions, rows, slots)


def attention_dtype(x):
    """What attention is computed in: a CPU's kernel is slower in bfloat16, backward many times."""
    return x.dtype if x.is_cuda else torch.float32


def repeat_heads(q, k, v):
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (x.repeat_interleave(groups, dim=1) for x in (k, v))


def add_window_and_alibi(seqs, config, x):
    """A Packed or Step with what a model's config asks for; x (N, D) has its device and dtype."""
    window, kv = config.sliding_window, config.num_key_value_heads
    slopes = alibi_slopes(config.num_attention_heads, x.device) if config.alibi else None  # (H,)
    if isinstance(seqs, DecodeBatch):
        groups = []
        for rows, mask in seqs.groups:
            places = torch.arange(mask.shape[-1], device=x.device)
            mask = attention_mask(
                seqs.positions[rows, None, None] - places, window, slopes, attention_dtype(x)
            )
            # A bool (n, 1, 1, extent), or what is added to the logits (n, K, H / K, extent).
            groups.append(
                (rows, mask.view(len(mask), kv, -1, len(places)) if config.alibi else mask[:, None])
            )
        return seqs._replace(groups=groups)
    seqs = seqs._replace(window=window)
    if not config.alibi and (window >= seqs.max_seqlen or x.is_cuda and x.dtype != torch.float32):
        return seqs  # nothing to hide, or the kernel knows windows
    places = torch.arange(seqs.max_seqlen, dtype=torch.int32, device=x.device)
    return seqs._replace(
        mask=attention_mask(places[:, None] - places, window, slopes, attention_dtype(x))
    )


def attention_mask(back, window, slopes, dtype):
    """The mask of keys that are `back` (.., queries, keys) positions behind their query: True where
    it sees them. With slopes (H,), what ALiBi (arXiv:2108.12409) adds to a head's logits."""
    seen = (back >= 0) & (back < window) if window else back >= 0
    if slopes is None:
        return seen
    fall = -slopes[:, None, None] * back if back.dim() == 2 else -slopes[:, None] * back
    return fall.masked_fill_(~seen, float("-inf")).to(dtype)


def alibi_slopes(heads, device=None):
    """ALiBi's slopes (H,) float32: 2^(-8 i / P) for the power of two P below, others between."""
    P = 2 ** int(math.log2(heads))
    count = torch.arange(1, heads + 1, device=device)
    return torch.exp2(-8 / P * torch.where(count <= P, count, count - P - 0.5))
