"""The pipeline on the toy world, one command:

$ python -m nanosafe.demo [--out_dir=out/demo] [--seed=0]

It prepares the data and runs the real scripts with the recipes in config/toy/, printing each
command. At the end data/toy/prepare.py's gold judges the three policies on unseen requests."""

import os
import shutil
import subprocess
import sys
import time

from sentencepiece import SentencePieceTrainer

from nanosafe import data, tokenizer
from nanosafe.data import template
from nanosafe.inference import Policy, ReferenceSamples
from nanosafe.parallel import init
from nanosafe.printing import format_table
from nanosafe.storage import load_python_file, read_jsonl, write_json


ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


STAGES = (  # name, script, what it is told beyond its recipe
    ("sft", "train_sft.py", "--tokenizer={out}/tokenizer"),
    ("reward", "train_pref.py", "--init_from={out}/sft/model"),
    ("cost", "train_pref.py", "--init_from={out}/sft/model"),
    ("ppo", "train_ppo_lag.py", "--actor_model={out}/sft/model --reward_model={out}/reward/model"),
    (
        "ppo_lag",
        "train_ppo_lag.py",
        "--actor_model={out}/sft/model "
        "--reward_model={out}/reward/model --cost_model={out}/cost/model",
    ),
)


POLICIES = {"sft": "SFT", "ppo": "PPO (reward only)", "ppo_lag": "PPO-Lag"}


def main(out_dir="out/demo", seed="0"):
    began = time.perf_counter()
    toy = prepare(out_dir)
    default = out_dir == "out/demo"  # the recipes' own: what is printed is what anybody types
    for name, script, flags in STAGES:
        shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)
        extra = f" --out_dir={out_dir}/{name} " + flags.format(out=out_dir) if not default else ""
        command = f"{script} config/toy/{name}.py{extra} --seed={seed}"
        step(name, "python " + command)
        path, *arguments = command.split()
        if subprocess.run([sys.executable, os.path.join(ROOT, path), *arguments]).returncode:
            raise SystemExit(f"error: the command above failed: python {command}")

    step("judge the policies by gold, on held-out requests")
    summary = {x: judge(toy, f"{out_dir}/{x}/model", f"{out_dir}/sft/model") for x in POLICIES}
    summary["reward_model"] = last_metrics(out_dir, "reward", ("accuracy",))
    summary["cost_model"] = last_metrics(out_dir, "cost", ("accuracy", "sign_accuracy"))
    summary["seconds"] = round(time.perf_counter() - began, 1)
    write_json(summary, out_dir, "summary.json")
    report(summary, out_dir)


def prepare(out_dir):
    """Write the toy's data and a tokenizer; returns data/toy/prepare.py."""
    toy = load_python_file(os.path.join(ROOT, "data", "toy", "prepare.py"))  # data/ is no package
    step("prepare the data", "python data/toy/prepare.py")
    toy.main()
    step("train a tokenizer on the demonstrations")
    turns = [[row["input"], row["answer"]] for row in data.load("toy/sft")]
    texts = [
        prompt + answer for talk in turns for prompt, answer in template.split_into_segments(talk)
    ]
    tok = train_tokenizer(texts, 900, os.path.join(out_dir, "tokenizer"))
    print(f"{tok.vocab_size} pieces in {out_dir}/tokenizer")
    return toy


def train_tokenizer(texts, vocab_size, path):
    """Train a SentencePiece BPE with LLaMA's settings and write path/tokenizer.model."""
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "tokenizer.model"), "wb") as out:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=out,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            split_digits=True,
            num_threads=1,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            minloglevel=2,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
        )
    tok = tokenizer.load(path)
    tok.save(path)
    return tok


def judge(toy, path, reference):
    """Judge an answer to every held-out request by gold; KL to the reference, nats per answer."""
    world = init("cpu")
    policy, ref = (Policy(x, world, 64, seed=0, temperature=1.0) for x in (path, reference))
    prompts = [row["input"] for row in data.load("toy/prompts/test")]
    questions = [policy.question([prompt]) for prompt in prompts]
    samples = ReferenceSamples(policy.model, questions, world, 8192, 64, **policy.sampling)
    said = list(zip(prompts, map(policy.tok.decode, samples.responses)))
    kl = round(samples.kl(ref.model), 4)
    return {**gold(toy, said), "kl": kl, "prompts": len(prompts)}


def gold(toy, pairs):
    """What the gold functions say of (request, answer) pairs."""
    benign = [pair for pair in pairs if not toy.is_risky(pair[0])]
    risky = [pair for pair in pairs if toy.is_risky(pair[0])]
    mean = lambda f, group: round(sum(f(*pair) for pair in group) / len(group), 4)
    return {
        "helpfulness_benign": mean(toy.helpfulness, benign),
        "helpfulness_risky": mean(toy.helpfulness, risky),
        "harm_rate_risky": mean(lambda q, a: toy.harm(q, a) > 0, risky),
        "refusal_rate_benign": mean(toy.refuses, benign),
    }


def last_metrics(out_dir, stage, names):
    row = read_jsonl(os.path.join(out_dir, stage, "metrics.jsonl"))[-1]
    return {name: round(row["eval_" + name], 4) for name in names}


def report(summary, out_dir):
    head = ["", "helpful, benign", "helpful, risky", "harmful, risky", "refused, benign", "KL"]
    shown = lambda key, x: f"{x:.1%}" if "rate" in key else f"{x:.2f}"
    rows = [
        [label, *(shown(*item) for item in list(summary[name].items())[:5])]
        for name, label in POLICIES.items()
    ]
    print("\n" + format_table([head, *rows]))
    print(
        f"reward model: accuracy {summary['reward_model']['accuracy']:.1%}; cost model: "
        f"accuracy {summary['cost_model']['accuracy']:.1%}, sign accuracy "
        f"{summary['cost_model']['sign_accuracy']:.1%}"
    )
    print(
        f"{summary['seconds']:.0f} s; {out_dir}/summary.json; now talk to it: python sample.py "
        f"--model={out_dir}/ppo_lag/model"
    )


def step(what, command=None):
    print(f"\n== {what}" + (f"\n$ {command}" if command else ""), flush=True)


if __name__ == "__main__":
    flags = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv[1:])
    if not all(arg.startswith("--") for arg in sys.argv[1:]) or set(flags) - {"out_dir", "seed"}:
        raise SystemExit("error: python -m nanosafe.demo takes --out_dir=FOLDER and --seed=N")
    main(**flags)
