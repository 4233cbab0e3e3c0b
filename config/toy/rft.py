# Rejection sampling on the toy world: the best of eight answers (README).
out_dir = "out/demo/rft"
init_from = "out/demo/sft/model"
data = "out/demo/best.jsonl"
epochs = 2.0
batch_size = 32
learning_rate = 1e-3
save_interval = 0
