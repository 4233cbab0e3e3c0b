"""Compiled blocks on the CPU, with the attention operator that a GPU has: how many versions of a
block torch.compile makes, and that they train as uncompiled ones do.

The backend aot_eager traces and partitions as on a GPU, and generates no code."""

import shutil
from weakref import WeakSet

import numpy as np
import pytest
import torch
from conftest import rows_of, small_config
from emulated_varlen import emulate_gpu_attention
from in_process import run_in_process
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from nanosafe import attention, inference, parallel
from nanosafe.checkpoint import init_from_scratch
from nanosafe.data.batching import collate
from nanosafe.losses import actor_loss, mle_loss
from nanosafe.model import LLaMA
from nanosafe.rollout import sample_tokens

CPU = torch.device("cpu")
WORLD = parallel.World(rank=0, size=1, device=CPU, main=True)
TRAINED = parallel.Placement(CPU, "ddp", torch.float32, torch.bfloat16, use_compile=True)
FROZEN = TRAINED._replace(dtype=torch.bfloat16)
LENGTHS = [[40, 31, 9], [17, 44], [25, 60, 3, 8]]  # of the sequences in three micro-batches
WIDTHS = {"one size": (32, 32, 32), "three sizes": (32, 64, 96)}  # of actor, reward, cost models
pytestmark = pytest.mark.usefixtures("end_process_group")


@pytest.fixture(autouse=True)
def gpu_attention(monkeypatch):
    """Packed attention as on a GPU, and no version of a block from an earlier test."""
    emulate_gpu_attention(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, which shard_model() raises
        yield
    torch._dynamo.reset()


def compile_with(backend, monkeypatch):
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend=backend))


def make_model(placement, head="lm", width=32, seed=1, **changes):
    config = small_config(hidden_size=width, num_hidden_layers=3, **changes)
    return init_from_scratch(config, head, seed=seed, placement=placement)


def make_batch(lengths, vocab_size=97):
    """A Batch of random tokens, the second half of each sequence being targets."""
    generator = np.random.default_rng(sum(lengths))
    sequences, masks = [], []
    for length in lengths:
        sequences.append(generator.integers(3, vocab_size, length))
        masks.append(np.arange(length) >= length // 2)
    return collate(sequences, masks, "cpu")


def make_responses():
    """Five prompts with responses, of random tokens."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 97, length) for length in (8, 9, 30, 11, 17)]
    return inference.Responses(ids, starts=[3, 1, 9, 4, 2], longest=21)


# ---- the operator ----


@pytest.mark.parametrize("window", [0, 6])
def test_the_emulated_operator_equals_the_padded_path(window, monkeypatch):
    """Values and gradients, with shared kv heads: the other tests of this file rest on it."""
    lengths = [12, 1, 30]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(43, 4, 8, generator=generator)
    k, v = torch.randn(2, 43, 2, 8, generator=generator)
    direction = torch.randn(43, 4, 8, generator=generator)
    cu_seqlens = torch.tensor([0, 12, 13, 43], dtype=torch.int32)
    layout = attention.pack(cu_seqlens, max(lengths), 43)
    mask = None
    if window:
        positions = torch.arange(30)
        distance = positions[:, None] - positions
        mask = attention.attention_mask(distance, window, None, torch.float32)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.float32:
            out = layout._replace(window=window, mask=mask).attend(*inputs, None)
        else:
            out = layout._replace(window=window).attend(*inputs, None)
            assert "Varlen" in type(out.grad_fn).__name__ or "varlen" in out.grad_fn.name()
        gradients = torch.autograd.grad((out * direction).sum(), inputs)
        results[dtype] = [out, *gradients]
    for exact, rounded in zip(*results.values()):
        assert (exact - rounded.float()).norm() < 0.02 * exact.norm()


def test_the_emulated_operator_refuses_what_a_gpu_refuses():
    layout = attention.pack(torch.tensor([0, 3], dtype=torch.int32), 3, 3)
    q = torch.zeros(3, 4, 12, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        layout.attend_packed(q, q, q)


# ---- how many versions of a block there are ----


def score(model, lengths):
    """What a rollout needs of a model that it does not update: a forward without gradients."""
    with torch.no_grad():
        run_forward(model, lengths)


def update(model, lengths, uniform_weights=False):
    """A micro-batch of a model's update."""
    out = run_forward(model, lengths, uniform_weights)
    parallel.backward(model, out.sum())


def run_forward(model, lengths, uniform_weights=False):
    batch = make_batch(lengths)
    if model.head == "score":
        return model.scores(batch)
    return model.log_probs(batch, uniform_weights=uniform_weights)


class PPOLagModels:
    """The six models of PPO-Lag, and an iteration's forwards in the trainer's order."""

    def __init__(self, widths):
        policy_width, reward_width, cost_width = widths
        self.actor = make_model(TRAINED, width=policy_width)
        self.ref = make_model(FROZEN, width=policy_width).requires_grad_(False)
        self.reward_model = make_model(FROZEN, "score", reward_width).requires_grad_(False)
        self.reward_critic = make_model(TRAINED, "score", reward_width)
        self.cost_model = make_model(FROZEN, "score", cost_width).requires_grad_(False)
        self.cost_critic = make_model(TRAINED, "score", cost_width)
        self.versions = {}  # of each model's blocks: those that its forwards have added

    def count(self, model, run, lengths, **options):
        before = counters["stats"]["unique_graphs"]
        run(model, lengths, **options)
        added = counters["stats"]["unique_graphs"] - before
        self.versions[model] = self.versions.get(model, 0) + added

    def iterate(self, micro_batches, responses):
        before = counters["stats"]["unique_graphs"]
        inference.response_logps(self.actor, responses, 1.0, 40, WORLD, as_in_updates=True)
        added = counters["stats"]["unique_graphs"] - before
        self.versions[self.actor] = self.versions.get(self.actor, 0) + added
        for model in (self.ref, self.reward_model, self.reward_critic):
            for lengths in micro_batches:
                self.count(model, score, lengths)
        for model in (self.cost_model, self.cost_critic):
            for lengths in micro_batches:
                self.count(model, score, lengths)
        for lengths in micro_batches:
            for model in (self.actor, self.reward_critic, self.cost_critic):
                self.count(model, update, lengths)
        for lengths in micro_batches:
            self.count(self.actor, update, lengths, uniform_weights=True)  # ptx


@pytest.mark.slow
@pytest.mark.parametrize("sizes", WIDTHS)
def test_a_block_has_at_most_four_compiled_versions_in_ppo_lag(sizes, monkeypatch):
    """Static and dynamic lengths, without gradients of trained and of frozen models, also with a
    rank that is idle, and where reward and cost models have other sizes than the actor."""
    compile_with("aot_eager", monkeypatch)
    models = PPOLagModels(WIDTHS[sizes])
    responses = make_responses()
    idle = [[]]
    long_ones = [[30] * 30, [2], [1, 1, 1]]
    models.iterate(LENGTHS, responses)
    models.iterate(idle, responses)
    models.iterate(long_ones, responses)
    assert max(models.versions.values()) <= 4
    if sizes == "one size":
        assert counters["stats"]["unique_graphs"] <= 4  # of all models together
    limit = torch._dynamo.config.recompile_limit
    assert counters["stats"]["unique_graphs"] <= limit / 4
    assert not counters["recompile_limit"]
    assert not counters["graph_break"]
    before = counters["stats"]["unique_graphs"]
    models.iterate([[11, 50], [7]], responses)
    assert counters["stats"]["unique_graphs"] == before  # nothing is compiled any more


# ---- the first ratio ----


def test_old_log_probs_run_the_version_that_updates_run(monkeypatch):
    """And no version is made for them; with as_in_updates=False there would be one more."""
    compile_with("aot_eager", monkeypatch)
    actor = make_model(TRAINED)
    for lengths in LENGTHS:
        update(actor, lengths)
    before = counters["stats"]["unique_graphs"]
    responses = make_responses()
    logps = inference.response_logps(actor, responses, 1.0, 40, WORLD, as_in_updates=True)
    assert not logps.requires_grad
    assert counters["stats"]["unique_graphs"] == before
    inference.response_logps(actor, responses, 1.0, 40, WORLD)
    assert counters["stats"]["unique_graphs"] == before + 1


def test_old_log_probs_as_in_updates_keep_no_graph():
    """What one micro-batch has saved for a backward pass is gone before the next one begins."""
    actor = make_model(TRAINED._replace(use_compile=False))
    saved = WeakSet()  # what the graphs that live have saved
    counts_before, counts_after = [], []  # each forward

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its graph it would keep itself alive
            saved.add(self)

    def count_around_forward(*inputs):
        counts_before.append(len(saved))
        out = LLaMA.log_probs(actor, *inputs)
        counts_after.append(len(saved))
        return out

    actor.log_probs = count_around_forward
    with saved_tensors_hooks(Saved, lambda packed: packed.tensor):
        inference.response_logps(actor, make_responses(), 1.0, 40, WORLD, as_in_updates=True)
    assert counts_before == [0, 0, 0]
    assert min(counts_after) > 10
    assert len(saved) == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler")
def test_the_first_ratio_of_compiled_blocks_is_exactly_one(monkeypatch):
    """Generated code rounds otherwise with gradients than without: log-probabilities from the
    version without them would differ by some hundredths."""
    compile_with("inductor", monkeypatch)
    actor = make_model(TRAINED, width=64, initializer_range=1 / 8)
    responses = make_responses()
    for lengths in LENGTHS:
        update(actor, lengths)  # from here on the blocks are compiled, with variable lengths
    old_logps = inference.response_logps(actor, responses, 1.0, 99, WORLD, as_in_updates=True)
    without_gradients = inference.response_logps(actor, responses, 1.0, 99, WORLD)
    # One micro-batch holds all of them, the longest first: as in the update of one minibatch.
    order = sorted(range(5), key=lambda i: -len(responses.ids[i]))
    batch = responses.pack(order, CPU)
    logps = responses.unpack(actor.log_probs(batch), batch, order)
    lengths = torch.tensor([len(responses.ids[i]) - responses.starts[i] for i in order])
    mask = (torch.arange(responses.longest) < lengths[:, None]).float()
    ratio = (logps - old_logps[order]).exp()
    assert (ratio[mask.bool()] == 1).all()
    assert not torch.equal(logps[mask.bool()], without_gradients[order][mask.bool()])
    # At a ratio of 1 the loss is minus the mean advantage.
    loss = actor_loss(logps, old_logps[order], torch.ones_like(mask), mask, 0.2, 0.2)
    assert loss.item() == -1


@pytest.mark.slow
def test_ppo_lag_runs_with_compiled_blocks_in_bfloat16(trainers, tmp_path, monkeypatch, capsys):
    """The trainer as it runs on a GPU, attention and compilation included: its first ratio is 1.

    A block has versions with gradients, without, and with frozen parameters. Each may be compiled
    twice, where the first micro-batches happen to have equal lengths or as many sequences. The
    sampler's steps, which have versions of their own, are not compiled here."""
    compile_with("aot_eager", monkeypatch)

    def plain_decode_step(block, *inputs):
        return block.forward(*inputs)

    monkeypatch.setattr("nanosafe.model.compiled_decode_step", lambda: plain_decode_step)
    monkeypatch.setattr("nanosafe.rollout.compiled_sample_tokens", lambda: sample_tokens)
    choose_placements = parallel.choose_placements

    def choose_compiled(*arguments):
        trained, frozen = choose_placements(*arguments)
        compiled = trained._replace(use_compile=True)
        return parallel.Placements(compiled, frozen._replace(use_compile=True))

    monkeypatch.setattr(parallel, "choose_placements", choose_compiled)
    monkeypatch.setattr(parallel, "close", lambda: None)  # it would end this process
    run_in_process(
        *trainers["ppo_lag"],
        f"--out_dir={tmp_path / 'run'}",
        "--dtype=bfloat16",
        "--batch_size=8",  # one update for each rollout
        "--max_tokens=200",  # several micro-batches
        "--max_steps=2",
        monkeypatch=monkeypatch,
        capsys=capsys,
    )
    for row in rows_of(tmp_path / "run" / "metrics.jsonl"):
        assert row["ratio"] == 1
        assert row["approx_kl"] == 0
    assert 3 <= counters["stats"]["unique_graphs"] <= 6
    assert not counters["recompile_limit"]


# ---- gradients ----

ARRANGEMENTS = {  # name -> layout, use_compile, activation_checkpointing, uniform_weights
    "compiled": ("ddp", True, False, False),
    "checkpointed": ("ddp", False, True, False),
    "compiled and checkpointed": ("ddp", True, True, False),
    "slices, compiled and checkpointed": ("fsdp", True, True, False),
    "uniform weights": ("fsdp", True, True, True),
}


def gradients_of(layout, use_compile, activation_checkpointing, uniform_weights):
    placement = TRAINED._replace(
        layout=layout,
        use_compile=use_compile,
        activation_checkpointing=activation_checkpointing,
    )
    model = make_model(placement)
    for k, lengths in enumerate(LENGTHS):
        score(model, lengths)
        batch = make_batch(lengths)
        logps = model.log_probs(batch, uniform_weights=uniform_weights)
        loss = mle_loss(logps, batch.targets >= 0)
        parallel.backward(model, loss, last=k == len(LENGTHS) - 1)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parallel.full_tensor(parameter.grad).clone()
    return gradients


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_compiled_and_checkpointed_blocks_have_the_gradients_of_plain_ones(
    arrangement, monkeypatch
):
    """Over three micro-batches, with forwards without gradients in between."""
    compile_with("aot_eager", monkeypatch)
    expected = gradients_of("ddp", False, False, False)
    gradients = gradients_of(*ARRANGEMENTS[arrangement])
    tolerance = 0.02 if arrangement == "uniform weights" else 0.005
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm()
        assert difference <= tolerance * expected[name].norm(), name


def test_a_whole_model_equals_itself_on_the_padded_path(monkeypatch):
    """A model in bfloat16 with packed attention against the same in float32 with padding."""
    model = init_from_scratch(small_config(), seed=3)
    batch = make_batch([40, 9, 2])
    expected = model.log_probs(batch)
    logps = model.to(torch.bfloat16).log_probs(batch)
    assert (logps - expected).abs().mean() < 0.02
