"""The only file that names an attention kernel.

The tokens of a forward come in one of two layouts. A `PackedBatch` holds whole sequences laid end
to end: training, scoring, and the prefill of prompts. A `DecodeBatch` holds one new token for each
of n cached sequences: decoding. Both have attend(q, k, v, cache), which lets each query see the
keys of its own sequence up to its own position. layouts_of_layers() adds what LLaMA does not have:
sliding windows, which may differ by layer, and ALiBi.

Shapes: N packed tokens, B sequences, L length of the longest, H heads, K kv heads, E head width,
S cache slots, T cached positions, n rows that are decoded."""

import inspect
import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

if torch.cuda.is_available():  # FlashAttention-2 for packed sequences; its import costs time
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters

# torch would take cuDNN's kernel on an H100 and later. With it some versions of torch compute
# something else for grouped heads or masks (pytorch issues 193893 and 196678); without it every
# card runs the same kernels.
torch.backends.cuda.enable_cudnn_sdp(False)


class Cache(NamedTuple):
    """Keys and values of one layer."""

    k: torch.Tensor  # (S, K, T, E)
    v: torch.Tensor  # (S, K, T, E)


class PackedBatch(NamedTuple):
    """Sequences laid end to end."""

    cu_seqlens: torch.Tensor  # (B+1,) int32: where each sequence begins, and N at the end
    max_seqlen: int  # L
    positions: torch.Tensor  # (N,) position of each token in its sequence
    rows: torch.Tensor  # (N,) the sequence that each token belongs to
    slots: Optional[torch.Tensor] = None  # (B,) cache slot of each sequence, for prefill
    window: int = 0  # how many keys a query sees, its own included; 0: all before it
    mask: Optional[torch.Tensor] = None  # (L, L) or (H, L, L), where causality is not enough

    def text_lengths(self):
        """How long the sequence of each token is (N,)."""
        return self.cu_seqlens.diff().long()[self.rows]

    def attend(self, q, k, v, cache):
        """q (N, H, E), k and v (N, K, E) -> (N, H, E)."""
        if cache is not None:
            slots = self.slots[self.rows]
            cache.k[slots, :, self.positions] = k
            cache.v[slots, :, self.positions] = v
        if has_packed_kernel(q, q.shape[-1]) and self.mask is None:
            return self.attend_packed(q, k, v)
        return self.attend_padded(q, k, v)

    def attend_packed(self, q, k, v):
        """FlashAttention-2 on the packed tokens as they are."""
        options = {}
        if k.shape[1] != q.shape[1]:
            if "enable_gqa" in VARLEN_OPTIONS:  # torch 2.12
                options["enable_gqa"] = True
            else:
                k, v = repeat_heads(k, q), repeat_heads(v, q)
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

    def attend_padded(self, q, k, v):
        """torch's kernel on right-padded sequences (B, L). Causality hides the padding."""
        B, L = len(self.cu_seqlens) - 1, self.max_seqlen
        N, H, E = q.shape
        k, v = repeat_heads(k, q), repeat_heads(v, q)
        has_padding = N != B * L
        if has_padding:
            source = self.find_padded_rows()
            q = q.index_select(0, source)
            k = k.index_select(0, source)
            v = v.index_select(0, source)
        q = q.view(B, L, H, E).transpose(1, 2)  # (B, H, L, E)
        k = k.view(B, L, H, E).transpose(1, 2)
        v = v.view(B, L, H, E).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None)
        out = out.transpose(1, 2).reshape(B * L, H, E)
        if has_padding:
            out = out.index_select(0, self.rows * L + self.positions)
        return out

    def find_padded_rows(self):
        """Which packed token stands at each padded position (B * L,).

        Padding repeats the sequence's last token; causality hides it."""
        begins = self.cu_seqlens[:-1, None].long()
        ends = self.cu_seqlens[1:, None].long()
        columns = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return torch.minimum(begins + columns, ends - 1).flatten()


class RowGroup(NamedTuple):
    """Rows of the cache that are decoded together, reading `extent` cached positions each."""

    rows: slice
    mask: torch.Tensor  # (rows, 1, 1, extent) whether the new token sees a slot's key, or a bias


class DecodeBatch(NamedTuple):
    """One new token for each of the first n cache slots."""

    positions: torch.Tensor  # (n,) position of the new token in its sequence
    rows: torch.Tensor  # (n,) 0 .. n-1
    groups: list  # of RowGroup, which together cover all n rows

    def text_lengths(self):
        """How long each sequence is (n,), its new token included."""
        return self.positions + 1

    def attend(self, q, k, v, cache):
        """q (n, H, E), k and v (n, K, E) -> (n, H, E)."""
        n, H, E = q.shape
        K = k.shape[1]
        cache.k[self.rows, :, self.positions] = k
        cache.v[self.rows, :, self.positions] = v
        # The H / K heads that share a kv head become H / K queries of it, so no key is repeated.
        q = q.reshape(n, K, H // K, E)
        outputs = []
        for rows, mask in self.groups:  # on a GPU one group of all rows
            extent = mask.shape[-1]
            keys = cache.k[rows, :, :extent]
            values = cache.v[rows, :, :extent]
            out = F.scaled_dot_product_attention(q[rows], keys, values, attn_mask=mask)
            outputs.append(out)
        out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return out.view(n, H, E)


def pack(cu_seqlens, max_seqlen, n_tokens, slots=None):
    """The PackedBatch of sequences that begin at cu_seqlens (B+1,)."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequences = torch.arange(len(lengths), device=lengths.device)
    rows = torch.repeat_interleave(sequences, lengths, output_size=n_tokens)
    positions = torch.arange(n_tokens, device=lengths.device) - cu_seqlens.long()[rows]
    return PackedBatch(cu_seqlens, max_seqlen, positions, rows, slots)


def has_packed_kernel(x, head_width):
    """Whether FlashAttention-2 takes packed heads of this width of x's dtype, on x's device."""
    half_precision = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half_precision and head_width % 8 == 0 and head_width <= 256


def attention_dtype(x):
    """What attention is computed in. A CPU's kernel is slow in bfloat16, its backward far more."""
    return x.dtype if x.is_cuda else torch.float32


def repeat_heads(x, q):
    """Keys or values (N, K, E), each head repeated for the heads of q (N, H, E) that share it."""
    repeats = q.shape[1] // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


# ---- sliding windows and ALiBi ----


def layouts_of_layers(layout, windows, config, x):
    """The layout of each layer, with its window; x (N, D) has the device and the dtype."""
    by_window = {}
    for window in windows:
        if window not in by_window:
            by_window[window] = add_window_and_alibi(layout, window, config, x)
    return [by_window[window] for window in windows]


def add_window_and_alibi(layout, window, config, x):
    """The layout with a layer's window, and with ALiBi where the model has it."""
    slopes = None
    if config.alibi:
        slopes = alibi_slopes(config.num_attention_heads, x.device)  # (H,)
    if isinstance(layout, DecodeBatch):
        return add_to_decode_batch(layout, window, config, slopes, attention_dtype(x))
    if not window and not config.alibi:
        return layout
    return add_to_packed_batch(layout, window, config, slopes, x)


def add_to_decode_batch(layout, window, config, slopes, dtype):
    """The DecodeBatch whose groups have biases: of the mask, with the window, or ALiBi's.

    The kernel adds a bias. It would make one of a bool in every layer."""
    groups = []
    for rows, mask in layout.groups:
        if not window and not config.alibi:
            groups.append(RowGroup(rows, bias_of_mask(mask, dtype)))
            continue
        keys = torch.arange(mask.shape[-1], device=mask.device)
        distance = layout.positions[rows, None, None] - keys
        mask = attention_mask(distance, window, slopes, dtype)
        if config.alibi:  # one bias per head, laid out as the queries are: (rows, K, H / K, extent)
            mask = mask.view(len(mask), config.num_key_value_heads, -1, len(keys))
        else:
            mask = bias_of_mask(mask, dtype)[:, None]
        groups.append(RowGroup(rows, mask))
    return layout._replace(groups=groups)


def add_to_packed_batch(layout, window, config, slopes, x):
    """The PackedBatch with its window, and with a mask where the kernel does not know windows."""
    layout = layout._replace(window=window)
    window_is_wide = window >= layout.max_seqlen
    kernel_knows_windows = has_packed_kernel(x, config.head_dim)
    if not config.alibi and (window_is_wide or kernel_knows_windows):
        return layout
    positions = torch.arange(layout.max_seqlen, dtype=torch.int32, device=x.device)
    distance = positions[:, None] - positions
    return layout._replace(mask=attention_mask(distance, window, slopes, attention_dtype(x)))


def attention_mask(distance, window, slopes, dtype):
    """Which keys a query sees, or what ALiBi (arXiv:2108.12409) adds to the logits.

    distance  (.., queries, keys): how many positions a key lies behind its query
    window    keys that a query sees, its own included; 0: all before it
    slopes    (H,) or None

    Without slopes a bool of distance's shape; with them a bias of `dtype`, which also has heads."""
    seen = distance >= 0
    if window:
        seen = seen & (distance < window)
    if slopes is None:
        return seen
    if distance.dim() == 2:
        bias = -slopes[:, None, None] * distance  # (H, L, L)
    else:
        bias = -slopes[:, None] * distance  # (rows, H, extent)
    return bias.masked_fill_(~seen, float("-inf")).to(dtype)


def bias_of_mask(seen, dtype):
    """What is added to the logits: 0 where a query sees a key, and -inf where it does not."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def alibi_slopes(heads, device=None):
    """ALiBi's slopes (H,) float32: 2^(-8 i / P) for P, the largest power of two up to H, and the
    steps between them for the other heads."""
    P = 2 ** int(math.log2(heads))
    count = torch.arange(1, heads + 1, device=device)
    return torch.exp2(-8 / P * torch.where(count <= P, count, count - P - 0.5))
