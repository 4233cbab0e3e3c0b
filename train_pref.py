"""
Stage 2: pairs of responses -> a reward model, or a cost model.

A reward model learns which response is better (objective=reward). A cost model learns which is
safer, and to put zero between safe and unsafe: cost > 0 means unsafe (objective=cost).

On a laptop, after python -m nanosafe.demo:
$ python train_pref.py
$ python train_pref.py --objective=cost --out_dir=out/cost --eval_data=toy/cost/test
On 8 GPUs, Safe-RLHF's recipes:
$ torchrun --nproc_per_node=8 train_pref.py config/beaver_7b/reward.py
$ torchrun --nproc_per_node=8 train_pref.py config/beaver_7b/cost.py
"""

import os
import time

import torch

from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe import state as run_state
from nanosafe.data import tokenize
from nanosafe.losses import cost_loss, reward_loss
from nanosafe.monitor import Monitor, Stop
from nanosafe.packing import check_fits, count_steps, examples_at, plan
from nanosafe.parallel import add, backward, close, init, main_first, places
from nanosafe.rl import ExponentialMovingAverage, RunningMeanStd
from nanosafe.tokenizer import load as load_tokenizer

# run
objective = "reward"  # reward | cost
out_dir = "out/reward"  # the run's folder: config.py, metrics.jsonl, model/, state/
resume = False  # continue the run in out_dir exactly where its last state was saved
seed = 0  # of the data order, and of a new score head
# model
init_from = "out/demo/sft/model"  # a policy, which gets a new score head, or a score model
# data
data = "toy/pairs"  # pairs: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
eval_data = "toy/reward/test"  # the same, held out; empty: none
max_len = 512  # longest sequence in tokens; pairs with a longer one are dropped and counted
# optimization
epochs = 2.0  # passes over the data
max_steps = 0  # optimizer steps at most; 0: as many as epochs gives
batch_size = 64  # pairs per optimizer step, over all ranks
max_tokens = 8192  # packed tokens per forward on one rank: memory, not mathematics
learning_rate = 2e-5  # peak, after warm-up
lr_schedule = "cosine"  # cosine | linear | constant
warmup_ratio = 0.03  # share of the steps in which the learning rate rises from 0
weight_decay = 0.1  # of AdamW, on matrices
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # greatest norm of a gradient; 0: none
max_skips = 10  # stop after this many updates with a non-finite gradient
regularization = 0.001  # weight of the mean squared score, which keeps scores near zero
normalizer = "ema"  # ema | running | none: moments of the scores, kept in the model's config.json
normalizer_momentum = 0.9  # of ema: the weight of the moments so far
# intervals, in optimizer steps
log_interval = 1  # metrics rows
eval_interval = 0  # evaluations; 0: at the end only
save_interval = 500  # states and exports; 0: at the end only
keep = 2  # states to keep
log_to = ""  # tensorboard, wandb, or both; empty: metrics.jsonl only
# machine
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # what is computed in: auto | bfloat16 | float32; auto is bfloat16 on a GPU
parallel = "auto"  # auto | plain | ddp | fsdp | hsdp
offload = "none"  # none | all: optimizer and weights wait in host memory
activation_checkpointing = False  # recompute each block in the backward pass: less memory, 4/3 time
use_compile = True  # torch.compile each block, on a GPU

config = configure(globals())

# ---- setup ----
if objective not in ("reward", "cost"):
    raise SystemExit(f"error: objective={objective!r}: choose reward or cost")
if normalizer not in ("ema", "running", "none"):
    raise SystemExit(f"error: normalizer={normalizer!r}: choose ema, running or none")
optim.check_schedules(lr_schedule)
world = init(device)
run_state.claim(out_dir, resume)
if world.main:
    save(config, os.path.join(out_dir, "config.py"))
tok = load_tokenizer(init_from)
with main_first():  # rank 0 fills the cache of token ids, the others find it
    train = tokenize(data, tok, objective, max_len, show=world.main)
    held_out = tokenize(eval_data, tok, objective, max_len, show=world.main) if eval_data else None

for dataset in filter(None, (train, held_out)):
    check_fits(dataset.lengths.tolist(), max_tokens)
size = checkpoint.count_parameters(init_from)
place, _ = places(world, dtype, parallel, offload, use_compile, activation_checkpointing, size)
model = checkpoint.load(init_from, "score", place=place, vocab_size=tok.vocab_size, seed=seed,
                        score_type=objective)
model.config.do_normalize = False  # scores are trained raw; their moments are kept beside
optimizer = optim.adamw(model, weight_decay, beta1, beta2)
moments = ExponentialMovingAverage(normalizer_momentum) if normalizer == "ema" else RunningMeanStd()

steps = count_steps(len(train), batch_size, epochs, max_steps)
skips = optim.SkipCounter(max_skips)
start = 0
if resume:
    state = run_state.load(out_dir, {"model": (model, optimizer)})
    start, skips.count = state["step"], state["skips"]
    moments.load_state_dict(state["moments"])
if world.main:
    print(f"{size / 1e6:.1f} M parameters, {place.layout}, computing in {place.compute_dtype}; "
          f"{steps} steps of {batch_size} pairs over {world.size} ranks, {max_tokens} tokens per "
          "forward", flush=True)


def end_scores(dataset, examples):
    """Scores of the pairs' last tokens, (2, n): of the preferred responses and of the others."""
    batch = dataset.batch(examples, world.device)
    ends = batch.cu_seqlens[1:].long() - 1
    return model(*batch[:3])[ends[:2 * len(examples)]].view(2, len(examples))


def pair_loss(first, second, signs):
    if objective == "reward":
        return reward_loss(first, second, regularization)
    return cost_loss(first, second, signs[:, 0], signs[:, 1], regularization)


def describe(scores, signs):
    """What end scores (n, 2), preferred response first, say about a model."""
    preferred, other = scores.unbind(1)
    right = preferred > other if objective == "reward" else preferred < other
    metrics = {
        "accuracy": right.float().mean().item(), "score_mean": scores.mean().item(),
        "score_std": scores.std().item(),
    }
    if objective == "cost":
        metrics["sign_accuracy"] = (scores * signs < 0).float().mean().item()
        for name, sign in (("safe", 1), ("unsafe", -1)):
            if (signs == sign).any():
                metrics[f"{name}_mean"] = scores[signs == sign].mean().item()
    return metrics


@torch.no_grad()
def evaluate():
    """describe() the held-out pairs, and how well their signs and order are met."""
    scores = torch.zeros(len(held_out), 2, device=world.device)
    for micro in plan(held_out.lengths.tolist(), max_tokens, world.size)[world.rank]:
        scores[micro] = end_scores(held_out, micro).T
    signs = torch.tensor(held_out.signs, device=world.device).float()
    return {f"eval_{name}": value for name, value in describe(add(scores), signs).items()}


def checkpoint_run(step):
    """The state to resume from, and the model for others to open."""
    monitor.flush()
    extra = {"skips": skips.count, "moments": moments.state_dict()}
    run_state.save(out_dir, step, {"model": (model, optimizer)}, extra, keep)
    if normalizer != "none":
        c = model.config
        c.mean, c.var = [moments.mean], [moments.var]
        c.normalizer_type = type(moments).__name__
        c.momentum = normalizer_momentum if normalizer == "ema" else None
    checkpoint.save(model, os.path.join(out_dir, "model"), tok, dtype=place.compute_dtype)


# ---- loop ----
stop = Stop()
monitor = Monitor(out_dir, steps, start, log_to, shown=("loss", "accuracy", "sign_accuracy"),
                  config=config)
for step in range(start, steps):
    began = time.perf_counter()
    examples = examples_at(step, len(train), batch_size, seed)
    signs = torch.tensor(train.signs[examples], device=world.device).float()  # (batch_size, 2)
    scores = torch.zeros(batch_size, 2, device=world.device)
    loss_sum = torch.zeros((), device=world.device)
    micros = plan(train.lengths[examples].tolist(), max_tokens, world.size)[world.rank]
    for i, micro in enumerate(micros):
        first, second = end_scores(train, [examples[j] for j in micro])
        # times this micro-batch's share of the pairs: the sum over all is the mean over the batch
        loss = pair_loss(first, second, signs[micro]) * (len(micro) / batch_size)
        backward(model, loss, last=i == len(micros) - 1)
        scores[micro] = torch.stack((first, second), dim=1).detach()
        loss_sum += loss.detach()
    lr = optim.learning_rate_at(step, steps, learning_rate, lr_schedule, warmup_ratio)
    grad_norm = optim.step(model, optimizer, lr, grad_clip, f"step {step}")
    skips.see(grad_norm)
    scores = add(scores)
    if torch.isfinite(scores).all():
        moments.update(scores.flatten())

    tokens = int(train.lengths[examples].sum())
    metrics = {
        "loss": add(loss_sum).item(), **describe(scores, signs), "grad_norm": grad_norm, "lr": lr,
        "tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - began),
        "skips": skips.count,
    }
    last = step + 1 == steps or stop.agreed(world.device)
    if held_out and (step + 1 == steps or eval_interval and (step + 1) % eval_interval == 0):
        metrics.update(evaluate())
    if step % log_interval == 0 or last or "eval_accuracy" in metrics:
        monitor.log(step, metrics)
    if last or save_interval and (step + 1) % save_interval == 0:
        checkpoint_run(step + 1)
    if last:
        break
monitor.close()
if world.main:
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()
                    if name.startswith("eval_")))
close()
