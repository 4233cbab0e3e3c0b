"""Gradients, weights, samples and files do not depend on ranks, layout or micro-batches."""

import os
from unittest.mock import patch

import pytest
import torch
from conftest import run
from safetensors.torch import load_file

from nanosafe import checkpoint, parallel

CASES = {  # name -> ranks, layout, max_tokens
    "plain, small micro-batches": (0, "plain", 200),
    "ddp": (2, "ddp", 4096),
    "fsdp": (2, "fsdp", 4096),
    "fsdp, small micro-batches": (2, "fsdp", 200),
    "one rank": (1, "fsdp", 4096),
}


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """The path of what one process computes: tensors, and beside them a model's folder."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run("tests/gradients.py", world, "plain", 4096, out)
    return out


def is_close(tensor, expected, tolerance):
    """Whether the norm of the difference is within a share of the expected tensor's norm."""
    difference = (tensor.float() - expected.float()).norm()
    return difference <= tolerance * expected.float().norm() + 1e-9


@pytest.mark.parametrize("case", CASES)
def test_gradients_weights_and_samples_are_those_of_one_process(case, world, reference, tmp_path):
    ranks, layout, max_tokens = CASES[case]
    out = tmp_path / "out"
    run("tests/gradients.py", world, layout, max_tokens, out, ranks=ranks)
    tensors, expected = load_file(out), load_file(reference)
    assert tensors.keys() == expected.keys()
    assert len(expected) > 40
    for name in expected:
        # Adam divides a gradient by its own size: where that is rounding noise, so is the step.
        tolerance = 2e-4 if name.startswith(("after", "new")) else 1e-5
        assert is_close(tensors[name], expected[name], tolerance), name
    model, expected_model = checkpoint.load(f"{out}.model"), checkpoint.load(f"{reference}.model")
    for parameter, other in zip(model.parameters(), expected_model.parameters()):
        assert torch.allclose(parameter, other, atol=1e-5)


TWO_NODES = """
import os, runpy, sys

os.environ["LOCAL_WORLD_SIZE"] = "2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("max_tokens", [4096, 200])
def test_hsdp_on_two_nodes_of_two_ranks_has_the_gradients_of_one_process(
    max_tokens, world, reference, tmp_path
):
    """Copies on different nodes exchange their gradients in the last micro-batch only."""
    script = tmp_path / "two_nodes.py"
    script.write_text(TWO_NODES)
    out = tmp_path / "out"
    run(script, "tests/gradients.py", world, "hsdp", max_tokens, out, ranks=4)
    tensors = load_file(out)
    for name, expected in load_file(reference).items():
        if not name.startswith(("after", "new")):
            assert is_close(tensors[name], expected, 1e-5), name


ONE = parallel.World(0, 1, torch.device("cpu"), True)
TWO = parallel.World(0, 2, torch.device("cpu"), True)


def choose_placements(world, dtype, layout, offload, parameters=10**6):
    return parallel.choose_placements(world, dtype, layout, offload, False, False, parameters)


def test_auto_chooses_a_layout_for_the_ranks_and_the_size():
    assert choose_placements(ONE, "auto", "auto", "none").trained.layout == "plain"
    assert choose_placements(ONE, "bfloat16", "auto", "none").trained.layout == "ddp"
    trained, frozen = choose_placements(TWO, "auto", "auto", "none")
    assert (trained.layout, frozen.layout) == ("ddp", "plain")
    large = choose_placements(TWO, "auto", "auto", "none", parameters=10**10)
    assert large.frozen.layout == "fsdp"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((ONE, "float16", "auto", "none"), "float16.*overflows"),
        ((ONE, "half", "auto", "none"), "dtype='half'"),
        ((ONE, "auto", "zero3", "none"), "parallel='zero3'"),
        ((TWO, "auto", "plain", "none"), "one of 2"),
        ((ONE, "auto", "auto", "disk"), "offload='disk'"),
    ],
)
def test_an_impossible_placement_is_refused(arguments, words):
    with pytest.raises(SystemExit, match=words):
        choose_placements(*arguments)


# ---- the environment ----

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def set_environment(monkeypatch, variables):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)


@pytest.mark.parametrize(
    "variables, ranks",
    [(TORCHRUN, (1, 2)), ({}, (0, 1)), ({"WORLD_SIZE": "1"}, (0, 1))],
)
def test_ranks_are_read_from_the_environment(variables, ranks, monkeypatch):
    set_environment(monkeypatch, variables)
    assert parallel.read_ranks() == ranks


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "0"}, "has RANK=0, but not WORLD_SIZE MASTER_ADDR MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but not RANK"),  # would do half of the work
        ({**TORCHRUN, "RANK": "first"}, "RANK='first'"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1'"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_stops_with_one_line(
    variables, words, monkeypatch
):
    set_environment(monkeypatch, variables)
    with pytest.raises(SystemExit) as stopped:
        parallel.init("cpu")
    assert words in stopped.value.code


@pytest.mark.parametrize("text, minutes", [(None, 30), ("", 30), ("0", 30), ("0.2", 0.2)])
def test_the_time_to_wait_for_a_rank_is_30_minutes_or_as_given(text, minutes, monkeypatch):
    monkeypatch.delenv("NANOSAFE_TIMEOUT", raising=False)
    if text is not None:
        monkeypatch.setenv("NANOSAFE_TIMEOUT", text)
    assert parallel.read_timeout() == minutes


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_time_to_wait_that_is_no_time_stops_with_one_line(text, monkeypatch):
    monkeypatch.setenv("NANOSAFE_TIMEOUT", text)
    with pytest.raises(SystemExit, match="NANOSAFE_TIMEOUT"):
        parallel.read_timeout()


# ---- streams and memory of a GPU ----


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_models_on_shared_streams_train_as_on_streams_of_their_own(layout):
    run("tests/shared_streams.py", layout, ranks=2)


def test_hsdp_trains_the_same_on_shared_streams(tmp_path):
    script = tmp_path / "two_nodes.py"
    script.write_text(TWO_NODES)
    run(script, "tests/shared_streams.py", "hsdp", ranks=4)


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def unset_allocator():
    """An environment that does not configure the allocator of GPU memory."""
    with patch.dict(os.environ):
        for name in ALLOCATOR_VARIABLES:
            os.environ.pop(name, None)
        yield


def read_allocator_variables():
    return [os.environ.get(name) for name in ALLOCATOR_VARIABLES]


def test_segments_of_gpu_memory_are_expandable_by_default(unset_allocator, monkeypatch):
    """They are chosen before anything else asks for the GPU."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: seen.extend(read_allocator_variables()))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    assert parallel.pick_device("cuda") == torch.device("cuda", 0)
    assert seen == ["expandable_segments:True"] * 2


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_an_allocator_that_the_user_has_configured_stays_as_it_is(name, unset_allocator):
    os.environ[name] = "max_split_size_mb:128"
    parallel.use_expandable_segments()
    assert sorted(map(str, read_allocator_variables())) == ["None", "max_split_size_mb:128"]
