# The toy world's reward model: which answer is more helpful. For train_pref.py.
objective = "reward"
out_dir = "out/demo/reward"
init_from = "out/demo/sft/model"
data = "toy/pairs"
eval_data = "toy/reward/test"
epochs = 1.0
batch_size = 32
warmup_ratio = 0.1
learning_rate = 1e-3
save_interval = 0
