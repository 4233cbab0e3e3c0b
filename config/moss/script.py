# MOSS-RLHF's script (its train_ppo_en.sh). For train_ppo_lag.py, after the paper's list, from which
# the script differs in what is set here:
# $ torchrun ... train_ppo_lag.py config/hh/task.py config/moss/ppo_max.py config/moss/script.py
out_dir = "out/moss/script"
ptx_data = ""
max_new_tokens = 512
rollout_size = 14  # 2 on each of 7 processes
batch_size = 14
critic_learning_rate = 1.5e-6
actor_lr_schedule = "constant"  # upstream's falls with the square root of the step
kl_coef = 0.01  # 0.1 in upstream's train_ppo_zh.sh
reward_scaling = "std"
reward_clip = 0.0
critic_warmup = 0
gae_lambda = 0.95
