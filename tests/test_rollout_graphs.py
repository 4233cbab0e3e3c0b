"""CUDA graphs, slots and refills of the sampler, without a GPU: by a stand-in for torch.cuda, by
drawn lengths of responses, and by fake tensors."""

import gc
import random
import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from kernel_counts import KernelCounts
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from nanosafe import attention, model, printing, rollout
from nanosafe.checkpoint import init_from_scratch
from nanosafe.model import Config, LLaMA

GIB = 2**30
EOS = [*range(2, 9)]  # so many that responses end at all lengths
LIMITS = [15 + i % 17 for i in range(40)]
PROMPTS = [[1, *range(3, 3 + 5 * i % 41)] for i in range(40)]


class FakeGPU:
    """What the sampler calls of torch.cuda: memory that is counted, and graphs that are recorded.

    A graph's recording computes nothing; its replay runs the step that was recorded."""

    def __init__(self, monkeypatch):
        self.free = 60 * GIB  # what the driver calls free
        self.total = 80 * GIB
        self.unused = 0  # what torch holds without using it
        self.recording = None  # the graph that is being recorded
        self.captured = []  # (rows, extent) of all graphs
        self.replayed = 0
        self.streams = 0
        self.pools = set()
        gpu = self

        class Stream:
            def __init__(self):
                gpu.streams += 1

            def wait_stream(self, other):
                pass

        class CUDAGraph:
            def capture_begin(self, pool, capture_error_mode):
                gpu.recording = self
                gpu.pools.add(pool)

            def capture_end(self):
                gpu.recording = None

            def replay(self):
                gpu.replayed += 1
                self.step()

        real_decode = rollout.Engine.decode

        def decode(engine, n, extents):
            if not gpu.recording:
                real_decode(engine, n, extents)
                return
            gpu.captured.append((n, extents[0][1]))
            gpu.recording.step = lambda: real_decode(engine, n, extents)

        @contextmanager
        def stream(chosen):
            yield

        current = Stream()
        self.streams = 0
        stand_ins = {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "current_stream": lambda: current,
            "graph_pool_handle": object,
            "empty_cache": self.empty_cache,
            "mem_get_info": lambda device: (self.free, self.total),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(rollout, "has_graphs", lambda device: True)
        monkeypatch.setattr(rollout.Engine, "decode", decode)

    def empty_cache(self):
        self.free += self.unused
        self.unused = 0


@pytest.fixture
def gpu(monkeypatch):
    rollout.capture_stream.cache_clear()
    printing.say_once.cache_clear()
    rollout.kept_engines.clear()
    yield FakeGPU(monkeypatch)
    rollout.capture_stream.cache_clear()
    rollout.kept_engines.clear()


def make_model(**changes):
    return init_from_scratch(small_config(initializer_range=0.3, **changes), seed=4)


def sample(net, slots=0, **options):
    return rollout.generate(net, PROMPTS, LIMITS, eos_ids=EOS, seed=5, slots=slots, **options)


# ---- graphs ----


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"alibi": True}])
def test_decoding_by_graphs_equals_decoding_without(options, changes, monkeypatch):
    net = make_model(**changes)
    expected = sample(net, **options)
    rollout.capture_stream.cache_clear()
    gpu = FakeGPU(monkeypatch)
    for slots in (0, 1, 5, 13):
        assert sample(net, slots, **options) == expected
    assert gpu.replayed > len(gpu.captured) > 5
    rollout.kept_engines.clear()


def test_a_second_rollout_captures_no_graph_again(gpu):
    net = make_model()
    expected = sample(net)
    assert len(gpu.captured) == len(set(gpu.captured))
    captured = len(gpu.captured)
    assert sample(net) == expected
    assert len(gpu.captured) == captured
    assert gpu.streams == 1
    assert len(gpu.pools) == 1


def test_kept_graphs_follow_an_update_in_place(gpu):
    net = make_model()
    before = sample(net)
    captured = len(gpu.captured)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    after = sample(net)
    assert after != before
    rollout.kept_engines.clear()
    assert sample(net) == after
    assert len(gpu.captured) > captured  # those of the last line, which has nothing to keep to


def test_a_normalised_head_follows_an_update_too(gpu):
    net = make_model(norm_head=True)
    sample(net)
    with torch.no_grad():
        net.lm_head.weight[7] += 1.0
    after = sample(net)
    rollout.kept_engines.clear()
    assert sample(net) == after


def test_graphs_are_captured_again_where_weights_have_moved(gpu):
    """A graph would read the memory where they were."""
    net = make_model()
    expected = sample(net)
    captured = len(gpu.captured)
    head = net.lm_head
    head.weight = torch.nn.Parameter(head.weight.clone())
    assert sample(net) == expected
    assert len(gpu.captured) == 2 * captured


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"banned": [9]}, {"with_logps": True}])
def test_graphs_are_captured_again_for_other_options(change, gpu):
    net = make_model()
    sample(net)
    captured = len(gpu.captured)
    sample(net, **change)
    assert len(gpu.captured) > captured


def test_kept_memory_serves_fewer_and_shorter_rows_and_is_replaced_by_more(gpu):
    net = make_model()
    options = {"eos_ids": EOS, "seed": 0}
    rollout.generate(net, PROMPTS[:8], 100, **options)
    engine = rollout.kept_engines[net]
    rollout.generate(net, PROMPTS[:3], 20, **options)
    assert rollout.kept_engines[net] is engine
    rollout.generate(net, PROMPTS[:3], 200, **options)
    longer = rollout.kept_engines[net]
    assert longer is not engine
    rollout.generate(net, PROMPTS[:9], 20, **options)
    assert rollout.kept_engines[net] is not longer


def test_what_is_kept_goes_with_its_model(gpu):
    """As that of a sharded model's twin, which lives for one rollout."""
    net = make_model()
    sample(net)
    assert len(rollout.kept_engines) == 1
    del net
    gc.collect()
    assert len(rollout.kept_engines) == 0


def test_a_large_cache_is_not_kept(gpu):
    gpu.total = 100
    net = make_model()
    sample(net)
    assert len(rollout.kept_engines) == 0


# ---- slots ----


def count_7b_slots(wanted, length):
    """Slots of an Engine of a 7B in bfloat16, without its weights and its cache."""
    config = Config()
    engine = object.__new__(rollout.Engine)
    engine.device = torch.device("cuda")
    engine.uses_graphs = True
    row_bytes = rollout.cache_bytes_per_token(config, torch.bfloat16) * length
    return engine.count_slots_that_fit(row_bytes, wanted)


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_the_second_rollout_of_the_7b_recipe_has_all_its_slots(length, gpu, capsys):
    """After the first update torch holds gradients, gathered weights and activations unused."""
    gpu.free = 12 * GIB
    gpu.unused = 25 * GIB
    assert count_7b_slots(16, length) == 16
    assert capsys.readouterr().out == ""


def test_it_is_said_once_that_memory_is_short(gpu, capsys):
    gpu.free = 4 * GIB
    assert count_7b_slots(16, 512) == 8
    assert count_7b_slots(16, 512) == 8
    printed = capsys.readouterr().out
    assert printed.count("note: 8 responses are decoded at a time, not 16") == 1
    assert "each takes 256 MiB" in printed


# ---- keys that are read, and prefills, of responses of drawn lengths ----


class SimulatedEngine:
    """Counts what an Engine would do. A response ends at each token with probability 1 / mean."""

    device = torch.device("cuda")
    border = 0
    round_extent = rollout.Engine.round_extent

    def __init__(self, prompts, slots, mean, limit):
        self.random = random.Random(0)
        self.mean = mean
        self.slots = min(slots, len(prompts))
        self.extents = [0] * self.slots
        longest = max(len(prompt) for prompt in prompts)
        self.columns = range(64 * -(-(longest + limit) // 64))
        self.prefills = 0
        self.keys_read = 0
        self.live_keys = 0
        self.graphs = set()

    def draw(self, n):
        tokens = []
        for _ in range(n):
            ends = self.random.random() < 1 / self.mean
            tokens.append(2 if ends else 5)
        return rollout.Drawn(tokens)

    def prefill(self, first_row, prompts, keys):
        self.prefills += 1
        for row, prompt in enumerate(prompts, start=first_row):
            self.extents[row] = len(prompt) + 1
        return self.draw(len(prompts))

    def step(self, n):
        rows = min(self.slots, rollout.round_rows(n))
        extent = self.round_extent(n)
        self.graphs.add((rows, extent))
        self.keys_read += rows * extent
        self.live_keys += sum(self.extents[:n])
        for row in range(n):
            self.extents[row] += 1
        return self.draw(n)

    def move(self, source, target):
        self.extents[target] = self.extents[source]


def simulate(prompt_count, slots, mean, limit):
    lengths = random.Random(1)
    prompts = [[1] * lengths.randint(20, 120) for _ in range(prompt_count)]
    engine = SimulatedEngine(prompts, slots, mean, limit)
    limits = [limit] * prompt_count
    scheduler = rollout.Scheduler(engine, prompts, limits, limits, {2}, None, None, "it")
    while scheduler.waiting or scheduler.live:
        scheduler.refill()
        if scheduler.live:
            scheduler.accept(engine.step(len(scheduler.live)), first_row=0)
    assert all(scheduler.responses)
    return engine


def test_a_ppo_rollout_reads_few_keys_that_no_response_has():
    """One rank's share of the 7B recipe: sixteen prompts, with EOS and without."""
    for mean in (200, 10**9):
        engine = simulate(16, 256, mean, 400)
        assert engine.keys_read <= 1.3 * engine.live_keys
        assert len(engine.graphs) < 32


def test_an_evaluation_reads_few_keys_and_is_refilled_in_groups():
    engine = simulate(2000, 256, 200, 512)
    assert engine.keys_read <= 2.6 * engine.live_keys
    assert engine.prefills <= 150
    assert len(engine.graphs) < 80


@pytest.mark.parametrize("slots", [1, 2, 5, 13, 40])
def test_waiting_for_free_rows_changes_no_response(slots, monkeypatch):
    net = make_model()
    expected = sample(net, slots)
    monkeypatch.setattr(rollout, "REFILL_SHARE", 10**9)  # a row is refilled as soon as it is free
    assert sample(net, slots) == expected


@pytest.mark.parametrize("n, rows", [(1, 1), (16, 16), (17, 18), (33, 36), (129, 144), (250, 256)])
def test_a_graph_has_at_most_a_sixteenth_of_spare_rows(n, rows):
    assert rollout.round_rows(n) == rows


# ---- kernels of a decode step ----


@pytest.fixture
def one_kernel_per_operator(monkeypatch):
    """torch's RMSNorm is one kernel on a GPU, and many operators on a CPU."""

    def keep_dtype(x):
        return x.dtype

    def count_once(x, shape, weight, eps):
        return torch.relu(x)

    monkeypatch.setattr(attention, "attention_dtype", keep_dtype)
    monkeypatch.setattr(F, "rms_norm", count_once)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters", lambda self: None)


def count_decode_kernels(layers, rows=16, length=512):
    """Operators of a decode step of a 7B with so many layers: {name: how many}."""
    config = Config(num_hidden_layers=layers)
    nothing_banned = torch.zeros(0, dtype=torch.int64)
    sampling = rollout.Sampling(1.0, 0, 1.0, nothing_banned, with_logps=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            net = LLaMA(config)
            torch.set_default_dtype(torch.float32)
            engine = rollout.Engine(net, rows, rows, length, sampling)
            with KernelCounts() as kernels, torch.no_grad():
                engine.decode(rows, [(slice(0, rows), length)])
    finally:
        torch.set_default_dtype(torch.float32)
    return kernels.counts


def split_decode_kernels():
    """The operators of one block, and those outside of the blocks."""
    one = count_decode_kernels(1)
    block = count_decode_kernels(2) - one
    return block, one - block


def test_a_decode_step_of_a_7b_launches_few_kernels(one_kernel_per_operator):
    """Without torch.compile: 17 a block, and some 60 for sampling and all that is done once."""
    block, outside = split_decode_kernels()
    assert block.total() <= 17, block
    assert outside.total() <= 64, outside


# ---- torch.compile of a decode step ----


@pytest.fixture
def fresh_compiler(monkeypatch):
    """Compiled functions that are new, and multiply as a GPU does: oneDNN's operator is a CPU's."""

    def forget():
        torch._dynamo.reset()
        counters.clear()
        model.compiled_decode_step.cache_clear()
        rollout.compiled_sample_tokens.cache_clear()

    forget()
    monkeypatch.setattr(model, "ONEDNN_ROWS", 0)
    yield
    forget()


ONE_WINDOW_IN_TWO = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("changes", [{}, ONE_WINDOW_IN_TWO, {"alibi": True}])
def test_compiled_decoding_samples_the_same_and_never_reaches_torchs_limit(
    changes, fresh_compiler, gpu, monkeypatch
):
    """torch compiles at most 8 versions of a function. All numbers of rows and of keys share one,
    but that of a single row; its kernels are left out here, which are the same for each of them."""
    compile_function = torch.compile

    def compile_without_kernels(function, dynamic):
        return compile_function(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    net = make_model(**changes)
    expected = sample(net)
    net.compile_decoding = True
    rollout.kept_engines.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for slots in (0, 1, 5, 13):
            assert sample(net, slots) == expected
    assert not counters["graph_break"], counters
    versions_of_both_functions = counters["stats"]["unique_graphs"]
    assert 2 <= versions_of_both_functions <= 9


def count_compiled_kernels(function, *arguments):
    """Kernels of a function as torch compiles it for a CPU: its outermost loops, and its calls of
    operators such as matrix products."""
    with torch.no_grad():
        _, codes = run_and_get_code(function, *arguments)
    (code,) = codes
    calls = code[code.index("def call(") :]
    count = len(re.findall(r"^.*(?:extern_kernels|torch\.ops)\.\S+\(", calls, re.MULTILINE))
    for kernel in code.split("async_compile.cpp_pybinding")[1:]:
        source = kernel.split("''')")[0]
        depths = [len(spaces) for spaces in re.findall(r"^( *)for\(", source, re.MULTILINE)]
        count += depths.count(min(depths))
    return count


@pytest.mark.slow
def test_a_compiled_decode_step_of_a_7b_launches_at_most_400_kernels(
    one_kernel_per_operator, fresh_compiler, monkeypatch
):
    """As torch compiles it for a CPU, with halves joined in one kernel, as it does for a GPU."""
    _, outside = split_decode_kernels()
    logits = torch.zeros(16, 32000, dtype=torch.bfloat16)
    u = torch.zeros(16, dtype=torch.float64)
    sampling = rollout.Sampling(1.0, 0, 1.0, torch.zeros(0, dtype=torch.int64), with_logps=True)
    with KernelCounts() as sampling_kernels:
        rollout.sample_tokens(logits, u, *sampling)
    everything_else = outside.total() - sampling_kernels.counts.total()
    monkeypatch.undo()

    monkeypatch.setattr(attention, "attention_dtype", lambda x: x.dtype)
    net = make_model(num_key_value_heads=4).bfloat16()
    engine = rollout.Engine(net, slots=16, wanted=16, length=128, sampling=sampling)
    seen = engine.columns <= engine.positions[:, None]
    groups = [attention.RowGroup(slice(0, 16), seen[:, None, None])]
    layout = attention.DecodeBatch(engine.positions, engine.rows, groups)
    x = torch.zeros(16, net.config.hidden_size, dtype=torch.bfloat16)
    layout = attention.layouts_of_layers(layout, net.windows, net.config, x)[0]
    cos, sin = net.rope.rotations(layout, x)[0]
    step = model.compiled_decode_step()
    sampling_step = rollout.compiled_sample_tokens()
    with torch._inductor.config.patch(force_pointwise_cat=True):
        block = count_compiled_kernels(step, net.layers[0], x, cos, sin, layout, engine.caches[0])
        of_sampling = count_compiled_kernels(sampling_step, logits, u, *sampling)
    counts = block, of_sampling, everything_else
    assert 32 * block + of_sampling + everything_else <= 400, counts
