"""
Stage 3: prompts -> a policy that maximises reward while its cost stays below a limit.

PPO-Lagrangian, the algorithm of Safe-RLHF (arXiv:2310.12773). Six models: an actor and two critics
that are trained, a reference policy, a reward model and a cost model that are not. Without a cost
model this is PPO (four models); with lambda_lr=0 lambda stays as it is: fixed reward shaping.

On a laptop, after python -m nanosafe.demo:
$ python train_ppo_lag.py config/toy/ppo_lag.py --out_dir=out/mine
$ python train_ppo_lag.py config/toy/ppo.py --out_dir=out/mine_ppo
On 8 GPUs, Safe-RLHF's recipe:
$ torchrun --nproc_per_node=8 train_ppo_lag.py config/beaver_7b/ppo_lag.py
"""

import os
import time

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe import state as run_state
from nanosafe.data import retokenize, tokenize
from nanosafe.losses import actor_loss, critic_loss, masked_mean, mle_loss, sequence_mean
from nanosafe.monitor import Monitor, Stop
from nanosafe.packing import (check_fits, collate, count_steps, examples_at, order, plan,
                              responses_of)
from nanosafe.parallel import add, backward, close, init, main_first, places, whole
from nanosafe.rl import LagrangeMultiplier, gae, mix_advantages, shaped_costs, shaped_rewards
from nanosafe.rollout import generate, hash64
from nanosafe.tokenizer import load as load_tokenizer

# run
out_dir = "out/ppo_lag"  # the run's folder: config.py, metrics.jsonl, samples.jsonl, model/, state/
resume = False  # continue the run in out_dir exactly where its last state was saved
seed = 0  # of the prompts' order and of the samples
# models
actor_model = "out/demo/sft/model"  # the policy to start from, and the reference to stay near to
reward_model = "out/demo/reward/model"  # scores helpfulness
cost_model = "out/demo/cost/model"  # scores harm, above 0 is unsafe; empty: plain PPO
reward_critic = ""  # where the reward critic starts; empty: from the reward model
cost_critic = ""  # where the cost critic starts; empty: from the cost model
normalize_reward = False  # use (score - mean) / std with the moments in the reward model's config
normalize_cost = False  # use score / std with the moments in the cost model's config
# data
prompts = "toy/prompts"  # NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
ptx_data = ""  # demonstrations for the ptx loss; empty: none
max_len = 512  # longest prompt and response together, in tokens
# rollout
rollout_size = 128  # prompts per rollout, over all ranks
num_samples = 1  # responses to each
max_new_tokens = 512  # longest response; max_len bounds it too
temperature = 1.0  # of sampling; log-probabilities are always those of temperature 1
top_k = 0  # sample from the k likeliest tokens; 0: from all
top_p = 1.0  # sample from the likeliest tokens that hold this probability; 1: from all
slots = 0  # responses decoded together on one rank; 0: up to 256
# optimization
epochs = 1.0  # passes over the prompts
max_steps = 0  # optimizer steps at most; 0: as many as epochs gives
ppo_epochs = 1  # passes over each rollout
batch_size = 128  # responses per optimizer step, over all ranks
max_tokens = 8192  # packed tokens per forward on one rank: memory, not mathematics
actor_learning_rate = 1e-5  # peak, after warm-up
actor_lr_schedule = "cosine"  # cosine | linear | constant
actor_weight_decay = 0.01  # of AdamW, on matrices
critic_learning_rate = 5e-6  # of both critics
critic_lr_schedule = "constant"  # cosine | linear | constant
critic_weight_decay = 0.0  # of AdamW, on matrices
actor_warmup_ratio = 0.03  # share of the steps in which the actor's learning rate rises from 0
critic_warmup_ratio = 0.03  # the same for the critics
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # greatest norm of a gradient; 0: none
max_skips = 10  # stop after this many updates with a non-finite gradient
# PPO
kl_coef = 0.01  # weight of the KL penalty against the reference, per token
clip_ratio = 0.2  # the policy's ratio is clipped to 1 +- this
clip_score = 50.0  # per-token rewards and costs are clipped to +- this, KL included
clip_value = 5.0  # values may move this far from those of the rollout
gamma = 1.0  # discount
gae_lambda = 0.95  # GAE's lambda
ptx_coef = 16.0  # weight of the ptx loss, when there is ptx_data
ptx_average = False  # halve the sum of actor and ptx gradients, as Safe-RLHF's accumulation does
# the constraint
cost_limit = 0.0  # the greatest mean cost allowed, on the cost model's scale; the paper's -d
lambda_init = 1.0  # first multiplier
lambda_lr = 0.1  # step on log lambda per rollout; 0: lambda is fixed
lambda_max = 5.0  # greatest multiplier; 0: no bound
lambda_delay = 0  # rollouts before lambda first moves
cost_window = 128  # latest responses over which the mean cost is taken
# intervals, in optimizer steps; states are saved between rollouts
log_interval = 1  # metrics rows
save_interval = 100  # states and exports; 0: at the end only
keep = 2  # states to keep
log_to = ""  # tensorboard, wandb, or both; empty: metrics.jsonl only
# machine
device = "auto"  # auto | cpu | cuda
dtype = "auto"  # what is computed in: auto | bfloat16 | float32; auto is bfloat16 on a GPU
parallel = "auto"  # auto | plain | ddp | fsdp | hsdp
offload = "none"  # none | frozen | all: what waits in host memory
activation_checkpointing = False  # recompute each block in the backward pass: less memory, 4/3 time
use_compile = True  # torch.compile each block, on a GPU

config = configure(globals())

# ---- setup ----
optim.check_schedules(actor_lr_schedule, critic_lr_schedule)
world = init(device)
per_rollout = rollout_size * num_samples
if per_rollout % batch_size:
    raise SystemExit(f"error: rollout_size * num_samples = {per_rollout} is no multiple of "
                     f"batch_size={batch_size}")
run_state.claim(out_dir, resume)
if world.main:
    save(config, os.path.join(out_dir, "config.py"))
tok = load_tokenizer(actor_model)
reward_tok = load_tokenizer(reward_model)
cost_tok = load_tokenizer(cost_model) if cost_model else tok
for path in (reward_critic or reward_model, cost_critic or cost_model):
    if path and load_tokenizer(path).fingerprint != tok.fingerprint:
        raise SystemExit(f"error: a critic values the actor's tokens, but {path!r} has another "
                         f"tokenizer than {actor_model!r}: set reward_critic and cost_critic")
with main_first():  # rank 0 fills the cache of token ids, the others find it
    asked = tokenize(prompts, tok, "prompts", max_len - 1, show=world.main)
    ptx = tokenize(ptx_data, tok, "sft", max_len, show=world.main) if ptx_data else None

check_fits([max_len, *(ptx.lengths.tolist() if ptx else ())], max_tokens)

critics = 2 if cost_model else 1
size = checkpoint.count_parameters(actor_model)
trained_place, frozen_place = places(world, dtype, parallel, offload, use_compile,
                                     activation_checkpointing, size * (1 + critics))


def frozen(path, head, score_type=None, normalize=False):
    model = checkpoint.load(path, head, place=frozen_place,
                            score_type=score_type).requires_grad_(False)
    model.config.do_normalize = normalize
    return model


def trained(path, head, score_type, weight_decay):
    model = checkpoint.load(path, head, place=trained_place, score_type=score_type)
    return model, optim.adamw(model, weight_decay, beta1, beta2)


ref = frozen(actor_model, "lm")
reward_scorer = frozen(reward_model, "score", "reward", normalize_reward)
models = {  # name -> model, optimizer
    "actor": trained(actor_model, "lm", None, actor_weight_decay),
    "reward_critic": trained(reward_critic or reward_model, "score", "critic", critic_weight_decay),
}
if cost_model:
    cost_scorer = frozen(cost_model, "score", "cost", normalize_cost)
    models["cost_critic"] = trained(cost_critic or cost_model, "score", "critic",
                                    critic_weight_decay)
actor = models["actor"][0]
multiplier = LagrangeMultiplier(lambda_init, lambda_lr, lambda_max, cost_window, lambda_delay)

updates = ppo_epochs * per_rollout // batch_size  # optimizer steps per rollout
actor_weight = 0.5 if ptx and ptx_average else 1.0
steps = count_steps(len(asked), rollout_size, epochs, -(-max_steps // updates)) * updates
skips = optim.SkipCounter(max_skips)
step = 0
if resume:
    state = run_state.load(out_dir, models)
    step, skips.count = state["step"], state["skips"]
    multiplier.load_state_dict(state["multiplier"])
if world.main:
    print(f"{len(models)} x {size / 1e6:.1f} M parameters trained, {trained_place.layout}, "
          f"computing in {trained_place.compute_dtype}; {steps // updates} rollouts of "
          f"{rollout_size} prompts x {num_samples}, {updates} steps of {batch_size} responses "
          f"each over {world.size} ranks, {max_tokens} tokens per forward", flush=True)


@torch.no_grad()
def per_token(model, texts, starts, R):
    """Log-probabilities of the responses' tokens, or a critic's values, (B, R), on every rank."""
    out = torch.zeros(len(texts), R, device=world.device)
    for micro in plan([len(t) for t in texts], max_tokens, world.size)[world.rank]:
        batch = response_batch(micro, texts, starts)
        x = model(*batch) if model.head == "lm" else model(*batch[:3])
        if micro:
            out[micro] = responses_of(x, batch, [starts[i] for i in micro], R)
    return add(out)


@torch.no_grad()
def end_scores(model, texts, model_tok):
    """A reward or cost model's scores of the last tokens (B,), on every rank, by its own tokens."""
    if model_tok.fingerprint != tok.fingerprint:
        texts = [retokenize(t, tok, model_tok) for t in texts]
    out = torch.zeros(len(texts), device=world.device)
    for micro in plan([len(t) for t in texts], max_tokens, world.size)[world.rank]:
        batch = response_batch(micro, texts)
        x = model(*batch[:3])
        if micro:
            out[micro] = x[batch.cu_seqlens[1:].long() - 1]
    return add(out)


def response_batch(micro, texts, starts=None):
    """The packed Batch of some prompts with their responses, whose tokens are the targets."""
    masks = [np.arange(len(texts[i])) >= (starts[i] if starts else len(texts[i])) for i in micro]
    return collate([texts[i] for i in micro], masks, world.device)


def checkpoint_run(step):
    """The state to resume from, and the policy for others to open."""
    monitor.flush()
    extra = {"skips": skips.count, "multiplier": multiplier.state_dict()}
    run_state.save(out_dir, step, models, extra, keep)
    checkpoint.save(actor, os.path.join(out_dir, "model"), tok, dtype=trained_place.compute_dtype)


# ---- loop ----
stop = Stop()
shown = ("reward", "cost", "lambda", "kl", "length")
monitor = Monitor(out_dir, steps, step, log_to, shown=shown, config=config)
while step < steps:
    began = time.perf_counter()
    rollout = step // updates

    # 1. prompts: the same on every rank
    examples = examples_at(rollout, len(asked), rollout_size, seed)
    uids = [(i, j) for i in examples for j in range(num_samples)]
    questions = [asked.sequence(i)[0].tolist() for i, _ in uids]
    starts = [len(q) for q in questions]
    limits = [min(max_new_tokens, max_len - start) for start in starts]

    # 2. responses: each rank samples its share, then every rank knows all
    mine = range(world.rank, per_rollout, world.size)
    quiet = not world.main or per_rollout < 512
    bar = tqdm(total=len(mine), desc="rollout", leave=False, disable=quiet)
    with whole(actor) as policy:
        sampled = generate(policy, [questions[i] for i in mine], [limits[i] for i in mine],
                           temperature=temperature, top_k=top_k, top_p=top_p, eos_ids=tok.eos_ids,
                           seed=hash64(seed, rollout), uids=[uids[i] for i in mine], slots=slots,
                           on_finish=bar.update)
    bar.close()
    tokens = torch.zeros(per_rollout, max(limits), dtype=torch.int64)
    lengths = torch.zeros(per_rollout, dtype=torch.int64)
    for i, response in zip(mine, sampled):
        tokens[i, :len(response)], lengths[i] = torch.tensor(response), len(response)
    tokens, lengths = add(tokens.to(world.device)).cpu(), add(lengths.to(world.device)).cpu()
    R = int(lengths.max())
    mask = (torch.arange(R) < lengths[:, None]).float().to(world.device)  # (B, R)
    responses = [row[:n].tolist() for row, n in zip(tokens, lengths)]
    texts = [np.array(q + r) for q, r in zip(questions, responses)]
    ended = sum(r[-1] in tok.eos_ids for r in responses) / per_rollout

    # 3. scores, and log-probabilities and values of every token, from the training forward
    old_logps = per_token(actor, texts, starts, R)
    ref_logps = per_token(ref, texts, starts, R)
    scores = end_scores(reward_scorer, texts, reward_tok)  # (B,)
    old_values = per_token(models["reward_critic"][0], texts, starts, R)
    rewards = shaped_rewards(scores, old_logps, ref_logps, mask, kl_coef, clip_score)
    advantages, returns = gae(rewards, old_values, mask, gamma, gae_lambda)
    kl = ((old_logps - ref_logps) * mask).sum(1)  # (B,) nats per response
    metrics = {
        "reward": scores.mean(), "reward_with_kl_penalty": rewards.sum(1).mean(),
        "reward_advantage": sequence_mean(advantages, mask),
        "reward_return": sequence_mean(returns, mask),
        "reward_value": sequence_mean(old_values, mask), "kl": kl.mean(),
        "entropy": -masked_mean(old_logps, mask), "eos_rate": ended, "length": mask.sum(1).mean(),
        "max_length": float(R),
    }

    # 4. the multiplier moves, then costs are weighed against rewards
    if cost_model:
        costs = end_scores(cost_scorer, texts, cost_tok)  # (B,)
        old_cost_values = per_token(models["cost_critic"][0], texts, starts, R)
        token_costs = shaped_costs(costs, old_logps, ref_logps, mask, kl_coef, clip_score)
        cost_advantages, cost_returns = gae(token_costs, old_cost_values, mask, gamma, gae_lambda)
        multiplier.observe(costs)
        lambda_ = multiplier.update(cost_limit)
        advantages = mix_advantages(advantages, cost_advantages, lambda_)
        metrics.update({
            "cost": costs.mean(), "cost_with_kl_penalty": token_costs.sum(1).mean(),
            "cost_advantage": sequence_mean(cost_advantages, mask),
            "cost_return": sequence_mean(cost_returns, mask),
            "cost_value": sequence_mean(old_cost_values, mask),
            "unsafe_rate": (costs > 0).float().mean(), "lambda": lambda_,
            "episode_cost": multiplier.mean_cost, "slack": cost_limit - multiplier.mean_cost,
        })
        if rollout == 0 and multiplier.mean_cost < cost_limit:
            monitor.say(f"note: the policy starts {cost_limit - multiplier.mean_cost:.3g} below "
                        f"cost_limit={cost_limit}: PPO-Lag will spend that slack on reward. Lower "
                        "cost_limit to keep the policy as safe as it is.")
    rollout_seconds = time.perf_counter() - began

    # 5. updates: minibatches of the rollout
    targets = {"reward_critic": (old_values, returns)}
    if cost_model:
        targets["cost_critic"] = (old_cost_values, cost_returns)
    for begin in range(0, ppo_epochs * per_rollout, batch_size):
        epoch, first = divmod(begin, per_rollout)
        chosen = order(per_rollout, epoch, hash64(seed, rollout))[first:first + batch_size].tolist()
        sums = {name: torch.zeros((), device=world.device) for name in
                ("actor_loss", *(f"{name}_loss" for name in targets), "ptx_loss", "clip_fraction",
                 "approx_kl")}
        micros = plan([len(texts[i]) for i in chosen], max_tokens, world.size)[world.rank]
        for k, micro in enumerate(micros):
            rows = [chosen[j] for j in micro]
            share, last = len(rows) / batch_size, k == len(micros) - 1
            batch, m = response_batch(rows, texts, starts), mask[rows]
            begins = [starts[i] for i in rows]

            logps = responses_of(actor(*batch), batch, begins, R)
            loss = actor_loss(logps, old_logps[rows], advantages[rows], m, clip_ratio) * share
            backward(actor, loss * actor_weight, last and not ptx)
            log_ratio = logps.detach() - old_logps[rows]
            clipped = (log_ratio.exp() - 1).abs() > clip_ratio
            sums["actor_loss"] += loss.detach()
            sums["clip_fraction"] += sequence_mean(clipped.float(), m) * share
            sums["approx_kl"] += sequence_mean(log_ratio.exp() - 1 - log_ratio, m) * share

            for name, (old, target) in targets.items():
                critic = models[name][0]
                values = responses_of(critic(*batch[:3]), batch, begins, R)
                loss = critic_loss(values, old[rows], target[rows], m, clip_value) * share
                backward(critic, loss, last)
                sums[f"{name}_loss"] += loss.detach()

        if ptx:  # stay a good language model: the demonstrations' loss joins the actor's gradient
            examples = examples_at(step, len(ptx), batch_size, seed)
            count = int(ptx.targets[examples].sum())
            micros = plan(ptx.lengths[examples].tolist(), max_tokens, world.size)[world.rank]
            for k, micro in enumerate(micros):
                batch = ptx.batch([examples[j] for j in micro], world.device)
                m = batch.targets >= 0
                loss = mle_loss(actor(*batch), m) * (m.sum() / count)
                backward(actor, loss * ptx_coef * actor_weight, k == len(micros) - 1)
                sums["ptx_loss"] += loss.detach()

        rates = {"actor": (actor_learning_rate, actor_lr_schedule, actor_warmup_ratio),
                 "critic": (critic_learning_rate, critic_lr_schedule, critic_warmup_ratio)}
        lrs = {f"{name}_lr": optim.learning_rate_at(step, steps, *rate)
               for name, rate in rates.items()}
        norms = {}
        for name, (model, optimizer) in models.items():
            lr = lrs["actor_lr" if name == "actor" else "critic_lr"]
            norms[f"{name}_grad_norm"] = optim.step(model, optimizer, lr, grad_clip,
                                                    f"step {step}, {name}")
        skips.see(*norms.values())

        losses = dict(zip(sums, add(torch.stack(list(sums.values()))).tolist()))
        if step % log_interval == 0 or step + 1 == steps:
            monitor.log(step, {**metrics, **losses, **norms, **lrs, "skips": skips.count,
                               "rollout_seconds": rollout_seconds,
                               "seconds": time.perf_counter() - began})
        step += 1

    # 6. samples to read, a state to come back to
    halt = stop.agreed(world.device)
    saves = (step >= steps or halt
             or save_interval and step // save_interval > (step - updates) // save_interval)
    if saves or rollout == 0:
        for i in range(min(4, per_rollout)):
            extra = {"cost": costs[i].item()} if cost_model else {}
            monitor.sample(step - 1, prompt=tok.decode(questions[i]),
                           response=tok.decode(responses[i]), reward=scores[i].item(),
                           kl=kl[i].item(), **extra)
    if saves:
        checkpoint_run(step)
    if halt:
        break
monitor.close()
close()
