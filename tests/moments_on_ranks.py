"""AdamW steps with bfloat16 moments on gradients that are given; run by test_optim.py.

$ torchrun --nproc_per_node=2 tests/moments_on_ranks.py LAYOUT STEPS FOLDER

The run in FOLDER begins, or goes on, until it has made STEPS steps. Then its state is saved."""

import sys

import torch

from nanosafe import checkpoint, optim, parallel
from nanosafe.checkpoint import run_state
from nanosafe.tools.toy_world import small_config

layout, steps, folder = sys.argv[1:]
world = parallel.init("cpu")
placements = parallel.choose_placements(world, "float32", layout, "none", False, False, 10**4)
model = checkpoint.init_from_scratch(small_config(), seed=1, placement=placements.trained)
models = {"model": model}
optimizers = {"model": optim.make_adamw(model, 0.1, 0.9, 0.95, "bfloat16", seed=5)}
start = 0
if run_state.list_states(folder):
    start = run_state.load(folder, models, optimizers)["step"]
for step in range(start, int(steps)):
    torch.manual_seed(step)
    for parameter in model.parameters():
        # All ranks draw the whole gradient and keep their rows. Its norm is below that at which it
        # is clipped, so it stays as it is.
        gradient = 1e-4 * torch.randn(parameter.shape)
        local = parallel.local_rows(parameter)
        parameter.grad = torch.zeros_like(parameter.data)
        mine = gradient[local.first : local.first + local.count]
        parallel.local_part(parameter.grad).copy_(mine)
    norm = optim.guarded_step(model, optimizers["model"], 1e-3, 1.0)
    assert norm < 1
run_state.save(folder, int(steps), models, optimizers, {})
parallel.close()
