"""
Stage 1: demonstrations -> a policy, by supervised fine-tuning.

On a laptop, from scratch on the toy world (python -m nanosafe.demo prepares it):
$ python train_sft.py
On 8 GPUs, Safe-RLHF's recipe for LLaMA-7B:
$ torchrun --nproc_per_node=8 train_sft.py config/beaver_7b/sft.py
Continue a run that was stopped or killed:
$ python train_sft.py --resume=True
"""

import os
import time

import torch

from configurator import configure, save
from nanosafe import checkpoint, optim
from nanosafe import state as run_state
from nanosafe.data import tokenize
from nanosafe.losses import mle_loss
from nanosafe.model import Config
from nanosafe.monitor import Monitor, Stop
from nanosafe.packing import check_fits, count_steps, examples_at, plan
from nanosafe.parallel import add, backward, close, init, main_first, places
from nanosafe.tokenizer import load as load_tokenizer
from nanosafe.scratch import scratch

# run
out_dir = "out/sft"  # the run's folder: config.py, metrics.jsonl, model/, state/
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
data = "toy/sft"  # demonstrations: NAME[/SPLIT][:PROPORTION[:PATH]] or a .jsonl, comma separated
eval_data = ""  # the same, held out; empty: none
max_len = 512  # longest sequence in tokens; longer rows are dropped and counted
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

# ---- setup ----
optim.check_schedules(lr_schedule)
world = init(device)
run_state.claim(out_dir, resume)
if world.main:
    save(config, os.path.join(out_dir, "config.py"))
from_scratch = init_from == "scratch"
tok = load_tokenizer(tokenizer if from_scratch else init_from)
with main_first():  # rank 0 fills the cache of token ids, the others find it
    train = tokenize(data, tok, "sft", max_len, show=world.main)
    held_out = tokenize(eval_data, tok, "sft", max_len, show=world.main) if eval_data else None

shape = Config(vocab_size=tok.vocab_size, hidden_size=hidden_size,
               intermediate_size=intermediate_size, num_hidden_layers=num_hidden_layers,
               num_attention_heads=num_attention_heads, num_key_value_heads=num_key_value_heads,
               initializer_range=hidden_size**-0.5)  # about 0.02 at 7B's width
for dataset in filter(None, (train, held_out)):
    check_fits(dataset.lengths.tolist(), max_tokens)
size = checkpoint.count_parameters(shape if from_scratch else init_from)
place, _ = places(world, dtype, parallel, offload, use_compile, activation_checkpointing, size)
if from_scratch:
    model = scratch(shape, seed=seed, place=place)
else:
    model = checkpoint.load(init_from, "lm", place=place, vocab_size=tok.vocab_size)
optimizer = optim.adamw(model, weight_decay, beta1, beta2)

steps = count_steps(len(train), batch_size, epochs, max_steps)
skips = optim.SkipCounter(max_skips)
start = 0
if resume:
    state = run_state.load(out_dir, {"model": (model, optimizer)})
    start, skips.count = state["step"], state["skips"]
if world.main:
    print(f"{size / 1e6:.1f} M parameters, {place.layout}, computing in {place.compute_dtype}; "
          f"{steps} steps of {batch_size} sequences over {world.size} ranks, {max_tokens} tokens "
          "per forward", flush=True)


def evaluate():
    """Mean loss per token on the held-out data."""
    total = torch.zeros((), device=world.device)
    with torch.no_grad():
        for micro in plan(held_out.lengths.tolist(), max_tokens, world.size)[world.rank]:
            batch = held_out.batch(micro, world.device)
            total -= model(*batch).sum()
    return add(total).item() / held_out.targets.sum()


def checkpoint_run(step):
    """The state to resume from, and the model for others to open."""
    monitor.flush()
    run_state.save(out_dir, step, {"model": (model, optimizer)}, {"skips": skips.count}, keep)
    checkpoint.save(model, os.path.join(out_dir, "model"), tok, dtype=place.compute_dtype)


# ---- loop ----
stop = Stop()
monitor = Monitor(out_dir, steps, start, log_to, shown=("loss", "grad_norm", "lr"), config=config)
for step in range(start, steps):
    began = time.perf_counter()
    examples = examples_at(step, len(train), batch_size, seed)
    lengths = train.lengths[examples].tolist()
    count = int(train.targets[examples].sum())  # tokens that carry loss, in the whole batch
    micros = plan(lengths, max_tokens, world.size)[world.rank]
    loss_sum = torch.zeros((), device=world.device)
    for i, micro in enumerate(micros):
        batch = train.batch([examples[j] for j in micro], world.device)
        logps = model(*batch)
        mask = batch.targets >= 0
        # the mean over this micro-batch's tokens, times its share of all: so the sum over all
        # micro-batches and ranks is the mean over the whole batch, however it is cut
        loss = mle_loss(logps, mask) * (mask.sum() / count)
        backward(model, loss, last=i == len(micros) - 1)
        loss_sum += loss.detach()
    lr = optim.learning_rate_at(step, steps, learning_rate, lr_schedule, warmup_ratio)
    grad_norm = optim.step(model, optimizer, lr, grad_clip, f"step {step}")
    skips.see(grad_norm)

    metrics = {
        "loss": add(loss_sum).item(), "grad_norm": grad_norm, "lr": lr, "tokens": sum(lengths),
        "tokens_per_second": sum(lengths) / (time.perf_counter() - began), "skips": skips.count,
    }
    last = step + 1 == steps or stop.agreed(world.device)
    if held_out and (step + 1 == steps or eval_interval and (step + 1) % eval_interval == 0):
        metrics["eval_loss"] = evaluate()
    if step % log_interval == 0 or last or "eval_loss" in metrics:
        monitor.log(step, metrics)
    if last or save_interval and (step + 1) % save_interval == 0:
        checkpoint_run(step + 1)
    if last:
        break
monitor.close()
close()
