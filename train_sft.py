"""Stage 1: demonstrations -> a policy, by supervised fine-tuning; or scored documents -> a policy,
by pretraining with human preferences (arXiv:2302.08582), six ways.

objective is mle, all that there is for demonstrations; of documents also filter, conditional,
unlikelihood, awr or rwr: docs/methods.md has the equations.

On a laptop, from scratch on the toy world (python -m nanosafe.demo prepares it):
$ python train_sft.py
$ python train_sft.py config/toy/phf.py --objective=conditional
On 8 GPUs, Safe-RLHF's recipe for LLaMA-7B, and PHF's (a task, then a method):
$ torchrun --nproc_per_node=8 train_sft.py config/beaver_7b/sft.py
$ torchrun --nproc_per_node=8 train_sft.py config/phf/pii/pretrain.py config/phf/pii/awr.py"""

import os
import time
import torch
from configurator import configure, save
from nanosafe import checkpoint, optim, printing
from nanosafe.checkpoint import run_state
from nanosafe.phf import scorers
from nanosafe.data import load, tokenize
from nanosafe.tokenizer.special_tokens import ALIGNED, control_token_ids, add_control_tokens
from nanosafe.phf.documents import target_scores
from nanosafe.errors import choose, stop, one_line_errors
from nanosafe.losses import awr_loss, mle_loss, unlikelihood_loss
from nanosafe.model import Config
from nanosafe.monitor import Monitor
from nanosafe.data.batching import count_steps, examples_at, plan_micro_batches
from nanosafe.parallel import all_reduce_sum, backward, init, local_rows, choose_placements
from nanosafe.inference import ReferenceSamples, sum_response_logps
from nanosafe.rollout import sample_all
from nanosafe.tokenizer import load as load_tokenizer

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
documents = False  # rows are texts with scores, cut into blocks of max_len; else demonstrations
max_len = 512  # longest sequence in tokens; longer demonstrations are dropped and counted
# objective; scores are of misalignment: higher is worse
objective = "mle"  # mle | filter | conditional | unlikelihood | awr | rwr
score_threshold = 0.0  # filter: of documents; conditional, unlikelihood: of segments
drop_fraction = 0.01  # conditional: share of the segments without a control token
alpha = 1.0  # unlikelihood: its weight; awr: weight of the policy's loss, the rest is the values'
beta = 1.0  # awr, rwr: advantages are divided by this
weight_max = 1000.0  # awr, rwr: greatest weight of a token
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
# texts sampled at evaluations, for documents
eval_samples = 0  # how many; 0: none
eval_prompts = ""  # a dataset of prompts whose texts they continue; empty: from nothing
eval_max_new_tokens = 128  # longest
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

# ---- setup ----
choose("objective", objective, ("mle", "filter", "conditional", "unlikelihood", "awr", "rwr"))
if objective != "mle" and not documents:
    stop(f"objective={objective!r} needs documents with scores: --documents=True and their data")
choose("lr_schedule", lr_schedule, optim.SCHEDULES)
world = init(device, config)
resume = run_state.open_run_folder(config, save)
from_scratch = init_from == "scratch"
tok = load_tokenizer(tokenizer if from_scratch else init_from)
tok = add_control_tokens(tok) if objective == "conditional" else tok
task, method, compared = "documents" if documents else "sft", (), ()
if objective in ("filter", "conditional"):
    method = objective, score_threshold, drop_fraction
    compared = ("compare", score_threshold) if objective == "conditional" else ()
train = tokenize(data, tok, task, max_len, max_tokens, method=method)
held_out = eval_data and tokenize(eval_data, tok, task, max_len, max_tokens, method=compared)

shape = Config(
    tok.vocab_size,
    hidden_size,
    intermediate_size,
    num_hidden_layers,
    num_attention_heads,
    num_key_value_heads,
    initializer_range=hidden_size**-0.5,
)  # about 0.02 at 7B's width
size = checkpoint.count_parameters(shape if from_scratch else init_from)
place, _ = choose_placements(
    world, dtype, parallel, offload, use_compile, activation_checkpointing, size
)
head = "both" if objective == "awr" else "lm"
if from_scratch:
    model = checkpoint.init_from_scratch(shape, head, seed=seed, place=place)
else:
    model = checkpoint.load(init_from, head, place=place, vocab_size=tok.vocab_size)
if objective == "awr":
    local_rows(model.score_head.weight)[0].zero_()  # every value is -sigmoid(0) at first
optimizer = optim.make_adamw(model, weight_decay, beta1, beta2)

steps = count_steps(len(train), batch_size, epochs, max_steps)
start = skips = 0
if resume:
    state = run_state.load(out_dir, {"model": (model, optimizer)})
    start, skips = state["step"], state["skips"]
printing.print_once(
    f"{size / 1e6:.1f} M parameters, {place.layout}, computing in {place.compute_dtype}; {steps} "
    f"steps of {batch_size} sequences over {world.size} ranks, {max_tokens} tokens per forward"
)

# What samples continue: a conditional model is asked for aligned text.
begin = tok.encode(ALIGNED if objective == "conditional" else "", bos=True)
with one_line_errors(eval_prompts):
    prompts = [row["input"] for row in load(eval_prompts)] if eval_prompts else [""]
prompts = [prompts[i % len(prompts)] for i in range(eval_samples)]
asked = [tok.encode_suffix(text) for text in prompts]
sampling = {
    "temperature": eval_temperature,
    "top_p": eval_top_p,
    "eos_ids": tok.eos_ids,
    "banned": control_token_ids(tok),
}
score = scorers.load_scorer(scorer, world) if scorer else None
if reference:
    if not eval_samples or load_tokenizer(reference).engine.identity != tok.engine.identity:
        stop(f"reference={reference!r} needs eval_samples, and this model's tokenizer")
    references = ReferenceSamples(
        checkpoint.load(reference, "lm", dtype=torch.float32, device=world.device),
        [tok.encode("", bos=True) + ids for ids in asked],
        world,
        max_tokens,
        eval_max_new_tokens,
        seed=0,
        eos_ids=tok.eos_ids,
    )


def loss_of(dataset, examples):
    """The mean loss of some examples' tokens, and how many there are."""
    batch = dataset.batch(examples, world.device)
    mask = batch.targets >= 0
    even = objective in ("mle", "filter", "conditional")
    logps, values = model(*batch, even=even), torch.zeros(())
    if objective == "awr":
        logps, values = logps[0], -torch.sigmoid(logps[1])  # V is in (-1, 0), as PHF's scores are
    if even:
        return mle_loss(logps, mask), mask.sum()
    scores = target_scores(dataset, examples, world.device)
    if objective == "unlikelihood":
        return unlikelihood_loss(logps, scores, mask, score_threshold, alpha), mask.sum()
    weight = alpha if objective == "awr" else 1.0
    return awr_loss(logps, scores, values, mask, weight, beta, weight_max), mask.sum()


@torch.no_grad()
def evaluate(step):
    """Nats per token of the held-out data; what samples of the model are like."""
    metrics = {}
    if held_out:
        sequences = [held_out.sequence(i) for i in range(len(held_out))]
        total = sum_response_logps(model, sequences, max_tokens, world).sum().item()
        metrics["eval_loss"] = -total / held_out.targets.sum()
    if eval_samples:
        ids = sample_all(
            model, [begin + ids for ids in asked], world, eval_max_new_tokens, seed=seed, **sampling
        )
        texts = [text + tok.decode(x) for text, x in zip(prompts, ids)]
        scores = score(texts) if score else [0.0] * len(texts)
        found = scorers.text_statistics(texts, scores, hit_threshold)
        metrics |= {f"eval_{name}": x for name, x in found.items() if x == x}  # nan: too few
        for text, value in list(zip(texts, scores))[:8]:
            monitor.sample(step, text=text, score=value)
    if reference:
        metrics["eval_kl"] = references.kl(model, [begin + ids for ids in asked])
    return metrics


def checkpoint_run(step):
    """The state to resume from, and the model for others to open."""
    monitor.flush()
    checkpoint.save(model, os.path.join(out_dir, "model"), tok, place.compute_dtype, "lm")
    run_state.save(out_dir, step, {"model": (model, optimizer)}, {"skips": skips}, keep)


# ---- loop ----
monitor = Monitor(out_dir, steps, start, log_to, ("loss", "grad_norm", "lr"), config)
for step in range(start, steps):
    began = time.perf_counter()
    examples = examples_at(step, len(train), batch_size, seed)
    lengths = train.lengths[examples].tolist()
    count = int(train.targets[examples].sum())  # tokens that carry loss, in the whole batch
    micros = plan_micro_batches(lengths, max_tokens, world.size)[world.rank]
    loss_sum = torch.zeros((), device=world.device)
    for i, micro in enumerate(micros):
        # the mean over this micro-batch's tokens, times its share of all: so the sum over all
        # micro-batches and ranks is the mean over the whole batch, however it is cut
        loss, tokens = loss_of(train, [examples[j] for j in micro])
        loss = loss * (tokens / count)
        backward(model, loss, last=i == len(micros) - 1)
        loss_sum += loss.detach()
    lr = optim.learning_rate_at(step, steps, learning_rate, lr_schedule, warmup_ratio)
    grad_norm = optim.guarded_step(model, optimizer, lr, grad_clip, f"step {step}")
    skips = optim.count_skips(skips, max_skips, grad_norm)

    speed = sum(lengths) / (time.perf_counter() - began)
    metrics = {
        "loss": all_reduce_sum(loss_sum).item(),
        "grad_norm": grad_norm,
        "lr": lr,
        "skips": skips,
        "tokens": sum(lengths),
        "tokens_per_second": speed,
    }
    last = step + 1 == steps or monitor.asked_to_stop(world.device)
    evaluated = step + 1 == steps or eval_interval and (step + 1) % eval_interval == 0
    if evaluated:
        metrics.update(evaluate(step))
    if step % log_interval == 0 or last or evaluated:
        monitor.log(step, metrics)
    if last or save_interval and (step + 1) % save_interval == 0:
        checkpoint_run(step + 1)
    if last:
        break
monitor.close()
