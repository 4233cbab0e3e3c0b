"""Attention over packed sequences and over the cache, against the plain definition; kernels on a GPU."""

import inspect

import pytest
import torch
from conftest import small_config
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from nanosafe import attention
from nanosafe.model import LLaMA

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
                keys = k[start : start + t + 1, h // groups]
                weights = (keys @ q[start + t, h] / q.shape[2] ** 0.5).softmax(0)
                out[start + t, h] = weights @ v[start : start + t + 1, h // groups]
        start += n
    return out


@pytest.mark.parametrize("lengths", [[5], [4, 4], [3, 7, 1]])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_packed_equals_the_definition(lengths, K):
    q, k, v, seqs = inputs(lengths, K=K)
    assert torch.allclose(seqs.attend(q, k, v, None), plain(q, k, v, lengths), atol=1e-5)


def test_positions_restart_in_every_sequence():
    seqs = inputs([3, 1, 2])[3]
    assert seqs.positions.tolist() == [0, 1, 2, 0, 0, 1] and seqs.rows.tolist() == [
        0,
        0,
        0,
        1,
        2,
        2,
    ]


def test_on_a_cpu_attention_is_float32_whatever_the_rest_is():
    """Its kernel is slower in bfloat16, backward many times: keys and values are kept as they are used."""
    from nanosafe.model import LLaMA
    from nanosafe.rollout import Engine

    torch.manual_seed(0)
    model, cu_seqlens = LLaMA(small_config()), torch.tensor([0, 7, 19], dtype=torch.int32)
    tokens = torch.randint(3, model.config.vocab_size, (19,))
    expected = model(tokens, cu_seqlens, 12)
    half = LLaMA(small_config()).bfloat16()
    half.load_state_dict(model.state_dict())
    seen, real = [], torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, *a, **k: seen.append(q.dtype) or real(q, *a, **k),
        )
        logits = half(tokens, cu_seqlens, 12)
    logits.float().sum().backward()
    assert set(seen) == {torch.float32} and logits.dtype == torch.bfloat16
    assert torch.allclose(logits.float(), expected, atol=0.05 * expected.abs().max().item())
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())
    engine = Engine(half, 0, 2, 20, (1.0, 0, 1.0, ()))
    assert {x.dtype for cache in engine.caches for x in cache} == {torch.float32}


def test_a_step_over_the_cache_equals_the_packed_sequence():
    lengths = [6, 3]
    q, k, v, seqs = inputs(lengths)
    whole = seqs.attend(q, k, v, None)
    cache = attention.Cache(torch.zeros(4, 2, 8, 16), torch.zeros(4, 2, 8, 16))
    first = torch.cat([torch.arange(5), torch.arange(6, 8)])  # all but the last token of each
    head = attention.pack(
        torch.tensor([0, 5, 7], dtype=torch.int32), 5, 7, slots=torch.tensor([0, 1])
    )
    head.attend(q[first], k[first], v[first], cache)
    last, positions = torch.tensor([5, 8]), torch.tensor([5, 2])
    mask = (torch.arange(8) <= positions[:, None])[:, None, None]
    for groups in (
        [(slice(0, 2), mask)],
        [(slice(0, 1), mask[:1, ..., :6]), (slice(1, 2), mask[1:, ..., :3])],
    ):
        step = attention.DecodeBatch(positions, torch.arange(2), groups)
        assert torch.allclose(step.attend(q[last], k[last], v[last], cache), whole[last], atol=1e-6)


def test_a_step_reads_no_further_than_it_says():
    lengths = [6, 3]
    q, k, v, seqs = inputs(lengths)
    cache = attention.Cache(
        torch.full((2, 2, 8, 16), torch.nan), torch.full((2, 2, 8, 16), torch.nan)
    )
    whole = seqs.attend(q, k, v, None)
    seqs._replace(slots=torch.arange(2)).attend(q, k, v, cache)
    last, positions = torch.tensor([5, 8]), torch.tensor([5, 2])
    groups = [
        (slice(i, i + 1), torch.ones(1, 1, 1, n, dtype=torch.bool)) for i, n in enumerate(lengths)
    ]
    step = attention.DecodeBatch(positions, torch.arange(2), groups)
    assert torch.allclose(step.attend(q[last], k[last], v[last], cache), whole[last], atol=1e-6)


@gpu
@needs_gpu
@pytest.mark.parametrize("K, window", [(2, 0), (4, 0), (2, 100)])
def test_varlen_equals_the_padded_path_forward_and_backward(K, window):
    results = []
    for path in ("varlen", "padded"):
        q, k, v, seqs = inputs([300, 77, 512], K=K, E=64, device="cuda", dtype=torch.bfloat16)
        seqs = (
            attention.add_window_and_alibi(
                seqs, small_config(sliding_window=window), q.float() if path == "padded" else q
            )
            if window
            else seqs
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = getattr(seqs, path)(*leaves)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results):
        assert (a.float() - b.float()).abs().max() < 0.05 * b.float().abs().max()


@pytest.mark.parametrize("K, window", [(2, 0), (4, 0), (2, 100)])
def test_blocks_are_traced_whole_and_once_around_the_packed_kernel(K, window, monkeypatch):
    """Else torch.compile leaves a block's graph for Python, or compiles anew in mid-training. Without a GPU: the tensors are
    fake, so the kernel only says what shape it returns."""
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn, raising=False)
    monkeypatch.setattr(
        attention, "VARLEN_OPTIONS", inspect.signature(varlen_attn).parameters, raising=False
    )
    monkeypatch.setattr(attention, "attention_dtype", lambda x: x.dtype)
    monkeypatch.setattr(
        attention.PackedBatch, "attend", lambda self, q, k, v, cache: self.attend_packed(q, k, v)
    )
    torch._dynamo.reset()
    counters.clear()
    model = LLaMA(small_config(num_hidden_layers=12, num_key_value_heads=K)).to(torch.bfloat16)
    for layer in model.layers:
        layer.compile(backend="eager")
    with FakeTensorMode(allow_non_fake_inputs=True):

        def forward(*lengths):
            N = sum(lengths)
            seqs = attention.pack(
                torch.zeros(len(lengths) + 1, dtype=torch.int32), max(lengths), N
            )._replace(window=window)
            x = model.hidden_states(torch.zeros(N, dtype=torch.int64), seqs)
            assert x.shape == (N, 32) and x.dtype == torch.bfloat16 and x.requires_grad

        for lengths in (
            [60, 31],
            [17, 44, 92],
            [7, 25, 120, 3],
        ):  # as it comes; sizes become variables; no more
            forward(*lengths)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for lengths in ([5, 9], [200], [30] * 11, [300, 77, 1, 512, 130], [64, 64], [33, 2, 8]):
                forward(*lengths)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters


@pytest.mark.parametrize("window, alibi", [(0, True), (3, False), (3, True), (100, False)])
def test_windows_and_alibi_equal_the_plain_definition(window, alibi):
    """In whole sequences, and in a step over the cache, with fewer kv heads than heads."""
    lengths, H, K, E = [6, 3], 4, 2, 16
    q, k, v, seqs = inputs(lengths, H, K, E)
    config = small_config(sliding_window=window, alibi=alibi)
    slopes = [2 ** (-8 * (h + 1) / H) if alibi else 0.0 for h in range(H)]
    expected = torch.zeros_like(q)
    for first, n in ((0, 6), (6, 3)):
        for i in range(n):
            seen = [j for j in range(i + 1) if not window or i - j < window]
            for h in range(H):
                logits = torch.stack(
                    [
                        q[first + i, h] @ k[first + j, h // (H // K)] / E**0.5 - slopes[h] * (i - j)
                        for j in seen
                    ]
                )
                expected[first + i, h] = logits.softmax(0) @ torch.stack(
                    [v[first + j, h // (H // K)] for j in seen]
                )
    cache = attention.Cache(torch.zeros(4, K, 8, E), torch.zeros(4, K, 8, E))
    whole = attention.add_window_and_alibi(seqs._replace(slots=torch.tensor([0, 1])), config, q)
    assert torch.allclose(whole.attend(q, k, v, cache), expected, atol=1e-5)
    last, positions = torch.tensor([5, 8]), torch.tensor([5, 2])
    step = attention.DecodeBatch(
        positions,
        torch.arange(2),
        [(slice(0, 2), (torch.arange(8) <= positions[:, None])[:, None, None])],
    )
    step = attention.add_window_and_alibi(step, config, q)
    assert torch.allclose(step.attend(q[last], k[last], v[last], cache), expected[last], atol=1e-5)
