"""The work that nanosafe.bench times: nanosafe's side, and transformers' and TRL's on the same weights and tokens.

$ python tests/workloads.py SIDE WORKLOAD FOLDER OUT.json [key=value ...]     # SIDE: nanosafe or peer

Each call is a process of its own, so that its peak of memory is its own. OUT.json gets "seconds" and
"work", a number per step or repetition, without the first, which is warm-up; and numbers by which the
reader sees that both sides computed the same."""

import gc
import json
import os
import runpy
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
side, workload, folder, out, *rest = sys.argv[1:]
options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in rest)}
DEVICE = options.pop("device", "cpu")
DTYPE = getattr(
    torch, options.pop("dtype", "float32")
)  # computed in; what is trained is kept in float32
report = {"seconds": [], "work": []}


def rows(name):
    with open(f"{folder}/{name}.json") as f:
        return json.load(f)


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, repetitions):
    """Do `work`, which returns how much it was, as often as asked, the first time for warm-up."""
    for i in range(repetitions):
        began = now()
        amount = work()
        if i:
            report["seconds"].append(now() - began)
            report["work"].append(amount)


class Nanosafe:
    """Trainers are the real scripts, whole: a step lasts from one row of metrics to the next."""

    def train(self, script, flags, models=(), amount=lambda metrics: options["batch_size"]):
        from nanosafe import checkpoint, monitor, optim, parallel, rollout

        phases, names, owners = {}, iter(models), {}

        def watch(module, name, phase):
            real = getattr(module, name)

            def watched(*args, **kwargs):
                began = now()
                result = real(*args, **kwargs)
                key = phase(args, kwargs)
                phases[key] = phases.get(key, 0.0) + now() - began
                return result

            setattr(module, name, watched)

        def load(*args, **kwargs):
            model = real_load(*args, **kwargs)
            owners[id(model)] = name = next(names, "model")

            def phase(_, options):  # ptx is the only forward of a mean
                owners[id(model)] = "ptx" if "actor" in models and options.get("even") else name
                return owners[id(model)] + (": updates" if torch.is_grad_enabled() else ": scoring")

            watch(model, "forward", phase)
            return model

        real_load, checkpoint.load = checkpoint.load, load
        watch(rollout, "generate", lambda *_: "rollout")
        watch(parallel, "backward", lambda args, _: owners[id(args[0])] + ": updates")
        watch(optim, "step", lambda args, _: owners[id(args[0])] + ": updates")
        real_log, last = monitor.Monitor.log, []

        def log(self, step, metrics):
            real_log(self, step, metrics)
            last.append(now())
            report["seconds"] = [b - a for a, b in zip(last, last[1:])]
            report.setdefault("losses", []).append(
                float(metrics.get("loss", metrics.get("actor_loss", 0)))
            )
            report["work"] = [amount(metrics)] * len(report["seconds"])
            report["phases"] = dict(phases)  # of the last step
            phases.clear()

        monitor.Monitor.log = log
        parallel.close = lambda *_: None
        sys.argv = [script, *(f"--{key}={value}" for key, value in flags.items())]
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")

    def flags(self, batch_size, steps, max_tokens, **more):
        return {
            "out_dir": f"{folder}/ours",
            "save_interval": 0,
            "batch_size": batch_size,
            "max_steps": steps,
            "max_tokens": max_tokens,
            "device": DEVICE,
            "dtype": str(DTYPE).removeprefix("torch."),
            **more,
        }

    def one(self, **more):
        return {
            "learning_rate": 1e-4,
            "lr_schedule": "constant",
            "warmup_ratio": 0,
            "weight_decay": 0,
            "init_from": f"{folder}/model",
            "max_len": 512,
            **self.flags(**more),
        }

    def sft(self, data, **sizes):
        self.train(
            "train_sft.py", self.one(data=data, **sizes), amount=lambda metrics: metrics["tokens"]
        )

    def reward(self, data, **sizes):
        self.train("train_pref.py", self.one(data=data, eval_data="", regularization=0, **sizes))

    def cost(self, data, **sizes):
        self.train("train_pref.py", self.one(data=data, eval_data="", objective="cost", **sizes))

    def dpo(self, data, **sizes):
        self.train(
            "train_pref.py", self.one(data=data, eval_data="", objective="dpo", beta=0.1, **sizes)
        )

    def ppo(self, data, max_new_tokens, cost=False, ptx_data="", **sizes):
        flags = {
            "ptx_data": ptx_data,
            "actor_model": f"{folder}/model",
            "reward_model": f"{folder}/reward",
            "max_len": 256 + max_new_tokens,
            "cost_model": f"{folder}/cost" if cost else "",
            "prompts": data,
            "max_new_tokens": max_new_tokens,
            "rollout_size": sizes["batch_size"],
            "actor_learning_rate": 1e-4,
            "critic_learning_rate": 1e-4,
            "actor_warmup_ratio": 0,
            "critic_warmup_ratio": 0,
            **self.flags(**sizes),
        }
        names = (
            "reference",
            "reward model",
            *(("cost model",) * cost),
            "actor",
            "reward critic",
            "cost critic",
        )
        self.train("train_ppo_lag.py", flags, names)

    def ppo_lag(self, **sizes):
        """Six models, and demonstrations in the gradient."""
        self.ppo(cost=True, **sizes)

    def model(self):
        from nanosafe import checkpoint

        return checkpoint.load(f"{folder}/model", dtype=DTYPE, device=DEVICE)

    def generate(self, max_new_tokens, repetitions, eos):
        from nanosafe.rollout import generate

        model, prompts = self.model(), rows("prompts64")
        timed(
            lambda: sum(
                map(
                    len,
                    generate(
                        model, prompts, max_new_tokens, eos_ids=eos, seed=len(report["seconds"])
                    ),
                )
            ),
            repetitions,
        )

    @torch.no_grad()
    def forward(self, repetitions, max_tokens):
        from nanosafe.data.batching import collate, plan_micro_batches

        model, data = self.model(), [ids for ids, _ in rows("sft")][:64]
        batch = lambda part: collate(
            [data[i] for i in part], [[0] + [1] * (len(data[i]) - 1) for i in part], DEVICE
        )
        report["logits"] = model(*batch([0])[:3])[-1, :64].float().tolist()
        parts = plan_micro_batches(list(map(len, data)), max_tokens, 1)[0]
        report["sum"] = sum(model(*batch(part)).sum().item() for part in parts)
        timed(lambda: sum(len(model(*batch(part))) for part in parts), repetitions)

    def load(self, repetitions):
        timed(
            lambda: (
                gc.collect() * 0 + sum(p.sum().item() * 0 + 1 for p in self.model().parameters())
            ),
            repetitions,
        )

    def growth(self, repetitions):
        """Seconds per token as one size grows: a training step's tokens, its vocabulary, sequences, responses."""
        from nanosafe import checkpoint, losses
        from nanosafe.data import batching
        from nanosafe.model import Config
        from nanosafe.rollout import generate

        base = self.model().config
        grown = {}

        def step(model, tokens, length):
            ids = torch.randint(3, model.config.vocab_size, (tokens // length, length))
            batch = batching.collate(
                list(ids.numpy()), [[0] + [1] * (length - 1)] * len(ids), DEVICE
            )
            model.zero_grad()
            losses.mle_loss(
                model.log_probs(batch, uniform_weights=True), batch.targets >= 0
            ).backward()

        def best(name, size, work, tokens):
            report["seconds"] = []
            timed(work, repetitions + 1)
            grown.setdefault(name, []).append((size, min(report["seconds"]) / tokens))

        model = self.model().float()
        for tokens in (512, 1024, 2048, 4096, 8192):
            best("packed tokens", tokens, lambda: step(model, tokens, 256), tokens)
        for length in (64, 128, 256, 512, 1024):
            best("tokens of a sequence", length, lambda: step(model, 2048, length), 2048)
        for n in (1, 8, 32, 64, 128):
            prompts = (rows("prompts64") * 2)[:n]
            best(
                "prompts sampled together",
                n,
                lambda: generate(model, prompts, 32, eos_ids=[], seed=0),
                32 * n,
            )
        for length in (32, 64, 128, 256):
            prompts = rows("prompts64")[:32]
            best(
                "tokens of a response",
                length,
                lambda: generate(model, prompts, length, eos_ids=[], seed=0),
                32 * length,
            )
        for size in (8000, 32000, 128000):
            config = Config(**{**vars(base), "vocab_size": size})
            other = checkpoint.init_from_scratch(config, "lm")
            best("vocabulary", size, lambda: step(other.to(DEVICE), 1024, 256), 1024)
        report.update(grown=grown, seconds=[1.0], work=[0])  # a rate would mean nothing


def policy():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).to(DEVICE)


def scorer(name):
    """nanosafe's score model as the class that TRL wants: the same weights under another name."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with open(f"{folder}/{name}/config.json") as f:
        shape = {
            k: v
            for k, v in json.load(f).items()
            if k not in ("architectures", "id2label", "label2id")
        }
    config = LlamaConfig(**shape, num_labels=1)
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config).to(DEVICE)
    weights = load_file(f"{folder}/{name}/model.safetensors")
    weights["score.weight"] = weights.pop("score_head.weight")
    model.load_state_dict(weights)
    return model


def clock(amount=0):
    """Seconds of each optimizer step, from one step's end to the next's, as a user waits for it; losses."""
    from transformers import TrainerCallback

    last = []

    def on_step_end(self, *_, **__):
        last.append(now())
        report["seconds"] = [b - a for a, b in zip(last, last[1:])]
        report["work"] = [amount or options["batch_size"]] * len(report["seconds"])

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            report.setdefault("losses", []).append(float(logs["loss"]))

    return [type("Clock", (TrainerCallback,), {"on_step_end": on_step_end, "on_log": on_log})]


def common(batch_size, steps, micro):
    """Plain AdamW at a constant rate, nothing saved or reported, data in the order of its rows."""
    return dict(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=micro,
        max_steps=steps,
        gradient_accumulation_steps=batch_size // micro,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
        bf16=DTYPE == torch.bfloat16,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        seed=0,
        gradient_checkpointing=False,
    )


def untouched(trainer):
    """The trainer's class, but what it gets is tokenised already."""
    return type(
        trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset}
    )


def sft(batch_size, steps, micro, packing=False):
    from trl import SFTConfig, SFTTrainer

    data = [
        {"input_ids": ids, "labels": [t if m else -100 for t, m in zip(ids, mask)]}
        for ids, mask in rows("sft")
    ]
    if packing:  # the trainer's own packing; sequences do not see each other's places, but attend to each other on a CPU
        config = SFTConfig(
            **common(batch_size, steps, micro),
            max_length=packing,
            packing=True,
            eos_token=tokenizer.eos_token,
        )
        trainer = SFTTrainer(
            policy(), config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        packed = sum(map(len, trainer.train_dataset["input_ids"])) / len(trainer.train_dataset)
        trainer.add_callback(clock(packed * batch_size)[0])
    else:
        config = SFTConfig(**common(batch_size, steps, micro), max_length=None)
        trainer = untouched(SFTTrainer)(
            policy(),
            config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=clock(sum(len(ids) for ids, _ in rows("sft")) / steps),
        )
    trainer.train()


def dpo(batch_size, steps, micro):
    from trl import DPOConfig, DPOTrainer

    data = [
        {"prompt_ids": a[:k], "chosen_ids": a[k:], "rejected_ids": b[k:]}
        for a, b, k in rows("pairs")
    ]
    config = DPOConfig(**common(batch_size, steps, micro), max_length=None, beta=0.1)
    model = policy()
    untouched(DPOTrainer)(
        model,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=clock(),
    ).train()


def reward(batch_size, steps, micro):
    from trl import RewardConfig, RewardTrainer

    data = [{"chosen_ids": a, "rejected_ids": b} for a, b, _ in rows("pairs")]
    config = RewardConfig(**common(batch_size, steps, micro), max_length=None)
    untouched(RewardTrainer)(
        scorer("reward"),
        config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=clock(),
    ).train()


def ppo(batch_size, steps, micro, rollout, max_new_tokens):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    data = Dataset.from_list([{"input_ids": ids} for ids in rows("prompts")])
    keys = common(batch_size, steps, micro)
    keys = {k: v for k, v in keys.items() if k != "max_steps"}
    config = PPOConfig(
        **keys,
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
        tokenizer,
        policy(),
        policy(),
        scorer("reward"),
        data,
        scorer("reward"),
        callbacks=clock(),
    )
    trainer.train()


def generate(max_new_tokens, repetitions, eos, micro):
    """Ragged prompts, left-padded, `micro` at a time; tokens up to each row's first EOS count."""
    model, prompts, stops = policy().to(DTYPE), sorted(rows("prompts64"), key=len), set(eos)

    @torch.no_grad()
    def work():
        made = []
        for i in range(0, len(prompts), micro):
            part = prompts[i : i + micro]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=DEVICE)
            mask = torch.tensor(
                [[0] * (longest - len(p)) + [1] * len(p) for p in part], device=DEVICE
            )
            made += model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                eos_token_id=list(eos) or None,
                pad_token_id=0,
            )[:, longest:].tolist()
        return sum(next((k + 1 for k, t in enumerate(row) if t in stops), len(row)) for row in made)

    timed(work, repetitions)


@torch.no_grad()
def forward(repetitions, micro):
    """Log-probabilities of right-padded batches; the first example's logits, for the reader to compare."""
    model, data = policy().to(DTYPE).eval(), [ids for ids, _ in rows("sft")][:64]
    report["logits"] = (
        model(torch.tensor([data[0]], device=DEVICE)).logits[0, -1, :64].float().tolist()
    )

    def work():
        total = 0.0
        for i in range(0, len(data), micro):
            part = sorted(data, key=len)[i : i + micro]
            longest = max(map(len, part))
            ids = torch.tensor([p + [0] * (longest - len(p)) for p in part], device=DEVICE)
            mask = torch.tensor(
                [[1] * len(p) + [0] * (longest - len(p)) for p in part], device=DEVICE
            )
            logps = (
                model(ids, attention_mask=mask)
                .logits[:, :-1]
                .float()
                .log_softmax(-1)
                .gather(2, ids[:, 1:, None])
            )
            total += (logps[..., 0] * mask[:, 1:]).sum().item()
        report["sum"] = total
        return sum(map(len, data))

    timed(work, repetitions)


def load(repetitions):
    timed(
        lambda: gc.collect() * 0 + sum(p.sum().item() * 0 + 1 for p in policy().parameters()),
        repetitions,
    )


if side == "nanosafe":
    getattr(Nanosafe(), workload)(**options)
else:
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    tokenizer.pad_token_id = 0  # <unk>: no example holds it
    {
        "sft": sft,
        "dpo": dpo,
        "reward": reward,
        "ppo": ppo,
        "generate": generate,
        "forward": forward,
        "load": load,
    }[workload](**options)
with open(
    "/proc/self/status"
) as f:  # getrusage() would also count the process that started this one
    report["peak"] = 1024 * int(next(line for line in f if line.startswith("VmHWM")).split()[1])
if DEVICE == "cuda":
    report["peak"] = torch.cuda.max_memory_allocated()
with open(out, "w") as f:
    json.dump(report, f)
