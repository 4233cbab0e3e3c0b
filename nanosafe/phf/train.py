"""Pretraining with human preferences (PHF, arXiv:2302.08582): scored documents -> a policy.

A document is segments of text, each with a score of misalignment; higher is worse. The objective
says what the scores do:

    mle           nothing: maximum likelihood of all documents
    filter        documents with a mean score above score_threshold are left out
    conditional   a control token before each segment says whether it is aligned
    unlikelihood  segments with a score above score_threshold are made unlikely
    awr           advantage-weighted regression: tokens are weighted by exp(advantage / beta)
    rwr           reward-weighted regression: the same without values, by exp(-score / beta)

The first three change the data and keep the loss of SFT; the others change the loss. The equations
are in docs/methods.md.

On a laptop, from scratch on the toy world (python -m nanosafe.demo prepares it):
$ python -m nanosafe.phf.train config/toy/phf.py --objective=conditional
On 8 GPUs, the paper's recipe, a task and then a method:
$ torchrun --nproc_per_node=8 -m nanosafe.phf.train config/phf/pii/pretrain.py config/phf/pii/awr.py
"""

import math
import os
import time

import torch

from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe.checkpoint import run_state
from nanosafe.data import load as load_records
from nanosafe.data import report_shared_prompts
from nanosafe.data.batching import count_steps, examples_at, plan_micro_batches
from nanosafe.errors import choose, stop
from nanosafe.inference import ReferenceSamples, sum_response_logps, warn_beyond_positions
from nanosafe.losses import awr_loss, mle_loss, unlikelihood_loss
from nanosafe.model import Config
from nanosafe.monitor import Monitor, check_sinks
from nanosafe.parallel import all_reduce_sum, backward, choose_placements, init, local_rows
from nanosafe.phf.documents import target_scores, tokenize_documents
from nanosafe.phf.scorers import load_scorer, text_statistics
from nanosafe.printing import print_once
from nanosafe.ranges import check_heads, check_ranges
from nanosafe.rollout import sample_all
from nanosafe.tokenizer import load as load_tokenizer
from nanosafe.tokenizer.special_tokens import ALIGNED, add_control_tokens, control_token_ids

# run
out_dir = "out/phf"  # the run's folder: config.py, metrics.jsonl, model/, state/
resume = False  # continue the run in out_dir exactly where its last state was saved
seed = 0  # of the data order, and of the weights when init_from is scratch
# model
init_from = "scratch"  # a model folder, or scratch
tokenizer = "out/demo/tokenizer"  # its folder, when from scratch; else init_from's is taken
hidden_size = 128  # from scratch only: width D
intermediate_size = 352  # from scratch only: width of the MLP
num_hidden_layers = 4  # from scratch only: blocks
num_attention_heads = 4  # from scratch only: heads H
num_key_value_heads = 4  # from scratch only: kv heads K
# data
data = "toy/documents"  # documents: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
eval_data = ""  # the same, held out; empty: none
max_len = 512  # tokens of a block; longer documents are cut into several
# objective
objective = "mle"  # mle | filter | conditional | unlikelihood | awr | rwr
score_threshold = 0.0  # above it a document (filter) or segment (conditional, unlikelihood) is bad
drop_fraction = 0.01  # conditional: share of the segments without a control token
alpha = 1.0  # unlikelihood: weight of bad tokens; awr: of the policy's loss (values: 1 - alpha)
beta = 1.0  # awr, rwr: advantages are divided by this
weight_max = 1000.0  # awr, rwr: greatest weight of a token
# optimization
epochs = 3.0  # passes over the data
max_steps = 0  # optimizer steps at most; 0: as many as epochs gives
batch_size = 64  # blocks per optimizer step, over all ranks
max_tokens = 4096  # packed tokens per forward on one rank: memory, not mathematics
learning_rate = 2e-5  # peak, after warm-up
lr_schedule = "cosine"  # cosine | linear | constant
warmup_ratio = 0.03  # share of the steps in which the learning rate rises from 0
weight_decay = 0.0  # of AdamW, on matrices
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # greatest norm of a gradient; 0: none
max_skips = 10  # stop after this many updates with a non-finite gradient
# texts sampled at evaluations
eval_samples = 0  # number of samples; 0: none
eval_prompts = ""  # a dataset whose prompts the samples continue; empty: they begin from nothing
eval_max_new_tokens = 128  # longest sample
eval_temperature = 0.7  # of sampling
eval_top_p = 0.9  # sample from the likeliest tokens that hold this probability
scorer = ""  # pii | pep8 | toxicity | a cost model's folder | FILE.py:FUNCTION; empty: none
hit_threshold = 0.5  # a sample with a score above it is a hit
reference = ""  # a model's folder: KL(reference || model) is measured on its samples; empty: none
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
choose("objective", objective, ("mle", "filter", "conditional", "unlikelihood", "awr", "rwr"))
choose("lr_schedule", lr_schedule, optim.SCHEDULES)
if init_from == "scratch":
    check_heads(hidden_size, num_attention_heads, num_key_value_heads)
if objective == "awr" and alpha > 1:
    stop(f"alpha={alpha}: in awr the values' loss has the weight 1 - alpha, so alpha is at most 1")
check_sinks(log_to)
world = init(device, config)
resume = run_state.open_run_folder(config)
from_scratch = init_from == "scratch"
tok = load_tokenizer(tokenizer if from_scratch else init_from)
is_conditional = objective == "conditional"
if is_conditional:
    tok = add_control_tokens(tok)

# What samples continue. A conditional model is asked for aligned text.
prompts = [""]
if eval_prompts:
    prompts = [record.get("input") for record in load_records(eval_prompts)]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        stop(f"eval_prompts={eval_prompts!r}: every row needs a text as its 'input'")
prompts = [prompts[i % len(prompts)] for i in range(eval_samples)]
prompt_ids = [tok.encode_suffix(prompt) for prompt in prompts]
plain_start = tok.encode("", bos=True)
sample_start = tok.encode(ALIGNED, bos=True) if is_conditional else plain_start
if reference and not eval_samples:
    stop(f"reference={reference!r} is compared on samples: set eval_samples")
if reference and load_tokenizer(reference).engine.identity != tok.engine.identity:
    stop(f"reference={reference!r} has another tokenizer than this model")

train = tokenize_documents(
    data, tok, max_len, max_tokens, objective, score_threshold, drop_fraction
)
held_out = None
if eval_data:
    # The held-out loss is of the text: no document is filtered, and control tokens do not count.
    held_out_objective = "compare" if is_conditional else "mle"
    held_out = tokenize_documents(
        eval_data, tok, max_len, max_tokens, held_out_objective, score_threshold
    )
    report_shared_prompts(train, held_out)

shape = Config(
    vocab_size=tok.vocab_size,
    hidden_size=hidden_size,
    intermediate_size=intermediate_size,
    num_hidden_layers=num_hidden_layers,
    num_attention_heads=num_attention_heads,
    num_key_value_heads=num_key_value_heads,
    max_position_embeddings=max(Config.max_position_embeddings, max_len),
    initializer_range=hidden_size**-0.5,  # about 0.02 at 7B's width
)
parameters = checkpoint.count_parameters(shape if from_scratch else init_from)
placement = choose_placements(
    world, dtype, parallel, offload, use_compile, activation_checkpointing, parameters
).trained
head = "both" if objective == "awr" else "lm"
if from_scratch:
    model = checkpoint.init_from_scratch(shape, head, seed=seed, placement=placement)
else:
    model = checkpoint.load(init_from, head, placement=placement, vocab_size=tok.vocab_size)
if objective == "awr":
    local_rows(model.score_head.weight).rows.zero_()  # every value is -sigmoid(0) at first
warn_beyond_positions({repr(init_from): model}, max_len, f"max_len={max_len}")
optimizer = optim.make_adamw(model, weight_decay, beta1, beta2)

steps = count_steps(len(train), batch_size, epochs, max_steps)
record = run_state.make_record(
    config, steps, data=train, init_from=None if from_scratch else init_from
)
start = skips = 0
if resume:
    state = run_state.load(out_dir, {"model": model}, {"model": optimizer}, record)
    start, skips = state["step"], state["skips"]
print_once(
    f"{parameters / 1e6:.1f} M parameters, {placement.layout}, computing in "
    f"{placement.compute_dtype}; {steps} steps of {batch_size} sequences over {world.size} ranks, "
    f"{max_tokens} tokens per forward"
)

score_texts = load_scorer(scorer, world) if scorer else None
if reference:
    references = ReferenceSamples(
        checkpoint.load(reference, "lm", dtype=torch.float32, device=world.device),
        [plain_start + ids for ids in prompt_ids],
        world,
        max_tokens,
        eval_max_new_tokens,
        seed=0,
        eos_ids=tok.eos_ids,
    )


def compute_loss(dataset, examples):
    """The mean loss per target of some blocks, and the number of targets."""
    batch = dataset.batch(examples, world.device)
    mask = batch.targets >= 0
    if objective in ("mle", "filter", "conditional"):
        logps = model.log_probs(batch, uniform_weights=True)
        return mle_loss(logps, mask), mask.sum()
    scores = target_scores(dataset, examples, world.device)
    if objective == "unlikelihood":
        logps = model.log_probs(batch)
        loss = unlikelihood_loss(logps, scores, mask, score_threshold, alpha)
    elif objective == "rwr":
        # AWR whose values are all 0 and whose loss is the policy's alone.
        logps = model.log_probs(batch)
        no_values = torch.zeros((), device=world.device)
        loss = awr_loss(logps, scores, no_values, mask, 1.0, beta, weight_max)
    else:
        logps, head_scores = model.log_probs_and_scores(batch)
        values = -torch.sigmoid(head_scores)  # in (-1, 0), as PHF's negated scores are
        loss = awr_loss(logps, scores, values, mask, alpha, beta, weight_max)
    return loss, mask.sum()


@torch.no_grad()
def evaluate(step):
    """The loss of the held-out documents, statistics of samples, and KL(reference || model)."""
    metrics = {}
    if held_out:
        metrics["eval_loss"] = held_out_loss()
    if eval_samples:
        texts = sample_texts()
        scores = score_texts(texts) if scorer else [0.0] * len(texts)
        for name, value in text_statistics(texts, scores, hit_threshold).items():
            if not math.isnan(value):  # of too few samples
                metrics[f"eval_{name}"] = value
        for text, score in zip(texts[:8], scores[:8]):
            monitor.sample(step, text=text, score=score)
    if reference:
        metrics["eval_kl"] = references.kl(model, [sample_start + ids for ids in prompt_ids])
    return metrics


def held_out_loss():
    """Nats per target of the held-out documents."""
    sequences = [held_out.sequence(i) for i in range(len(held_out))]
    logps = sum_response_logps(model, sequences, max_tokens, world)
    return -logps.sum().item() / held_out.target_counts.sum()


def sample_texts():
    """The prompts, each with what the model continues it with."""
    responses = sample_all(
        model,
        [sample_start + ids for ids in prompt_ids],
        world,
        eval_max_new_tokens,
        seed=seed,
        temperature=eval_temperature,
        top_p=eval_top_p,
        eos_ids=tok.eos_ids,
        banned=control_token_ids(tok),
    )
    return [prompt + tok.decode(response) for prompt, response in zip(prompts, responses)]


def save_run(step):
    """Write the state to resume from, and the model for others to open."""
    monitor.flush()
    checkpoint.save(model, os.path.join(out_dir, "model"), tok, placement.compute_dtype, "lm")
    extra = {"skips": skips}
    run_state.save(out_dir, step, {"model": model}, {"model": optimizer}, extra, keep, record)


# ---- loop ----
run_state.begin_run(config, save)
monitor = Monitor(out_dir, steps, start, log_to, ("loss", "grad_norm", "lr"), config)
for step in range(start, steps):
    began = time.perf_counter()
    examples = examples_at(step, len(train), batch_size, seed)
    lengths = train.lengths[examples].tolist()
    targets_in_batch = int(
        train.target_counts[examples].sum()
    )  # tokens that carry loss, over all ranks
    micro_batches = plan_micro_batches(lengths, max_tokens, world.size)[world.rank]
    loss_sum = torch.zeros((), device=world.device)
    for k, rows in enumerate(micro_batches):
        # A micro-batch's mean times its share of all targets: over micro-batches and ranks these
        # sum up to the mean over the whole batch, however it is cut.
        loss, targets = compute_loss(train, [examples[i] for i in rows])
        loss = loss * (targets / targets_in_batch)
        backward(model, loss, last=k == len(micro_batches) - 1)
        loss_sum += loss.detach()
    lr = optim.learning_rate_at(step, steps, learning_rate, lr_schedule, warmup_ratio)
    grad_norm = optim.guarded_step(model, optimizer, lr, grad_clip, f"step {step}")
    skips = optim.count_skips(skips, max_skips, grad_norm)

    tokens = sum(lengths)
    metrics = {
        "loss": all_reduce_sum(loss_sum).item(),
        "grad_norm": grad_norm,
        "lr": lr,
        "skips": skips,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }
    is_last = step + 1 == steps
    must_stop = monitor.asked_to_stop(world.device)
    evaluates = is_last or (eval_interval and (step + 1) % eval_interval == 0)
    if evaluates:
        metrics.update(evaluate(step))
    if step % log_interval == 0 or is_last or must_stop or evaluates:
        monitor.log(step, metrics)
    if is_last or must_stop or (save_interval and (step + 1) % save_interval == 0):
        save_run(step + 1)
    if must_stop:
        break
monitor.close()
