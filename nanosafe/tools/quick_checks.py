"""What must hold on a machine before its speed means anything: the core of tests/test_gpu.py.

An installed package has no tests. A check returns an error, which choose() gives a tolerance; the
models are small and random."""

import math

import torch
from torch.func import functional_call

from nanosafe import optim, parallel, rollout
from nanosafe.checkpoint import init_from_scratch
from nanosafe.checkpoint.adapter_folder import Base, new_adapter, parameter_of
from nanosafe.checkpoint.families import FAMILIES
from nanosafe.data.batching import Batch
from nanosafe.lora import Lora
from nanosafe.losses import mle_loss
from nanosafe.model import Config

LENGTHS = [300, 77, 1, 512, 130]
STEPS = 10


def choose(device):
    """{what must hold: (the check, the greatest error that it may return)} on a kind of device."""
    checks = {
        "bfloat16 equals float32": (compare_precisions, 0.06),
        "training in bfloat16 follows float32": (compare_training, 0.03),
        "an adapter equals its merged model": (compare_adapter, 0.06),
        "what is sampled has the trainer's probabilities": (compare_sampler, 0.05),
    }
    if device == "cuda":
        checks["compiled blocks equal eager ones"] = (compare_compiled, 0.12)
        checks["decoding by graphs equals decoding without"] = (compare_graphs, 0.0)
    return checks


# ---- the checks ----


def compare_precisions(world):
    """Packed attention and its gradients in bfloat16, beside float32, which pads."""
    model = make_model(world, torch.bfloat16)
    batch = make_batch(LENGTHS, world)
    return largest_error(results_of(model, batch), results_of(model.float(), batch))


def compare_training(world):
    """The largest relative difference of ten losses; nan if training does not lower them."""
    mixed = parallel.Placement(world.device, "ddp", torch.float32, torch.bfloat16)
    ours = train(mixed, world)
    expected = train(parallel.Placement(world.device), world)
    if ours[-1] > 0.9 * ours[0]:
        return math.nan
    return max(abs(a - b) / b for a, b in zip(ours, expected))


def train(placement, world):
    """The losses of a few steps on one batch."""
    model = init_from_scratch(make_config(), seed=3, placement=placement)
    batch = make_batch([40, 64, 23, 51, 38, 64, 9, 30], world)
    optimizer = optim.make_adamw(model, 0.0, 0.9, 0.95)
    losses = []
    for _ in range(STEPS):
        loss = mle_loss(model.log_probs(batch, uniform_weights=True), batch.targets >= 0)
        parallel.backward(model, loss)
        optim.guarded_step(model, optimizer, 2e-4, 1.0)
        losses.append(loss.item())
    return losses


def compare_adapter(world):
    """Log-probabilities of a base with an adapter, beside the base with the product added."""
    base = make_model(world, torch.bfloat16).requires_grad_(False)
    shared = Base(base, FAMILIES["llama"], fingerprint=0)
    adapted = new_adapter("base", shared, "lm", Lora(8, 16.0, "all"), None, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".B." in name:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    adapted = adapted.to(world.device)
    merged = {name: parameter.clone() for name, parameter in base.named_parameters()}
    for i, pairs in enumerate(adapted.block_pairs(torch.float32)):
        for matrix, pair in pairs._asdict().items():
            weight = merged[parameter_of(i, matrix)]
            weight += pair.B @ pair.A
    batch = make_batch(LENGTHS, world)
    ours = {"logps": adapted.log_probs(batch)}
    expected = functional_call(base, merged, tuple(batch))
    if (ours["logps"] - base.log_probs(batch)).abs().mean() < 0.01:
        return math.nan  # the adapter changes nothing
    return largest_error(ours, {"logps": expected})


@torch.no_grad()
def compare_sampler(world):
    """The mean difference, in nats, of the sampler's log-probabilities and the forward's."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    model = make_model(world, dtype)
    prompts = [[1, *range(3, 10 + 7 * i)] for i in range(8)]
    sampled = rollout.generate(model, prompts, 24, eos_ids=[2], seed=0, with_logps=True)
    differences = []
    for prompt, response, logps in zip(prompts, sampled.responses, sampled.logps):
        text = torch.tensor([*prompt, *response], device=world.device)
        ends = torch.tensor([0, len(text)], dtype=torch.int32, device=world.device)
        targets = text.roll(-1)
        targets[-1] = -100
        expected = model.log_probs(Batch(text, ends, len(text), targets))
        expected = expected[len(prompt) - 1 : -1]
        differences.append((torch.tensor(logps, device=world.device) - expected).abs())
    return torch.cat(differences).mean().item()


def compare_compiled(world):
    """The results of compiled blocks, with a second size, beside eager ones."""
    mixed = parallel.Placement(world.device, "ddp", torch.float32, torch.bfloat16)
    compiled = mixed._replace(use_compile=True)
    models = []
    for placement in (compiled, mixed):
        models.append(init_from_scratch(make_config(), seed=3, placement=placement))
    error = 0.0
    for lengths in ([60, 31], LENGTHS):
        batch = make_batch(lengths, world)
        ours, expected = results_of(models[0], batch), results_of(models[1], batch)
        error = max(error, largest_error(ours, expected))
    return error


def compare_graphs(world):
    """How many of sixteen responses differ where graphs are not used, with four slots."""
    model = make_model(world, torch.bfloat16)
    prompts = [[1, *range(3, 3 + 5 * i % 41)] for i in range(16)]
    limits = [25 + i for i in range(16)]

    def sample():
        return rollout.generate(model, prompts, limits, eos_ids=range(2, 40), seed=5, slots=4)

    with_graphs = sample()
    replay = rollout.Engine.replay
    rollout.Engine.replay = decode_without_graph
    try:
        expected = sample()
    finally:
        rollout.Engine.replay = replay
    return sum(a != b for a, b in zip(with_graphs, expected))


def decode_without_graph(engine, n, extent):
    engine.decode(n, [(slice(0, n), extent)])


# ---- what they share ----


def make_config():
    """Four heads of 64 that share two keys. The logits spread as those of a trained model do."""
    return Config(1000, 256, 512, 2, 4, 2, initializer_range=1 / 16)


def make_model(world, dtype):
    return init_from_scratch(make_config(), seed=3).to(world.device, dtype)


def make_batch(lengths, world):
    """A Batch of random tokens and targets; a seventh of the targets carries no loss."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(3, 1000, (2, sum(lengths)), generator=generator)
    targets[::7] = -100
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    device = world.device
    return Batch(tokens.to(device), cu_seqlens.to(device), max(lengths), targets.to(device))


def results_of(model, batch):
    """Log-probabilities, and the gradients of a random sum of them, by name."""
    logps = model.log_probs(batch)
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    parallel.backward(model, (logps * weights.to(logps.device)).mean())
    results = {"logps": logps.detach()[batch.targets >= 0]}
    for name, parameter in model.named_parameters():
        results[name] = parallel.full_tensor(parameter.grad).float()
        parameter.grad = None
    return results


def largest_error(ours, expected):
    """The largest difference of two sets of tensors, as a share of a tensor's spread."""
    errors = []
    for name, tensor in expected.items():
        spread = (tensor - tensor.mean()).norm()
        errors.append((ours[name].float() - tensor).norm() / spread)
    return torch.stack(errors).max().item()
