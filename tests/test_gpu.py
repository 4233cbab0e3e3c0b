"""What only a GPU runs: bfloat16 and its kernels, torch.compile, CUDA graphs and offloading, in
whole models and trainers. Each docstring says what would go wrong unnoticed without its test."""

import math
import time

import numpy as np
import pytest
import torch
from conftest import rows_of, run, small_config
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from nanosafe import attention, checkpoint, optim, parallel, rollout
from nanosafe.checkpoint import init_from_scratch
from nanosafe.checkpoint.adapter_folder import Base, new_adapter, parameter_of
from nanosafe.checkpoint.families import FAMILIES
from nanosafe.data.batching import Batch, collate
from nanosafe.inference import Responses, response_logps
from nanosafe.logprobs import compute_logits
from nanosafe.lora import Lora
from nanosafe.losses import mle_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("end_process_group"),
]

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
MIXED = parallel.Placement(GPU, "ddp", torch.float32, BF16)  # what one GPU trains in
LENGTHS = [300, 77, 1, 512, 130]


def make_config(**changes):
    """Four heads of 64 that share two keys. The logits spread as those of a trained model do."""
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "initializer_range": 1 / 16,
        "max_position_embeddings": 1024,
    }
    return small_config(**{**sizes, **changes})


def make_bf16_model(**changes):
    return init_from_scratch(make_config(**changes), seed=3).to(GPU, BF16)


def make_placed_model(placement):
    return init_from_scratch(make_config(), seed=3, placement=placement)


def make_batch(lengths, vocab_size=1000, seed=0):
    """A Batch of random tokens and targets; a seventh of the targets carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(vocab_size, (2, sum(lengths)), generator=generator).to(GPU)
    targets[::7] = -100
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(GPU)
    return Batch(tokens, cu_seqlens, max(lengths), targets)


def compute_results(model, batch, log_probs=None, of_mean=False):
    """Log-probabilities, and the gradients of their mean or of a random sum, by name.

    log_probs(batch)  replaces the model's"""
    logps = log_probs(batch) if log_probs else model.log_probs(batch)
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1)).to(GPU)
    loss = logps.mean() if of_mean else (logps * weights).mean()
    parallel.backward(model, loss)
    results = {"logps": logps.detach()[batch.targets >= 0]}
    for name, parameter in model.named_parameters():
        results[name] = parallel.full_tensor(parameter.grad).float().cpu()
        parameter.grad = None
    return results


def check_agreement(ours, theirs, tolerance):
    """Check that two sets of tensors differ, one by one, by less than a share of their spread."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        spread = (expected - expected.mean()).norm()
        error = ((ours[name] - expected).norm() / spread).item()
        assert error < tolerance, f"{name}: {error:.4f} of the spread"


def kernels_of(function):
    """The names of the kernels that the GPU runs during a call."""
    function()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    names = set()
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            names.add(event.name)
    assert names, "the profiler saw no kernel"
    return names


# ---- attention ----


def test_a_bfloat16_model_equals_the_float32_one_on_the_padded_path():
    """Else packed sequences may see each other, or the future, or the kernel's gradients or its
    grouped heads may be wrong."""
    model, batch = make_bf16_model(), make_batch(LENGTHS)
    expected = compute_results(make_bf16_model().float(), batch)
    check_agreement(compute_results(model, batch), expected, 0.06)


@pytest.mark.parametrize("known", [True, False])
def test_grouped_heads_are_right_with_and_without_the_kernels_option(known, monkeypatch):
    """Else torch 2.11, whose kernel has no option enable_gqa, and later versions may train
    different models."""
    major, minor = torch.__version__.split(".")[:2]
    has_option = (int(major), int(minor)) >= (2, 12)
    assert "window_size" in attention.VARLEN_OPTIONS
    assert ("enable_gqa" in attention.VARLEN_OPTIONS) == has_option
    model, batch = make_bf16_model(), make_batch(LENGTHS)
    expected = compute_results(model, batch)
    if not known:
        options = dict.fromkeys(set(attention.VARLEN_OPTIONS) - {"enable_gqa"})
        monkeypatch.setattr(attention, "VARLEN_OPTIONS", options)
    check_agreement(compute_results(model, batch), expected, 0.03)


def test_packed_attention_is_flash_attention_2():
    """Else training may run on a kernel that an A800 does not have or that is slower: cuDNN's, the
    memory-efficient one, or plain products."""
    model, batch = make_bf16_model(), make_batch(LENGTHS)
    names = kernels_of(lambda: compute_results(model, batch))
    for part in ("flash_fwd", "flash_bwd"):
        assert any(part in name for name in names), (part, sorted(names))
    for name in names:
        assert "fmha" not in name and "cudnn" not in name


# ---- torch.compile and CUDA graphs ----


def graph_breaks():
    """Reasons for which blocks fell back to Python. FSDP's hooks lie outside of the blocks."""
    return [reason for reason in counters["graph_break"] if "FSDP hooks" not in reason]


def test_compiled_blocks_equal_eager_ones_and_compile_once():
    """Else torch.compile may change the gradient, fall back to Python inside a block, or compile
    again in the middle of training.

    There are twelve blocks: more than the versions that torch keeps of one function, if each block
    needed its own."""
    torch._dynamo.reset()
    counters.clear()
    config = make_config(num_hidden_layers=12)
    eager_placement = MIXED._replace(use_compile=False)
    compiled_placement = MIXED._replace(use_compile=True)
    eager = init_from_scratch(config, seed=3, placement=eager_placement)
    compiled = init_from_scratch(config, seed=3, placement=compiled_placement)
    began = time.perf_counter()
    # The first batch is compiled with its sizes, the second with variable sizes, the third not.
    for lengths in ([60, 31], [17, 44, 92], [7, 25, 120, 3]):
        compute_results(compiled, make_batch(lengths))
    seconds = time.perf_counter() - began
    stats = counters["stats"]
    note = f"after {seconds:.1f} s of start-up; {dict(stats)}"
    assert not graph_breaks(), f"{graph_breaks()} {note}"
    assert 0 < stats["unique_graphs"] <= 2, note
    batches = ([5, 9], [200], [30] * 11, LENGTHS, [64, 64], [33, 2, 8])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, lengths in enumerate(batches):
            batch = make_batch(lengths, seed=i)
            expected = compute_results(eager, batch)
            check_agreement(compute_results(compiled, batch), expected, 0.12)
    assert not graph_breaks() and stats["unique_graphs"] <= 2, note
    assert seconds < 300, note


def decode_without_graphs(monkeypatch):
    """From here on decode steps run the same kernels without graphs; returns how many rows each."""
    sizes = []

    def decode(engine, n, extent):
        sizes.append(n)
        engine.decode(n, [(slice(0, n), extent)])

    monkeypatch.setattr(rollout.Engine, "replay", decode)
    return sizes


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("slots", [0, 4])
def test_decoding_by_graphs_equals_decoding_without(slots, temperature, monkeypatch):
    """Else a graph may read stale memory, or miss what a refilled row, a moved row or a smaller
    batch changed."""
    model = make_bf16_model(vocab_size=97)
    prompts = [[1, *range(3, 3 + 5 * i % 41)] for i in range(16)]

    def sample():
        return rollout.generate(
            model,
            prompts,
            [25 + i for i in range(16)],
            temperature=temperature,
            eos_ids=[*range(2, 8)],
            seed=5,
            slots=slots,
        )

    with_graphs = sample()
    sizes = decode_without_graphs(monkeypatch)
    assert with_graphs == sample()
    assert max(sizes) == (slots or 16) and len(set(sizes)) > 1, set(sizes)
    lengths = {len(response) for response in with_graphs}
    assert temperature == 0 or len(lengths) > 5, lengths


PROMPTS = [[1, *range(3, 3 + 5 * i % 41)] for i in range(16)]


def sample(model, **options):
    """Responses to PROMPTS, some of which end early."""
    defaults = {"eos_ids": [*range(2, 8)], "seed": 5, "slots": 4}
    return rollout.generate(model, PROMPTS, 30, **{**defaults, **options})


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"banned": [9, 11]}])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"alibi": True}])
def test_graphs_know_filters_windows_and_alibi(changes, options, monkeypatch):
    """Else a graph may keep the mask, the biases or the sorted tokens of the step in which it was
    recorded."""
    model = make_bf16_model(vocab_size=97, **changes)
    with_graphs = sample(model, **options)
    decode_without_graphs(monkeypatch)
    assert with_graphs == sample(model, **options)


def sampler_gap(model):
    """The mean difference between the sampler's log-probabilities and the forward's, in nats."""
    sampled = sample(model, with_logps=True)
    differences = []
    for prompt, response, logps in zip(PROMPTS, sampled.responses, sampled.logps):
        text = torch.tensor([*prompt, *response], device=GPU)
        ends = torch.tensor([0, len(text)], dtype=torch.int32, device=GPU)
        targets = text.roll(-1)
        targets[-1] = -100
        with torch.no_grad():
            expected = model.log_probs(Batch(text, ends, len(text), targets))
        differences += (torch.tensor(logps) - expected[len(prompt) - 1 : -1].cpu()).abs().tolist()
    return sum(differences) / len(differences)


def test_what_is_sampled_has_the_trainers_probabilities():
    """Else decoding may compute another policy than the one that is trained, and only a worse
    reward would tell."""
    assert sampler_gap(make_bf16_model()) < 0.05


def test_decoding_runs_the_memory_efficient_kernel(monkeypatch):
    """Else an H100 may decode by cuDNN's kernel, of which some versions are wrong for grouped heads
    with a mask, or any card by plain products, which write all scores to memory."""
    model = make_bf16_model()
    decode_without_graphs(monkeypatch)
    names = kernels_of(lambda: sample(model))
    assert any("fmha" in name for name in names), sorted(names)
    for name in names:
        assert "cudnn" not in name.lower(), name


def test_a_second_rollout_after_an_update_has_the_slots_of_the_first(monkeypatch):
    """Else memory that torch holds unused after an update may count as taken: then fewer rows are
    decoded together in all rollouts but the first, and nothing but the clock tells."""
    model = make_placed_model(MIXED)
    slots = []
    open_engine = rollout.open_engine

    def open_and_note(*arguments):
        engine = open_engine(*arguments)
        slots.append(engine.slots)
        return engine

    monkeypatch.setattr(rollout, "open_engine", open_and_note)
    # A row takes so much that not all sixteen fit into half of what torch leaves below.
    free = torch.cuda.mem_get_info()[0]
    monkeypatch.setattr(rollout, "cache_bytes_per_token", lambda *_: free // 2 // 16 // 128)
    monkeypatch.setattr(rollout, "keep_engine", lambda engine: None)
    with parallel.gathered_for_sampling(model) as policy:
        before = sample(policy, slots=0)
    optimizer = optim.make_adamw(model, 0.0, 0.9, 0.95)
    batch = make_batch(LENGTHS)
    parallel.backward(model, model.log_probs(batch).mean())
    optim.guarded_step(model, optimizer, 0.1, 1.0)
    ballast = torch.empty(free // 2, dtype=torch.uint8, device=GPU)
    del ballast  # torch keeps it
    held = torch.cuda.memory_reserved()
    with parallel.gathered_for_sampling(model) as policy:
        after = sample(policy, slots=0)
    assert slots[1] >= slots[0] - 1 > 1, slots
    assert torch.cuda.memory_reserved() < held
    assert after != before  # the graphs of the second rollout have the new weights


def test_a_second_rollout_of_a_plain_model_takes_no_more_memory():
    """Else each rollout may leave its graphs and its cache behind, until memory is full."""
    model = make_bf16_model()
    expected = sample(model)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(3):
        assert sample(model) == expected
    assert torch.cuda.memory_reserved() <= reserved


def test_paged_attention_reads_the_keys_that_are_used_and_no_others():
    """Else decoding by pages of the cache, which one day may replace padding, would rest on a
    kernel that ignores lengths or the order of pages."""
    if "block_table" not in attention.VARLEN_OPTIONS:
        pytest.skip("this torch has no pages")
    generator = torch.Generator().manual_seed(0)
    page, K, H, E = 256, 2, 4, 64
    used = [300, 1, 256, 511]
    q = torch.randn(len(used), H, E, generator=generator).to(GPU, BF16)
    k, v = torch.randn(2, 8, page, K, E, generator=generator).to(GPU, BF16)
    table = torch.tensor([[6, 1], [0, 7], [3, 2], [5, 4]], dtype=torch.int32, device=GPU)
    ends = torch.arange(len(used) + 1, dtype=torch.int32, device=GPU)
    out = attention.varlen_attn(
        q,
        k,
        v,
        ends,
        None,
        1,
        2 * page,
        seqused_k=torch.tensor(used, dtype=torch.int32, device=GPU),
        block_table=table,
        enable_gqa=True,
    )
    for i, length in enumerate(used):
        keys = k[table[i].long()].flatten(0, 1)[:length].float()  # (length, K, E)
        values = v[table[i].long()].flatten(0, 1)[:length].float()
        keys = keys.repeat_interleave(H // K, dim=1)
        values = values.repeat_interleave(H // K, dim=1)
        scores = torch.einsum("he,the->ht", q[i].float(), keys) / E**0.5
        expected = torch.einsum("ht,the->he", scores.softmax(-1), values)
        check_agreement({"out": out[i].float()}, {"out": expected}, 0.02)


# ---- torch.compile with all that is combined with it ----


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_compiled_and_checkpointed_blocks_have_the_gradients_of_plain_ones(layout):
    """Else a block that is computed again in the backward pass may run another version than in the
    forward pass, and its gradient belong to other activations."""
    torch._dynamo.reset()
    both = MIXED._replace(layout=layout, use_compile=True, activation_checkpointing=True)
    model, expected_model = make_placed_model(both), make_placed_model(MIXED)
    for lengths in ([60, 31], [17, 44, 92], LENGTHS):
        batch = make_batch(lengths)
        expected = compute_results(expected_model, batch)
        check_agreement(compute_results(model, batch), expected, 0.12)


def test_compiled_blocks_in_float32_equal_eager_ones_and_are_sampled_from():
    """Else the only layout without FSDP, which dtype=float32 takes, may not survive torch.compile
    and CUDA graphs together."""
    torch._dynamo.reset()
    plain = parallel.Placement(GPU, use_compile=True)
    model, expected_model = make_placed_model(plain), make_placed_model(parallel.Placement(GPU))
    for lengths in ([60, 31], LENGTHS):
        batch = make_batch(lengths)
        expected = compute_results(expected_model, batch)
        check_agreement(compute_results(model, batch), expected, 0.005)
    assert sampler_gap(model) < 0.005


def test_a_head_width_that_the_packed_kernel_refuses_takes_the_padded_path():
    """Else a model with heads of 100, as OpenLLaMA 3B has them, stops in its first forward."""
    sizes = {"hidden_size": 400, "num_attention_heads": 4, "initializer_range": 1 / 20}
    model, batch = make_bf16_model(**sizes), make_batch(LENGTHS)
    assert model.config.head_dim == 100
    expected = compute_results(make_bf16_model(**sizes).float(), batch)
    check_agreement(compute_results(model, batch), expected, 0.06)
    assert sampler_gap(model) < 0.05


def make_idle_batch():
    """What a rank computes that has no sequence of its own."""
    return collate([], [], GPU)


def score_and_update(models, batches):
    """A small iteration of PPO-Lag: frozen models score, trained ones score and are updated."""
    for model in models:
        for batch in batches:
            with torch.no_grad():
                run_forward(model, batch)
    for model in models:
        if not next(model.parameters()).requires_grad:
            continue
        for batch in batches:
            parallel.backward(model, run_forward(model, batch).sum())
        model.zero_grad()


def run_forward(model, batch):
    return model.scores(batch) if model.head == "score" else model.log_probs(batch)


def test_an_iteration_with_an_idle_rank_compiles_nothing_after_the_first():
    """Else each rank that once had nothing to do would compile on, for tens of seconds and up to
    torch's limit, beyond which blocks run uncompiled without a word."""
    torch._dynamo.reset()
    counters.clear()
    compiled = MIXED._replace(use_compile=True)
    models = []
    for placement in (compiled, compiled._replace(dtype=BF16)):
        for head in ("lm", "score"):
            model = init_from_scratch(make_config(), head, seed=3, placement=placement)
            models.append(model.requires_grad_(placement.dtype == torch.float32))
    first = [make_batch([60, 31]), make_batch([17, 44, 92])]
    score_and_update(models, first)
    score_and_update(models, [make_idle_batch(), make_batch(LENGTHS)])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 6, dict(counters["stats"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        score_and_update(models, [make_batch([5, 9]), make_idle_batch(), make_batch([200])])
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["recompile_limit"] and not graph_breaks()


# ---- adapters ----


def make_adapted(base, head="lm", seed=1):
    """A new adapter of all matrices, whose B is not zero: it changes what its base says."""
    shared = Base(base, FAMILIES["llama"], fingerprint=0)
    model = new_adapter("base", shared, head, Lora(8, 16.0, "all"), "critic", seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".B." in name or name.startswith("score_head"):
            parameter.data.normal_(0.0, 0.03, generator=generator)
    return model.to(GPU).requires_grad_(True)


def merged_log_probs(adapted, batch):
    """Those of the base with each product added to its weight, as a function of the adapter."""
    weights = dict(adapted.base.named_parameters())
    for i, pairs in enumerate(adapted.block_pairs(torch.float32)):
        for matrix, pair in pairs._asdict().items():
            name = parameter_of(i, matrix)
            weights[name] = weights[name] + pair.B @ pair.A
    return functional_call(adapted.base, weights, tuple(batch))


def test_an_adapter_has_the_gradients_of_its_merged_model():
    """Else the scale, the order of an adapter's rows or a rounding to bfloat16 may be wrong, and
    the adapter learn something else than its exported folder says."""
    base = make_bf16_model().requires_grad_(False)
    exact = make_bf16_model().float().requires_grad_(False)
    batch = make_batch(LENGTHS)
    results = compute_results(make_adapted(base), batch)
    adapted = make_adapted(exact)

    def log_probs(batch):
        return merged_log_probs(adapted, batch)

    check_agreement(results, compute_results(adapted, batch, log_probs), 0.06)


def test_adapters_that_alternate_compile_nothing():
    """Else each of six adapters would compile the blocks of its base for itself, and reach torch's
    limit."""
    torch._dynamo.reset()
    counters.clear()
    frozen = parallel.Placement(GPU, dtype=BF16, use_compile=True)
    base = make_placed_model(frozen).to(BF16).requires_grad_(False)
    models = [base, make_adapted(base), make_adapted(base, "score"), make_adapted(base, seed=2)]
    for lengths in ([60, 31], [17, 44, 92]):
        score_and_update(models, [make_batch(lengths)])
    score_and_update(models, [make_idle_batch()])
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        score_and_update(models, [make_batch(LENGTHS), make_idle_batch(), make_batch([200])])
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["recompile_limit"] and not graph_breaks()


@pytest.mark.parametrize("is_twin", [True, False])
def test_graphs_sample_from_an_adapter_as_it_is_after_an_update(is_twin, monkeypatch):
    """Else a graph may hold the pairs from before the update, and sample the old policy."""
    adapted = make_adapted(make_bf16_model(vocab_size=97).requires_grad_(False))

    def sample_adapter():
        if not is_twin:  # as sample.py does
            return sample(adapted)
        with parallel.gathered_for_sampling(adapted) as policy:
            return sample(policy)

    before = sample_adapter()
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.mul_(-1.5)
    after = sample_adapter()
    assert after != before
    decode_without_graphs(monkeypatch)
    assert after == sample_adapter()


# ---- precision, layouts and offloading ----


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_the_layouts_of_one_rank_equal_float32_weights_cast_by_hand(layout):
    """Else FSDP2 may lose or repeat a gradient, reduce in bfloat16, or compute in another precision
    than it was asked for."""
    model = make_placed_model(MIXED._replace(layout=layout))
    plain = make_placed_model(parallel.Placement(GPU))
    batch = make_batch(LENGTHS)

    def log_probs_in_bf16(batch):
        weights = {name: parameter.to(BF16) for name, parameter in plain.named_parameters()}
        return functional_call(plain, weights, tuple(batch))

    expected = compute_results(plain, batch, log_probs_in_bf16)
    for _ in range(2):  # before the second time, weights have been gathered and dropped
        check_agreement(compute_results(model, batch), expected, 0.02)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def train(placement, steps):
    """Fine-tune on one batch of random tokens; returns the model and its losses."""
    model = make_placed_model(placement)
    batch = make_batch([40, 64, 23, 51, 38, 64, 9, 30])
    optimizer = optim.make_adamw(model, 0.0, 0.9, 0.95)
    losses = []
    for _ in range(steps):
        loss = mle_loss(model.log_probs(batch, uniform_weights=True), batch.targets >= 0)
        parallel.backward(model, loss)
        norm = optim.guarded_step(model, optimizer, 5e-5, 1.0)
        assert math.isfinite(norm)
        losses.append(loss.item())
    return model, losses


def test_training_in_bfloat16_follows_float32():
    """Else updates may be lost to rounding, where the trained weights, the moments or the gradients
    are not float32."""
    _, in_bf16 = train(MIXED, 30)
    _, in_float32 = train(parallel.Placement(GPU), 30)
    assert max(in_bf16[-1], in_float32[-1]) < 0.7 * in_float32[0], (in_bf16, in_float32)
    for ours, expected in zip(in_bf16, in_float32):
        assert abs(ours - expected) < 0.03 * expected, (in_bf16, in_float32)


def copy_weights(model):
    weights = {}
    for name, parameter in parallel.named_local_parameters(model):
        weights[name] = parallel.full_tensor(parameter).float().cpu()
    return weights


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_an_offloaded_model_is_trained_as_any_other(layout):
    """Else the step on the host may miss a gradient, or the GPU may go on with old weights.

    Updates are compared, not weights: Adam's first update is +-lr, and where a gradient is close to
    zero rounding may turn its sign."""
    model, losses = train(MIXED._replace(layout=layout, offload=True), 2)
    other, expected = train(MIXED._replace(layout=layout), 2)
    assert losses == pytest.approx(expected, rel=0.01)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    before = copy_weights(init_from_scratch(make_config(), seed=3))
    ours, theirs = copy_weights(model), copy_weights(other)
    for name in before:
        update = (theirs[name] - before[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 0.2 * update, name


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_an_offloaded_frozen_model_scores_as_any_other(layout, tmp_path):
    """Else a reference or reward model that waits in host memory may score with wrong weights."""
    path = tmp_path / "model"
    checkpoint.save(init_from_scratch(make_config(), seed=3), path, dtype=BF16)
    placement = parallel.Placement(GPU, layout, BF16, BF16, offload=True)
    frozen = checkpoint.load(path, placement=placement).requires_grad_(False)
    other = checkpoint.load(path, device=GPU).requires_grad_(False)
    batch = make_batch(LENGTHS)
    with torch.no_grad():
        expected = {"logps": other.log_probs(batch)}
        for _ in range(2):
            check_agreement({"logps": frozen.log_probs(batch)}, expected, 0.01)
    devices = {parameter.device.type for _, parameter in parallel.named_local_parameters(frozen)}
    assert devices == {"cpu"}


def test_log_probabilities_with_uniform_weights_equal_the_others():
    """Else the gradients of a mean, which the forward pass computes, may differ from those of any
    other loss in scale, or from block to block.

    The vocabulary is so large that both ways work in two blocks."""
    model = make_bf16_model(vocab_size=64000)
    batch = make_batch([1024, 1000, 1024, 952], 64000)

    def uniform_log_probs(batch):
        return model.log_probs(batch, uniform_weights=True)

    uniform = compute_results(model, batch, uniform_log_probs, of_mean=True)
    check_agreement(uniform, compute_results(model, batch, of_mean=True), 0.03)


def test_logits_are_float32_products_of_bfloat16_operands():
    """Else each log-probability may be wrong by the rounding of a logit to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 256, generator=generator).to(GPU, BF16)
    weight = torch.randn(1000, 256, generator=generator).to(GPU, BF16)
    expected = x.double() @ weight.double().T
    memory = torch.empty(70, 1000, device=GPU)
    for logits in (compute_logits(x, weight), compute_logits(x, weight, out=memory)):
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < 1e-3
    assert compute_logits(x[:0], weight).shape == (0, 1000)  # of a rank without work


def test_the_first_ratio_of_compiled_blocks_is_exactly_one():
    """Else PPO may clip, and learn from, what is only rounding of generated code."""
    actor = make_placed_model(MIXED._replace(use_compile=True))
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 1000, length) for length in (200, 90, 30)]
    responses = Responses(ids, starts=[80, 30, 9], longest=120)
    world = parallel.World(0, 1, GPU, True)
    for lengths in (LENGTHS, [60, 31]):
        compute_results(actor, make_batch(lengths))
    old_logps = response_logps(actor, responses, 1.0, 1000, world, as_in_updates=True)
    rows = [0, 1, 2]
    batch = responses.pack(rows, GPU)
    logps = responses.unpack(actor.log_probs(batch), batch, rows)
    for i, length in enumerate((120, 60, 21)):
        assert torch.equal(logps[i, :length], old_logps[i, :length])


# ---- trainers ----


@pytest.mark.parametrize("name", ["sft", "reward", "ppo_lag"])
def test_trainers_run(name, trainers, tmp_path):
    """Else a trainer may mix devices or types, or its metrics, files or sampling may fail with
    compiled bfloat16 models."""
    run(*trainers[name], f"--out_dir={tmp_path}/run", "--device=cuda", "--max_steps=2")
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
