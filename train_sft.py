"""Stage 1: demonstrations -> a policy, by supervised fine-tuning: maximum likelihood of what the
assistant says.

On a laptop, from scratch on the toy world (python -m nanosafe.demo prepares it):
$ python train_sft.py
On 8 GPUs, Safe-RLHF's recipe for LLaMA-7B:
$ torchrun --nproc_per_node=8 train_sft.py config/beaver_7b/sft.py"""

import os
import time

import nanosafe  # noqa: F401  (before torch: it sets how OpenMP's threads wait)

import torch

from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe.checkpoint import run_state
from nanosafe.data import report_shared_prompts, tokenize
from nanosafe.data.batching import count_steps, examples_at, plan_micro_batches
from nanosafe.errors import choose, stop
from nanosafe.inference import sum_response_logps, warn_beyond_positions
from nanosafe.lora import make_lora
from nanosafe.losses import mle_loss
from nanosafe.model import Config
from nanosafe.monitor import Monitor, check_sinks
from nanosafe.parallel import all_reduce_sum, backward, choose_placements, init
from nanosafe.printing import print_once
from nanosafe.ranges import check_heads, check_ranges
from nanosafe.tokenizer import load as load_tokenizer

# run
out_dir = "out/sft"  # the run's folder: config.py, metrics.jsonl, model/, state/
resume = False  # continue the run in out_dir exactly where its last state was saved
seed = 0  # of the data order, and of new weights: from scratch, or an adapter's
# model
init_from = "scratch"  # a model folder, or scratch
tokenizer = "out/demo/tokenizer"  # its folder, when from scratch; else init_from's is taken
template = "auto"  # chat template: auto (the model's own) | safe_rlhf | chatml | llama3 | FILE
hidden_size = 128  # from scratch only: width D
intermediate_size = 352  # from scratch only: width of the MLP
num_hidden_layers = 4  # from scratch only: blocks
num_attention_heads = 4  # from scratch only: heads H
num_key_value_heads = 4  # from scratch only: kv heads K
# adapters: low-rank additions to a frozen base, which are trained instead of it (LoRA)
lora_rank = 0  # of new adapters; 0: no adapters, all weights are trained
lora_alpha = 32.0  # what an adapter adds is multiplied by lora_alpha / lora_rank
lora_targets = "all"  # a block's matrices that get one: all, or names as in q_proj,v_proj
lora_merge = False  # also write the model merged into its base, to model_merged/
# data
data = "toy/sft"  # demonstrations: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
eval_data = ""  # the same, held out; empty: none
max_len = 512  # longest sequence in tokens; longer demonstrations are dropped and counted
# optimization
epochs = 3.0  # passes over the data
max_steps = 0  # optimizer steps at most; 0: as many as epochs gives
batch_size = 64  # sequences per optimizer step, over all ranks
max_tokens = 4096  # packed tokens per forward on one rank: memory, not mathematics
learning_rate = 2e-5  # peak, after warm-up
lr_schedule = "cosine"  # cosine | linear | constant
warmup_ratio = 0.03  # share of the steps in which the learning rate rises from 0
weight_decay = 0.0  # of AdamW, on matrices
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
moments = "float32"  # of AdamW, stored as float32 | bfloat16 (4 bytes per parameter less)
grad_clip = 1.0  # greatest norm of a gradient; 0: none
max_skips = 10  # stop after this many updates with a non-finite gradient
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
choose("lr_schedule", lr_schedule, optim.SCHEDULES)
choose("moments", moments, optim.MOMENTS)
if init_from == "scratch":
    check_heads(hidden_size, num_attention_heads, num_key_value_heads)
if init_from == "scratch" and lora_rank:
    stop(f"lora_rank={lora_rank} adds to a model that is there: set init_from to its folder")
check_sinks(log_to)
world = init(device, config)
resume = run_state.open_run_folder(config)
from_scratch = init_from == "scratch"
tok = load_tokenizer(tokenizer if from_scratch else init_from, template)
train = tokenize(data, tok, "sft", max_len, max_tokens)
held_out = tokenize(eval_data, tok, "sft", max_len, max_tokens) if eval_data else None
if held_out:
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
lora = make_lora(lora_rank, lora_alpha, lora_targets, lora_merge)
if from_scratch:
    counts = checkpoint.Counts(checkpoint.count_parameters(shape), frozen=0)
else:
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
if from_scratch:
    model = checkpoint.init_from_scratch(shape, "lm", seed=seed, placement=placement)
else:
    model = checkpoint.load_trained(
        init_from, "lm", placements, {}, lora, vocab_size=tok.vocab_size, seed=seed
    )
warn_beyond_positions({repr(init_from): model}, max_len, f"max_len={max_len}")
optimizer = optim.make_adamw(
    model, weight_decay, beta1, beta2, moments, seed, placement.use_compile
)

steps = count_steps(len(train), batch_size, epochs, max_steps)
record = run_state.make_record(
    config, steps, data=train, init_from=None if from_scratch else init_from
)
start = skips = 0
if resume:
    state = run_state.load(out_dir, {"model": model}, {"model": optimizer}, record)
    start, skips = state["step"], state["skips"]
print_once(
    f"{counts.trained:,} parameters trained, {placement.layout}, computing in "
    f"{placement.compute_dtype}; {steps} steps of {batch_size} sequences over {world.size} ranks, "
    f"{max_tokens} tokens per forward"
)


@torch.no_grad()
def evaluate():
    """The loss of the held-out demonstrations, in nats per token of the assistant's."""
    sequences = [held_out.sequence(i) for i in range(len(held_out))]
    total = sum_response_logps(model, sequences, max_tokens, world).sum().item()
    return {"eval_loss": -total / held_out.target_counts.sum()}


def save_run(step):
    """Write the state to resume from, and the model for others to open."""
    monitor.flush()
    model_dir = os.path.join(out_dir, "model")
    checkpoint.save(model, model_dir, tok, placement.compute_dtype)
    if lora_rank and lora_merge:
        checkpoint.save_merged(model_dir, f"{model_dir}_merged", tok, placement.compute_dtype)
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
        batch = train.batch([examples[i] for i in rows], world.device)
        mask = batch.targets >= 0
        logps = model.log_probs(batch, uniform_weights=True)
        # A micro-batch's mean times its share of all targets: over micro-batches and ranks these
        # sum up to the mean over the whole batch, however it is cut.
        loss = mle_loss(logps, mask) * (mask.sum() / targets_in_batch)
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
    if evaluates and held_out:
        metrics.update(evaluate())
    if step % log_interval == 0 or is_last or must_stop or evaluates:
        monitor.log(step, metrics)
    if is_last or must_stop or (save_interval and (step + 1) % save_interval == 0):
        save_run(step + 1)
    if must_stop:
        break
monitor.close()
print_once(f"the model is in {os.path.join(out_dir, 'model')}")
