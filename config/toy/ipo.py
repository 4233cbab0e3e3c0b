# The toy world's IPO: the same pairs, a margin of 1 / (2 beta) nats per token to reach.
objective = "ipo"
out_dir = "out/demo/ipo"
init_from = "out/demo/sft/model"
data = "toy/pairs:10000/-1"
eval_data = "toy/reward/test"
epochs = 1.0
batch_size = 32
warmup_ratio = 0.1
learning_rate = 3e-4
beta = 2.0
max_new_tokens = 64
save_interval = 0
