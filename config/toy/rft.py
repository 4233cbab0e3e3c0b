# Rejection sampling on the toy world: SFT on the best of eight answers. For train_sft.py.
# The README has the command of sample.py that makes the answers.
out_dir = "out/demo/rft"
init_from = "out/demo/sft/model"
data = "out/demo/best.jsonl"
epochs = 2.0
batch_size = 32
learning_rate = 1e-3
save_interval = 0
