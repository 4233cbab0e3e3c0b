# MOSS-RLHF's reward model (arXiv:2307.04964, Sec. 4.2), with a language-modelling loss on the
# preferred answer. For train_pref.py.
objective = "reward"
out_dir = "out/moss/rm"
init_from = "out/beaver_7b/sft/model"
data = "hh_rlhf/helpful-base,hh_rlhf/harmless-base"
eval_data = "hh_rlhf/helpful-base/test,hh_rlhf/harmless-base/test"
max_len = 2048
batch_size = 32  # upstream has 4 to 128, as many as a number of tokens allows
max_tokens = 16384
max_steps = 1000  # fewer reach the same accuracy, but PPO is worse with them, says the paper
learning_rate = 5e-6
warmup_ratio = 0.1
weight_decay = 0.0
regularization = 0.0
lm_coef = 1.0  # the paper's beta_rm
