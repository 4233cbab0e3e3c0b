"""Two optimizer steps as the trainers make them; run by test_parallel.py, which compares the files.

$ torchrun --nproc_per_node=2 tests/gradients.py FOLDER LAYOUT MAX_TOKENS OUT

FOLDER is the world of conftest.py. OUT gets gradients, weights, samples and log-probabilities, all
of them whole. OUT.run gets the state of the run, and OUT.model the policy's model folder."""

import sys

import torch
from safetensors.torch import save_file

from nanosafe import checkpoint, optim, parallel, rollout
from nanosafe.checkpoint import run_state
from nanosafe.data import tokenize
from nanosafe.data.batching import last_of_each, plan_micro_batches
from nanosafe.losses import cost_loss, mle_loss
from nanosafe.tokenizer import load

folder, layout, max_tokens, out = sys.argv[1:]
world = parallel.init("cpu")
trained, frozen = parallel.choose_placements(world, "float32", layout, "none", False, False, 10**4)
tok = load(f"{folder}/policy")
demonstrations = tokenize(f"{folder}/data/sft/test.jsonl:17/-1", tok, "sft", 200)
pairs = tokenize(f"{folder}/data/cost/test.jsonl:11/-1", tok, "cost", 200)
ref = checkpoint.load(f"{folder}/policy", "lm", placement=frozen).requires_grad_(False)
models = {
    "policy": checkpoint.load(f"{folder}/policy", "lm", placement=trained),
    "cost": checkpoint.load(f"{folder}/cost", "score", placement=trained),
}
optimizers = {}
for name, model in models.items():
    optimizers[name] = optim.make_adamw(model, 0.1, 0.9, 0.95)


def micro_batches_of_this_rank(dataset):
    """Pairs of a micro-batch, which is a list of examples, and whether it is the last."""
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
        loss = mle_loss(policy.log_probs(batch), mask)
        parallel.backward(policy, loss * share, is_last)

    cost = models["cost"]
    signs = torch.tensor(pairs.labels).float()  # (number of pairs, 2)
    for examples, is_last in micro_batches_of_this_rank(pairs):
        n = len(examples)
        batch = pairs.batch(examples, "cpu")
        # A rank without work has a batch of two tokens and no pair: hence the slice.
        end_scores = last_of_each(cost.scores(batch), batch)[: 2 * n]
        safer, unsafer = end_scores.view(2, n)
        loss = cost_loss(safer, unsafer, signs[examples, 0], signs[examples, 1], 0.1)
        parallel.backward(cost, loss * n / len(pairs), is_last)


def update_weights():
    """An optimizer step of both models; returns the norms of their gradients."""
    norms = []
    for name, model in models.items():
        norms.append(optim.guarded_step(model, optimizers[name], 1e-3, 1.0))
    return norms


# ---- two steps ----

results = {}
accumulate_gradients()
for name, model in models.items():
    for key, parameter in model.named_parameters():
        results[f"{name}/{key}"] = parallel.full_tensor(parameter.grad).clone()
results["norms"] = torch.tensor(update_weights())
accumulate_gradients()
update_weights()
for name, model in models.items():
    for key, parameter in model.named_parameters():
        results[f"after/{name}/{key}"] = parallel.full_tensor(parameter).clone()

# ---- sampling between steps, of which the ranks do different amounts ----

policy = models["policy"]
with parallel.gathered_for_sampling(policy) as twin:
    prompts = [[1, 5, 9]] * (2 + 3 * world.rank)
    responses = rollout.generate(twin, prompts, 8 + 5 * world.rank, eos_ids=[2], seed=0)
beginning = responses[0][:8]
padding = [0] * (8 - len(beginning))
results["sampled"] = torch.tensor(beginning + padding)

# ---- log-probabilities of a frozen and of the trained model ----

batch = demonstrations.batch(range(4), "cpu")
with torch.no_grad():
    results["ref"] = ref.log_probs(batch)
    results["new"] = policy.log_probs(batch)

# ---- the state of the run goes to the disk and comes back ----

run_state.save(f"{out}.run", 2, models, optimizers, {"lambda": 1.5})
fresh = {
    "policy": checkpoint.load(f"{folder}/policy", "lm", placement=trained),
    "cost": checkpoint.load(f"{folder}/cost", "score", placement=trained),
}
fresh_optimizers = {}
for model_name, model in fresh.items():
    fresh_optimizers[model_name] = optim.make_adamw(model, 0.1, 0.9, 0.95)
state = run_state.load(f"{out}.run", fresh, fresh_optimizers)
assert state["lambda"] == 1.5
for model_name, model in models.items():
    for (name, a), b in zip(model.named_parameters(), fresh[model_name].parameters()):
        assert torch.equal(parallel.full_tensor(a), parallel.full_tensor(b)), name
checkpoint.save(policy, f"{out}.model")
if world.main:
    contiguous = {name: tensor.contiguous() for name, tensor in results.items()}
    save_file(contiguous, out)
parallel.close()
