"""Stage 2: pairs of responses -> a reward model, or a cost model, or a policy without either.

objective says which:

    reward            a score per response: which of two is better
    cost              the same: which of two is safer, and above 0 a response is unsafe
    dpo, ipo          a policy whose log-ratio to a reference is the reward
    simpo, orpo       the same without a reference
    kto               a policy from responses that are good or bad, each by itself
    safedpo, bso      a policy from pairs whose unsafe response always loses
    bfpo, modpo       a policy from pairs by helpfulness, and from how safe their responses are
    rrhf              a policy that ranks scored answers as their scores do

On a laptop, after python -m nanosafe.demo:
$ python train_pref.py --eval_data=toy/reward/test
$ python train_pref.py --objective=cost --out_dir=out/cost --eval_data=toy/cost/test
On 8 GPUs, Safe-RLHF's recipes; the cost model's differs from the reward model's in what it names:
$ torchrun --nproc_per_node=8 train_pref.py config/beaver_7b/reward.py config/beaver_7b/cost.py"""

import os
import time
from typing import NamedTuple

import nanosafe  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

import numpy as np
import torch

from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe.checkpoint import run_state
from nanosafe.data import report_shared_prompts, tokenize
from nanosafe.data.batching import (
    count_steps,
    examples_at,
    gather_responses,
    last_of_each,
    plan_micro_batches,
    sum_per_sequence,
)
from nanosafe.errors import choose, stop
from nanosafe.inference import (
    ReferenceSamples,
    cached_reference_logps,
    last_token_scores,
    sum_response_logps,
    warn_beyond_positions,
)
from nanosafe.lora import make_lora
from nanosafe.losses import (
    bfpo_loss,
    bso_loss,
    cost_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    mean_or_zero,
    modpo_loss,
    orpo_loss,
    reward_loss,
    rrhf_loss,
    safedpo_loss,
    simpo_loss,
    zero_outside,
)
from nanosafe.monitor import Monitor, check_sinks
from nanosafe.parallel import all_reduce_sum, backward, choose_placements, init
from nanosafe.printing import print_once
from nanosafe.ranges import check_ranges
from nanosafe.rl import ExponentialMovingAverage, RunningMeanStd
from nanosafe.tokenizer import load as load_tokenizer

# run
objective = "reward"  # reward | cost | dpo | ipo | simpo | orpo | kto | safedpo | bso | bfpo |
# modpo | rrhf
out_dir = "out/reward"  # the run's folder: config.py, metrics.jsonl, model/, state/
resume = False  # continue the run in out_dir exactly where its last state was saved
seed = 0  # of the data order, of a new score head or adapter, and of samples
# model
init_from = "out/demo/sft/model"  # a policy, which gets a new head to score, or a score model
template = "auto"  # chat template: auto (the model's own) | safe_rlhf | chatml | llama3 | FILE
# adapters: low-rank additions to a frozen base, which are trained instead of it (LoRA)
lora_rank = 0  # of new adapters; 0: no adapters, all weights are trained
lora_alpha = 32.0  # what an adapter adds is multiplied by lora_alpha / lora_rank
lora_targets = "all"  # a block's matrices that get one: all, or names as in q_proj,v_proj
lora_merge = False  # also write the model merged into its base, to model_merged/
# data
data = "toy/pairs"  # pairs: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
eval_data = ""  # the same, held out; empty: none
rank_by = "better"  # better | safer: which label dpo, ipo, simpo and orpo learn; kto: is_safe
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
moments = "float32"  # of AdamW, stored as float32 | bfloat16 (4 bytes per parameter less)
grad_clip = 1.0  # greatest norm of a gradient; 0: none
max_skips = 10  # stop after this many updates with a non-finite gradient
# reward and cost models; margin and lm_coef are of policies, too
regularization = 0.001  # weight of the mean squared score, which keeps scores near zero
token_wise = False  # compare the scores of all tokens from the first that differs, not the last's
margin = 0.0  # reward, simpo: by how much the preferred response should win; safedpo, bso: by how
# much a safe one should win over an unsafe one
lm_coef = 0.0  # weight of the preferred response's loss per token, unless it is known to be unsafe
normalizer = "ema"  # ema | running | none: moments of the scores, kept in the model's config.json
normalizer_momentum = 0.9  # of ema: the weight of the moments so far
# policies; the reference is the model in init_from
beta = 0.1  # weight of the log-ratio; ipo: 1 / (2 beta) is the margin to reach, bfpo: up to
# 1 / beta nats; orpo: weight of the pair beside the preferred response's likelihood
label_smoothing = 0.0  # dpo: share of the pairs whose label is taken to be wrong
reference_free = False  # compare log-probabilities, not their ratios to the reference's
sum_logps = False  # ipo: of whole responses, not per token; another beta fits then
generator = "sba"  # bso: sba | logistic: where its divergence comes from; logistic is safedpo
safety_model = ""  # modpo: a cost model's folder, or a policy's that was trained on what is safer
helpful_weight = 0.5  # modpo: weight of the pairs; the rest is that of safety_model
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
check_ranges(config)

# ---- setup ----
# A new objective is a loss in losses.py, an entry here, and a line in judge_pairs() or a branch in
# judge().
TASK_OF_OBJECTIVE = {
    "reward": "reward",
    "cost": "cost",
    "dpo": "reward",
    "ipo": "reward",
    "simpo": "reward",
    "orpo": "reward",
    "kto": "kto",
    "safedpo": "safedpo",
    "bso": "safedpo",
    "bfpo": "bfpo",
    "modpo": "reward",
    "rrhf": "rank",
}
TASK_IF_SAFER = {"dpo": "cost", "ipo": "cost", "simpo": "cost", "orpo": "cost", "kto": "kto_safe"}
choose("objective", objective, TASK_OF_OBJECTIVE)
choose("rank_by", rank_by, ("better", "safer"))
choose("generator", generator, ("sba", "logistic"))
choose("normalizer", normalizer, ("ema", "running", "none"))
choose("lr_schedule", lr_schedule, optim.SCHEDULES)
choose("moments", moments, optim.MOMENTS)
check_sinks(log_to)
task = TASK_OF_OBJECTIVE[objective]
if rank_by == "safer":
    choose("with rank_by=safer objective", objective, TASK_IF_SAFER)
    task = TASK_IF_SAFER[objective]
if objective == "modpo" and not safety_model:
    stop("objective=modpo needs safety_model: the folder of a cost model, or of a safer policy")
gives_scores = objective in ("reward", "cost")
has_reference = not gives_scores and objective not in ("simpo", "orpo", "rrhf")
world = init(device, config)
resume = run_state.open_run_folder(config)
tok = load_tokenizer(init_from, template)
train = tokenize(data, tok, task, max_len, max_tokens)
held_out = None
if eval_data:
    held_out = tokenize(eval_data, tok, task, max_len, max_tokens)
    report_shared_prompts(train, held_out)
datasets = list(filter(None, (train, held_out)))

lora = make_lora(lora_rank, lora_alpha, lora_targets, lora_merge)
counts = checkpoint.count_trained_and_frozen(init_from, lora)
placements = choose_placements(
    world,
    dtype,
    parallel,
    offload,
    use_compile,
    activation_checkpointing,
    counts.trained,
    counts.frozen,
)
placement = placements.trained
bases = {}  # the models in memory, by folder: adapters of one base share it
head = "lm"
if gives_scores:
    head = "both" if lm_coef else "score"
model = checkpoint.load_trained(
    init_from,
    head,
    placements,
    bases,
    lora,
    vocab_size=tok.vocab_size,
    score_type=objective if gives_scores else None,
    seed=seed,
)
model.config.do_normalize = False  # scores are trained as they are; their moments are kept beside
warn_beyond_positions({repr(init_from): model}, max_len, f"max_len={max_len}")
optimizer = optim.make_adamw(
    model, weight_decay, beta1, beta2, moments, seed, placement.use_compile
)
score_moments = RunningMeanStd()
if normalizer == "ema":
    score_moments = ExponentialMovingAverage(normalizer_momentum)

# The reference is the model before its first step. Beside an adapter it is in memory anyway, as the
# base. Of a model that is trained itself, its log-probabilities of all responses are computed now
# and kept, so that no second model is held.
has_reference = has_reference and not reference_free
ref = None
if has_reference and lora_rank:
    ref = checkpoint.load(
        init_from, "lm", placement=placements.frozen, vocab_size=tok.vocab_size, bases=bases
    )
reference_logps = {}  # Dataset -> (n, width)
if has_reference and not ref:
    for dataset in datasets:
        reference_logps[dataset] = cached_reference_logps(
            model, init_from, dataset, max_tokens, world
        )

# KTO weighs desirable responses as much as the others, and measures the KL on answers to other
# prompts.
mismatched_ref_logps = {}  # Dataset -> (n,)
if objective == "kto":
    desirable = np.sum(train.labels == 1)
    undesirable = np.sum(train.labels == 0)
    if not (desirable and undesirable):
        stop(
            f"{data!r} has {desirable} desirable and {undesirable} other responses; kto needs both"
        )
    undesirable_weight = float(desirable / undesirable)
    if has_reference and not ref:
        for dataset in datasets:
            sequences = [dataset.mismatched_sequence(i) for i in range(len(dataset))]
            mismatched_ref_logps[dataset] = sum_response_logps(model, sequences, max_tokens, world)

# MODPO asks another model how safe each response is: minus the cost, or the implied reward of a
# policy, whose beta is taken to be this run's.
safety = {}  # Dataset -> (n, 2): minus the costs, or the log-probabilities of the safer policy
if objective == "modpo":
    if load_tokenizer(safety_model, template).identity != tok.identity:
        stop(f"{safety_model!r} has another tokenizer or chat template than {init_from!r}")
    safety_judge = checkpoint.load(
        safety_model, placement=placements.frozen, vocab_size=tok.vocab_size
    )
    safety_is_implied = safety_judge.head == "lm"
    for dataset in datasets:
        if not safety_is_implied:
            checkpoint.check_score_model(safety_model, "cost")
            responses = [dataset.sequence(i // 2, i % 2)[0] for i in range(2 * len(dataset))]
            costs = last_token_scores(safety_judge, responses, max_tokens, world)
            safety[dataset] = -costs.view(-1, 2)
        else:
            safety[dataset] = cached_reference_logps(
                safety_judge, safety_model, dataset, max_tokens, world
            )
    del safety_judge

reference_samples = None
if not gives_scores and held_out and eval_samples:
    sequences = [held_out.sequence(i) for i in range(min(eval_samples, len(held_out)))]
    held_out_prompts = [ids[: np.argmax(mask)].tolist() for ids, mask in sequences]
    reference_samples = ReferenceSamples(
        model, held_out_prompts, world, max_tokens, max_new_tokens, eos_ids=tok.eos_ids, seed=seed
    )

steps = count_steps(len(train), batch_size, epochs, max_steps)
record = run_state.make_record(
    config, steps, data=train, init_from=init_from, safety_model=safety_model or None
)
start = skips = 0
if resume:
    state = run_state.load(out_dir, {"model": model}, {"model": optimizer}, record)
    start, skips = state["step"], state["skips"]
    score_moments.load_state_dict(state["moments"])
print_once(
    f"{counts.trained:,} parameters trained, {placement.layout}, computing in "
    f"{placement.compute_dtype}; {steps} steps of {batch_size} examples over {world.size} ranks, "
    f"{max_tokens} tokens per forward"
)


# ---- objectives ----
# A dataset's batch holds the preferred responses of n examples first, then the other ones. On a
# rank without work n is 0, and [: 2 * n] cuts off the one number of its empty batch.


class Judged(NamedTuple):
    """What an objective says about some examples."""

    loss: torch.Tensor  # their mean loss
    scores: torch.Tensor  # (n, width): end scores or implied rewards, the preferred response first


def judge(dataset, examples, kl):
    """The Judged of examples; kl is what estimate_kl() says of them, or of a batch around them."""
    batch = dataset.batch(examples, world.device)
    labels = torch.tensor(dataset.labels[examples], device=world.device)  # (n, width)
    if gives_scores:
        return judge_by_scores(dataset, examples, batch, labels)
    if objective == "rrhf":
        return judge_rankings(batch, labels)
    if objective == "kto":
        return judge_one_by_one(dataset, examples, batch, labels, kl)
    return judge_pairs(dataset, examples, batch, labels)


def judge_by_scores(dataset, examples, batch, labels):
    """Reward and cost models: end scores, or the scores of all tokens."""
    n = len(examples)
    if lm_coef:
        logps, scores = model.log_probs_and_scores(batch)
    else:
        scores = model.scores(batch)
    end_scores = last_of_each(scores, batch)[: 2 * n].view(2, n)
    first, second, mask = end_scores[0], end_scores[1], None
    if token_wise:
        starts = [1] * (2 * n)  # so that column j is the score of token j
        first, second = gather_responses(scores, batch, starts, batch.max_seqlen).chunk(2)
        mask = mask_differing_tokens(dataset, examples, batch.max_seqlen)
    if objective == "reward":
        loss = reward_loss(first, second, regularization, mask, margin)
    else:
        safer_sign, unsafer_sign = labels.T
        loss = cost_loss(first, second, safer_sign, unsafer_sign, regularization, mask)
    if lm_coef:
        mean_logps = sum_per_sequence(logps, batch) / count_targets(batch)
        loss = loss - lm_coef * mean_or_zero(mean_logps[:n])
    return Judged(loss, end_scores.T)


def judge_pairs(dataset, examples, batch, labels):
    """Policies from pairs: the log-ratio to the reference is the implied reward."""
    n = len(examples)
    ref_logps = ask_reference(dataset, examples, batch, ~labels.isnan()).T
    logps = sum_per_sequence(model.log_probs(batch), batch)[: 2 * n].view(2, n)
    lengths = count_targets(batch)[: 2 * n].view(2, n)
    four = (*logps, *ref_logps)
    four_per_token = (*(logps / lengths), *(ref_logps / lengths))
    unsafe = (labels.T < 0).float()  # labels are +1 for safe and -1 for unsafe, if they say that
    if objective == "dpo":
        loss = dpo_loss(*four, beta, label_smoothing)
    elif objective == "ipo":
        loss = ipo_loss(*(four if sum_logps else four_per_token), beta)
    elif objective == "simpo":
        loss = simpo_loss(*logps, *lengths, beta, margin)
    elif objective == "orpo":
        loss = orpo_loss(*logps, *lengths, beta)
    elif objective == "safedpo":
        loss = safedpo_loss(*four, *unsafe, beta, margin)
    elif objective == "bso":
        loss = bso_loss(*four, *unsafe, beta, margin, generator, limit=30 + margin)
    elif objective == "bfpo":
        loss = bfpo_loss(*four, *unsafe, beta)
    else:
        safety_rewards = safety[dataset][examples].T
        if safety_is_implied:
            safety_rewards = beta * (safety_rewards - ref_logps)
        loss = modpo_loss(*four, *safety_rewards, helpful_weight, beta)
    if lm_coef:
        # Where the first response is unsafe, as in BFPO's pairs, the second one should win.
        second = zero_outside(1 - unsafe[1], four_per_token[1])
        winner = torch.where(unsafe[0].bool(), second, four_per_token[0])
        loss = loss - lm_coef * mean_or_zero(winner)
    implied_rewards = beta * (logps - ref_logps)
    if objective in ("simpo", "orpo") or (objective == "ipo" and not sum_logps):
        implied_rewards = implied_rewards / lengths
    return Judged(loss, implied_rewards.T)


@torch.no_grad()
def ask_reference(dataset, examples, batch, exists):
    """The reference's log-probabilities of the responses (n, width); 0 where there is none.

    exists  (n, width): whether an example has such a response"""
    if ref:
        return spread_over_answers(sum_per_sequence(ref.log_probs(batch), batch), exists)
    if has_reference:
        return reference_logps[dataset][examples]
    return torch.zeros(exists.shape, device=world.device)


def judge_one_by_one(dataset, examples, batch, labels, kl):
    """KTO: labels (n, width) are 1 and 0, and nan where an example has one response only."""
    exists = ~labels.isnan()
    ref_logps = ask_reference(dataset, examples, batch, exists)
    logps = spread_over_answers(sum_per_sequence(model.log_probs(batch), batch), exists)
    lengths = spread_over_answers(count_targets(batch), exists).clamp(min=1)
    loss = kto_loss(logps[exists], ref_logps[exists], labels[exists], kl, beta, undesirable_weight)
    # A response weighs the same wherever it is: examples weigh as much as they have responses.
    loss = loss * exists.sum() / max(1, exists.numel())
    if lm_coef:
        loss = loss - lm_coef * mean_or_zero(zero_outside(labels == 1, logps / lengths).mean(1))
    return Judged(loss, beta * (logps - ref_logps))


def estimate_kl(dataset, examples):
    """KTO's KL(policy || reference): the mean log-ratio of answers to other prompts, a scalar."""
    if objective != "kto":
        return None
    sequences = [dataset.mismatched_sequence(i) for i in examples]
    ref_logps = 0.0
    if ref:
        ref_logps = sum_response_logps(ref, sequences, max_tokens, world)
    elif has_reference:
        ref_logps = mismatched_ref_logps[dataset][examples]
    logps = sum_response_logps(model, sequences, max_tokens, world)
    return (logps - ref_logps).mean()


def judge_rankings(batch, labels):
    """RRHF: labels (n, width) are the answers' scores, nan where a ranking has fewer answers."""
    exists = ~labels.isnan()
    logps = spread_over_answers(sum_per_sequence(model.log_probs(batch), batch), exists)
    lengths = spread_over_answers(count_targets(batch), exists).clamp(min=1)
    losses = []
    for i in range(len(labels)):
        answers = exists[i]
        losses.append(rrhf_loss(logps[i, answers], lengths[i, answers], labels[i, answers]))
    loss = mean_or_zero(torch.stack(losses) if losses else logps.sum(1))
    return Judged(loss, logps / lengths)


def spread_over_answers(x, exists):
    """x, one number per sequence of the batch, -> (n, width), 0 where there is no such answer."""
    n, width = exists.shape
    count = int(exists.sum())
    return x.new_zeros(width, n).masked_scatter(exists.T, x[:count]).T


def count_targets(batch):
    """How many tokens each response has, its EOS included (B,)."""
    return sum_per_sequence((batch.targets >= 0).float(), batch).clamp(min=1)


def mask_differing_tokens(dataset, examples, length):
    """1 from the first token at which two responses differ to the longer one's end (n, length)."""
    mask = torch.zeros(len(examples), length)
    for row, i in enumerate(examples):
        chosen, _ = dataset.sequence(i, 0)
        rejected, _ = dataset.sequence(i, 1)
        shorter = min(len(chosen), len(rejected))
        differs = chosen[:shorter] != rejected[:shorter]
        begin = int(np.argmax(np.append(differs, True)))
        mask[row, begin : max(len(chosen), len(rejected))] = 1
    return mask.to(world.device)


# ---- metrics ----


def describe(scores, labels):
    """What scores or implied rewards (n, width), the preferred first, say about a model."""
    if objective == "kto":
        return describe_one_by_one(scores, labels)
    metrics = {}
    gaps = gaps_between_pairs(scores, labels)
    metrics["accuracy"] = (gaps > 0).float().mean().item()
    metrics["margin"] = gaps.mean().item()
    if not gives_scores:
        others = scores[:, 1]
        if objective == "rrhf":
            others = scores[labels < labels[:, :1]]
        metrics["reward_chosen"] = scores[:, 0].mean().item()
        metrics["reward_rejected"] = others.mean().item()
        return metrics
    metrics["score_mean"] = scores.mean().item()
    metrics["score_std"] = scores.std().item()
    if objective == "cost":  # labels are +1 for safe and -1 for unsafe
        metrics["sign_accuracy"] = (scores * labels < 0).float().mean().item()
        for name, sign in (("safe", 1), ("unsafe", -1)):
            if (labels == sign).any():
                metrics[f"{name}_mean"] = scores[labels == sign].mean().item()
    return metrics


def describe_one_by_one(scores, labels):
    """The same of KTO: right is a gain of a desirable response, or a loss of another one."""
    is_desirable = labels == 1
    is_other = labels == 0  # a missing response is neither
    right = torch.where(is_desirable, scores > 0, scores < 0)
    metrics = {"accuracy": right[is_desirable | is_other].float().mean().item()}
    if is_desirable.any() and is_other.any():
        metrics["reward_chosen"] = scores[is_desirable].mean().item()
        metrics["reward_rejected"] = scores[is_other].mean().item()
        metrics["margin"] = metrics["reward_chosen"] - metrics["reward_rejected"]
    return metrics


def gaps_between_pairs(scores, labels):
    """By how much the score of each preferred response exceeds that of the other one."""
    if objective == "cost":
        return scores[:, 1] - scores[:, 0]  # the first is the safer one, which costs less
    if objective == "bfpo":
        return labels[:, 0] * (scores[:, 0] - scores[:, 1])  # an unsafe first one should lose
    if objective != "rrhf":
        return scores[:, 0] - scores[:, 1]
    gaps = scores[:, :, None] - scores[:, None]  # (n, width, width)
    is_better = labels[:, :, None] > labels[:, None]  # False where an answer is missing
    return gaps[is_better]


@torch.no_grad()
def evaluate():
    """The loss of the held-out data, describe() of it, and the KL from the reference."""
    scores = torch.zeros(held_out.labels.shape, device=world.device)
    total = torch.zeros(())
    lengths = held_out.lengths.tolist()
    kl = estimate_kl(held_out, list(range(len(held_out))))
    for rows in plan_micro_batches(lengths, max_tokens, world.size)[world.rank]:
        judged = judge(held_out, rows, kl)
        scores[rows] = judged.scores
        total += judged.loss.cpu() * len(rows) / len(held_out)
    labels = torch.tensor(held_out.labels, device=world.device)
    metrics = {"loss": all_reduce_sum(total.to(world.device)).item()}
    metrics.update(describe(all_reduce_sum(scores), labels))
    if reference_samples:
        metrics["kl"] = reference_samples.kl(model)
    return {f"eval_{name}": value for name, value in metrics.items()}


def save_run(step):
    """Write the state to resume from, and the model for others to open."""
    monitor.flush()
    if gives_scores and normalizer != "none":
        model.config.mean = [score_moments.mean]
        model.config.var = [score_moments.var]
        model.config.normalizer_type = type(score_moments).__name__
        model.config.momentum = normalizer_momentum if normalizer == "ema" else None
    exported_head = "score" if gives_scores else "lm"
    model_dir = os.path.join(out_dir, "model")
    checkpoint.save(model, model_dir, tok, dtype=placement.compute_dtype, head=exported_head)
    if lora_rank and lora_merge:
        checkpoint.save_merged(model_dir, f"{model_dir}_merged", tok, placement.compute_dtype)
    extra = {"skips": skips, "moments": score_moments.state_dict()}
    run_state.save(out_dir, step, {"model": model}, {"model": optimizer}, extra, keep, record)


# ---- loop ----
run_state.begin_run(config, save)
monitor = Monitor(out_dir, steps, start, log_to, ("loss", "accuracy", "sign_accuracy"), config)
for step in range(start, steps):
    began = time.perf_counter()
    examples = examples_at(step, len(train), batch_size, seed)
    lengths = train.lengths[examples].tolist()
    labels = torch.tensor(train.labels[examples], device=world.device)  # (batch_size, width)
    scores = torch.zeros(labels.shape, device=world.device)
    loss_sum = torch.zeros((), device=world.device)
    kl = estimate_kl(train, examples)
    micro_batches = plan_micro_batches(lengths, max_tokens, world.size)[world.rank]
    for k, rows in enumerate(micro_batches):
        judged = judge(train, [examples[i] for i in rows], kl)
        # A micro-batch's mean times its share of the examples: over micro-batches and ranks these
        # sum up to the mean over the whole batch, however it is cut.
        loss = judged.loss * (len(rows) / batch_size)
        backward(model, loss, last=k == len(micro_batches) - 1)
        scores[rows] = judged.scores.detach()
        loss_sum += loss.detach()
    lr = optim.learning_rate_at(step, steps, learning_rate, lr_schedule, warmup_ratio)
    grad_norm = optim.guarded_step(model, optimizer, lr, grad_clip, f"step {step}")
    skips = optim.count_skips(skips, max_skips, grad_norm)
    scores = all_reduce_sum(scores)
    if gives_scores and torch.isfinite(scores).all():
        score_moments.update(scores.flatten())

    tokens = sum(lengths)
    metrics = {
        "loss": all_reduce_sum(loss_sum).item(),
        **describe(scores, labels),
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
        "lr": lr,
        "skips": skips,
    }
    is_last = step + 1 == steps
    must_stop = monitor.asked_to_stop(world.device)
    evaluates = is_last or (eval_interval and (step + 1) % eval_interval == 0)
    if evaluates and held_out:
        metrics.update(evaluate())
    if step % log_interval == 0 or is_last or must_stop or (evaluates and held_out):
        monitor.log(step, metrics)
    if is_last or must_stop or (save_interval and (step + 1) % save_interval == 0):
        save_run(step + 1)
    if must_stop:
        break
monitor.close()
print_once(f"the model is in {os.path.join(out_dir, 'model')}")
