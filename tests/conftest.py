"""What the tests share: a small tokenizer, small models, and ways to run the scripts."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from nanosafe.tools.toy_world import make_world, rows_of, same_state, small_config, trainer_flags

__all__ = ["rows_of", "same_state", "small_config"]  # which tests import from here

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The longest file first, so that two processes end together."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Token ids are cached in a folder of the test run's own."""
    os.environ["NANOSAFE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def toy():
    """data/toy/prepare.py as a module."""
    path = os.path.join(ROOT, "data", "toy", "prepare.py")
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world(toy, tmp_path_factory):
    """A folder with the toy data, its tokenizer, and random policy, reward and cost models."""
    return make_world(toy, tmp_path_factory.mktemp("world"))


@pytest.fixture
def trainers(world):
    return trainer_flags(world)


def run(*command, ranks=0, check=True, stdin=None, cwd=ROOT, threads=1):
    """Run a script as a user does, under torchrun when ranks > 0; returns the finished process."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        input=stdin,
        timeout=1800,
    )
    if check and done.returncode:
        raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
