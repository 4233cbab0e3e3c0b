"""
Where a run left off: state.py's files -> models and optimizers, on any number of ranks.
"""

import os

import torch
from safetensors import safe_open

from nanosafe import parallel
from nanosafe.checkpoint import copy_rows
from nanosafe.files import read_json, stop
from nanosafe.state import MOMENTS


@torch.no_grad()
def load(out_dir, trained):
    """Restore the latest state into models and optimizers, returns its step and extras.

    The states' rows may lie in another number of files than there are ranks: each picks its own.
    """
    folder = latest_state(out_dir)
    state = read_json(folder, "state.json")
    pieces = {}  # tensor -> [(first row, slice)]
    for rank in range(state["ranks"]):
        handle = safe_open(os.path.join(folder, f"rank_{rank:05d}.safetensors"), framework="pt")
        for key, start in read_json(folder, f"rank_{rank:05d}.json").items():
            pieces.setdefault(key, []).append((start, handle.get_slice(key)))
    for model_name, (model, optimizer) in trained.items():
        steps = state["optimizer_steps"][model_name]
        for name, p in parallel.parameters(model):
            targets = {"weight": p.data}
            if steps:
                moments = {key: torch.zeros_like(p.data) for key in MOMENTS}
                optimizer.state[p] = {
                    "step": torch.tensor(float(steps), device=parallel.local(p.data).device),
                    **moments}
                targets.update(moments)
            _, first, _, _ = parallel.local_rows(p)
            for key, target in targets.items():
                for start, piece in pieces[f"{model_name}/{name}/{key}"]:
                    height = piece.get_shape()[0]
                    copy_rows(parallel.local(target), first, piece, start, height)
    return state


def latest_state(out_dir):
    """The folder of the run's last whole state."""
    try:
        with open(os.path.join(out_dir, "state", "latest")) as f:
            return os.path.join(out_dir, "state", f.read().strip())
    except FileNotFoundError:
        stop(f"resume=True, but {out_dir!r} has no state: start it without")
