"""Attention over packed sequences and over the cache, against the plain definition; kernels on a GPU."""

import pytest
import torch

from nanosafe import attention

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inputs(lengths, H=4, K=2, E=16, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    N = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    q, k, v = (torch.randn(N, heads, E, generator=g).to(device, dtype) for heads in (H, K, K))
    return q, k, v, attention.pack(cu_seqlens, max(lengths), N)


def plain(q, k, v, lengths):
    """softmax(q k / sqrt(E)) v of each sequence and head, one query at a time."""
    out, start = torch.zeros_like(q), 0
    groups = q.shape[1] // k.shape[1]
    for n in lengths:
        for t in range(n):
            for h in range(q.shape[1]):
                keys = k[start:start + t + 1, h // groups]
                weights = (keys @ q[start + t, h] / q.shape[2]**0.5).softmax(0)
                out[start + t, h] = weights @ v[start:start + t + 1, h // groups]
        start += n
    return out


@pytest.mark.parametrize("lengths", [[5], [4, 4], [3, 7, 1]])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_packed_equals_the_definition(lengths, K):
    q, k, v, seqs = inputs(lengths, K=K)
    assert torch.allclose(seqs.attend(q, k, v, None), plain(q, k, v, lengths), atol=1e-5)


def test_positions_restart_in_every_sequence():
    seqs = inputs([3, 1, 2])[3]
    assert seqs.positions.tolist() == [0, 1, 2, 0, 0, 1] and seqs.rows.tolist() == [0, 0, 0, 1, 2, 2]


def test_a_step_over_the_cache_equals_the_packed_sequence():
    lengths = [6, 3]
    q, k, v, seqs = inputs(lengths)
    whole = seqs.attend(q, k, v, None)
    cache = attention.Cache(torch.zeros(4, 2, 8, 16), torch.zeros(4, 2, 8, 16))
    first = torch.cat([torch.arange(5), torch.arange(6, 8)])  # all but the last token of each
    head = attention.pack(torch.tensor([0, 5, 7], dtype=torch.int32), 5, 7, slots=torch.tensor([0, 1]))
    head.attend(q[first], k[first], v[first], cache)
    last, positions = torch.tensor([5, 8]), torch.tensor([5, 2])
    mask = (torch.arange(8) <= positions[:, None])[:, None]
    step = attention.Step(positions, mask, torch.arange(2))
    assert torch.allclose(step.attend(q[last], k[last], v[last], cache), whole[last], atol=1e-6)


@gpu
@needs_gpu
@pytest.mark.parametrize("K", [2, 4])
def test_varlen_equals_the_padded_path_forward_and_backward(K):
    results = []
    for path in ("varlen", "padded"):
        q, k, v, seqs = inputs([300, 77, 512], K=K, E=64, device="cuda", dtype=torch.bfloat16)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = getattr(seqs, path)(*leaves)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results):
        assert (a.float() - b.float()).abs().max() < 0.05 * b.float().abs().max()
