"""How often the host waits for the GPU in PPO-Lag, counted on the CPU.

While it waits it prepares nothing, and the GPU runs dry. The host waits where it needs a number
from the GPU (item, nonzero, a mask as an index), and where it copies memory that is not pinned: a
tensor made of a list, a list as an index. What copy_to_device() copies is pinned."""

import numpy as np
import pytest
import torch
from in_process import run_in_process
from torch.utils._python_dispatch import TorchDispatchMode

from nanosafe import inference, parallel
from nanosafe.data import batching

# Operators whose answer, or the size of whose answer, the host needs.
WAITING_OPERATORS = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "equal")


class HostWaits(TorchDispatchMode):
    """Counts, while it is on, what would make the host wait if all tensors were a GPU's."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        self.is_pinned = False  # inside of copy_to_device()
        self.watch(monkeypatch, torch, "tensor")
        self.watch(monkeypatch, torch, "as_tensor")
        self.watch(monkeypatch, torch, "from_numpy")
        self.watch_lists(monkeypatch, "__getitem__")
        self.watch_lists(monkeypatch, "__setitem__")
        copy = batching.copy_to_device

        def copy_pinned(*arguments):
            self.is_pinned = True
            try:
                return copy(*arguments)
            finally:
                self.is_pinned = False

        monkeypatch.setattr(batching, "copy_to_device", copy_pinned)
        monkeypatch.setattr(inference, "copy_to_device", copy_pinned)

    def note(self, what):
        if not self.is_pinned:
            self.found.append(what)

    def watch(self, monkeypatch, owner, name):
        """Count each call of a function that makes a tensor of memory that is not pinned."""
        function = getattr(owner, name)

        def watched(*arguments, **options):
            self.note(name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    def watch_lists(self, monkeypatch, name):
        """Count each tensor that is indexed by a list or an array."""
        method = getattr(torch.Tensor, name)

        def watched(tensor, index, *value):
            parts = index if isinstance(index, tuple) else (index,)
            for part in parts:
                if isinstance(part, (list, np.ndarray)):
                    self.note(f"{name} of a list")
            return method(tensor, index, *value)

        monkeypatch.setattr(torch.Tensor, name, watched)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = function._schema.name.split("::")[1]
        if name in WAITING_OPERATORS:
            self.note(name)
        if name == "repeat_interleave" and options.get("output_size") is None:
            self.note(name)
        if name in ("index", "index_put_"):
            for index in arguments[1]:
                if index is not None and index.dtype == torch.bool:
                    self.note(f"{name} of a mask")
        return function(*arguments, **options)


@pytest.fixture
def count_waits(trainers, tmp_path, monkeypatch, capsys):
    """count_waits(flags) -> the waits of a run of PPO-Lag and its number of micro-batches."""

    def count(name, *flags):
        actor_updates = []
        backward = parallel.backward

        def counted_backward(model, loss, last=True):
            if model.head == "lm":
                actor_updates.append(model)
            backward(model, loss, last)

        with monkeypatch.context() as patches:
            waits = HostWaits(patches)
            patches.setattr(parallel, "backward", counted_backward)
            with waits:
                run_in_process(
                    *trainers["ppo_lag"],
                    "--max_steps=2",
                    f"--out_dir={tmp_path / name}",
                    *flags,
                    monkeypatch=patches,
                    capsys=capsys,
                )
        return len(waits.found), len(actor_updates)

    return count


@pytest.mark.parametrize("loss_mean", ["response", "token"])
def test_a_micro_batch_of_ppo_lag_makes_the_host_wait_at_most_twice(loss_mean, count_waits):
    """Of two runs that differ in their number of micro-batches only, also of scoring passes."""
    same = ("--ptx_data=", "--batch_size=8", f"--loss_mean={loss_mean}", "--max_new_tokens=60")
    waits, micro_batches = count_waits("long", *same, "--max_tokens=2000")
    more_waits, more_micro_batches = count_waits("short", *same, "--max_tokens=200")
    assert more_micro_batches >= micro_batches + 6
    assert more_waits - waits <= 2 * (more_micro_batches - micro_batches)


def test_a_batch_for_a_gpu_is_copied_from_pinned_memory_without_waiting(monkeypatch):
    """torch.Tensor's own methods stand in for those that need a GPU."""
    calls = []

    def pin_memory(tensor):
        calls.append("pin_memory")
        return tensor

    def to(tensor, device, non_blocking=False):
        calls.append((str(device), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch = batching.collate([np.arange(5)], [np.arange(5) >= 2], torch.device("cuda", 0))
    assert batch.target_positions.tolist() == [1, 2, 3]
    assert calls == ["pin_memory", ("cuda:0", True)] * 4


@pytest.mark.parametrize("values", [[], [3, 1], np.arange(4), np.zeros(0, np.int32)])
def test_what_is_copied_to_a_device_keeps_its_values_and_its_type(values):
    copy = batching.copy_to_device(values, "cpu")
    assert copy.tolist() == list(values)
    expected = torch.int64 if isinstance(values, list) else torch.from_numpy(values).dtype
    assert copy.dtype == expected
