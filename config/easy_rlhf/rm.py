# EasyRLHF's reward model (its rm_train) on the three helpful subsets of hh-rlhf. For train_pref.py.
# Upstream has GPT-2 XL; here it is a LLaMA. Upstream reports no accuracy.
objective = "reward"
out_dir = "out/easy_rlhf/rm"
init_from = "models/llama-7b"  # upstream: gpt2-xl
data = "hh_rlhf/helpful-base,hh_rlhf/helpful-online,hh_rlhf/helpful-rejection-sampled"
eval_data = (
    "hh_rlhf/helpful-base/test,hh_rlhf/helpful-online/test,hh_rlhf/helpful-rejection-sampled/test"
)
max_len = 1024
epochs = 10.0
batch_size = 32  # 1 x 8 accumulation x 4 GPUs
learning_rate = 1e-5
lr_schedule = "constant"
warmup_ratio = 0.027  # 1000 steps
regularization = 0.0
offload = "all"  # upstream's ZeRO-2 keeps the optimizer in host memory
eval_interval = 1000
save_interval = 1000
keep = 3
