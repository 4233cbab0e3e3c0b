# Which answer people preferred, on Anthropic's hh-rlhf.
objective = "reward"
out_dir = "out/small/reward"
init_from = "out/small/sft/model"
data = "hh_rlhf/harmless-base,hh_rlhf/helpful-base"
eval_data = "hh_rlhf/harmless-base/test,hh_rlhf/helpful-base/test"
epochs = 1.0
batch_size = 32
learning_rate = 3e-4
max_len = 256
