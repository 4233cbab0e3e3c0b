"""What the tests share: a small tokenizer, small models, and ways to run the scripts."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.distributed as dist
from launcher import Launcher

from nanosafe import parallel
from nanosafe.data.examples import make_turns
from nanosafe.storage import load_python_file
from nanosafe.tools.toy_world import make_world, rows_of, same_state, small_config, trainer_flags

__all__ = ["rows_of", "same_state", "small_config"]  # which tests import from here

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# One thread for each process, here and in all that tests start: OpenMP's idle threads spin, which
# makes everything several times slower where tests run side by side.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub; test_hub.py has one of its own


LONG_FILES = ("test_readme", "test_reliability", "test_train", "test_methods", "test_eval")


def pytest_collection_modifyitems(items):
    """The long files first, so that two processes end together."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONG_FILES))


@pytest.fixture(scope="module")
def end_process_group():
    """shard_model() makes a process group of one, which ends with the file that asks for this."""
    yield
    if dist.is_initialized():
        parallel.close(end_process=False)
        parallel.meshes.clear()


def encode_texts(texts, tok):
    """The ids and the loss mask of a conversation's texts, the user's first."""
    turns = make_turns(texts)
    if len(texts) % 2 == 0:
        return tok.finished_conversation(turns)
    return tok.conversation(turns)


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    """Token ids are cached in a folder of the test run's own."""
    os.environ["NANOSAFE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def toy():
    """data/toy/prepare.py as a module."""
    return load_python_file(os.path.join(ROOT, "data", "toy", "prepare.py"))


@pytest.fixture(scope="session")
def world(toy, tmp_path_factory):
    """A folder with the toy data, a tokenizer, and random policy, reward and cost models."""
    return make_world(toy, tmp_path_factory.mktemp("world"))


@pytest.fixture
def trainers(world):
    return trainer_flags(world)


@cache
def start_launcher():
    return Launcher()


def run(*command, ranks=0, check=True, stdin=None, cwd=ROOT):
    """Run a script as a user does, with ranks as under torchrun; returns the finished process."""
    command = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    if command[0] == "-c":
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=environment,
            input=stdin,
        )
    else:
        done = start_launcher().run(command, cwd, environment, stdin, ranks)
    if check and done.returncode:
        raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
