"""The side of transformers and TRL in what nanosafe.bench times, each workload in its own process.

$ python -m nanosafe.tools.peer_workloads NAME FOLDER OUT [key=value ...]

workload_report.py explains the arguments and the report. The peers get the weights and the token
ids of nanosafe's side, in the same order."""

import gc
import json

import torch

from nanosafe.tools.workload_report import Workload

PAD = 0  # <unk>, which no example holds


def main():
    workload = Workload(__doc__)
    functions = {
        "load": load,
        "forward": forward,
        "generate": generate,
        "sft": sft,
        "reward": reward,
        "dpo": dpo,
        "ppo": ppo,
    }
    functions[workload.name](workload, **workload.options)
    workload.write_report()


# ---- models ----


def load_policy(workload):
    from transformers import AutoModelForCausalLM

    path = f"{workload.folder}/model"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(workload.device)


def load_tokenizer(workload):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{workload.folder}/model")
    tokenizer.pad_token_id = PAD
    return tokenizer


def load_reward_model(workload):
    """nanosafe's reward model as the class that TRL wants: the same weights under another name."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with open(f"{workload.folder}/reward/config.json") as f:
        stated = json.load(f)
    for name in ("architectures", "id2label", "label2id"):
        stated.pop(name, None)
    config = LlamaConfig(**stated, num_labels=1)
    config.pad_token_id = PAD
    model = LlamaForSequenceClassification(config).to(workload.device)
    weights = load_file(f"{workload.folder}/reward/model.safetensors")
    weights["score.weight"] = weights.pop("score_head.weight")
    model.load_state_dict(weights)
    return model


# ---- TRL's trainers ----


def common_settings(workload, batch_size, steps, micro):
    """Plain AdamW at a constant rate, data in the order of its rows, nothing saved or reported."""
    return {
        "output_dir": f"{workload.folder}/trl",
        "per_device_train_batch_size": micro,
        "max_steps": steps,
        "gradient_accumulation_steps": batch_size // micro,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": workload.device == "cpu",
        "bf16": workload.dtype == torch.bfloat16,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "seed": 0,
        "gradient_checkpointing": False,
    }


def make_clock(workload, work_per_step):
    """A callback that reports each step, from the end of the one before to its own, and losses."""
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            ends.append(workload.now())
            seconds = [later - earlier for earlier, later in zip(ends, ends[1:])]
            workload.report["seconds"] = seconds
            workload.report["work"] = [work_per_step] * len(seconds)

        def on_log(self, args, state, control, logs=None, **rest):
            if logs and "loss" in logs:
                workload.report.setdefault("losses", []).append(float(logs["loss"]))

    return Clock()


def without_preparation(trainer_class):
    """The same trainer for data that is tokenised already."""

    class Unprepared(trainer_class):
        def _prepare_dataset(self, dataset, *arguments, **options):
            return dataset

    Unprepared.__name__ = trainer_class.__name__
    return Unprepared


def make_dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def sft(workload, batch_size, steps, micro, packing=0):
    """packing: 0, or TRL's own packing into rows of so many tokens.

    On a CPU packed sequences attend to each other, so their losses differ."""
    from trl import SFTConfig, SFTTrainer

    rows = []
    for ids, mask in workload.read_tokens("sft"):
        labels = [token if is_target else -100 for token, is_target in zip(ids, mask)]
        rows.append({"input_ids": ids, "labels": labels})
    settings = common_settings(workload, batch_size, steps, micro)
    tokenizer = load_tokenizer(workload)
    if packing:
        config = SFTConfig(
            **settings, max_length=packing, packing=True, eos_token=tokenizer.eos_token
        )
        trainer_class = SFTTrainer
    else:
        config = SFTConfig(**settings, max_length=None)
        trainer_class = without_preparation(SFTTrainer)
    trainer = trainer_class(
        load_policy(workload),
        config,
        train_dataset=make_dataset(rows),
        processing_class=tokenizer,
    )
    if packing:
        packed_rows = trainer.train_dataset["input_ids"]
        tokens_per_row = sum(len(ids) for ids in packed_rows) / len(packed_rows)
        tokens_per_step = tokens_per_row * batch_size
    else:
        tokens_per_step = sum(len(row["input_ids"]) for row in rows) / steps
    trainer.add_callback(make_clock(workload, tokens_per_step))
    trainer.train()


def dpo(workload, batch_size, steps, micro):
    from trl import DPOConfig, DPOTrainer

    rows = []
    for chosen, rejected, start in workload.read_tokens("pairs"):
        row = {"prompt_ids": chosen[:start]}
        row["chosen_ids"] = chosen[start:]
        row["rejected_ids"] = rejected[start:]
        rows.append(row)
    settings = common_settings(workload, batch_size, steps, micro)
    trainer = without_preparation(DPOTrainer)(
        load_policy(workload),
        args=DPOConfig(**settings, max_length=None, beta=0.1),
        train_dataset=make_dataset(rows),
        processing_class=load_tokenizer(workload),
        callbacks=[make_clock(workload, batch_size)],
    )
    trainer.train()


def reward(workload, batch_size, steps, micro):
    from trl import RewardConfig, RewardTrainer

    rows = []
    for chosen, rejected, _ in workload.read_tokens("pairs"):
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    settings = common_settings(workload, batch_size, steps, micro)
    trainer = without_preparation(RewardTrainer)(
        load_reward_model(workload),
        RewardConfig(**settings, max_length=None),
        train_dataset=make_dataset(rows),
        processing_class=load_tokenizer(workload),
        callbacks=[make_clock(workload, batch_size)],
    )
    trainer.train()


def ppo(workload, batch_size, steps, micro, rollout, max_new_tokens):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = [{"input_ids": ids} for ids in workload.read_tokens("prompts")]
    settings = common_settings(workload, batch_size, steps, micro)
    del settings["max_steps"]
    config = PPOConfig(
        **settings,
        num_ppo_epochs=1,
        num_mini_batches=1,
        total_episodes=batch_size * steps,
        response_length=max_new_tokens,
        local_rollout_forward_batch_size=rollout,
        num_sample_generations=0,
        kl_coef=0.01,
        whiten_rewards=False,
        temperature=1.0,
    )
    trainer = PPOTrainer(
        config,
        load_tokenizer(workload),
        load_policy(workload),
        load_policy(workload),
        load_reward_model(workload),
        make_dataset(rows),
        load_reward_model(workload),
        callbacks=[make_clock(workload, batch_size)],
    )
    trainer.train()


# ---- transformers ----


def load(workload, repetitions):
    def load_and_read():
        gc.collect()
        tensors = 0
        for parameter in load_policy(workload).parameters():
            parameter.sum().item()
            tensors += 1
        return tensors

    workload.repeat(load_and_read, repetitions)


@torch.no_grad()
def forward(workload, repetitions, micro):
    """Log-probabilities of right-padded batches; the logits of the first, to be compared."""
    model = load_policy(workload).to(workload.dtype).eval()
    sequences = [ids for ids, _ in workload.read_tokens("sft")][:64]
    first = torch.tensor([sequences[0]], device=workload.device)
    workload.report["logits"] = model(first).logits[0, -1, :64].float().tolist()

    def add_up_logps():
        total = 0.0
        by_length = sorted(sequences, key=len)
        for start in range(0, len(sequences), micro):
            ids, mask = pad(by_length[start : start + micro], workload.device)
            logits = model(ids, attention_mask=mask).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            total += (logps * mask[:, 1:]).sum().item()
        workload.report["sum"] = total
        return sum(len(ids) for ids in sequences)

    workload.repeat(add_up_logps, repetitions)


def generate(workload, max_new_tokens, repetitions, eos, micro):
    """Left-padded prompts, `micro` at a time. Tokens count up to the first EOS of each response."""
    model = load_policy(workload).to(workload.dtype)
    prompts = sorted(workload.read_tokens("prompts64"), key=len)
    ends = set(eos)

    @torch.no_grad()
    def sample():
        responses = []
        for start in range(0, len(prompts), micro):
            ids, mask = pad(prompts[start : start + micro], workload.device, left=True)
            sampled = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                eos_token_id=eos or None,
                pad_token_id=PAD,
            )
            responses += sampled[:, ids.shape[1] :].tolist()
        return sum(length_to_eos(response, ends) for response in responses)

    workload.repeat(sample, repetitions)


def pad(sequences, device, left=False):
    """(ids, mask) of sequences that are padded to the longest one."""
    longest = max(len(ids) for ids in sequences)
    ids, mask = [], []
    for sequence in sequences:
        padding = [0] * (longest - len(sequence))
        ones = [1] * len(sequence)
        if left:
            ids.append(padding + sequence)
            mask.append(padding + ones)
        else:
            ids.append(sequence + padding)
            mask.append(ones + padding)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def length_to_eos(response, ends):
    for i, token in enumerate(response):
        if token in ends:
            return i + 1
    return len(response)


if __name__ == "__main__":
    main()
