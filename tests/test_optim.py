"""Moments in bfloat16: the rounding, AdamW with it, states, and ranks."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows_of, run, same_state, small_config
from safetensors.torch import load_file
from torch import nn

from nanosafe import checkpoint, optim
from nanosafe.checkpoint import run_state
from nanosafe.tools.toy_world import find_latest_state

ALL_HALVES = torch.arange(2**16, dtype=torch.int32)  # every value that 16 random bits can have


def round_with_all_bits(x):
    """What a number becomes with each of the 65,536 values of the random bits."""
    return optim.round_stochastically(torch.full((2**16,), x), ALL_HALVES).float()


# ---- the rounding ----


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("lower_half", [0, 1, 2**14, 2**15, 2**16 - 1])
def test_a_number_is_rounded_up_by_as_many_bits_as_it_lies_above_its_neighbour(lower_half, sign):
    """Between 1 and 2 neighbours in bfloat16 differ by 2^-7, and float32 knows 65,536 steps."""
    x = sign * (1 + lower_half * 2.0**-23)
    rounded = round_with_all_bits(x)
    assert set(rounded.tolist()) <= {sign, sign * (1 + 2.0**-7)}
    assert (rounded != sign).sum() == lower_half


@pytest.mark.parametrize("x", [math.pi, -1e-30, 3e-39, 12345.678, 1.0e-45, -0.999999])
def test_the_mean_over_all_bits_is_the_number_itself(x):
    """1e-45 and 3e-39 are subnormal, and -0.999999 may be rounded across a power of two."""
    x = torch.tensor(x).item()  # as float32 has it
    mean = round_with_all_bits(x).double().mean().item()
    assert mean == pytest.approx(x, rel=1e-12, abs=0)


@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -3.5, math.inf, -math.inf])
def test_what_bfloat16_can_hold_is_not_rounded(x):
    rounded = round_with_all_bits(x)
    assert (rounded == x).all()
    assert (rounded.signbit() == torch.tensor(x).signbit()).all()


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1])
def test_nan_stays_nan_whatever_its_bits(pattern):
    """A GPU's NaN has all bits set: a carry out of it would make -0."""
    x = torch.tensor([pattern], dtype=torch.int32).view(torch.float32).expand(2**16).contiguous()
    assert x.isnan().all()
    assert optim.round_stochastically(x, ALL_HALVES).isnan().all()


def test_the_largest_numbers_are_rounded_to_infinity_or_down():
    largest = torch.finfo(torch.float32).max
    rounded = round_with_all_bits(largest)
    assert set(rounded.tolist()) == {torch.finfo(torch.bfloat16).max, math.inf}


# ---- the random bits ----


def hash_in_python(number):
    """lowbias32 by its definition, on Python's integers."""
    h = number % 2**32
    h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
    h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
    return h ^ (h >> 16)


@pytest.mark.parametrize("counter", [0, 12345, 2**31 - 3, 2**32 - 2])
def test_bits_are_the_hash_of_their_number_also_where_int32_wraps_around(counter):
    bits = optim.draw_bits(optim.wrap_int32(counter), 6, "cpu")
    expected = [optim.wrap_int32(hash_in_python(counter + i)) for i in range(6)]
    assert bits.tolist() == expected


def test_both_halves_of_the_bits_are_uniform_and_independent():
    """Each bit is set in half of 2^20 numbers, within five standard errors, and no two bits of the
    halves agree more often than that."""
    count = 2**20
    bits = optim.draw_bits(0, count, "cpu")
    columns = [((bits >> k) & 1).double() for k in range(32)]
    ones = torch.stack(columns)
    five_errors = 5 * 0.5 / math.sqrt(count)
    assert ((ones.mean(1) - 0.5).abs() < five_errors).all()
    agreement = (2 * ones - 1) @ (2 * ones - 1).T / count
    between_halves = agreement[:16, 16:]
    assert (between_halves.abs() < 2 * five_errors).all()


# ---- why it is stochastic ----


# A parameter whose gradient is 0 from now on: its second moment should fall as beta2^steps.


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_a_second_moment_decays_as_it_should(beta2):
    size = 10_000
    steps = round(2 / (1 - beta2))  # until about e^-2 of it is left
    moment = torch.ones(size, dtype=torch.bfloat16)
    for step in range(steps):
        bits = optim.draw_bits(step * size, size, "cpu") & 0xFFFF
        moment = optim.round_stochastically(moment.float() * beta2, bits)
    assert moment.float().mean().item() == pytest.approx(beta2**steps, rel=0.005)


@pytest.mark.parametrize("start", [1.0, 1.5, 1.9921875])
def test_a_second_moment_that_is_rounded_to_the_nearest_sticks(start):
    """A thousandth is less than half of the distance to the next bfloat16, which is at least 1/256
    of the number: after 2000 steps nothing has moved, where 1/e^2 should be left."""
    moment = torch.tensor(start, dtype=torch.bfloat16)
    for _ in range(2000):
        moment = (moment.float() * 0.999).to(torch.bfloat16)
    assert moment == start


# ---- AdamW ----


def make_layers(moments, **options):
    """Two linear layers, whose initial weights are always the same, and their optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7))
    return model, optim.make_adamw(model, 0.1, 0.9, 0.95, moments, **options)


def set_gradients(model, step):
    torch.manual_seed(100 + step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def train(model, optimizer, steps):
    for step in range(steps):
        set_gradients(model, step)
        optim.guarded_step(model, optimizer, 1e-2, 1.0)


def copy_moments(model, optimizer):
    return [optimizer.state[p][name] for p in model.parameters() for name in run_state.MOMENTS]


def all_equal(tensors, others):
    return all(map(torch.equal, tensors, others))


def test_the_first_step_is_that_of_torch():
    """The moments before it are 0, which bfloat16 holds exactly."""
    model, optimizer = make_layers("bfloat16")
    expected, its_optimizer = make_layers("float32")
    train(model, optimizer, 1)
    train(expected, its_optimizer, 1)
    for parameter, other in zip(model.parameters(), expected.parameters()):
        assert torch.allclose(parameter, other, rtol=0, atol=3e-8)


def test_later_steps_differ_from_those_of_torch_by_the_rounding_only():
    """One rounding is off by less than 2^-7 of the number. A moment remembers several of them."""
    model, optimizer = make_layers("bfloat16")
    expected, its_optimizer = make_layers("float32")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, 20)
    train(expected, its_optimizer, 20)
    for parameter, other, start in zip(model.parameters(), expected.parameters(), before):
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
        assert optimizer.state[parameter]["exp_avg_sq"].dtype == torch.bfloat16
        difference = (parameter - other).norm()
        assert 0 < difference < 2**-6 * (other - start).norm()
        for name in run_state.MOMENTS:
            moment = optimizer.state[parameter][name].float()
            exact = its_optimizer.state[other][name]
            assert 0 < (moment - exact).norm() < 2**-6 * exact.norm(), name


def test_the_update_does_not_depend_on_how_elements_are_cut_into_slices(monkeypatch):
    model, optimizer = make_layers("bfloat16")
    train(model, optimizer, 3)
    monkeypatch.setitem(optim.SLICE, "cpu", 17)
    other, its_optimizer = make_layers("bfloat16")
    train(other, its_optimizer, 3)
    assert all_equal(model.parameters(), other.parameters())
    assert all_equal(copy_moments(model, optimizer), copy_moments(other, its_optimizer))


def test_another_seed_rounds_otherwise():
    model, optimizer = make_layers("bfloat16", seed=0)
    other, its_optimizer = make_layers("bfloat16", seed=1)
    train(model, optimizer, 2)
    train(other, its_optimizer, 2)
    assert not all_equal(copy_moments(model, optimizer), copy_moments(other, its_optimizer))


def test_a_skipped_step_and_a_parameter_without_gradient_change_nothing():
    model, optimizer = make_layers("bfloat16")
    train(model, optimizer, 2)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [moment.clone() for moment in copy_moments(model, optimizer)]
    set_gradients(model, 2)
    model[0].weight.grad[0, 0] = math.nan
    assert math.isnan(optim.guarded_step(model, optimizer, 1e-2, 1.0))
    optim.guarded_step(model, optimizer, 1e-2, 1.0)  # no gradients are left
    assert all_equal(model.parameters(), weights)
    assert all_equal(copy_moments(model, optimizer), moments)
    assert run_state.count_optimizer_steps(optimizer) == 2


def test_a_rank_without_a_row_of_a_parameter_updates_nothing_there():
    model = nn.Module()
    model.empty = nn.Parameter(torch.zeros(0, 4))
    optimizer = optim.make_adamw(model, 0.0, 0.9, 0.95, "bfloat16")
    train(model, optimizer, 2)
    assert optimizer.state[model.empty]["exp_avg"].shape == (0, 4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_the_compiled_update_computes_the_same_and_is_not_compiled_for_each_length():
    torch._dynamo.reset()
    optim.compile_update.cache_clear()
    shapes = [(60, 50), (300,), (7, 9), (5000,)]
    for step, shape in enumerate(shapes):
        end = 40 + 5 * step
        tensors = make_tensors(shape)
        expected = [tensor.clone() for tensor in tensors]
        numbers = optim.compute_factors(step + 1, 1e-3, 0.1, 0.9, 0.95), (0.9, 0.95), 1000 * step
        optim.update_elements(*[tensor.view(-1)[3:end] for tensor in expected], *numbers)
        # A matrix and a vector are two kinds of views: each is compiled once.
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            optim.compile_update()(*[tensor.view(-1)[3:end] for tensor in tensors], *numbers)
        for tensor, other in zip(tensors, expected):
            assert torch.allclose(tensor.float(), other.float(), rtol=2**-7, atol=1e-6)


def make_tensors(shape):
    """Weights, gradients and both moments of one shape."""
    weights, gradients, first, second = torch.randn(4, *shape)
    return weights, gradients, first.bfloat16(), second.square().bfloat16()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_compile", [False, True])
def test_a_gpu_updates_as_a_cpu_does(use_compile):
    """The random bits are the same integers, so the moments are, where float32 rounds alike."""
    update = optim.compile_update() if use_compile else optim.update_elements
    assert torch.equal(optim.draw_bits(7, 5000, "cuda").cpu(), optim.draw_bits(7, 5000, "cpu"))
    tensors = make_tensors((5000,))
    on_gpu = [tensor.cuda() for tensor in tensors]
    factors = optim.compute_factors(3, 1e-3, 0.1, 0.9, 0.95)
    optim.update_elements(*tensors, factors, (0.9, 0.95), 7)
    update(*on_gpu, factors.cuda(), (0.9, 0.95), 7)
    for tensor, expected in zip(on_gpu, tensors):
        assert torch.allclose(tensor.cpu().float(), expected.float(), rtol=2**-7, atol=1e-6)
    for moment, expected in zip(on_gpu[2:], tensors[2:]):
        assert (moment.cpu() == expected).float().mean() > 0.99


# ---- states ----


def make_run(seed=1, moments="bfloat16"):
    """A small model with its optimizer, by the names that a state knows them by."""
    model = checkpoint.init_from_scratch(small_config(), seed=seed)
    return {"model": model}, {"model": optim.make_adamw(model, 0.1, 0.9, 0.95, moments)}


def continue_run(models, optimizers, first, last):
    for step in range(first, last):
        set_gradients(models["model"], step)
        optim.guarded_step(models["model"], optimizers["model"], 1e-2, 1.0)


def test_a_state_has_moments_in_bfloat16_and_continues_bit_by_bit(tmp_path):
    models, optimizers = make_run()
    continue_run(models, optimizers, 0, 3)
    run_state.save(tmp_path, 3, models, optimizers, {})
    continue_run(models, optimizers, 3, 6)

    saved = load_file(tmp_path / "state" / "step_000003" / "rank_00000_model.safetensors")
    kinds = {"weight": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    for key, tensor in saved.items():
        assert tensor.dtype == kinds[key.rpartition("/")[2]], key

    resumed, its_optimizers = make_run(seed=2)
    run_state.load(tmp_path, resumed, its_optimizers)
    continue_run(resumed, its_optimizers, 3, 6)
    assert all_equal(models["model"].parameters(), resumed["model"].parameters())
    expected = copy_moments(models["model"], optimizers["model"])
    assert all_equal(copy_moments(resumed["model"], its_optimizers["model"]), expected)


@pytest.mark.parametrize("before, after", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_may_go_on_with_other_moments(before, after, tmp_path):
    models, optimizers = make_run(moments=before)
    continue_run(models, optimizers, 0, 3)
    run_state.save(tmp_path, 3, models, optimizers, {})
    resumed, its_optimizers = make_run(seed=2, moments=after)
    run_state.load(tmp_path, resumed, its_optimizers)
    moments = copy_moments(resumed["model"], its_optimizers["model"])
    dtype = getattr(torch, after)
    for moment, saved in zip(moments, copy_moments(models["model"], optimizers["model"])):
        assert moment.dtype == dtype
        assert torch.equal(moment, saved.to(dtype))
    continue_run(resumed, its_optimizers, 3, 4)


SLOW_TRAINERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "ppo_lag")]


@pytest.mark.parametrize("name", ["sft", *SLOW_TRAINERS])
def test_a_resumed_trainer_is_bit_equal_to_one_that_never_stopped(name, trainers, tmp_path):
    flags = [*trainers[name], "--moments=bfloat16", "--keep=9"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(*flags, f"--out_dir={whole}")
    shutil.copytree(whole, resumed)
    (resumed / "state" / "latest").write_text("step_000004\n")  # as if it had died after step 4
    run(*flags, f"--out_dir={resumed}", "--resume=True")
    assert same_state(whole, resumed)


def test_an_unknown_kind_of_moments_stops_a_trainer_with_one_line(trainers, tmp_path):
    flags = [*trainers["sft"], f"--out_dir={tmp_path}/a", "--moments=float16"]
    done = run(*flags, check=False)
    assert done.returncode == 1
    assert "moments='float16'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# ---- ranks ----

LAYOUTS = [(2, "ddp"), (2, "fsdp"), pytest.param(3, "fsdp", marks=pytest.mark.slow)]


@pytest.mark.parametrize("ranks, layout", LAYOUTS)
def test_a_row_is_updated_alike_on_whichever_rank_it_lies(ranks, layout, tmp_path):
    """Given gradients, so that no sum over ranks is rounded otherwise. The run then goes on, on one
    rank, from the state that several have saved."""
    script = f"{ROOT}/tests/moments_on_ranks.py"
    run(script, "plain", 3, tmp_path / "whole")
    run(script, layout, 3, tmp_path / "cut", ranks=ranks)
    assert read_rows(tmp_path / "cut") == read_rows(tmp_path / "whole")
    run(script, "plain", 6, tmp_path / "whole")
    run(script, "plain", 6, tmp_path / "cut")
    assert read_rows(tmp_path / "cut") == read_rows(tmp_path / "whole")


def read_rows(out_dir):
    """{tensor: its rows as bytes} of a run's last state, from the files of all ranks."""
    rows = {}
    for path in sorted(Path(find_latest_state(out_dir)).glob("rank_*.safetensors")):
        for key, tensor in load_file(path).items():
            rows[key] = rows.get(key, b"") + tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_trainer_on_two_ranks_learns_what_one_process_learns(layout, trainers, tmp_path):
    flags = [*trainers["sft"], "--moments=bfloat16"]
    run(*flags, f"--out_dir={tmp_path}/one")
    run(*flags, f"--out_dir={tmp_path}/two", f"--parallel={layout}", ranks=2)
    rows = rows_of(tmp_path / "one" / "metrics.jsonl")
    for row, other in zip(rows, rows_of(tmp_path / "two" / "metrics.jsonl"), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=2e-3)
    assert find_latest_state(tmp_path / "two").endswith("step_000006")
