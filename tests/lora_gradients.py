"""Two optimizer steps of adapters on one base; run by test_lora.py, which compares the files.

$ torchrun --nproc_per_node=2 tests/lora_gradients.py FOLDER LAYOUT MAX_TOKENS RECOMPUTES OUT

FOLDER is the world of conftest.py. RECOMPUTES is 0 or 1: of activation checkpointing. OUT gets
gradients, weights, samples and log-probabilities. OUT.run gets the state of the run."""

import sys
import zlib

import torch
from safetensors.torch import save_file

from nanosafe import checkpoint, optim, parallel, rollout
from nanosafe.checkpoint import run_state
from nanosafe.data import tokenize
from nanosafe.data.batching import last_of_each, plan_micro_batches
from nanosafe.lora import Lora
from nanosafe.losses import cost_loss, mle_loss
from nanosafe.tokenizer import load

folder, layout, max_tokens, recomputes, out = sys.argv[1:]
world = parallel.init("cpu")
placements = parallel.choose_placements(
    world, "float32", layout, "none", False, recomputes == "1", 10**4, frozen=10**4
)
tok = load(f"{folder}/policy")
demonstrations = tokenize(f"{folder}/data/sft/test.jsonl:17/-1", tok, "sft", 200)
pairs = tokenize(f"{folder}/data/cost/test.jsonl:11/-1", tok, "cost", 200)
lora = Lora(4, 16.0, "all")
bases = {}


def load_trained(head, score_type=None):
    model = checkpoint.load_trained(
        f"{folder}/policy", head, placements, bases, lora, score_type=score_type
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.blocks.parameters():  # B, too, so that no gradient is zero
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


models = {"policy": load_trained("lm"), "cost": load_trained("both", "cost")}
base = models["policy"].base
optimizers = {}
for name, model in models.items():
    assert model.base is base
    optimizers[name] = optim.make_adamw(model, 0.1, 0.9, 0.95)
before = {}
for name, parameter in parallel.named_local_parameters(base):
    before[name] = parallel.local_part(parameter.data).clone()


def micro_batches_of_this_rank(dataset):
    """The examples of each micro-batch, and whether it is the last."""
    lengths = dataset.lengths.tolist()
    plan = plan_micro_batches(lengths, int(max_tokens), world.size)[world.rank]
    for k, examples in enumerate(plan):
        yield examples, k == len(plan) - 1


def accumulate_gradients():
    """A forward and backward of both models over all examples."""
    policy = models["policy"]
    all_targets = int(demonstrations.target_counts.sum())
    for examples, is_last in micro_batches_of_this_rank(demonstrations):
        batch = demonstrations.batch(examples, "cpu")
        mask = batch.targets >= 0
        share = mask.sum() / all_targets
        loss = mle_loss(policy.log_probs(batch, uniform_weights=True), mask)
        parallel.backward(policy, loss * share, is_last)

    cost = models["cost"]
    signs = torch.tensor(pairs.labels).float()  # (number of pairs, 2)
    for examples, is_last in micro_batches_of_this_rank(pairs):
        n = len(examples)
        batch = pairs.batch(examples, "cpu")
        logps, scores = cost.log_probs_and_scores(batch)
        # A rank without work has a batch of two tokens and no pair: hence the slice.
        end_scores = last_of_each(scores, batch)[: 2 * n]
        safer, unsafer = end_scores.view(2, n)
        loss = cost_loss(safer, unsafer, signs[examples, 0], signs[examples, 1], 0.1)
        loss = loss * n / len(pairs) - 1e-4 * logps.sum()
        parallel.backward(cost, loss, is_last)


# ---- two steps ----

results = {}
accumulate_gradients()
for name, model in models.items():
    for key, parameter in model.named_parameters():
        results[f"{name}/{key}"] = parameter.grad.clone()
norms = []
for name, model in models.items():
    norms.append(optim.guarded_step(model, optimizers[name], 1e-3, 1.0))
results["norms"] = torch.tensor(norms)
accumulate_gradients()
for name, model in models.items():
    optim.guarded_step(model, optimizers[name], 1e-3, 1.0)

# ---- adapters are whole and equal on all ranks; of the base there is one, and it is as before ----

checksums = []
for name, model in models.items():
    for key, parameter in model.named_parameters():
        results[f"after/{name}/{key}"] = parameter.data.clone()
        checksums.append(zlib.crc32(parameter.detach().numpy().tobytes()))
checksums_of_ranks = parallel.all_gather_lists([checksums], [world.rank], world.size)
assert checksums_of_ranks == [checksums] * world.size
rows_here = 0
for name, parameter in parallel.named_local_parameters(base):
    local = parallel.local_part(parameter.data)
    rows_here += len(local)
    assert torch.equal(local, before[name]), name
rows_of_ranks = parallel.all_gather_lists([rows_here], [world.rank], world.size)
rows_of_base = sum(len(parameter) for parameter in base.parameters())
slices = 2 if layout in ("fsdp", "hsdp") else 1  # hsdp: on two nodes of two ranks
assert sum(rows_of_ranks) == rows_of_base * world.size // slices

# ---- sampling between steps, of which the ranks do different amounts; log-probabilities ----

policy = models["policy"]
prompts = [[1, 5, 9], [1, 7], [1, 8, 12, 40], [1, 30, 31], [1, 9]]
responses = rollout.sample_all(policy, prompts, world, 9, eos_ids=[2], seed=0)
results["sampled"] = torch.tensor([id for response in responses for id in response])
accumulate_gradients()  # training goes on after it
batch = demonstrations.batch(range(4), "cpu")
with torch.no_grad():
    results["new"] = policy.log_probs(batch)
    results["ref"] = base.log_probs(batch)
    results["scores"] = models["cost"].scores(batch)

run_state.save(f"{out}.run", 2, models, optimizers, {"lambda": 1.5})
fresh = {"policy": load_trained("lm"), "cost": load_trained("both", "cost")}
fresh_optimizers = {}
for name, model in fresh.items():
    fresh_optimizers[name] = optim.make_adamw(model, 0.1, 0.9, 0.95)
run_state.load(f"{out}.run", fresh, fresh_optimizers)
for name, model in models.items():
    for parameter, other in zip(model.parameters(), fresh[name].parameters()):
        assert torch.equal(parameter, other)
checkpoint.save(policy, f"{out}.model", tok)
if world.main:
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
parallel.close()
