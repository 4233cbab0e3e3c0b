"""What only a GPU runs: bfloat16 and its kernels, torch.compile, CUDA graphs, offloading; in whole models and trainers."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from conftest import rows_of, run, small_config
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from nanosafe import attention, checkpoint, optim, parallel, rollout
from nanosafe.checkpoint import init_from_scratch
from nanosafe.losses import mle_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
MIXED = parallel.Placement(GPU, "ddp", torch.float32, BF16)  # what one GPU trains in
LENGTHS = [300, 77, 1, 512, 130]


@pytest.fixture(scope="module", autouse=True)
def alone():
    """parallel.put() makes a process group of one; it ends with this file."""
    yield
    if dist.is_initialized():
        parallel.close(leave=False)
        parallel.meshes.clear()


def config(**changes):
    """Four heads of 64 that share two keys. Its logits spread as a trained model's do."""
    return small_config(
        **{
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 512,
            "initializer_range": 1 / 16,
            "max_position_embeddings": 1024,
            **changes,
        }
    )


def half(**changes):
    return init_from_scratch(config(**changes), seed=3).to(GPU, BF16)


def make_batch(lengths, vocab_size=1000, seed=0):
    """(tokens, cu_seqlens, max_seqlen, targets); a seventh of the targets is nobody's."""
    g = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(vocab_size, (2, sum(lengths)), generator=g).to(GPU)
    targets[::7] = -100
    return tokens, torch.tensor([0, *lengths]).cumsum(0).int().to(GPU), max(lengths), targets


def results(model, batch, forward=None, mean=False):
    """Log-probabilities, and the gradients of their mean or of a random sum, by name."""
    logps = (forward or model)(*batch)
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1)).to(GPU)
    parallel.backward(model, (logps if mean else logps * weights).mean())
    found = {"logps": logps.detach()[batch[3] >= 0]}
    for name, p in model.named_parameters():
        found[name] = parallel.full_tensor(p.grad).float().cpu()
        p.grad = None
    return found


def agree(ours, theirs, tolerance):
    """Whether two sets of tensors differ by less than this share of their spread, one by one."""
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        error = ((ours[name] - b).norm() / (b - b.mean()).norm()).item()
        assert error < tolerance, f"{name}: {error:.4f} of the spread"


def test_a_bfloat16_model_equals_the_float32_one_on_the_padded_path():
    """Else packed sequences see each other, or the future, or the kernel's gradients or grouped heads are wrong."""
    model, batch = half(), make_batch(LENGTHS)
    agree(results(model, batch), results(half().float(), batch), 0.06)


@pytest.mark.parametrize("known", [True, False])
def test_grouped_heads_with_and_without_the_kernel_s_help(known, monkeypatch):
    """Else torch 2.11, whose kernel takes no enable_gqa, and later ones train different models."""
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    assert "window_size" in attention.VARLEN_OPTIONS and (
        "enable_gqa" in attention.VARLEN_OPTIONS
    ) == (version >= (2, 12))
    model, batch = half(), make_batch(LENGTHS)
    expected = results(model, batch)
    if not known:
        monkeypatch.setattr(
            attention, "VARLEN_OPTIONS", dict.fromkeys({*attention.VARLEN_OPTIONS} - {"enable_gqa"})
        )
    agree(results(model, batch), expected, 0.03)


def test_packed_attention_is_flash_attention_2():
    """Else training runs on a kernel that an A800 has not, or that is slower: cuDNN's, memory-efficient, plain products."""
    model, batch = half(), make_batch(LENGTHS)
    results(model, batch)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        results(model, batch)
        torch.cuda.synchronize()
    names = {event.name for event in seen.events() if event.device_type == DeviceType.CUDA}
    assert names, "the profiler saw no kernel"
    for part in ("flash_fwd", "flash_bwd"):
        assert any(part in name for name in names), (part, sorted(names))
    assert not [name for name in names if "fmha" in name or "cudnn" in name]


def test_compiled_blocks_equal_eager_ones_whole_and_once():
    """Else torch.compile changes the gradient, falls back to Python inside a block, or compiles anew in mid-training.

    Twelve blocks: more than the versions that torch keeps of one function, were each block to need its own."""
    torch._dynamo.reset()
    counters.clear()
    deep = config(num_hidden_layers=12)
    eager, compiled = (
        init_from_scratch(deep, seed=3, placement=MIXED._replace(use_compile=c))
        for c in (False, True)
    )
    began = time.perf_counter()
    for lengths in (
        [60, 31],
        [17, 44, 92],
        [7, 25, 120, 3],
    ):  # as it comes; sizes become variables; no more
        results(compiled, make_batch(lengths))
    seconds = time.perf_counter() - began
    said = f"after {seconds:.1f} s of start-up; {dict(counters['stats'])}"
    breaks = lambda: [
        why for why in counters["graph_break"] if "FSDP hooks" not in why
    ]  # those are outside of the block
    assert not breaks(), f"{breaks()} {said}"
    assert 0 < counters["stats"]["unique_graphs"] <= 2, said
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, lengths in enumerate(([5, 9], [200], [30] * 11, LENGTHS, [64, 64], [33, 2, 8])):
            batch = make_batch(lengths, seed=i)
            agree(results(compiled, batch), results(eager, batch), 0.12)
    assert not breaks() and counters["stats"]["unique_graphs"] <= 2, said
    assert seconds < 300, said


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("slots", [0, 4])
def test_decoding_by_graphs_equals_decoding_without(slots, temperature, monkeypatch):
    """Else a graph reads stale memory, or forgets what a refilled or moved row, or a smaller batch, changed."""
    model = half(vocab_size=97)
    prompts = [[1, *range(3, 3 + 5 * i % 41)] for i in range(16)]
    ask = lambda: rollout.generate(
        model,
        prompts,
        [25 + i for i in range(16)],
        temperature=temperature,
        eos_ids=[*range(2, 8)],
        seed=5,
        slots=slots,
    )
    graphs, sizes = ask(), []

    def decode(engine, n):
        sizes.append(n)
        engine.decode(n, [(slice(0, n), len(engine.columns))])

    monkeypatch.setattr(rollout.Engine, "replay", decode)
    assert graphs == ask()
    assert max(sizes) == (slots or 16) and len(set(sizes)) > 1, set(sizes)
    lengths = {len(response) for response in graphs}
    assert temperature == 0 or len(lengths) > 5, lengths


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_one_rank_s_layouts_equal_float32_weights_cast_by_hand(layout):
    """Else FSDP2 loses or repeats a gradient, reduces in bfloat16, or computes in another precision than it says."""
    model, batch = (
        init_from_scratch(config(), seed=3, placement=MIXED._replace(layout=layout)),
        make_batch(LENGTHS),
    )
    plain = init_from_scratch(config(), seed=3, placement=parallel.Placement(GPU))
    cast = lambda *batch: functional_call(
        plain, {name: p.to(BF16) for name, p in plain.named_parameters()}, batch
    )
    expected = results(plain, batch, cast)
    for _ in range(2):  # the second time its weights have been gathered and dropped before
        agree(results(model, batch), expected, 0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def train(placement, steps):
    """Fine-tune on one batch of random tokens; the model and its losses."""
    model, batch = (
        init_from_scratch(config(), seed=3, placement=placement),
        make_batch([40, 64, 23, 51, 38, 64, 9, 30]),
    )
    optimizer, losses = optim.make_adamw(model, 0.0, 0.9, 0.95), []
    for step in range(steps):
        loss = mle_loss(model(*batch, uniform_weights=True), batch[3] >= 0)
        parallel.backward(model, loss)
        assert math.isfinite(optim.guarded_step(model, optimizer, 5e-5, 1.0))
        losses.append(loss.item())
    return model, losses


def test_training_in_bfloat16_follows_float32():
    """Else updates are lost to rounding: the master weights, the moments or the gradients are not float32."""
    halves, wholes = train(MIXED, 30)[1], train(parallel.Placement(GPU), 30)[1]
    assert max(halves[-1], wholes[-1]) < 0.7 * wholes[0], (halves, wholes)
    assert all(abs(a - b) < 0.03 * b for a, b in zip(halves, wholes)), (halves, wholes)


def weights(model):
    return {
        name: parallel.full_tensor(p).float().cpu()
        for name, p in parallel.named_local_parameters(model)
    }


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_an_offloaded_model_is_trained_as_another(layout):
    """Else the step on the host misses a gradient, or the GPU goes on with old weights.

    Updates are compared: Adam's first is +-lr, and rounding may turn the sign where a gradient is next to nothing."""
    model, losses = train(MIXED._replace(layout=layout, offload=True), 2)
    other, expected = train(MIXED._replace(layout=layout), 2)
    assert losses == pytest.approx(expected, rel=0.01)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    before, ours, theirs = (weights(m) for m in (init_from_scratch(config(), seed=3), model, other))
    for name, w in before.items():
        assert (ours[name] - theirs[name]).norm() < 0.2 * (theirs[name] - w).norm(), name


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_an_offloaded_frozen_model_scores_as_another(layout, tmp_path):
    """Else a reference or reward model that waits in host memory judges with wrong weights."""
    checkpoint.save(init_from_scratch(config(), seed=3), tmp_path / "model", dtype=BF16)
    placement = parallel.Placement(GPU, layout, BF16, BF16, offload=True)
    frozen = checkpoint.load(tmp_path / "model", placement=placement).requires_grad_(False)
    other, batch = (
        checkpoint.load(tmp_path / "model", device=GPU).requires_grad_(False),
        make_batch(LENGTHS),
    )
    with torch.no_grad():
        expected = {"logps": other(*batch)}
        for _ in range(2):
            agree({"logps": frozen(*batch)}, expected, 0.01)
    assert {p.device.type for _, p in parallel.named_local_parameters(frozen)} == {"cpu"}


def test_even_log_probabilities_equal_the_others():
    """Else a mean's gradients, which the forward pass makes, differ from any loss's: in scale, or from block to block.

    So large that either way works in two blocks."""
    model, batch = half(vocab_size=64000), make_batch([1024, 1000, 1024, 952], 64000)
    even = results(model, batch, lambda *batch: model(*batch, uniform_weights=True), mean=True)
    agree(even, results(model, batch, mean=True), 0.03)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo_lag"])
def test_trainers_run(name, trainers, tmp_path):
    """Else a trainer mixes devices or types, or its metrics, files or sampling fail with compiled bfloat16 models."""
    run(*trainers[name], f"--out_dir={tmp_path}/a", "--device=cuda", "--max_steps=2")
    rows = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert len(rows) == 2 and all(math.isfinite(x) for row in rows for x in row.values()), rows
