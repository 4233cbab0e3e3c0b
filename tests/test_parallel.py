"""The gradient of a step does not depend on ranks, layout or micro-batches; nor do weights, samples, files."""

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
    out = tmp_path_factory.mktemp("plain") / "out"
    run("tests/gradients.py", world, "plain", 4096, out)
    return load_file(out), str(out)


@pytest.mark.parametrize("case", CASES)
def test_gradients_weights_and_samples_are_those_of_one_process(case, world, reference, tmp_path):
    ranks, layout, max_tokens = CASES[case]
    out = tmp_path / "out"
    run("tests/gradients.py", world, layout, max_tokens, out, ranks=ranks)
    ours, theirs = load_file(out), reference[0]
    assert ours.keys() == theirs.keys() and len(theirs) > 40
    for name, expected in theirs.items():
        # Adam divides a gradient by its own size: where that is rounding noise, so is the first step
        tolerance = 2e-4 if name.startswith(("after", "new")) else 1e-5
        error = (ours[name].float() - expected.float()).norm()
        assert error <= tolerance * expected.float().norm() + 1e-9, name
    a, b = checkpoint.load(f"{out}.model"), checkpoint.load(f"{reference[1]}.model")
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("max_tokens", [4096, 200])
def test_hsdp_is_a_mesh_of_nodes_and_ranks(max_tokens, world, reference, tmp_path):
    """Four ranks that call themselves two nodes of two; copies exchange gradients in the last micro-batch only."""
    out = tmp_path / "out"
    text = (
        "import os, runpy, sys; os.environ['LOCAL_WORLD_SIZE'] = '2'; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = tmp_path / "two_nodes.py"
    script.write_text(text)
    run(script, "tests/gradients.py", world, "hsdp", max_tokens, out, ranks=4)
    for name, expected in reference[0].items():
        if not name.startswith(("after", "new")):
            error = (load_file(out)[name].float() - expected.float()).norm()
            assert error <= 1e-5 * expected.float().norm() + 1e-9, name


def test_layouts_are_chosen_and_mistakes_refused():
    one = parallel.World(0, 1, torch.device("cpu"), True)
    two = parallel.World(0, 2, torch.device("cpu"), True)
    place = lambda *args: parallel.choose_placements(*args, False, False, 10**6)
    assert place(one, "auto", "auto", "none")[0].layout == "plain"
    assert place(one, "bfloat16", "auto", "none")[0].layout == "ddp"
    trained, frozen = place(two, "auto", "auto", "none")
    assert (trained.layout, frozen.layout) == ("ddp", "plain")
    assert (
        parallel.choose_placements(two, "auto", "auto", "none", False, False, 10**10)[1].layout
        == "fsdp"
    )
    for args, words in (
        ((one, "float16", "auto", "none"), "float16.*overflows"),
        ((one, "half", "auto", "none"), "dtype='half'"),
        ((one, "auto", "zero3", "none"), "parallel='zero3'"),
        ((two, "auto", "plain", "none"), "one of 2"),
        ((one, "auto", "auto", "disk"), "offload='disk'"),
    ):
        with pytest.raises(SystemExit, match=words):
            place(*args)
