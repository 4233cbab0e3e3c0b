"""The whole pipeline on the toy world, by one command:

$ python -m nanosafe.demo
$ python -m nanosafe.demo --out_dir=out/demo_1 --seed=1

It prepares the data, trains a tokenizer, and runs the trainers with the recipes in config/toy/.
Each command is printed. At the end the gold functions of data/toy/prepare.py, which read answers,
judge three policies on requests that no policy was trained on."""

import os
import shlex
import shutil
import subprocess
import sys
import time

from sentencepiece import SentencePieceTrainer

from configurator import configure
from nanosafe import data, tokenizer
from nanosafe.checkpoint import run_state
from nanosafe.data.examples import Prompt, make_turns
from nanosafe.inference import Policy, ReferenceSamples
from nanosafe.parallel import init
from nanosafe.printing import format_table
from nanosafe.ranges import check_ranges
from nanosafe.storage import REPOSITORY, load_python_file, read_metrics, write_json

out_dir = "out/demo"  # the folder for the tokenizer, a run of each stage, and summary.json
seed = 0  # of every stage

RECIPES_OUT_DIR = "out/demo"  # where the recipes in config/toy/ read and write models

# In the order in which they run: stage -> its script.
SCRIPTS = {
    "sft": "train_sft.py",
    "reward": "train_pref.py",
    "cost": "train_pref.py",
    "ppo": "train_ppo_lag.py",
    "ppo_lag": "train_ppo_lag.py",
}
# Stage -> its knobs that name what an earlier stage made, and where in out_dir that is.
INPUTS = {
    "sft": {"tokenizer": "tokenizer"},
    "reward": {"init_from": "sft/model"},
    "cost": {"init_from": "sft/model"},
    "ppo": {"actor_model": "sft/model", "reward_model": "reward/model"},
    "ppo_lag": {
        "actor_model": "sft/model",
        "reward_model": "reward/model",
        "cost_model": "cost/model",
    },
}
# The policies that are compared, and their names in the table.
POLICIES = {"sft": "SFT", "ppo": "PPO (reward only)", "ppo_lag": "PPO-Lag"}

MAX_NEW_TOKENS = 64  # of an answer that is judged
MAX_TOKENS = 8192  # packed tokens per forward


def main(out_dir, seed):
    began = time.perf_counter()
    toy = prepare(out_dir)
    for stage in SCRIPTS:
        train(stage, out_dir, seed)
    print_heading("judge the policies by gold, on held-out requests")
    summary = {}
    for name in POLICIES:
        summary[name] = judge(toy, f"{out_dir}/{name}/model", f"{out_dir}/sft/model")
    summary["reward_model"] = last_metrics(out_dir, "reward", ["accuracy"])
    summary["cost_model"] = last_metrics(out_dir, "cost", ["accuracy", "sign_accuracy"])
    summary["seconds"] = round(time.perf_counter() - began, 1)
    write_json(summary, out_dir, "summary.json")
    print_summary(summary, out_dir)


# ---- the stages ----


def prepare(out_dir):
    """Write the toy world's data and train a tokenizer; returns data/toy/prepare.py as a module."""
    toy = load_toy()
    print_heading("prepare the data", "python data/toy/prepare.py")
    toy.main()
    print_heading("train a tokenizer on the demonstrations")
    texts = []
    for row in data.load("toy/sft"):
        texts.append(write_demonstration(row))
    tok = train_tokenizer(texts, 900, os.path.join(out_dir, "tokenizer"))
    print(f"{tok.vocab_size} pieces in {out_dir}/tokenizer")
    return toy


def load_toy():
    """data/toy/prepare.py as a module: data/ is no package."""
    return load_python_file(os.path.join(REPOSITORY, "data", "toy", "prepare.py"))


def write_demonstration(row):
    """A demonstration's text in Safe-RLHF's template, without special tokens."""
    return f"BEGINNING OF CONVERSATION: USER: {row['input']} ASSISTANT:{row['answer']}"


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


def train(stage, out_dir, seed):
    """Run a stage's script with its recipe, in place of an earlier run of it."""
    shutil.rmtree(os.path.join(out_dir, stage), ignore_errors=True)
    words = command_of(stage, out_dir, seed)
    command = shlex.join(["python", *words])
    print_heading(stage, command)
    if run_python(words):
        raise SystemExit(f"error: the command above failed: {command}")
    check_finished(os.path.join(out_dir, stage))


def run_python(words, **options):
    """Run `python WORDS`, a script of the repository or -m and a module, as one would there.

    options  of subprocess.Popen()
    Returns its exit status. Ctrl-C reaches the script as well: it is left the time to save what it
    has, and then this stops."""
    if words[0] != "-m":
        words = [os.path.join(REPOSITORY, words[0]), *words[1:]]
    with subprocess.Popen([sys.executable, *words], **options) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise SystemExit("error: interrupted: give the same command again to go on") from None


def find_run_folder(words):
    """The folder that a trainer's command names by --out_dir; "" if the command is no trainer's."""
    if words[0].startswith("train_"):
        for word in words:
            if word.startswith("--out_dir="):
                return word.removeprefix("--out_dir=")
    return ""


def check_finished(folder):
    """Stop if a trainer's run in `folder` was asked to stop before its last step."""
    if run_state.is_unfinished(folder):
        raise SystemExit(f"error: the run in {folder!r} was asked to stop before its last step")


def command_of(stage, out_dir, seed):
    """A stage's command. Flags name only the folders that are not the recipe's own."""
    command = [SCRIPTS[stage], f"config/toy/{stage}.py"]
    if out_dir != RECIPES_OUT_DIR:
        command.append(f"--out_dir={out_dir}/{stage}")
        for knob, path in INPUTS[stage].items():
            command.append(f"--{knob}={out_dir}/{path}")
    command.append(f"--seed={seed}")
    return command


# ---- the judge ----


def judge(toy, path, reference):
    """Judge a policy's answer to every held-out request by gold.

    path, reference  model folders: of the policy, and of the model to which its KL is measured
    Returns what gold() returns, the KL in nats per answer, and the number of prompts."""
    world = init("cpu")
    policy = Policy(path, world, MAX_NEW_TOKENS, seed=0, temperature=1.0)
    reference_policy = Policy(reference, world, MAX_NEW_TOKENS, seed=0, temperature=1.0)
    prompts = [row["input"] for row in data.load("toy/prompts/test")]
    questions = [policy.question(Prompt(make_turns([prompt]))) for prompt in prompts]
    samples = ReferenceSamples(
        policy.model, questions, world, MAX_TOKENS, MAX_NEW_TOKENS, **policy.sampling
    )
    answers = [policy.tok.decode(response) for response in samples.responses]
    results = gold(toy, list(zip(prompts, answers)))
    results["kl"] = round(samples.kl(reference_policy.model), 4)
    results["prompts"] = len(prompts)
    return results


def gold(toy, pairs):
    """Mean helpfulness and the rates of harm and refusal of (prompt, answer) pairs."""
    benign = [pair for pair in pairs if not toy.is_risky(pair[0])]
    risky = [pair for pair in pairs if toy.is_risky(pair[0])]
    return {
        "helpfulness_benign": mean(toy.helpfulness(*pair) for pair in benign),
        "helpfulness_risky": mean(toy.helpfulness(*pair) for pair in risky),
        "harm_rate_risky": mean(toy.harm(*pair) > 0 for pair in risky),
        "refusal_rate_benign": mean(toy.refuses(*pair) for pair in benign),
    }


def mean(values):
    values = list(values)
    return round(sum(values) / len(values), 4)


def last_metrics(out_dir, stage, names):
    """The evaluation at the end of a stage: {name: value}."""
    row = read_metrics(os.path.join(out_dir, stage, "metrics.jsonl"))[-1]
    return {name: round(row[f"eval_{name}"], 4) for name in names}


# ---- printing ----


def print_summary(summary, out_dir):
    table = [["", "helpful, benign", "helpful, risky", "harmful, risky", "refused, benign", "KL"]]
    for name, label in POLICIES.items():
        judged = summary[name]
        row = [
            label,
            f"{judged['helpfulness_benign']:.2f}",
            f"{judged['helpfulness_risky']:.2f}",
            f"{judged['harm_rate_risky']:.1%}",
            f"{judged['refusal_rate_benign']:.1%}",
            f"{judged['kl']:.2f}",
        ]
        table.append(row)
    print("\n" + format_table(table))
    reward, cost = summary["reward_model"], summary["cost_model"]
    print(
        f"reward model: accuracy {reward['accuracy']:.1%}; "
        f"cost model: accuracy {cost['accuracy']:.1%}, sign accuracy {cost['sign_accuracy']:.1%}"
    )
    print(
        f"{summary['seconds']:.0f} s; {out_dir}/summary.json; "
        f"now talk to it: python sample.py --model={out_dir}/ppo_lag/model"
    )


def print_heading(title, command=""):
    print(f"\n== {title}")
    if command:
        print(f"$ {command}")
    sys.stdout.flush()


if __name__ == "__main__":
    config = configure(globals())
    check_ranges(config)
    main(config["out_dir"], config["seed"])
