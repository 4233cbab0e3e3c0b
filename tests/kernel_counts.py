"""Counts the kernels that a GPU would launch for some code, without a GPU.

The code runs on fake tensors, which have shapes and no numbers. Every operator of torch that is no
view counts as one kernel."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS_AND_ALLOCATIONS = {
    "view",
    "_unsafe_view",
    "slice",
    "split",
    "split_with_sizes",
    "chunk",
    "transpose",
    "t",
    "select",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "detach",
    "alias",
    "as_strided",
    "_reshape_alias",
    "narrow",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "unbind",
    "lift_fresh",
    "device",  # asks where a tensor is
}


class KernelCounts(TorchDispatchMode):
    """Within its block, `counts` grows by one for each operator: {name: how many}."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.split("::")[1]
        if name not in VIEWS_AND_ALLOCATIONS:
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))
