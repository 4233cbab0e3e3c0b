# MOSS-RLHF's train_ppo_en.sh, after config/hh/task.py and the paper's list in ppo_max.py.
out_dir = "out/moss/script"
ptx_data = ""
max_new_tokens = 512
rollout_size = 14  # 2 on each of 7 processes
batch_size = 14
critic_learning_rate = 1.5e-6
actor_lr_schedule = "constant"  # theirs falls with the root of the step
kl_coef = 0.01  # 0.1 in train_ppo_zh.sh
reward_scaling = "std"
reward_clip = 0.0
critic_warmup = 0
gae_lambda = 0.95
