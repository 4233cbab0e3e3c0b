"""Stage 3: prompts -> a policy that maximises reward while its cost stays below a limit.

PPO-Lagrangian, the algorithm of Safe-RLHF (arXiv:2310.12773). Six models: an actor and two critics
that are trained, a reference policy, a reward model and a cost model that are not. Without a cost
model this is PPO (four models); with lambda_lr=0 lambda stays as it is: fixed reward shaping; with
advantage=rloo or grpo there are no critics.

On a laptop, after python -m nanosafe.demo:
$ python train_ppo_lag.py config/toy/ppo_lag.py --out_dir=out/mine
$ python train_ppo_lag.py config/toy/ppo.py --out_dir=out/mine_ppo
On 8 GPUs, Safe-RLHF's recipe:
$ torchrun --nproc_per_node=8 train_ppo_lag.py config/beaver_7b/ppo_lag.py"""

import os
import time
import numpy as np
import torch
from tqdm import tqdm
from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe.checkpoint import run_state
from nanosafe.data import tokenize
from nanosafe.errors import choose, stop
from nanosafe.losses import actor_loss, critic_loss, masked_mean, mle_loss, sequence_mean
from nanosafe.monitor import Monitor
from nanosafe.data.batching import (
    check_fits,
    collate,
    count_steps,
    examples_at,
    shuffled_order,
    plan_micro_batches,
    gather_responses,
)
from nanosafe.parallel import all_reduce_sum, backward, init, choose_placements
from nanosafe.rl import (
    REWARD_SCALINGS,
    LagrangeMultiplier,
    RunningMeanStd,
    adapt_kl_coef,
    gae,
    group_advantages,
    mix_advantages,
    normalize,
    scale_rewards,
    shaped_costs,
    shaped_rewards,
)
from nanosafe.rollout import hash64, sample_all
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
temperature = 1.0  # of sampling, and of all log-probabilities; these know no top_k and top_p
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
ema = 0.0  # decay per step of an average of the actor's weights, written to model_ema/; 0: none
# PPO
advantage = "gae"  # gae | rloo | grpo; the last two need num_samples > 1 and no critics
kl_coef = 0.01  # weight of the KL penalty against the reference, per token
kl_target = 0.0  # nats per response that kl_coef is adapted to reach; 0: it stays
kl_horizon = 10000.0  # responses over which it adapts
clip_ratio = 0.2  # the policy's ratio is clipped to 1 +- this; 0: it is not
max_ratio = 0.0  # no step of the actor when its mean ratio is above this; 0: always one
clip_score = 50.0  # per-token rewards and costs are clipped to +- this, KL included; 0: not
clip_value = 5.0  # values may move this far from those of the rollout; 0: any far
gamma = 1.0  # discount
gae_lambda = 0.95  # GAE's lambda
reward_scaling = "none"  # none | std | mean_std (both running) | first (rollout's std); never costs
reward_clip = 0.0  # rewards are clipped to +- this once scaled, before the KL joins; 0: not
normalize_advantage = False  # mean 0 and deviation 1 over a rollout's tokens
entropy_coef = 0.0  # weight of the policy's entropy per token, as an advantage of -log p
critic_warmup = 0  # rollouts in which only the critics learn
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
choose("actor_lr_schedule", actor_lr_schedule, optim.SCHEDULES)
choose("critic_lr_schedule", critic_lr_schedule, optim.SCHEDULES)
choose("advantage", advantage, ("gae", "rloo", "grpo"))
choose("reward_scaling", reward_scaling, REWARD_SCALINGS)
if advantage != "gae" and num_samples < 2:
    stop(
        f"advantage={advantage!r} compares a prompt's responses with each other: num_samples="
        f"{num_samples} must be at least 2"
    )
world = init(device, config)
per_rollout = rollout_size * num_samples
if per_rollout % batch_size:
    stop(f"rollout_size * num_samples = {per_rollout} is no multiple of batch_size={batch_size}")
resume = run_state.open_run_folder(config, save)
tok = load_tokenizer(actor_model)
paths = {"reward": reward_model, **({"cost": cost_model} if cost_model else {})}
toks = {name: load_tokenizer(path) for name, path in paths.items()}
critic_paths = {"reward": reward_critic or reward_model, "cost": cost_critic or cost_model}
critics = list(paths) if advantage == "gae" else []
for name in critics:
    if load_tokenizer(critic_paths[name]).fingerprint != tok.fingerprint:
        stop(
            f"a critic values the actor's tokens, but {critic_paths[name]!r} has another "
            f"tokenizer than {actor_model!r}: set {name}_critic, or advantage=rloo"
        )
check_fits([max_len], max_tokens)
asked = tokenize(prompts, tok, "prompts", max_len - 1)
ptx = tokenize(ptx_data, tok, "sft", max_len, max_tokens) if ptx_data else None

size = checkpoint.count_parameters(actor_model)
trained_placement, frozen_placement = choose_placements(
    world,
    dtype,
    parallel,
    offload,
    use_compile,
    activation_checkpointing,
    size * (1 + len(critics)),
)


def frozen(path, head, kind=None, normalize=False):
    model = checkpoint.load(path, head, placement=frozen_placement, score_type=kind).requires_grad_(
        False
    )
    model.config.do_normalize = normalize
    return model


def trained(path, head, score_type, weight_decay):
    model = checkpoint.load(path, head, placement=trained_placement, score_type=score_type)
    return model, optim.make_adamw(model, weight_decay, beta1, beta2)


ref = frozen(actor_model, "lm")
scorers = {"reward": frozen(reward_model, "score", "reward", normalize_reward)}
if cost_model:
    scorers["cost"] = frozen(cost_model, "score", "cost", normalize_cost)
models = {"actor": trained(actor_model, "lm", None, actor_weight_decay)}  # with their optimizers
for name in critics:
    models[f"{name}_critic"] = trained(critic_paths[name], "score", "critic", critic_weight_decay)
actor = models["actor"][0]
average = {"model_ema": trained(actor_model, "lm", None, 0.0)} if ema else {}


def split_trained():
    every = {**models, **average}
    return {k: m for k, (m, _) in every.items()}, {k: o for k, (_, o) in every.items()}


multiplier = LagrangeMultiplier(lambda_init, lambda_lr, lambda_max, cost_window, lambda_delay)
moments = RunningMeanStd()  # of the rewards, for reward_scaling
kl_weight = kl_coef  # what kl_coef has come to
log_temperature = temperature or 1.0  # of log-probabilities; greedy responses get the model's own
unbounded = float("inf")

updates = ppo_epochs * per_rollout // batch_size  # optimizer steps per rollout
actor_weight = 0.5 if ptx and ptx_average else 1.0
steps = count_steps(len(asked), rollout_size, epochs, -(-max_steps // updates)) * updates
step = skips = 0
if resume:
    state = run_state.load(out_dir, *split_trained())
    step, skips, kl_weight = state["step"], state["skips"], state["kl_coef"]
    multiplier.load_state_dict(state["multiplier"])
    vars(moments).update(state["moments"])
if world.main:
    print(
        f"{len(models)} x {size / 1e6:.1f} M parameters trained, {trained_placement.layout}, "
        f"computing in {trained_placement.compute_dtype}; {steps // updates} rollouts of "
        f"{rollout_size} prompts x {num_samples}, {updates} steps of {batch_size} responses "
        f"each over {world.size} ranks, {max_tokens} tokens per forward",
        flush=True,
    )


def packed(rows, texts, starts):
    """The Batch of some prompts with their responses, and where in each the response begins."""
    masks = [np.arange(len(texts[i])) >= starts[i] for i in rows]
    return collate([texts[i] for i in rows], masks, world.device), [starts[i] for i in rows]


def forward(model, batch, begins, R):
    """Log-probabilities of packed() responses' tokens, or a critic's values: (rows, R)."""
    x = model.log_probs(batch, log_temperature) if model.head == "lm" else model.scores(batch)
    return gather_responses(x, batch, begins, R)


@torch.no_grad()
def per_token(model, texts, starts, R):
    """forward() of all responses (B, R), on every rank."""
    out = torch.zeros(len(texts), R, device=world.device)
    for rows in plan_micro_batches([len(t) for t in texts], max_tokens, world.size)[world.rank]:
        out[rows] = forward(model, *packed(rows, texts, starts), R)
    return all_reduce_sum(out)


def end_scores(model, texts, model_tok):
    """A reward or cost model's scores of the last tokens (B,), on every rank, by its own tokens."""
    if model_tok.fingerprint != tok.fingerprint:
        from nanosafe.data.template import retokenize

        texts = [retokenize(t, tok, model_tok) for t in texts]
    return per_token(model, texts, [len(t) for t in texts], 1)[:, 0]


def checkpoint_run(step):
    """The state to resume from, and the policy for others to open."""
    monitor.flush()
    extra = {
        "skips": skips,
        "multiplier": multiplier.state_dict(),
        "kl_coef": kl_weight,
        "moments": vars(moments),
    }
    for folder, (model, _) in {"model": models["actor"], **average}.items():
        checkpoint.save(model, os.path.join(out_dir, folder), tok, trained_placement.compute_dtype)
    run_state.save(out_dir, step, *split_trained(), extra, keep)


# ---- loop ----
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
    with tqdm(desc="rollout", total=per_rollout, leave=0, delay=3, disable=not world.main) as bar:
        responses = sample_all(
            actor,
            questions,
            world,
            limits,
            uids,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_ids=tok.eos_ids,
            seed=hash64(seed, rollout),
            slots=slots,
            on_finish=lambda: bar.update(world.size),
        )
    lengths = torch.tensor([len(r) for r in responses])
    R = int(lengths.max())
    mask = (torch.arange(R) < lengths[:, None]).float().to(world.device)  # (B, R)
    texts = [np.array(q + r) for q, r in zip(questions, responses)]

    # 3. log-probabilities of every token, from the training forward
    old_logps = per_token(actor, texts, starts, R)
    ref_logps = per_token(ref, texts, starts, R)
    kl = ((old_logps - ref_logps) * mask).sum(1)  # (B,) nats per response
    metrics = {
        "kl": kl.mean(),
        "kl_coef": kl_weight,
        "entropy": -masked_mean(old_logps, mask),
        "eos_rate": sum(r[-1] in tok.eos_ids for r in responses) / per_rollout,
        "length": mask.sum(1).mean(),
        "max_length": float(R),
    }

    # 4. rewards and costs of responses and of every token, and what was better than expected
    scores, advantages, targets = {}, {}, {}
    for name in scorers:
        shaped = {"reward": shaped_rewards, "cost": shaped_costs}[name]
        scores[name] = end_scores(scorers[name], texts, toks[name])  # (B,)
        if not scores[name].isfinite().all():
            monitor.say(f"step {step}: the {name} model gives some responses no number")
        signal = scores[name]
        if name == "reward":
            signal = scale_rewards(signal, moments, reward_scaling, reward_clip or unbounded)
        tokenwise = shaped(signal, old_logps, ref_logps, mask, kl_weight, clip_score or unbounded)
        if critics:
            values = per_token(models[f"{name}_critic"][0], texts, starts, R)
            advantages[name], returns = gae(tokenwise, values, mask, gamma, gae_lambda)
            targets[f"{name}_critic"] = values, returns
            metrics.update(
                {
                    f"{name}_return": sequence_mean(returns, mask),
                    f"{name}_value": sequence_mean(values, mask),
                    f"{name}_advantage": sequence_mean(advantages[name], mask),
                }
            )
        else:
            advantages[name] = tokenwise.sum(1)  # (B,) to be compared once they are mixed
        metrics[name] = scores[name].mean()
        metrics[f"{name}_with_kl_penalty"] = tokenwise.sum(1).mean()

    # 5. the multiplier moves, then costs are weighed against rewards
    policy_learns = rollout >= critic_warmup
    mixed = advantages["reward"]
    if cost_model:
        multiplier.observe(scores["cost"])
        lambda_ = multiplier.update(cost_limit) if policy_learns else multiplier.value
        mixed = mix_advantages(mixed, advantages["cost"], lambda_)
        metrics.update(
            {
                "unsafe_rate": (scores["cost"] > 0).float().mean(),
                "lambda": lambda_,
                "episode_cost": multiplier.mean_cost,
                "slack": cost_limit - multiplier.mean_cost,
            }
        )
        if rollout == 0 and multiplier.mean_cost < cost_limit:
            monitor.say(
                f"note: the policy starts {metrics['slack']:.3g} below cost_limit: PPO-Lag "
                "will spend it on reward. Lower cost_limit to keep it as safe as it is."
            )
    if not critics:
        mixed = group_advantages(mixed, mask, num_samples, advantage)
    if normalize_advantage:
        mixed = normalize(mixed, mask)
    mixed = mixed - entropy_coef * old_logps  # the entropy's gradient is E[-log p grad log p]
    if kl_target and policy_learns:
        kl_weight = adapt_kl_coef(
            kl_weight, metrics["kl"].item(), kl_target, per_rollout, kl_horizon
        )
    metrics["rollout_seconds"] = time.perf_counter() - began

    # 6. updates: minibatches of the rollout
    for begin in range(0, ppo_epochs * per_rollout, batch_size):
        epoch, first = divmod(begin, per_rollout)
        chosen = shuffled_order(per_rollout, epoch, hash64(seed, rollout))[
            first : first + batch_size
        ].tolist()
        sums = {
            name: torch.zeros((), device=world.device)
            for name in (
                "clip_fraction",
                "ratio",
                "approx_kl",
                *(f"{name}_loss" for name in ("actor", "ptx", *targets)),
            )
        }
        micros = plan_micro_batches([len(texts[i]) for i in chosen], max_tokens, world.size)[
            world.rank
        ]
        for k, micro in enumerate(micros):
            rows = [chosen[j] for j in micro]
            share, last, m = len(rows) / batch_size, k == len(micros) - 1, mask[rows]
            batch, begins = packed(rows, texts, starts)

            if policy_learns:
                logps = forward(actor, batch, begins, R)
                loss = (
                    actor_loss(logps, old_logps[rows], mixed[rows], m, clip_ratio or unbounded)
                    * share
                )
                backward(actor, loss * actor_weight, last and not ptx)
                log_ratio = logps.detach() - old_logps[rows]
                ratio = log_ratio.exp()
                clipped = (ratio - 1).abs() > (clip_ratio or unbounded)
                sums["actor_loss"] += loss.detach()
                sums["clip_fraction"] += sequence_mean(clipped.float(), m) * share
                sums["approx_kl"] += sequence_mean(ratio - 1 - log_ratio, m) * share
                sums["ratio"] += sequence_mean(ratio, m) * share

            for name, (old, target) in targets.items():
                critic = models[name][0]
                values = forward(critic, batch, begins, R)
                loss = (
                    critic_loss(values, old[rows], target[rows], m, clip_value or unbounded) * share
                )
                backward(critic, loss, last)
                sums[f"{name}_loss"] += loss.detach()

        if ptx and policy_learns:  # stay a good language model: demonstrations join the gradient
            examples = examples_at(step, len(ptx), batch_size, seed)
            count = int(ptx.targets[examples].sum())
            micros = plan_micro_batches(ptx.lengths[examples].tolist(), max_tokens, world.size)[
                world.rank
            ]
            for k, micro in enumerate(micros):
                batch = ptx.batch([examples[j] for j in micro], world.device)
                m = batch.targets >= 0
                loss = mle_loss(actor.log_probs(batch, uniform_weights=True), m) * (m.sum() / count)
                backward(actor, loss * ptx_coef * actor_weight, k == len(micros) - 1)
                sums["ptx_loss"] += loss.detach()

        losses = dict(zip(sums, all_reduce_sum(torch.stack(list(sums.values()))).tolist()))
        if max_ratio and losses["ratio"] > max_ratio:
            actor.zero_grad(set_to_none=True)
            monitor.say(f"step {step}: mean ratio {losses['ratio']:.3g}: the actor is not moved")
        lrs = {
            "actor_lr": optim.learning_rate_at(
                step, steps, actor_learning_rate, actor_lr_schedule, actor_warmup_ratio
            )
        }
        lrs["critic_lr"] = optim.learning_rate_at(
            step, steps, critic_learning_rate, critic_lr_schedule, critic_warmup_ratio
        )
        norms = {}
        for name, (model, optimizer) in models.items():
            lr = lrs["actor_lr" if name == "actor" else "critic_lr"]
            norms[f"{name}_grad_norm"] = optim.guarded_step(
                model, optimizer, lr, grad_clip, f"step {step}, {name}"
            )
        skips = optim.count_skips(skips, max_skips, *norms.values())
        if ema:
            optim.update_ema(average["model_ema"][0], actor, ema)

        if step % log_interval == 0 or step + 1 == steps:
            monitor.log(
                step,
                {
                    **metrics,
                    **losses,
                    **norms,
                    **lrs,
                    "skips": skips,
                    "seconds": time.perf_counter() - began,
                },
            )
        step += 1

    # 7. samples to read, a state to come back to
    halt = monitor.asked_to_stop(world.device)
    saves = (
        step >= steps
        or halt
        or save_interval
        and step // save_interval > (step - updates) // save_interval
    )
    if saves or rollout == 0:
        for i in range(min(4, per_rollout)):
            monitor.sample(
                step - 1,
                prompt=tok.decode(questions[i]),
                response=tok.decode(responses[i]),
                kl=kl[i].item(),
                **{name: x[i].item() for name, x in scores.items()},
            )
    if saves:
        checkpoint_run(step)
    if halt:
        break
monitor.close()
