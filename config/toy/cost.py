# The toy world's cost model: which answer is more harmful, and whether it is harmful at all.
# For train_pref.py.
objective = "cost"
out_dir = "out/demo/cost"
init_from = "out/demo/sft/model"
data = "toy/pairs:12000/-1"
eval_data = "toy/cost/test"
epochs = 1.0
batch_size = 32
warmup_ratio = 0.1
learning_rate = 1e-3
save_interval = 0
