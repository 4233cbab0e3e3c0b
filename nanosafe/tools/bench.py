"""nanosafe beside its peers, and beside what the machine allows: a table, and its numbers as JSON.

$ pip install -e ".[bench]" && python -m nanosafe.bench    # the toy's texts: after nanosafe.demo
$ python -m nanosafe.bench --pairs=PAIRS.jsonl --dialogues=DIALOGUES.jsonl --tokenizer=FOLDER

Both sides get the same weights, tokens and prompts, in processes of their own, in turn, A B A B
(benchmark.py, workloads.py). It stops where their first losses or logits differ."""

from configurator import configure
from nanosafe.tools import benchmark

workloads = "load,forward,sft,reward,cost,dpo,generate,generate_eos,ppo,ppo_lag,growth"  # all
peers = "transformers,trl"  # whom to measure beside; empty: nanosafe alone
device = "cpu"  # cpu | cuda
dtype = "auto"  # of both sides: auto | bfloat16 | float32; auto is bfloat16 on a GPU
pairs = "toy/pairs"  # pairs; their prompts are answered, too
safety_pairs = "toy/pairs"  # pairs with safety labels
dialogues = "toy/sft"  # demonstrations
tokenizer = "out/demo/tokenizer"  # a folder
vocab_size = 32000  # of the model
hidden_size = 256  # of the model: width D
num_hidden_layers = 6  # of the model: blocks
num_attention_heads = 8  # of the model: heads H
batch_size = 32  # sequences, pairs or prompts of a step
steps = 4  # of each process; the first is warm-up
repetitions = 3  # of each process
max_tokens = 1024  # nanosafe's packed tokens per forward
micros = "2,4,8"  # the peers' sequences per forward; the best one counts
max_new_tokens = 64  # of PPO's responses; twice as many in generation
folder = "out/bench"  # weights, tokens, and what the runs write
out = "docs/benchmarks.json"  # the numbers

config = configure(globals())

if __name__ == "__main__":
    benchmark.main(**config)
