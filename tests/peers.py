"""The peers' side of nanosafe.bench: transformers and TRL on the weights, tokens and prompts it wrote.

$ python tests/peers.py WORKLOAD FOLDER OUT.json [key=value ...]

Each call is a process of its own, so that its peak of memory is its own. OUT.json gets "seconds" (one
number per step or repetition, the first ones too: the reader drops what is warm-up), what the step
worked on, and numbers by which the reader sees that both sides computed the same."""

import gc
import json
import os
import sys
import time

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig,
                          LlamaForSequenceClassification, TrainerCallback)

workload, folder, out, *rest = sys.argv[1:]
options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in rest)}
DEVICE = options.pop("device", "cpu")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
report = {"seconds": []}
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
tokenizer.pad_token_id = 0  # <unk>: no example holds it


def rows(name):
    with open(f"{folder}/{name}.json") as f:
        return json.load(f)


def policy():
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).to(DEVICE)


def scorer(name):
    """nanosafe's score model as the class that TRL wants: the same weights under another name."""
    with open(f"{folder}/{name}/config.json") as f:
        shape = {k: v for k, v in json.load(f).items() if k not in ("architectures", "id2label", "label2id")}
    config = LlamaConfig(**shape, num_labels=1)
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config).to(DEVICE)
    weights = load_file(f"{folder}/{name}/model.safetensors")
    weights["score.weight"] = weights.pop("score_head.weight")
    weights.pop("lm_head.weight", None)
    model.load_state_dict(weights)
    return model


class Clock(TrainerCallback):
    """Seconds of each optimizer step: from one step's end to the next's, as a user waits for it."""
    def on_train_begin(self, *_, **__):
        self.last = time.perf_counter()

    def on_step_end(self, *_, **__):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        report["seconds"].append(now - self.last)
        self.last = now

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            report.setdefault("losses", []).append(logs["loss"])


def common(batch_size, steps, micro):
    """Plain AdamW at a constant rate, nothing saved or reported, data in the order of its rows."""
    return dict(
        output_dir=f"{folder}/trl", per_device_train_batch_size=micro, max_steps=steps,
        gradient_accumulation_steps=batch_size // micro, learning_rate=1e-4, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=DEVICE == "cpu", bf16=DEVICE == "cuda",
        train_sampling_strategy="sequential", dataloader_pin_memory=False, seed=0, gradient_checkpointing=False)


def untouched(trainer):
    """The trainer's class, but what it gets is tokenised already."""
    return type(trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})


def sft(batch_size, steps, micro, packing=False):
    from trl import SFTConfig, SFTTrainer
    data = [{"input_ids": ids, "labels": [t if m else -100 for t, m in zip(ids, mask)]} for ids, mask in rows("sft")]
    if packing:  # the trainer's own packing; sequences do not see each other's places, but attend to each other on a CPU
        config = SFTConfig(**common(batch_size, steps, micro), max_length=packing, packing=True, eos_token=tokenizer.eos_token)
        trainer = SFTTrainer(policy(), config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[Clock()])
        report["tokens"] = sum(len(x) for x in trainer.train_dataset["input_ids"][:batch_size * steps])
    else:
        config = SFTConfig(**common(batch_size, steps, micro), max_length=None)
        trainer = untouched(SFTTrainer)(policy(), config, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
                                        callbacks=[Clock()])
    trainer.train()


def dpo(batch_size, steps, micro):
    from trl import DPOConfig, DPOTrainer
    data = [{"prompt_ids": a[:k], "chosen_ids": a[k:], "rejected_ids": b[k:]} for a, b, k in rows("pairs")]
    config = DPOConfig(**common(batch_size, steps, micro), max_length=None, beta=0.1)
    model = policy()
    untouched(DPOTrainer)(model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
                          callbacks=[Clock()]).train()


def reward(batch_size, steps, micro):
    from trl import RewardConfig, RewardTrainer
    data = [{"chosen_ids": a, "rejected_ids": b} for a, b, _ in rows("pairs")]
    config = RewardConfig(**common(batch_size, steps, micro), max_length=None)
    untouched(RewardTrainer)(scorer("reward"), config, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
                             callbacks=[Clock()]).train()


def ppo(batch_size, steps, micro, rollout, max_new_tokens):
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    data = Dataset.from_list([{"input_ids": ids} for ids in rows("prompts")])
    keys = common(batch_size, steps, micro)
    keys = {k: v for k, v in keys.items() if k != "max_steps"}
    config = PPOConfig(**keys, num_ppo_epochs=1, num_mini_batches=1, total_episodes=batch_size * steps,
                       response_length=max_new_tokens, local_rollout_forward_batch_size=rollout, num_sample_generations=0,
                       kl_coef=0.01, whiten_rewards=False, temperature=1.0)
    trainer = PPOTrainer(config, tokenizer, policy(), policy(), scorer("reward"), data, scorer("reward"), callbacks=[Clock()])
    trainer.train()


def generate(max_new_tokens, repetitions, eos, batch_size=0):
    """Ragged prompts, left-padded, in batches of batch_size; tokens up to each row's first EOS count."""
    model, prompts = policy().to(DTYPE), rows("prompts64")
    size, stops = batch_size or len(prompts), set(eos)
    prompts = sorted(prompts, key=len)
    for _ in range(repetitions):
        began, count = time.perf_counter(), 0
        for i in range(0, len(prompts), size):
            part = prompts[i:i + size]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=DEVICE)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=DEVICE)
            with torch.no_grad():
                made = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=True, top_k=0, top_p=1.0,
                                      eos_token_id=list(eos) or None, pad_token_id=0)[:, longest:].tolist()
            for row in made:
                ends = [k for k, t in enumerate(row) if t in stops]
                count += ends[0] + 1 if ends else len(row)
        report["seconds"].append(time.perf_counter() - began)
        report.setdefault("tokens", []).append(count)


def forward(repetitions, micro):
    """Logits of the first examples, for the reader to compare; then scoring right-padded batches."""
    model, data = policy().to(DTYPE).eval(), [ids for ids, _ in rows("sft")][:64]
    with torch.no_grad():
        logits = model(torch.tensor([data[0]], device=DEVICE)).logits[0].float().cpu()
        report["logits"] = logits[-1, :64].tolist()
        for _ in range(repetitions):
            began = time.perf_counter()
            for i in range(0, len(data), micro):
                part = data[i:i + micro]
                longest = max(map(len, part))
                ids = torch.tensor([p + [0] * (longest - len(p)) for p in part], device=DEVICE)
                mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in part], device=DEVICE)
                logits = model(ids, attention_mask=mask).logits[:, :-1].float()
                logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum().item()
            report["seconds"].append(time.perf_counter() - began)
    report["tokens"] = sum(map(len, data))


def load(repetitions):
    for _ in range(repetitions):
        began = time.perf_counter()
        sum(p.sum().item() for p in policy().parameters())
        report["seconds"].append(time.perf_counter() - began)
        gc.collect()


{"sft": sft, "dpo": dpo, "reward": reward, "ppo": ppo, "generate": generate, "forward": forward, "load": load}[workload](**options)
report["peak"] = int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024 if os.path.exists(
    "/proc/self/status") else 0
report["cuda_peak"] = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
with open(out, "w") as f:
    json.dump(report, f)
