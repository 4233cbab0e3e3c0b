# DPO on the toy world: a policy straight from the pairs, more helpful and more harmful.
# For train_pref.py.
objective = "dpo"
out_dir = "out/demo/dpo"
init_from = "out/demo/sft/model"
data = "toy/pairs:10000/-1"
eval_data = "toy/reward/test"
epochs = 1.0
batch_size = 32
warmup_ratio = 0.1
learning_rate = 3e-4
beta = 0.1
max_new_tokens = 64
save_interval = 0
