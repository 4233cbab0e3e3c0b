"""Stage 2: pairs of responses -> a reward model, or a cost model, or a policy without either.

objective is reward (which response is better) or cost (which is safer; above 0 means unsafe), a
score per response; or dpo, ipo, a policy whose log-ratio to a reference is the reward; or rrhf, a
policy that ranks scored answers as their scores do.

On a laptop, after python -m nanosafe.demo:
$ python train_pref.py
$ python train_pref.py --objective=cost --out_dir=out/cost --eval_data=toy/cost/test
On 8 GPUs, Safe-RLHF's recipes; the cost model's differs from the reward model's in what it names:
$ torchrun --nproc_per_node=8 train_pref.py config/beaver_7b/reward.py config/beaver_7b/cost.py"""

import os
import time
import numpy as np
import torch
from configurator import configure, save
from nanosafe import checkpoint, optim, printing
from nanosafe.checkpoint import run_state
from nanosafe.data import tokenize
from nanosafe.errors import choose, stop
from nanosafe.losses import cost_loss, dpo_loss, ipo_loss, mean_or_zero, reward_loss, rrhf_loss
from nanosafe.monitor import Monitor
from nanosafe.data.batching import (
    count_steps,
    examples_at,
    plan_micro_batches,
    gather_responses,
    sum_per_sequence,
)
from nanosafe.parallel import all_reduce_sum, backward, init, choose_placements
from nanosafe.inference import ReferenceSamples, cached_reference_logps
from nanosafe.rl import ExponentialMovingAverage, RunningMeanStd
from nanosafe.tokenizer import load as load_tokenizer

# run
objective = "reward"  # reward | cost | dpo | ipo | rrhf
out_dir = "out/reward"  # the run's folder: config.py, metrics.jsonl, model/, state/
resume = False  # continue the run in out_dir exactly where its last state was saved
seed = 0  # of the data order, of a new score head, and of samples
# model
init_from = "out/demo/sft/model"  # a policy, which gets a new head to score, or a score model
# data
data = "toy/pairs"  # pairs: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
eval_data = "toy/reward/test"  # the same, held out; empty: none
max_len = 512  # longest sequence in tokens; pairs with a longer one are dropped and counted
# optimization
epochs = 2.0  # passes over the data
max_steps = 0  # optimizer steps at most; 0: as many as epochs gives
batch_size = 64  # pairs (rrhf: rankings) per optimizer step, over all ranks
max_tokens = 8192  # packed tokens per forward on one rank: memory, not mathematics
learning_rate = 2e-5  # peak, after warm-up
lr_schedule = "cosine"  # cosine | linear | constant
warmup_ratio = 0.03  # share of the steps in which the learning rate rises from 0
weight_decay = 0.1  # of AdamW, on matrices
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # greatest norm of a gradient; 0: none
max_skips = 10  # stop after this many updates with a non-finite gradient
# reward and cost models
regularization = 0.001  # weight of the mean squared score, which keeps scores near zero
token_wise = False  # compare the scores of all tokens from the first that differs, not the last's
margin = 0.0  # reward: by how much the preferred response should win
lm_coef = 0.0  # reward, cost: weight of the preferred response's loss per token, as MOSS does
normalizer = "ema"  # ema | running | none: moments of the scores, kept in the model's config.json
normalizer_momentum = 0.9  # of ema: the weight of the moments so far
# policies; the reference is the model in init_from
beta = 0.1  # dpo: weight of the log-ratio; ipo: 1 / (2 beta) is the margin to reach
label_smoothing = 0.0  # dpo: share of the pairs whose label is taken to be wrong
reference_free = False  # dpo, ipo: compare log-probabilities, not their ratios to the reference's
sum_logps = False  # ipo: of whole responses, not per token; another beta fits then
eval_samples = 64  # responses of the reference to measure KL(reference || policy) on; 0: none
max_new_tokens = 128  # longest of these
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
SCORED, POLICIES = ("reward", "cost"), ("dpo", "ipo", "rrhf")
choose("objective", objective, SCORED + POLICIES)
choose("normalizer", normalizer, ("ema", "running", "none"))
choose("lr_schedule", lr_schedule, optim.SCHEDULES)
if beta <= 0 or not 0 <= label_smoothing < 0.5:
    stop(f"beta={beta}, label_smoothing={label_smoothing}: above 0, and from 0 to below 0.5")
scored = objective in SCORED
world = init(device, config)
resume = run_state.open_run_folder(config, save)
tok = load_tokenizer(init_from)
task = objective if scored else "rank" if objective == "rrhf" else "reward"
train = tokenize(data, tok, task, max_len, max_tokens)
held_out = tokenize(eval_data, tok, task, max_len, max_tokens) if eval_data else None
size = checkpoint.count_parameters(init_from)
placement, _ = choose_placements(
    world, dtype, parallel, offload, use_compile, activation_checkpointing, size
)
head = "lm" if not scored else "both" if lm_coef else "score"
model = checkpoint.load(
    init_from,
    head,
    placement=placement,
    vocab_size=tok.vocab_size,
    seed=seed,
    score_type=objective if scored else None,
)
model.config.do_normalize = False  # scores are trained raw; their moments are kept beside
optimizer = optim.make_adamw(model, weight_decay, beta1, beta2)
moments = ExponentialMovingAverage(normalizer_momentum) if normalizer == "ema" else RunningMeanStd()

# The reference is the model before its first step: what it says is kept, no second one is held.
reference, samples = {}, None
if objective in ("dpo", "ipo") and not reference_free:
    for dataset in filter(None, (train, held_out)):
        reference[dataset] = cached_reference_logps(model, init_from, dataset, max_tokens, world)
if not scored and held_out and eval_samples:
    chosen = [held_out.sequence(i) for i in range(min(eval_samples, len(held_out)))]
    samples = ReferenceSamples(
        model,
        [ids[: np.argmax(mask)].tolist() for ids, mask in chosen],
        world,
        max_tokens,
        max_new_tokens,
        eos_ids=tok.eos_ids,
        seed=seed,
    )

steps = count_steps(len(train), batch_size, epochs, max_steps)
start = skips = 0
if resume:
    state = run_state.load(out_dir, {"model": model}, {"model": optimizer})
    start, skips = state["step"], state["skips"]
    vars(moments).update(state["moments"])
printing.print_once(
    f"{size / 1e6:.1f} M parameters, {placement.layout}, computing in {placement.compute_dtype}; {steps} "
    f"steps of {batch_size} examples over {world.size} ranks, {max_tokens} tokens per forward"
)


def judge(dataset, examples):
    """The mean loss of some examples, and their end scores or implied rewards (n, width)."""
    batch = dataset.batch(examples, world.device)
    labels = torch.tensor(dataset.labels[examples], device=world.device)  # (n, width)
    n, width = labels.shape
    if scored:
        out = model.log_probs_and_scores(batch) if lm_coef else model.scores(batch)
        logps, scores = out if lm_coef else (None, out)
        ends = scores[(batch.cu_seqlens[1:].long() - 1)[: 2 * n]].view(2, n)
        first, second, mask = *ends, None
        if token_wise:
            first, second = gather_responses(scores, batch, [1] * 2 * n, batch.max_seqlen).chunk(2)
            mask = differing(dataset, examples, batch.max_seqlen)
        if objective == "reward":
            loss = reward_loss(first, second, regularization, mask, margin)
        else:
            loss = cost_loss(first, second, *labels.T, regularization, mask)
        if lm_coef:
            loss = loss - lm_coef * mean_or_zero(
                (sum_per_sequence(logps, batch) / tokens_of(batch))[:n]
            )
        return loss, ends.T
    there = ~labels.isnan().T  # (width, n): the sequences lie end to end, part by part
    place_in = lambda x: x.new_zeros(width, n).masked_scatter(there, x[: int(there.sum())]).T
    logps = place_in(sum_per_sequence(model.log_probs(batch), batch))  # (n, width)
    lengths = place_in(tokens_of(batch)).clamp(min=1)
    if objective == "rrhf":
        rrhf = [rrhf_loss(*(x[i, there[:, i]] for x in (logps, lengths, labels))) for i in range(n)]
        return mean_or_zero(torch.stack(rrhf) if rrhf else logps.sum(1)), logps / lengths
    ref = reference[dataset][examples] if reference else torch.zeros_like(logps)
    if objective == "dpo":
        return dpo_loss(*logps.T, *ref.T, beta, label_smoothing), beta * (logps - ref)
    per = torch.ones_like(lengths) if sum_logps else lengths
    return ipo_loss(*(logps / per).T, *(ref / per).T, beta), beta * (logps - ref) / per


def tokens_of(batch):
    """How many tokens each response has, its EOS among them (B,)."""
    return sum_per_sequence((batch.targets >= 0).float(), batch).clamp(min=1)


def differing(dataset, examples, L):
    """1 from the first token at which two responses differ to the longer one's end (n, L)."""
    mask = torch.zeros(len(examples), L)
    for row, i in enumerate(examples):
        a, b = (dataset.sequence(i, part)[0] for part in (0, 1))
        same = min(len(a), len(b))
        begin = int(np.argmax(np.append(a[:same] != b[:same], True)))
        mask[row, begin : max(len(a), len(b))] = 1
    return mask.to(world.device)


def describe(x, labels):
    """What scores or implied rewards (n, width), preferred first, say about a model."""
    sign = -1 if objective == "cost" else 1
    gaps = sign * (x[:, :, None] - x[:, None])  # (n, width, width)
    # of a cost pair the first is the safer one, whatever the signs that its labels are
    ranks = labels if objective != "cost" else torch.tensor([[1, 0]], device=x.device)
    better = (ranks[:, :, None] > ranks[:, None]).expand(gaps.shape)  # false where one is missing
    metrics = {
        "accuracy": (gaps > 0)[better].float().mean().item(),
        "margin": gaps[better].mean().item(),
    }
    if not scored:
        return {
            **metrics,
            "reward_chosen": x[:, 0].mean().item(),
            "reward_rejected": x[labels < labels[:, :1]].mean().item(),
        }
    metrics.update(score_mean=x.mean().item(), score_std=x.std().item())
    if objective == "cost":
        metrics["sign_accuracy"] = (x * labels < 0).float().mean().item()
        for name, sign in (("safe", 1), ("unsafe", -1)):
            if (labels == sign).any():
                metrics[f"{name}_mean"] = x[labels == sign].mean().item()
    return metrics


@torch.no_grad()
def evaluate():
    """The loss of the held-out data, describe() of it, and the KL from the reference."""
    x, total = torch.zeros(held_out.labels.shape, device=world.device), torch.zeros(())
    for micro in plan_micro_batches(held_out.lengths.tolist(), max_tokens, world.size)[world.rank]:
        loss, x[micro] = judge(held_out, micro)
        total += loss.cpu() * len(micro) / len(held_out)
    labels = torch.tensor(held_out.labels, device=world.device)
    metrics = {
        "loss": all_reduce_sum(total.to(world.device)).item(),
        **describe(all_reduce_sum(x), labels),
    }
    if samples:
        metrics["kl"] = samples.kl(model)
    return {f"eval_{name}": value for name, value in metrics.items()}


def checkpoint_run(step):
    """The state to resume from, and the model for others to open."""
    monitor.flush()
    if scored and normalizer != "none":
        vars(model.config).update(
            mean=[moments.mean],
            var=[moments.var],
            normalizer_type=type(moments).__name__,
            momentum=normalizer_momentum if normalizer == "ema" else None,
        )
    checkpoint.save(
        model,
        os.path.join(out_dir, "model"),
        tok,
        dtype=placement.compute_dtype,
        head="score" if scored else "lm",
    )
    extra = {"skips": skips, "moments": vars(moments)}
    run_state.save(out_dir, step, {"model": model}, {"model": optimizer}, extra, keep)


# ---- loop ----
monitor = Monitor(out_dir, steps, start, log_to, ("loss", "accuracy", "sign_accuracy"), config)
for step in range(start, steps):
    began = time.perf_counter()
    examples = examples_at(step, len(train), batch_size, seed)
    labels = torch.tensor(train.labels[examples], device=world.device)  # (batch_size, width)
    x = torch.zeros(labels.shape, device=world.device)
    loss_sum = torch.zeros((), device=world.device)
    micros = plan_micro_batches(train.lengths[examples].tolist(), max_tokens, world.size)[
        world.rank
    ]
    for i, micro in enumerate(micros):
        loss, judged = judge(train, [examples[j] for j in micro])
        # times this micro-batch's share of the pairs: the sum over all is the mean over the batch
        loss = loss * (len(micro) / batch_size)
        backward(model, loss, last=i == len(micros) - 1)
        x[micro] = judged.detach()
        loss_sum += loss.detach()
    lr = optim.learning_rate_at(step, steps, learning_rate, lr_schedule, warmup_ratio)
    grad_norm = optim.guarded_step(model, optimizer, lr, grad_clip, f"step {step}")
    skips = optim.count_skips(skips, max_skips, grad_norm)
    x = all_reduce_sum(x)
    if scored and torch.isfinite(x).all():
        moments.update(x.flatten())

    tokens = int(train.lengths[examples].sum())
    metrics = {
        "loss": all_reduce_sum(loss_sum).item(),
        **describe(x, labels),
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        "lr": lr,
        "skips": skips,
    }
    last = step + 1 == steps or monitor.asked_to_stop(world.device)
    if held_out and (step + 1 == steps or eval_interval and (step + 1) % eval_interval == 0):
        metrics.update(evaluate())
    if step % log_interval == 0 or last or "eval_accuracy" in metrics:
        monitor.log(step, metrics)
    if last or save_interval and (step + 1) % save_interval == 0:
        checkpoint_run(step + 1)
    if last:
        break
monitor.close()
