"""Stage 3: prompts -> a policy that maximises reward while its cost stays below a limit.

PPO-Lagrangian, the algorithm of Safe-RLHF (arXiv:2310.12773). Six models: the actor and two critics
are trained; the reference policy, the reward model and the cost model are not. Without a cost model
this is PPO with four models. Each further cost model is a further constraint, with its own limit,
lambda, critic and metrics. With lambda_lr=0 lambda stays as it is: fixed reward shaping. With
advantage=rloo or grpo there are no critics. With lora_rank the trained models are adapters on a
frozen base; if the reward and cost models are adapters of it, too, all six share it in memory.

On a laptop, after python -m nanosafe.demo:
$ python train_ppo_lag.py config/toy/ppo_lag.py --out_dir=out/mine
$ python train_ppo_lag.py config/toy/ppo.py --out_dir=out/mine_ppo
On 8 GPUs, Safe-RLHF's recipe:
$ torchrun --nproc_per_node=8 train_ppo_lag.py config/beaver_7b/ppo_lag.py"""

import math
import os
import time
from collections import Counter
from typing import NamedTuple

import nanosafe  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe.checkpoint import run_state
from nanosafe.data import tokenize
from nanosafe.data.batching import (
    check_fits,
    copy_to_device,
    count_steps,
    examples_at,
    plan_micro_batches,
    shuffled_order,
)
from nanosafe.errors import choose, stop
from nanosafe.inference import (
    Responses,
    ScoreFunction,
    check_prompts,
    check_scorer,
    encode_all_answered,
    last_token_scores,
    list_constraints,
    response_logps,
    response_values,
    warn_beyond_positions,
)
from nanosafe.lora import make_lora
from nanosafe.losses import (
    LOSS_MEANS,
    SURROGATES,
    actor_loss,
    batch_share,
    critic_loss,
    importance_weights,
    masked_mean,
    mle_loss,
    policy_ratio,
    sequence_mean,
)
from nanosafe.monitor import Monitor, check_sinks
from nanosafe.parallel import MetricSums, backward, choose_placements, init
from nanosafe.printing import print_once
from nanosafe.ranges import check_cost_limit, check_ranges
from nanosafe.rl import (
    ADVANTAGES,
    CONSTRAINTS,
    COST_KINDS,
    MULTIPLIERS,
    NORMALIZE_GROUPS,
    REWARD_SCALINGS,
    RunningMeanStd,
    adapt_kl_coef,
    constrained_costs,
    excess_costs,
    gae,
    group_advantages,
    length_penalties,
    make_multiplier,
    measure_sampler_gap,
    mix_advantages,
    normalize,
    pessimism_factor,
    pessimistic_costs,
    scale_rewards,
    shaped_costs,
    shaped_rewards,
    share_of_flat_groups,
    whiten,
)
from nanosafe.rollout import hash64, sample_all
from nanosafe.storage import names_function
from nanosafe.tokenizer import load as load_tokenizer

# run
out_dir = "out/ppo_lag"  # the run's folder: config.py, metrics.jsonl, samples.jsonl, model/, state/
resume = False  # continue the run in out_dir exactly where its last state was saved
seed = 0  # of the prompts' order, of the samples, and of new adapters and score heads
# models
actor_model = "out/demo/sft/model"  # the policy to start from, and the reference to stay near to
reward_model = "out/demo/reward/model"  # scores helpfulness; or FILE.py:NAME, a function
cost_model = "out/demo/cost/model"  # harm, unsafe above 0; A,B: two constraints; empty: plain PPO
reward_critic = ""  # where the reward critic starts; empty: from the reward model, or the actor
cost_critic = ""  # where cost critics start; empty: each from its cost model, or the actor
template = "auto"  # chat template: auto (the actor's own) | safe_rlhf | chatml | llama3 | FILE
normalize_reward = False  # use (score - mean) / std with the moments in the reward model's config
normalize_cost = False  # use score / std with the moments in the cost model's config
# adapters: low-rank additions to a frozen base, which are trained instead of it (LoRA)
lora_rank = 0  # of new adapters; 0: no adapters, all weights are trained
lora_alpha = 32.0  # what an adapter adds is multiplied by lora_alpha / lora_rank
lora_targets = "all"  # a block's matrices that get one: all, or names as in q_proj,v_proj
lora_merge = False  # also write the model merged into its base, to model_merged/
# data
prompts = "toy/prompts"  # NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
ptx_data = ""  # demonstrations for the ptx loss; empty: none
max_len = 512  # longest prompt and response together, in tokens
# rollout
rollout_size = 128  # prompts per rollout, over all ranks
num_samples = 1  # responses to each
max_new_tokens = 512  # longest response; max_len bounds it too
temperature = 1.0  # of sampling and of log-probabilities, which ignore top_k and top_p
top_k = 0  # sample from the k likeliest tokens; 0: from all
top_p = 1.0  # sample from the likeliest tokens that hold this probability; 1: from all
slots = 0  # responses decoded together on one rank; 0: up to 256
# optimization
epochs = 1.0  # passes over the prompts
max_steps = 0  # optimizer steps at most, up to a whole rollout; 0: as many as epochs gives
ppo_epochs = 1  # passes over each rollout
batch_size = 128  # responses per optimizer step, over all ranks
max_tokens = 8192  # packed tokens per forward on one rank: memory, not mathematics
actor_learning_rate = 1e-5  # peak, after warm-up
actor_lr_schedule = "cosine"  # cosine | linear | constant
actor_weight_decay = 0.01  # of AdamW, on matrices
critic_learning_rate = 5e-6  # of all critics
critic_lr_schedule = "constant"  # cosine | linear | constant
critic_weight_decay = 0.0  # of AdamW, on matrices
actor_warmup_ratio = 0.03  # share of the steps in which the actor's learning rate rises from 0
critic_warmup_ratio = 0.03  # the same for the critics
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
moments = "float32"  # of AdamW, stored as float32 | bfloat16 (4 bytes per parameter less)
grad_clip = 1.0  # greatest norm of a gradient; 0: none
max_skips = 10  # stop above this many updates with a non-finite gradient; each model counts
ema = 0.0  # decay per step of an average of the actor's weights, written to model_ema/; 0: none
# PPO
advantage = "gae"  # gae | rloo | grpo; the last two need num_samples > 1 and no critics
kl_coef = 0.01  # weight of the KL penalty against the reference, per token
kl_target = 0.0  # nats per response that kl_coef is adapted to reach; 0: it stays
kl_horizon = 10000.0  # responses over which it adapts
normalize_groups = "mixed"  # grpo standardises R - lambda C: mixed | R, C: each | and whitens: gdpo
surrogate = "ppo"  # ppo | gspo (one ratio per response) | cispo (the clipped ratio is a weight)
clip_ratio = 0.2  # the policy's ratio is clipped to 1 +- this; 0: it is not
clip_ratio_high = 0.0  # above 1 it is clipped to 1 + this instead; 0: to 1 + clip_ratio
loss_mean = "response"  # response (tokens, then responses) | token | constant (max_new_tokens)
is_cap = 0.0  # tokens weigh min(p_trainer / p_sampler, this); 0: all alike; 2 is common
mask_cut = False  # responses that were cut at their greatest length train the critics only
cut_penalty = 0.0  # what the reward of such a response loses, after reward_scaling
cut_buffer = 0  # last tokens before that length over which the penalty grows from 0; 0: it does not
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
cost_kind = "score"  # score | unsafe: 1 above 0, else 0, so that cost_limit is a share of answers
cost_limit = 0.0  # greatest cost allowed, in cost_kind's unit; the paper's -d; 0.0,-1.5: one each
constraint = "mean"  # mean | prompt: what has to keep it, the mean cost or every answer's (RePO)
pessimism = 0.0  # HC-RLHF's delta, the chance that its bound on the mean cost is wrong; 0: no bound
pessimism_test = 0  # answers that eval.safety_test will judge: the bound allows for its error, too
cost_scale = 1.0  # costs are multiplied by this before they meet rewards; cost_limit stays
multiplier = "lagrange"  # lagrange | pid | optimistic | bounded: how lambda follows the cost
lambda_init = 1.0  # first multiplier
lambda_lr = 0.1  # step per rollout on log lambda (pid, optimistic: on lambda); 0: no step
lambda_max = 5.0  # greatest multiplier; 0: no bound
lambda_kp = 0.1  # pid: gain of the distance from cost_limit; lambda_lr is that of its sum
lambda_kd = 0.01  # pid: gain of the cost's rise
lambda_ema = 0.95  # pid: weight of the previous mean of the distance and of the cost
lambda_lookback = 10  # pid: rollouts over which the rise is taken
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
check_ranges(config)

# ---- setup ----
choose("actor_lr_schedule", actor_lr_schedule, optim.SCHEDULES)
choose("critic_lr_schedule", critic_lr_schedule, optim.SCHEDULES)
choose("moments", moments, optim.MOMENTS)
choose("advantage", advantage, ADVANTAGES)
choose("normalize_groups", normalize_groups, NORMALIZE_GROUPS)
choose("surrogate", surrogate, SURROGATES)
choose("loss_mean", loss_mean, LOSS_MEANS)
choose("reward_scaling", reward_scaling, REWARD_SCALINGS)
choose("cost_kind", cost_kind, COST_KINDS)
choose("constraint", constraint, CONSTRAINTS)
choose("multiplier", multiplier, MULTIPLIERS)
check_sinks(log_to)
if advantage != "gae" and num_samples < 2:
    stop(
        f"advantage={advantage!r} compares a prompt's responses with each other: num_samples="
        f"{num_samples} must be at least 2"
    )
if advantage != "gae" and (temperature == 0 or top_k == 1):
    stop(
        f"advantage={advantage!r} compares a prompt's responses with each other, but with "
        f"temperature={temperature} and top_k={top_k} they are all the same"
    )
constraints = list_constraints(cost_model, cost_limit)
if normalize_groups != "mixed" and (advantage != "grpo" or not constraints):
    stop(
        f"normalize_groups={normalize_groups!r} standardises rewards and costs: it needs "
        "advantage=grpo and costs"
    )
cost_folders = []
for folder, limit in constraints.values():
    cost_folders.append(folder)
    check_cost_limit(cost_kind, limit)
if pessimism and (pessimism_test == 1 or min(cost_window, rollout_size * num_samples) < 2):
    stop(
        f"pessimism={pessimism} needs the deviation of several costs: cost_window={cost_window}, "
        f"rollout_size * num_samples={rollout_size * num_samples} and pessimism_test="
        f"{pessimism_test} must be 2 or more; pessimism_test may be 0"
    )
if kl_target and not kl_coef:
    stop(f"kl_target={kl_target} adapts kl_coef by factors, so kl_coef=0 would stay 0")
world = init(device, config)
responses_per_rollout = rollout_size * num_samples
if responses_per_rollout % batch_size:
    stop(
        f"rollout_size * num_samples = {responses_per_rollout} is not a multiple of "
        f"batch_size={batch_size}"
    )
if kl_target and kl_horizon < responses_per_rollout:
    print_once(
        f"note: kl_horizon={kl_horizon} is shorter than a rollout of {responses_per_rollout} "
        "responses: kl_coef changes by at most 20% per rollout"
    )
resume = run_state.open_run_folder(config)
# Where 0 means "no bound", the algorithm takes infinity.
ratio_bound = clip_ratio or math.inf
upper_ratio_bound = clip_ratio_high or ratio_bound
score_bound = clip_score or math.inf
value_bound = clip_value or math.inf
reward_bound = reward_clip or math.inf
log_temperature = temperature or 1.0  # greedy responses get the model's own log-probabilities

# data
tok = load_tokenizer(actor_model, template)
check_scorer(reward_model, "reward")
for folder in cost_folders:
    check_scorer(folder, "cost")
check_fits([max_len], max_tokens)
prompt_data = tokenize(prompts, tok, "prompts", max_len - 1)
ptx = tokenize(ptx_data, tok, "sft", max_len, max_tokens) if ptx_data else None

# models
has_critics = advantage == "gae"
critic_folders = {}
if has_critics:
    start = actor_model if names_function(reward_model) else reward_model
    critic_folders["reward_critic"] = reward_critic or start
    for name, (folder, _) in constraints.items():
        start = actor_model if names_function(folder) else folder
        critic_folders[f"{name}_critic"] = cost_critic or start
for name, folder in critic_folders.items():
    if load_tokenizer(folder).fingerprint != tok.fingerprint:
        knob = "reward_critic" if name == "reward_critic" else "cost_critic"
        stop(
            f"a critic values the actor's tokens, but {folder!r} has another tokenizer than "
            f"{actor_model!r}: set {knob}, or advantage=rloo"
        )
lora = make_lora(lora_rank, lora_alpha, lora_targets, lora_merge)
trained_folders = [actor_model, *critic_folders.values()]
counts = [checkpoint.count_trained_and_frozen(folder, lora) for folder in trained_folders]
parameters = sum(count.trained for count in counts)
placements = choose_placements(
    world,
    dtype,
    parallel,
    offload,
    use_compile,
    activation_checkpointing,
    parameters,
    counts[0].frozen,
)
bases = {}  # the models in memory, by folder: adapters of one base share it


def load_frozen(folder, head, model_tok, score_type=None):
    """A model that is not trained. model_tok: its tokenizer, whose tokens all need a row."""
    model = checkpoint.load(
        folder,
        head,
        placement=placements.frozen,
        vocab_size=model_tok.vocab_size,
        score_type=score_type,
        bases=bases,
    )
    return model.requires_grad_(False)


class Scorer(NamedTuple):
    """A reward or cost model."""

    model: object
    tok: object  # its tokenizer, with its own chat template; None: the model is a function


def load_scorer(folder, score_type, normalizes):
    """The Scorer of a folder or of FILE.py:NAME. normalizes: by the moments in its config."""
    if names_function(folder):
        if normalizes:
            stop(f"{folder!r} is a function: it has no moments to normalize its scores by")
        return Scorer(ScoreFunction(folder, world), tok=None)
    model_tok = load_tokenizer(folder)
    model = load_frozen(folder, "score", model_tok, score_type)
    if normalizes and model.config.var[0] <= 0:
        stop(f"{folder!r} states var={model.config.var[0]}: normalised scores are divided by it")
    model.config.do_normalize = normalizes
    return Scorer(model, model_tok)


def load_trained(folder, head, score_type=None):
    """A model to train: with lora_rank an adapter, whose frozen base is shared through `bases`."""
    return checkpoint.load_trained(
        folder,
        head,
        placements,
        bases,
        lora,
        vocab_size=tok.vocab_size,
        score_type=score_type,
        seed=seed,
    )


def make_optimizer(model, weight_decay):
    use_compile = placements.trained.use_compile
    return optim.make_adamw(model, weight_decay, beta1, beta2, moments, seed, use_compile)


ref = load_frozen(actor_model, "lm", tok)
scorers = {"reward": load_scorer(reward_model, "reward", normalize_reward)}
for name, (folder, _) in constraints.items():
    scorers[name] = load_scorer(folder, "cost", normalize_cost)
actor = load_trained(actor_model, "lm")
models = {"actor": actor}  # all that is trained, by the names that states know them by
optimizers = {"actor": make_optimizer(actor, actor_weight_decay)}
for name, folder in critic_folders.items():
    models[name] = load_trained(folder, "score", "critic")
    optimizers[name] = make_optimizer(models[name], critic_weight_decay)
average = load_trained(actor_model, "lm") if ema else None  # of an adapter, a second one
if average:
    models["model_ema"] = average  # saved with the others; no optimizer moves it
readers = dict(models)  # of up to max_len tokens
for name, scorer in scorers.items():
    if scorer.tok:
        readers[f"{name}_model"] = scorer.model
warn_beyond_positions(readers, max_len, f"max_len={max_len}")
for scorer in scorers.values():
    if scorer.tok and scorer.tok.identity != tok.identity:
        check_prompts(prompt_data, scorer.tok)

# the run
multipliers = {}
for name in constraints:
    multipliers[name] = make_multiplier(
        multiplier,
        init=lambda_init,
        lr=lambda_lr,
        max=lambda_max,
        window=cost_window,
        delay=lambda_delay,
        kp=lambda_kp,
        kd=lambda_kd,
        ema=lambda_ema,
        lookback=lambda_lookback,
        pessimism=pessimism,
        pessimism_test=pessimism_test,
    )
pessimistic_factor = 0.0
if pessimism:  # for the policy's costs the window is one rollout
    pessimistic_factor = pessimism_factor(pessimism, responses_per_rollout, pessimism_test)
reward_moments = RunningMeanStd()  # of the rewards, for reward_scaling
current_kl_coef = kl_coef  # kl_target adapts it
update_metrics = ["actor_loss", "ptx_loss", "clip_fraction", "ratio", "approx_kl"]
update_metrics += [f"{name}_loss" for name in critic_folders]
updates = ppo_epochs * responses_per_rollout // batch_size  # optimizer steps per rollout
actor_weight = 0.5 if ptx and ptx_average else 1.0
rollouts = count_steps(len(prompt_data), rollout_size, epochs, math.ceil(max_steps / updates))
steps = rollouts * updates
record = run_state.make_record(
    config,
    steps,
    prompts=prompt_data,
    ptx_data=ptx,
    actor_model=actor_model,
    reward_model=reward_model,
    cost_model=cost_folders or None,
)
step = skips = 0
if resume:
    state = run_state.load(out_dir, models, optimizers, record)
    step, skips = state["step"], state["skips"]
    if kl_target:
        current_kl_coef = state["kl_coef"]
    for name, own_multiplier in multipliers.items():
        own_multiplier.load_state_dict(state[name.replace("cost", "multiplier")])
    reward_moments.load_state_dict(state["moments"])
print_once(
    f"{parameters:,} parameters trained in {len(optimizers)} models, "
    f"{placements.trained.layout}, computing in {placements.trained.compute_dtype}; {rollouts} "
    f"rollouts of {rollout_size} prompts x {num_samples}, {updates} steps of {batch_size} "
    f"responses each over {world.size} ranks, {max_tokens} tokens per forward"
)


def score_answers(scorer, asked, questions, answers):
    """A Scorer's scores of all responses (B,), in the words that it was trained on.

    asked               the Prompt of each response
    questions, answers  token ids of the prompts and of the responses"""
    if scorer.tok is None:
        scores = scorer.model.score_answers(asked, questions, answers, tok)
        return torch.tensor(scores, device=world.device)
    ids = encode_all_answered(asked, questions, answers, tok, scorer.tok)
    return last_token_scores(scorer.model, ids, max_tokens, world)


def save_run(step):
    """Write the state to resume from, and the policy for others to open."""
    monitor.flush()
    compute_dtype = placements.trained.compute_dtype
    model_dir = os.path.join(out_dir, "model")
    checkpoint.save(actor, model_dir, tok, compute_dtype)
    if lora_rank and lora_merge:
        checkpoint.save_merged(model_dir, f"{model_dir}_merged", tok, compute_dtype)
    if average:
        checkpoint.save(average, os.path.join(out_dir, "model_ema"), tok, compute_dtype)
    extra = {
        "skips": skips,
        "kl_coef": current_kl_coef,
        "moments": reward_moments.state_dict(),
    }
    for name, own_multiplier in multipliers.items():  # multiplier, multiplier_2, ...
        extra[name.replace("cost", "multiplier")] = own_multiplier.state_dict()
    run_state.save(out_dir, step, models, optimizers, extra, keep, record)


# ---- loop ----
run_state.begin_run(config, save)
shown = ("reward", "cost", "lambda", "kl", "length")
monitor = Monitor(out_dir, steps, step, log_to, shown, config)
while step < steps:
    began = time.perf_counter()
    rollout = step // updates

    # 1. prompts: the same on every rank
    # A response's randomness is that of its uid: the prompt, and which of its responses it is. A
    # rollout can hold a prompt twice, as at an epoch's border: its responses are counted through.
    uids, asked, questions = [], [], []
    sampled = Counter()  # prompt -> how many responses to it the rollout has so far
    for example in examples_at(rollout, len(prompt_data), rollout_size, seed):
        for _ in range(num_samples):
            uids.append((example, sampled[example]))
            sampled[example] += 1
            asked.append(prompt_data.prompt(example))
            questions.append(prompt_data.sequence(example)[0].tolist())
    limits = [min(max_new_tokens, max_len - len(question)) for question in questions]

    # 2. responses: each rank samples its share, then every rank knows all of them
    with tqdm(
        desc="rollout", total=len(questions), leave=False, delay=3, disable=not world.main
    ) as bar:
        answers, sampled_logps = sample_all(
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
            with_logps=True,
            on_finish=lambda: bar.update(world.size),
        )
    lengths = torch.tensor([len(answer) for answer in answers])
    responses = Responses(
        ids=[np.array(question + answer) for question, answer in zip(questions, answers)],
        starts=[len(question) for question in questions],
        longest=int(lengths.max()),
    )
    positions = torch.arange(responses.longest)
    mask = (positions < lengths[:, None]).float().to(world.device)  # (B, R)

    sampled_logps = [torch.tensor(row) for row in sampled_logps]
    sampled_logps = pad_sequence(sampled_logps, batch_first=True).to(world.device)  # (B, R)

    # 3. log-probabilities of every token, from the training forward
    # The actor's are computed as in step 7, so that the first ratio is 1: without gradients,
    # compiled blocks round otherwise.
    old_logps = response_logps(
        actor,
        responses,
        log_temperature,
        max_tokens,
        world,
        as_in_updates=placements.trained.use_compile,
    )  # (B, R)
    ref_logps = response_logps(ref, responses, log_temperature, max_tokens, world)
    kl = ((old_logps - ref_logps) * mask).sum(1)  # (B,) nats per response
    sampler_gap = measure_sampler_gap(old_logps, sampled_logps, mask)
    ended = torch.tensor([answer[-1] in tok.eos_ids for answer in answers], device=world.device)
    metrics = {
        "kl": kl.mean(),
        "kl_coef": current_kl_coef,
        "entropy": -masked_mean(old_logps, mask),
        "eos_rate": ended.float().mean(),
        "length": mask.sum(1).mean(),
        "max_length": float(responses.longest),
        "sampler_gap": sampler_gap.mean,
        "sampler_k3": sampler_gap.k3,
        "sampler_gap_max": sampler_gap.largest,
    }

    # 4. rewards and costs of responses, then of every token
    scores = {}  # (B,) each
    for name, scorer in scorers.items():
        scores[name] = score_answers(scorer, asked, questions, answers)
        metrics[name] = scores[name].mean()
        if not scores[name].isfinite().all():
            monitor.say(f"step {step}: the {name} model gives some responses a non-finite score")
    rewards = scale_rewards(scores["reward"], reward_moments, reward_scaling, reward_bound)
    if reward_scaling != "none" and reward_moments.deviation == 0:
        monitor.say(
            f"step {step}: all rewards so far are equal: reward_scaling={reward_scaling!r} leaves "
            "their size as it is"
        )
    if cut_penalty:
        longest = torch.tensor(limits, device=world.device)
        penalties = length_penalties(mask.sum(1), ~ended, longest, cut_buffer)
        rewards = rewards - cut_penalty * penalties
    per_response = {"reward": rewards}  # (B,) each: what the policy learns from
    for name, (_, limit) in constraints.items():
        costs = constrained_costs(scores[name], cost_kind)
        if constraint == "prompt":
            costs = excess_costs(costs, limit)
        multipliers[name].observe(costs.tolist())
        if pessimism:
            costs = pessimistic_costs(costs, pessimistic_factor)
        per_response[name] = costs
    shaping = (old_logps, ref_logps, mask, current_kl_coef, score_bound)
    per_token = {"reward": shaped_rewards(rewards, *shaping)}  # (B, R) each
    for name in constraints:  # here the KL penalty has the other sign
        per_token[name] = shaped_costs(cost_scale * per_response[name], *shaping)

    # 5. advantages: how much more reward, and how much more of each cost, than expected
    values = {}  # (B, R) each; empty without critics
    returns = {}
    advantages = {}
    for name, token_scores in per_token.items():
        metrics[f"{name}_with_kl_penalty"] = token_scores.sum(1).mean()
        if has_critics:
            values[name] = response_values(models[f"{name}_critic"], responses, max_tokens, world)
            advantages[name], returns[name] = gae(
                token_scores, values[name], mask, gamma, gae_lambda
            )
            metrics[f"{name}_return"] = sequence_mean(returns[name], mask)
            metrics[f"{name}_value"] = sequence_mean(values[name], mask)
            metrics[f"{name}_advantage"] = sequence_mean(advantages[name], mask)
        else:
            advantages[name] = token_scores.sum(1)  # (B,): compared within groups below
            metrics[f"flat_{name}_groups"] = share_of_flat_groups(per_response[name], num_samples)
    if normalize_groups != "mixed":
        # Costs are compared without their KL penalty. Among equal costs it would be the only
        # difference, which standardisation would bring to full size.
        for name in advantages:
            compared = per_response[name] if name in constraints else advantages[name]
            advantages[name] = group_advantages(compared, mask, num_samples, advantage)

    # 6. the multipliers are updated, then costs are weighed against rewards
    policy_learns = rollout >= critic_warmup
    lambdas = []
    for name, (_, limit) in constraints.items():
        own_multiplier = multipliers[name]
        if constraint == "prompt":
            limit = 0.0  # excess_costs() has subtracted the limit from every cost
        if policy_learns:
            own_multiplier.update(limit)
        lambda_ = own_multiplier.value
        lambdas.append(lambda_)
        slack = limit - own_multiplier.mean_cost
        suffix = name.removeprefix("cost")  # empty, _2, _3, ...
        metrics[f"unsafe_rate{suffix}"] = (scores[name] > 0).float().mean()
        metrics[f"lambda{suffix}"] = lambda_
        metrics[f"episode_cost{suffix}"] = own_multiplier.mean_cost
        metrics[f"slack{suffix}"] = slack
        if pessimism:
            metrics[f"pessimistic_cost{suffix}"] = own_multiplier.pessimistic_cost
        if rollout == 0 and slack > 0:
            monitor.say(
                f"note: the policy's {name} starts {slack:.3g} below its limit: PPO-Lag will spend "
                "it on reward. Lower cost_limit to keep the policy as safe as it is."
            )
    cost_advantages = [advantages[name] for name in constraints]
    mixed = mix_advantages(advantages["reward"], cost_advantages, lambdas)
    if not has_critics and normalize_groups == "mixed":
        mixed = group_advantages(mixed, mask, num_samples, advantage)
    if normalize_groups == "gdpo":
        mixed = whiten(mixed, mask)
    if normalize_advantage:
        mixed = normalize(mixed, mask)
    # The gradient of the entropy is that of an advantage of -log p.
    mixed = mixed - entropy_coef * old_logps
    if is_cap:  # the tokens were drawn by the sampler, not by the forward that learns
        mixed = mixed * importance_weights(old_logps, sampled_logps, mask, is_cap)
    if kl_target and policy_learns:
        mean_kl = metrics["kl"].item()
        current_kl_coef = adapt_kl_coef(
            current_kl_coef, mean_kl, kl_target, responses_per_rollout, kl_horizon
        )
    metrics["rollout_seconds"] = time.perf_counter() - began

    # 7. updates: minibatches of the rollout
    policy_mask = mask * ended[:, None] if mask_cut else mask
    for first in range(0, ppo_epochs * responses_per_rollout, batch_size):
        epoch, begin = divmod(first, responses_per_rollout)
        order = shuffled_order(responses_per_rollout, epoch, hash64(seed, rollout))
        minibatch = order[begin : begin + batch_size].tolist()
        minibatch_index = copy_to_device(minibatch, world.device)
        sums = MetricSums(update_metrics, world.device)
        minibatch_lengths = [len(responses.ids[i]) for i in minibatch]
        micro_batches = plan_micro_batches(minibatch_lengths, max_tokens, world.size)[world.rank]
        for k, indices in enumerate(micro_batches):
            rows = [minibatch[i] for i in indices]
            index = copy_to_device(rows, world.device)  # indexing by a list waits for a GPU
            row_mask = mask[index]
            share = len(rows) / batch_size
            is_last = k == len(micro_batches) - 1
            batch = responses.pack(rows, world.device)

            if policy_learns:
                logps = responses.unpack(actor.log_probs(batch, log_temperature), batch, rows)
                loss = actor_loss(
                    logps,
                    old_logps[index],
                    mixed[index],
                    policy_mask[index],
                    clip_low=ratio_bound,
                    clip_high=upper_ratio_bound,
                    surrogate=surrogate,
                    loss_mean=loss_mean,
                    length=max_new_tokens,
                )
                loss = loss * batch_share(policy_mask, index, minibatch_index, loss_mean)
                backward(actor, loss * actor_weight, last=is_last and not ptx)
                log_ratio = logps.detach() - old_logps[index]
                ratio = policy_ratio(logps.detach(), old_logps[index], row_mask, surrogate)
                clipped = ((1 - ratio > ratio_bound) | (ratio - 1 > upper_ratio_bound)).float()
                sums.add("actor_loss", loss)
                sums.add("clip_fraction", sequence_mean(clipped, row_mask) * share)
                k3 = log_ratio.expm1() - log_ratio  # ratio - 1 loses its digits near 0
                sums.add("approx_kl", sequence_mean(k3, row_mask) * share)
                sums.add("ratio", sequence_mean(ratio, row_mask) * share)

            for name, old_values in values.items():
                critic = models[f"{name}_critic"]
                new_values = responses.unpack(critic.scores(batch), batch, rows)
                loss = critic_loss(
                    new_values, old_values[index], returns[name][index], row_mask, value_bound
                )
                loss = loss * share
                backward(critic, loss, last=is_last)
                sums.add(f"{name}_critic_loss", loss)

        if ptx and policy_learns:  # demonstrations join the gradient: stay a good language model
            examples = examples_at(step, len(ptx), batch_size, seed)
            targets_in_batch = int(ptx.target_counts[examples].sum())
            ptx_lengths = ptx.lengths[examples].tolist()
            micro_batches = plan_micro_batches(ptx_lengths, max_tokens, world.size)[world.rank]
            for k, indices in enumerate(micro_batches):
                batch = ptx.batch([examples[i] for i in indices], world.device)
                is_target = batch.targets >= 0
                loss = mle_loss(actor.log_probs(batch, uniform_weights=True), is_target)
                loss = loss * (is_target.sum() / targets_in_batch)
                is_last = k == len(micro_batches) - 1
                backward(actor, loss * ptx_coef * actor_weight, last=is_last)
                sums.add("ptx_loss", loss)

        losses = sums.reduce()
        if max_ratio and losses["ratio"] > max_ratio:
            actor.zero_grad(set_to_none=True)
            monitor.say(
                f"step {step}: the mean ratio is {losses['ratio']:.3g}, above max_ratio: the actor "
                "is not updated"
            )
        lrs = {
            "actor_lr": optim.learning_rate_at(
                step, steps, actor_learning_rate, actor_lr_schedule, actor_warmup_ratio
            ),
            "critic_lr": optim.learning_rate_at(
                step, steps, critic_learning_rate, critic_lr_schedule, critic_warmup_ratio
            ),
        }
        norms = {}
        # A model without gradients stays as it is: during critic_warmup, or above max_ratio.
        for name, optimizer in optimizers.items():
            lr = lrs["actor_lr"] if name == "actor" else lrs["critic_lr"]
            norms[f"{name}_grad_norm"] = optim.guarded_step(
                models[name], optimizer, lr, grad_clip, f"step {step}, {name}"
            )
        skips = optim.count_skips(skips, max_skips, *norms.values())
        if average:
            optim.update_ema(average, actor, ema)

        if step % log_interval == 0 or step + 1 == steps:
            seconds = time.perf_counter() - began
            row = {**metrics, **losses, **norms, **lrs, "skips": skips, "seconds": seconds}
            monitor.log(step, row)
        step += 1

    # 8. samples to read, a state to come back to
    must_stop = monitor.asked_to_stop(world.device)
    passed_interval = False
    if save_interval:
        passed_interval = step // save_interval > (step - updates) // save_interval
    saves = step >= steps or must_stop or passed_interval
    if saves or rollout == 0:
        for i in range(min(4, len(answers))):
            of_answer = {name: of_all[i].item() for name, of_all in scores.items()}
            monitor.sample(
                step - 1,
                prompt=tok.decode(questions[i]),
                response=tok.decode(answers[i]),
                kl=kl[i].item(),
                **of_answer,
            )
    if saves:
        save_run(step)
    if must_stop:
        break
monitor.close()
print_once(f"the model is in {os.path.join(out_dir, 'model')}")
