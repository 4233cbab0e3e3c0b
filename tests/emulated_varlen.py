"""A kernel on the CPU for varlen_attn, the operator of packed attention on a GPU.

torch defines varlen_attn as a custom operator with a kernel for GPUs only. Here it gets one for the
CPU, so that tracing, autograd, FSDP2 and checkpointing see in a test what they see on a GPU. It
refuses what the GPU's kernel refuses. Its numbers are rounded where FlashAttention-2 rounds, to
the operands' type before each product; they are not the GPU's bit by bit.

Shapes: N packed tokens, H heads, K kv heads, E head width; n tokens of one sequence."""

import inspect
import math

import torch
import torch.nn.attention.varlen as varlen

from nanosafe import attention

HALF_PRECISION = (torch.bfloat16, torch.float16)
LARGEST_WIDTH = 256  # of a head, and a multiple of 8


def emulate_gpu_attention(monkeypatch):
    """Let packed sequences in half precision take varlen_attn on the CPU, during one test."""
    pad = attention.PackedBatch.attend_padded

    def attend(layout, q, k, v):
        if q.dtype in HALF_PRECISION and layout.mask is None:
            return layout.attend_packed(q, k, v)
        return pad(layout, q, k, v)

    options = inspect.signature(varlen.varlen_attn).parameters
    monkeypatch.setattr(attention, "varlen_attn", varlen.varlen_attn, raising=False)
    monkeypatch.setattr(attention, "VARLEN_OPTIONS", options, raising=False)
    monkeypatch.setattr(attention, "attention_dtype", lambda x: x.dtype)
    monkeypatch.setattr(attention.PackedBatch, "attend_padded", attend)


@varlen._varlen_attn.register_kernel("cpu")
def compute_attention(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal=False,
    scale=None,
    window_size=None,
    *later_options,
):
    """query (N, H, E), key and value (N, K, E) -> (N, H, E), log-sums (H, N), a random state."""
    check_operands(query, key, value, cu_seq_q, max_q)
    out = torch.empty_like(query)
    log_sums = torch.empty(query.shape[1], len(query))
    for tokens in spans_of_sequences(cu_seq_q):
        v = heads_first(value[tokens], query)
        logits = compute_logits(query[tokens], key[tokens], window_size)
        log_sums[:, tokens] = logits.logsumexp(-1)
        probs = round_to(logits.softmax(-1), query)
        out[tokens] = (probs @ v).transpose(0, 1).to(query.dtype)
    return out, log_sums, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def compute_gradients(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal,
    rng_state,
    scale=None,
    window_size=None,
):
    """The gradients of query, key and value."""
    dquery = torch.empty_like(query)
    dkey = torch.empty_like(key)
    dvalue = torch.empty_like(value)
    for tokens in spans_of_sequences(cu_seq_q):
        q = heads_first(query[tokens], query)
        k = heads_first(key[tokens], query)
        v = heads_first(value[tokens], query)
        dout = heads_first(grad_out[tokens], query)
        logits = compute_logits(query[tokens], key[tokens], window_size)
        probs = (logits - lse[:, tokens, None]).exp()
        dprobs = dout @ v.mT
        row_sums = (dout * heads_first(out[tokens], query)).sum(-1, keepdim=True)
        dlogits = probs * (dprobs - row_sums) / math.sqrt(query.shape[-1])
        dlogits = round_to(dlogits, query)
        dquery[tokens] = (dlogits @ k).transpose(0, 1).to(query.dtype)
        dkey[tokens] = sum_shared_heads(dlogits.mT @ q, key)
        dvalue[tokens] = sum_shared_heads(round_to(probs, query).mT @ dout, value)
    return dquery, dkey, dvalue


def check_operands(query, key, value, cu_seqlens, longest):
    """Refuse what FlashAttention-2 refuses."""
    width = query.shape[-1]
    if width % 8 or width > LARGEST_WIDTH:
        raise RuntimeError(f"head_size {width} must be a multiple of 8, and at most 256")
    for x in (query, key, value):
        if x.dtype not in HALF_PRECISION or x.stride(-1) != 1:
            raise RuntimeError("half precision and a contiguous last dimension are needed")
    if cu_seqlens.dtype != torch.int32:
        raise RuntimeError("cu_seqlens must be int32")
    if cu_seqlens.diff().max() > longest:
        raise RuntimeError("a sequence is longer than max_q")


def spans_of_sequences(cu_seqlens):
    """The slice of the packed tokens of each sequence."""
    ends = cu_seqlens.tolist()
    return [slice(begin, end) for begin, end in zip(ends, ends[1:])]


def heads_first(x, query):
    """x (n, K or H, E) -> (H, n, E) in float32; a kv head is repeated for those that share it."""
    repeats = query.shape[1] // x.shape[1]
    return x.float().repeat_interleave(repeats, dim=1).transpose(0, 1)


def sum_shared_heads(gradient, x):
    """gradient (H, n, E) of repeated heads -> that of x's own heads (n, K, E)."""
    n, E = gradient.shape[1:]
    by_head = gradient.transpose(0, 1).reshape(n, x.shape[1], -1, E)
    return by_head.sum(2).to(x.dtype)


def compute_logits(query, key, window_size):
    """The scaled logits (H, n, n) of one sequence, -inf where a query does not see a key."""
    q = heads_first(query, query)
    k = heads_first(key, query)
    logits = (q @ k.mT) / math.sqrt(query.shape[-1])
    left, right = window_size  # how many keys before and after its own a query sees; -1: all
    positions = torch.arange(len(query))
    distance = positions[:, None] - positions
    is_hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        is_hidden |= distance > left
    if right >= 0:
        is_hidden |= distance < -right
    return logits.masked_fill(is_hidden, -math.inf)


def round_to(x, like):
    """x in float32, with the digits that the type of `like` has."""
    return x.to(like.dtype).float()
