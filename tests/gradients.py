"""One step's gradients, as the trainers compute them; run under torchrun by test_parallel.py.

$ torchrun --nproc_per_node=2 tests/gradients.py FOLDER LAYOUT MAX_TOKENS OUT
"""

import sys

import torch
from safetensors.torch import save_file

from nanosafe import checkpoint, optim, parallel, rollout
from nanosafe.checkpoint import run_state
from nanosafe.data import tokenize
from nanosafe.losses import cost_loss, mle_loss
from nanosafe.data.batching import plan_micro_batches
from nanosafe.tokenizer import load

folder, layout, max_tokens, out = sys.argv[1:]
world = parallel.init("cpu")
placement, frozen = parallel.choose_placements(
    world, "float32", layout, "none", False, False, 10**4
)
tok = load(f"{folder}/policy")
demonstrations = tokenize(f"{folder}/data/sft/test.jsonl:17/-1", tok, "sft", 200)
pairs = tokenize(f"{folder}/data/cost/test.jsonl:11/-1", tok, "cost", 200)
policy = checkpoint.load(f"{folder}/policy", "lm", placement=placement)
cost = checkpoint.load(f"{folder}/cost", "score", placement=placement)
ref = checkpoint.load(f"{folder}/policy", "lm", placement=frozen).requires_grad_(False)
optimizers = {
    "policy": optim.make_adamw(policy, 0.1, 0.9, 0.95),
    "cost": optim.make_adamw(cost, 0.1, 0.9, 0.95),
}


def micros(dataset):
    mine = plan_micro_batches(dataset.lengths.tolist(), int(max_tokens), world.size)[world.rank]
    return [(micro, k == len(mine) - 1) for k, micro in enumerate(mine)]


def step():
    """A forward and backward of both models over all micro-batches."""
    for micro, last in micros(demonstrations):
        batch = demonstrations.batch(micro, "cpu")
        mask = batch.targets >= 0
        share = mask.sum() / int(demonstrations.targets.sum())
        parallel.backward(policy, mle_loss(policy.log_probs(batch), mask) * share, last)
    signs = torch.tensor(pairs.labels).float()
    for micro, last in micros(pairs):
        batch = pairs.batch(micro, "cpu")
        scores = cost.scores(batch)
        a, b = scores[(batch.cu_seqlens[1:].long() - 1)[: 2 * len(micro)]].view(2, len(micro))
        loss = cost_loss(a, b, signs[micro, 0], signs[micro, 1], 0.1) * len(micro) / len(pairs)
        parallel.backward(cost, loss, last)


step()
results = {
    f"{name}/{k}": parallel.full_tensor(p.grad).clone()
    for name, model in (("policy", policy), ("cost", cost))
    for k, p in model.named_parameters()
}
norms = [
    optim.guarded_step(policy, optimizers["policy"], 1e-3, 1.0),
    optim.guarded_step(cost, optimizers["cost"], 1e-3, 1.0),
]
results["norms"] = torch.tensor(norms)
step()
for name, model in (("policy", policy), ("cost", cost)):
    optim.guarded_step(model, optimizers[name], 1e-3, 1.0)
    results.update(
        {f"after/{name}/{k}": parallel.full_tensor(p).clone() for k, p in model.named_parameters()}
    )

with parallel.gathered_for_sampling(
    policy
) as twin:  # sampling between steps: ranks do different amounts of it
    prompts = [[1, 5, 9]] * (2 + 3 * world.rank)
    sampled = rollout.generate(twin, prompts, 8 + 5 * world.rank, eos_ids=[2], seed=0)
results["sampled"] = torch.tensor(sampled[0][:8] + [0] * (8 - len(sampled[0][:8])))
batch = demonstrations.batch(range(4), "cpu")
with torch.no_grad():
    results["ref"], results["new"] = ref.log_probs(batch), policy.log_probs(batch)

# the state goes through the disk and comes back, whatever its layout
run_state.save(f"{out}.run", 2, {"policy": policy, "cost": cost}, optimizers, {"lambda": 1.5})
fresh = checkpoint.load(f"{folder}/policy", "lm", placement=placement)
fresh_optimizer = optim.make_adamw(fresh, 0.1, 0.9, 0.95)
assert run_state.load(f"{out}.run", {"policy": fresh}, {"policy": fresh_optimizer})["lambda"] == 1.5
for (name, a), b in zip(policy.named_parameters(), fresh.parameters()):
    assert torch.equal(parallel.full_tensor(a), parallel.full_tensor(b)), name
checkpoint.save(policy, f"{out}.model")
if world.main:
    save_file({k: v.contiguous() for k, v in results.items()}, out)
parallel.close()
