# DPO's reference recipe on hh-rlhf (arXiv:2305.18290). For train_pref.py.
# init_from is any policy that was fine-tuned on this data.
objective = "dpo"
out_dir = "out/hh/dpo"
init_from = "out/beaver_7b/sft/model"
data = "hh_rlhf/helpful-base,hh_rlhf/harmless-base"
eval_data = "hh_rlhf/helpful-base/test,hh_rlhf/harmless-base/test"
max_len = 512
epochs = 1.0
batch_size = 64
learning_rate = 5e-7
lr_schedule = "constant"
warmup_ratio = 0.11  # 150 steps
weight_decay = 0.0  # upstream's optimizer is RMSprop; here it is AdamW
grad_clip = 10.0
beta = 0.1  # upstream suggests 0.1 to 0.5
eval_interval = 312  # after 20,000 examples
