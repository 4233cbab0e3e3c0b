# MOSS-RLHF's reward model (arXiv:2307.04964, Sec. 4.2): with the preferred answer's LM loss.
objective = "reward"
out_dir = "out/moss/rm"
init_from = "out/beaver_7b/sft/model"
data = "hh_rlhf/helpful-base,hh_rlhf/harmless-base"
eval_data = "hh_rlhf/helpful-base/test,hh_rlhf/harmless-base/test"
max_len = 2048
batch_size = 32  # theirs is made of 4 to 128, by tokens
max_tokens = 16384
max_steps = 1000  # fewer reach the accuracy, and give a worse PPO
learning_rate = 5e-6
warmup_ratio = 0.1
weight_decay = 0.0
regularization = 0.0
lm_coef = 1.0  # beta_rm
