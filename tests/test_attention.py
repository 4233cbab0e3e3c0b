"""Attention over packed sequences and over the cache, against its definition; kernels on a GPU."""

import inspect
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from torch import tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from nanosafe import attention
from nanosafe.checkpoint import init_from_scratch
from nanosafe.data.batching import IGNORED, Batch
from nanosafe.model import LLaMA
from nanosafe.rollout import Engine, Sampling


class PretendedTensor(NamedTuple):
    """What attention.py asks of a tensor, to choose a kernel."""

    is_cuda: bool
    dtype: torch.dtype
    device: str = "cuda"


class Inputs(NamedTuple):
    """Random queries (N, H, E), keys and values (N, K, E) of packed sequences, and their layout."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: attention.PackedBatch


def random_inputs(lengths, H=4, K=2, E=16, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    N = sum(lengths)
    q = torch.randn(N, H, E, generator=generator).to(device, dtype)
    k = torch.randn(N, K, E, generator=generator).to(device, dtype)
    v = torch.randn(N, K, E, generator=generator).to(device, dtype)
    cu_seqlens = tensor([0, *lengths]).cumsum(0).int().to(device)
    return Inputs(q, k, v, attention.pack(cu_seqlens, max(lengths), N))


def attention_by_definition(q, k, v, lengths, window=0, slopes=None):
    """softmax(q k / sqrt(E) - slope * distance) v: one sequence, query and head at a time.

    window  keys that a query sees, its own included; 0: all before it
    slopes  ALiBi's, one per head; None: no bias"""
    N, H, E = q.shape
    sharing = H // k.shape[1]  # query heads that share a kv head
    out = torch.zeros_like(q)
    begin = 0
    for length in lengths:
        for t in range(length):
            first = max(0, t + 1 - window) if window else 0
            distance = t - torch.arange(first, t + 1)
            seen = slice(begin + first, begin + t + 1)
            for h in range(H):
                keys = k[seen, h // sharing]
                values = v[seen, h // sharing]
                logits = keys @ q[begin + t, h] / E**0.5
                if slopes:
                    logits = logits - slopes[h] * distance
                out[begin + t, h] = logits.softmax(0) @ values
        begin += length
    return out


# ---- packed sequences ----


@pytest.mark.parametrize("lengths", [[5], [4, 4], [3, 7, 1]])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_packed_attention_equals_its_definition(lengths, K):
    q, k, v, layout = random_inputs(lengths, K=K)
    expected = attention_by_definition(q, k, v, lengths)
    assert torch.allclose(layout.attend(q, k, v, None), expected, atol=1e-5)


def test_positions_restart_in_every_sequence():
    layout = random_inputs([3, 1, 2]).layout
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert layout.rows.tolist() == [0, 0, 0, 1, 2, 2]


# ---- one step over the cache: the last tokens of two sequences ----

LENGTHS = [6, 3]
LAST = tensor([5, 8])  # where the last token of each stands among the packed ones
LAST_POSITIONS = tensor([5, 2])
CACHE_LENGTH = 8


def make_cache(fill=0.0):
    shape = 4, 2, CACHE_LENGTH, 16  # (S, K, T, E)
    return attention.Cache(torch.full(shape, fill), torch.full(shape, fill))


def group_of_all_rows():
    """Both rows in one RowGroup, which reads the whole length of the cache."""
    seen = torch.arange(CACHE_LENGTH) <= LAST_POSITIONS[:, None]
    return attention.RowGroup(slice(0, 2), seen[:, None, None])


def groups_of_one_row():
    """A RowGroup for each row, which reads no more than the row's own keys."""
    groups = []
    for row, length in enumerate(LENGTHS):
        seen = torch.ones(1, 1, 1, length, dtype=torch.bool)
        groups.append(attention.RowGroup(slice(row, row + 1), seen))
    return groups


def attend_to_cache(inputs, cache, groups, config=None):
    """Attention of the last tokens, which may be in the cache already."""
    layout = attention.DecodeBatch(LAST_POSITIONS, torch.arange(2), groups)
    if config:
        layout = attention.add_window_and_alibi(layout, config.sliding_window, config, inputs.q)
    return layout.attend(inputs.q[LAST], inputs.k[LAST], inputs.v[LAST], cache)


@pytest.mark.parametrize("groups", [[group_of_all_rows()], groups_of_one_row()])
def test_a_step_over_the_cache_equals_packed_attention(groups):
    inputs = random_inputs(LENGTHS)
    q, k, v, layout = inputs
    expected = layout.attend(q, k, v, None)[LAST]
    all_but_last = tensor([0, 1, 2, 3, 4, 6, 7])
    cu_seqlens = tensor([0, 5, 7], dtype=torch.int32)
    prefill = attention.pack(cu_seqlens, 5, 7, slots=tensor([0, 1]))
    cache = make_cache()
    prefill.attend(q[all_but_last], k[all_but_last], v[all_but_last], cache)
    assert torch.allclose(attend_to_cache(inputs, cache, groups), expected, atol=1e-6)


def test_a_step_reads_no_further_than_its_extent():
    """Beyond the keys of each row the cache holds nan."""
    inputs = random_inputs(LENGTHS)
    q, k, v, layout = inputs
    expected = layout.attend(q, k, v, None)[LAST]
    cache = make_cache(fill=torch.nan)
    layout._replace(slots=torch.arange(2)).attend(q, k, v, cache)
    out = attend_to_cache(inputs, cache, groups_of_one_row())
    assert torch.allclose(out, expected, atol=1e-6)


def test_heads_that_the_packed_kernel_does_not_take_are_padded():
    """It takes multiples of 8 up to 256; OpenLLaMA-3B has heads of 100."""
    for head_width, has_kernel in (
        (64, True),
        (128, True),
        (256, True),
        (100, False),
        (264, False),
    ):
        on_gpu = PretendedTensor(is_cuda=True, dtype=torch.bfloat16)
        assert attention.has_packed_kernel(on_gpu, head_width) == has_kernel
    assert not attention.has_packed_kernel(PretendedTensor(True, torch.float32), 64)
    assert not attention.has_packed_kernel(PretendedTensor(False, torch.bfloat16), 64)


def test_a_padded_window_has_a_mask_where_the_packed_kernel_does_not_take_the_heads():
    """Else the padded path would not know of the window."""
    config = small_config(sliding_window=3, head_dim=100)
    layout = random_inputs(LENGTHS).layout
    x = PretendedTensor(is_cuda=True, dtype=torch.bfloat16, device="cpu")
    layout = attention.add_window_and_alibi(layout, 3, config, x)
    assert layout.mask is not None


def test_no_card_takes_the_kernel_of_cudnn():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ---- sliding windows and ALiBi ----

WINDOWS_AND_ALIBI = [(0, True), (3, False), (3, True), (100, False)]


def expected_with_window_and_alibi(inputs, window, alibi):
    slopes = None
    if alibi:
        slopes = [2**-2, 2**-4, 2**-6, 2**-8]  # 2^(-8 i / H) of H = 4 heads
    return attention_by_definition(inputs.q, inputs.k, inputs.v, LENGTHS, window, slopes)


@pytest.mark.parametrize("window, alibi", WINDOWS_AND_ALIBI)
def test_windows_and_alibi_of_packed_sequences_equal_their_definition(window, alibi):
    inputs = random_inputs(LENGTHS)
    q, k, v, layout = inputs
    config = small_config(sliding_window=window, alibi=alibi)
    layout = attention.add_window_and_alibi(layout, window, config, q)
    expected = expected_with_window_and_alibi(inputs, window, alibi)
    assert torch.allclose(layout.attend(q, k, v, None), expected, atol=1e-5)


@pytest.mark.parametrize("window, alibi", WINDOWS_AND_ALIBI)
def test_windows_and_alibi_of_a_step_equal_their_definition(window, alibi):
    inputs = random_inputs(LENGTHS)
    q, k, v, layout = inputs
    config = small_config(sliding_window=window, alibi=alibi)
    layout = layout._replace(slots=tensor([0, 1]))
    layout = attention.add_window_and_alibi(layout, window, config, q)
    cache = make_cache()
    layout.attend(q, k, v, cache)
    out = attend_to_cache(inputs, cache, [group_of_all_rows()], config)
    expected = expected_with_window_and_alibi(inputs, window, alibi)
    assert torch.allclose(out, expected[LAST], atol=1e-5)


# ---- bfloat16 on a CPU, where attention is computed and cached in float32 ----


@pytest.fixture(scope="module")
def float32_model():
    return init_from_scratch(small_config(), seed=0)


@pytest.fixture
def bfloat16_model(float32_model):
    model = LLaMA(small_config()).bfloat16()
    model.load_state_dict(float32_model.state_dict())
    return model


@pytest.fixture
def batch():
    tokens = torch.randint(3, 97, (19,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = tensor([0, 7, 19], dtype=torch.int32)
    return Batch(tokens, cu_seqlens, 12, torch.full_like(tokens, IGNORED))


def test_a_bfloat16_model_attends_in_float32_on_a_cpu(bfloat16_model, batch, monkeypatch):
    """torch's kernel for a CPU is slower in bfloat16, its backward pass many times."""
    seen = []
    real_attention = F.scaled_dot_product_attention

    def record_dtype(q, *arguments, **options):
        seen.append(q.dtype)
        return real_attention(q, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_dtype)
    bfloat16_model.logits(batch)
    assert set(seen) == {torch.float32}


def test_logits_of_a_bfloat16_model_are_near_those_in_float32(float32_model, bfloat16_model, batch):
    expected = float32_model.logits(batch)
    logits = bfloat16_model.logits(batch)
    assert logits.dtype == torch.bfloat16
    tolerance = 0.05 * expected.abs().max().item()
    assert torch.allclose(logits.float(), expected, atol=tolerance)


def test_gradients_of_a_bfloat16_model_are_bfloat16(bfloat16_model, batch):
    bfloat16_model.logits(batch).float().sum().backward()
    for name, parameter in bfloat16_model.named_parameters():
        assert parameter.grad.dtype == torch.bfloat16, name


def test_the_cache_of_a_bfloat16_model_is_float32_on_a_cpu(bfloat16_model):
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, banned=tensor([]))
    engine = Engine(bfloat16_model, slots=0, wanted=2, length=20, sampling=sampling)
    for cache in engine.caches:
        assert cache.k.dtype == torch.float32
        assert cache.v.dtype == torch.float32


# ---- torch.compile, without a GPU: the packed kernel only says what shape it returns ----


@pytest.fixture
def always_packed_kernel(monkeypatch):
    """attention.py as it is on a GPU: every layout takes the packed kernel, in bfloat16."""

    def attend(self, q, k, v, cache):
        return self.attend_packed(q, k, v)

    def keep_dtype(x):
        return x.dtype

    options = inspect.signature(varlen_attn).parameters
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn, raising=False)
    monkeypatch.setattr(attention, "VARLEN_OPTIONS", options, raising=False)
    monkeypatch.setattr(attention, "attention_dtype", keep_dtype)
    monkeypatch.setattr(attention.PackedBatch, "attend", attend)


def forward_with_fake_tensors(model, lengths, window):
    N = sum(lengths)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    layout = attention.pack(cu_seqlens, max(lengths), N)._replace(window=window)
    x = model.hidden_states(torch.zeros(N, dtype=torch.int64), layout)
    assert x.shape == (N, 32)
    assert x.dtype == torch.bfloat16
    assert x.requires_grad


def compile_blocks(config):
    torch._dynamo.reset()
    counters.clear()
    model = LLaMA(config).to(torch.bfloat16)
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


def check_that_training_compiles_nothing(model, window=0):
    warm_up = [[60, 31], [17, 44, 92], [7, 25, 120, 3]]
    training = [[5, 9], [200], [30] * 11, [300, 77, 1, 512, 130], [64, 64], [33, 2, 8]]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for lengths in warm_up:
            forward_with_fake_tensors(model, lengths, window)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for lengths in training:
                forward_with_fake_tensors(model, lengths, window)
    assert not counters["graph_break"], counters


@pytest.mark.parametrize("K, window", [(2, 0), (4, 0), (2, 100)])
def test_blocks_are_compiled_whole_and_once_around_the_packed_kernel(
    K, window, always_packed_kernel
):
    """A block's graph is not left for Python, and training compiles nothing anew.

    The first batch is compiled as it is, the second with variable sizes, and then no more."""
    model = compile_blocks(small_config(num_hidden_layers=12, num_key_value_heads=K))
    check_that_training_compiles_nothing(model, window)
    assert counters["stats"]["unique_graphs"] == 2, counters


LAYERS_THAT_DIFFER = {
    "norms of queries": {"qk_norm": "head"},
    "layers without RoPE": {"no_rope_layers": [1, 1, 1, 0] * 3},
    "norms after": {"qk_norm": "width", "post_norm": True},
    "a part of each head turns": {"partial_rotary_factor": 0.75},
    "windows in some layers": {
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "full_attention"] * 6,
    },
}


@pytest.mark.parametrize("name", LAYERS_THAT_DIFFER)
def test_blocks_of_other_families_are_compiled_as_often(name, always_packed_kernel):
    """Windows, which a kernel must know, take one more graph; all else is two, as a LLaMA's."""
    config = small_config(num_hidden_layers=12, **LAYERS_THAT_DIFFER[name])
    check_that_training_compiles_nothing(compile_blocks(config))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 or (config.sliding_window and graphs <= 4), counters


# ---- the packed kernel on a GPU ----


def attend_on_gpu(K, window, packed):
    """The output of one of the two kernels, and its gradients by q, k and v."""
    inputs = random_inputs([300, 77, 512], K=K, E=64, device="cuda", dtype=torch.bfloat16)
    q, k, v, layout = inputs
    if window:
        config = small_config()
        # In bfloat16 the packed kernel takes the window; in float32 the layout gets a mask.
        x = q if packed else q.float()
        layout = attention.add_window_and_alibi(layout, window, config, x)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = layout.attend_packed(*leaves) if packed else layout.attend_padded(*leaves)
    out.float().square().sum().backward()
    return [out, q.grad, k.grad, v.grad]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("K, window", [(2, 0), (4, 0), (2, 100)])
def test_the_packed_kernel_equals_the_padded_one_forward_and_backward(K, window):
    packed = attend_on_gpu(K, window, packed=True)
    padded = attend_on_gpu(K, window, packed=False)
    for a, b in zip(packed, padded):
        distance = (a.float() - b.float()).abs().max()
        assert distance < 0.05 * b.float().abs().max()
