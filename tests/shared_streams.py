"""Three models trained and one scored, on shared streams and on streams of their own; run by
test_parallel.py.

$ torchrun --nproc_per_node=2 tests/shared_streams.py LAYOUT

Stops unless both ways give the same weights, bit by bit."""

import sys

import torch
from torch.distributed.fsdp import FSDPModule

from nanosafe import optim, parallel
from nanosafe.checkpoint import init_from_scratch
from nanosafe.data.batching import IGNORED, Batch
from nanosafe.tools.toy_world import small_config

layout = sys.argv[1]
world = parallel.init("cpu")
float32 = torch.float32
trained = parallel.Placement(world.device, layout, float32, float32)


def make_batch(step):
    """Other random tokens on each rank and at each step."""
    generator = torch.Generator().manual_seed(10 * step + world.rank)
    tokens, targets = torch.randint(97, (2, 12 + step), generator=generator)
    targets[0] = IGNORED
    cu_seqlens = torch.tensor([0, 5, 12 + step], dtype=torch.int32)
    return Batch(tokens, cu_seqlens, 7 + step, targets)


def train(count_contexts):
    """The weights of all models after three iterations in PPO-Lag's order.

    count_contexts  of how many the models' communication must be"""
    ref = init_from_scratch(small_config(), placement=trained).requires_grad_(False)
    actor = init_from_scratch(small_config(), seed=1, placement=trained)
    models = [actor]
    for seed in (2, 3):
        critic = init_from_scratch(small_config(), "score", seed=seed, placement=trained)
        models.append(critic)
    optimizers = [optim.make_adamw(model, 0.1, 0.9, 0.95) for model in models]
    for step in range(3):
        with parallel.gathered_for_sampling(actor) as twin, torch.no_grad():
            twin.log_probs(make_batch(step))
        actor.log_probs(make_batch(step)).detach()  # old log-probabilities: no backward follows
        with torch.no_grad():
            ref.log_probs(make_batch(step))
            for critic in models[1:]:
                critic.scores(make_batch(step))
        for k in range(2):  # micro-batches
            batch = make_batch(step + k)
            for model in models:
                out = model.log_probs(batch) if model is actor else model.scores(batch).square()
                parallel.backward(model, out.mean(), last=k == 1)
        for model, optimizer in zip(models, optimizers):
            optim.guarded_step(model, optimizer, 1e-2, 1.0)
    contexts = set()
    for model in [ref, *models]:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                contexts.add(id(module._get_fsdp_state()._comm_ctx))
    assert len(contexts) == count_contexts
    weights = []
    for model in models:
        for parameter in model.parameters():
            weights.append(parallel.full_tensor(parameter).clone())
    return weights


shared = train(1)
parallel.share_streams = lambda model: None
apart = train(4)
assert len(shared) == len(apart) > 40
for a, b in zip(shared, apart):
    assert torch.equal(a, b)
parallel.close()
