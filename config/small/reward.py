# Which answer people found more helpful, on Anthropic's hh-rlhf. For train_pref.py.
objective = "reward"
out_dir = "out/small/reward"
init_from = "out/small/sft/model"
data = "hh_rlhf/helpful-base"
eval_data = "hh_rlhf/helpful-base/test"
epochs = 2.0
batch_size = 32
learning_rate = 3e-4
max_len = 256
