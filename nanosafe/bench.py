"""nanosafe beside its peers, and beside what the machine allows: one table, and its numbers as JSON.

$ pip install -e ".[bench]"
$ python -m nanosafe.bench --data=toy/pairs --dialogues=toy/sft   # after python -m nanosafe.demo
$ python -m nanosafe.bench --data=data/hh_rlhf/helpful-base/test.jsonl \\
    --dialogues=data/hh_rlhf/helpful-base-dialogue/test.jsonl --tokenizer=FOLDER

Both sides get the same weights, tokens and prompts. Each measurement is a process of its own, in
turn (A B A B ..): its peak of memory is its own, and a noisy machine is noisy to all. Before a ratio
is believed, both sides' first losses, or their logits, must agree. Tokens are counted unpadded."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time

import torch

from configurator import configure
from nanosafe import checkpoint, plan, rollout
from nanosafe import tokenizer as tokenizers
from nanosafe.data import tokenize
from nanosafe.files import make_folder, stop, table, write_json
from nanosafe.model import Config
from nanosafe.packing import examples_at

peers = "transformers,trl"  # whom to measure beside; empty: nanosafe alone
workloads = "load,forward,sft,reward,cost,dpo,generate,generate_eos,ppo,ppo_lag,growth"  # which
device = "cpu"  # cpu | cuda
data = "toy/pairs"  # pairs, whose prompts are also answered
dialogues = "toy/sft"  # demonstrations
tokenizer = "out/demo/tokenizer"  # a folder
vocab_size = 32000  # of the model, at least the tokenizer's
hidden_size = 256  # width D
num_hidden_layers = 6  # blocks
num_attention_heads = 8  # heads H
batch_size = 32  # sequences, pairs or prompts of a step
steps = 4  # of each process; the first is warm-up
repetitions = 3  # of each process
max_tokens = 2048  # packed tokens per forward
max_new_tokens = 64  # of a PPO response; twice that in generation
micros = "2,4,8"  # the peer's sequences per forward that are tried; the best counts
folder = "out/bench"  # weights, tokens, and what the runs write
out = "docs/benchmarks.json"  # the numbers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STEPS = {"sft": "sft.json", "reward": "pairs.json", "dpo": "pairs.json"}

def prepare():
    """Write the models and, for the peers, the tokens of every step in the order we take them."""
    make_folder(folder)
    tok = tokenizers.load(tokenizer)
    shape = Config(max(vocab_size, tok.vocab_size), hidden_size, hidden_size * 43 // 16,
                   num_hidden_layers, num_attention_heads, initializer_range=hidden_size**-0.5)
    checkpoint.save(checkpoint.scratch(shape, "lm", seed=0), f"{folder}/model", tok)
    for seed, kind in enumerate(("reward", "cost")):
        model = checkpoint.load(f"{folder}/model", "score", score_type=kind, seed=seed)
        checkpoint.save(model, f"{folder}/{kind}", tok)
    sets = {"sft": tokenize(dialogues, tok, "sft", 512), "pairs": tokenize(data, tok, "reward", 512),
            "prompts": tokenize(data, tok, "prompts", 256)}
    said = {}
    for name, found in sets.items():
        examples = [i for step in range(steps) for i in examples_at(step, len(found), batch_size, 0)]
        parts = [[found.sequence(i, part) for part in range(found.width)] for i in examples]
        rows = {"sft": lambda p: [p[0][0].tolist(), p[0][1].tolist()],
                "pairs": lambda p: [p[0][0].tolist(), p[1][0].tolist(), int(p[0][1].argmax())],
                "prompts": lambda p: p[0][0].tolist()}[name]
        write_json([rows(p) for p in parts], folder, name + ".json")
        said[name] = float(found.lengths[examples].mean()), float(found.targets[examples].mean())
    prompts = [sets["prompts"].sequence(i)[0].tolist()
               for i in examples_at(0, len(sets["prompts"]), 64, 0)]
    write_json(prompts, folder, "prompts64.json")
    return said

def measure(command):
    """Run a process; returns its peak of resident memory in bytes."""
    child = subprocess.Popen([sys.executable, *command], cwd=os.getcwd(), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tail = []
    reader = threading.Thread(target=lambda: tail.extend(child.stdout))
    reader.start()
    _, status, usage = os.wait4(child.pid, 0)
    reader.join()
    if status:
        stop(f"{' '.join(command)[:200]} failed: {''.join(tail[-3:])}")
    return usage.ru_maxrss * 1024

def ours(workload):
    """{"seconds", "tokens", "peak", "losses"} of one process of nanosafe's."""
    run = f"{folder}/ours"
    subprocess.run(["rm", "-rf", run])
    if workload not in TRAINERS:
        peak = measure(["-c", f"from nanosafe import bench_work; bench_work.{workload}('{folder}')"])
        with open(f"{folder}/ours.json") as f:
            return {**json.load(f), "peak": peak}
    common = [f"--out_dir={run}", "--save_interval=0", f"--batch_size={batch_size}",
              f"--max_steps={steps}", f"--max_tokens={max_tokens}", f"--device={device}"]
    peak = measure([os.path.join(ROOT, TRAINERS[workload][0]), *common, *TRAINERS[workload][1:]])
