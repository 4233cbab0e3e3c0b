# trlX's PPO on hh-rlhf (its examples/hh/ppo_hh.py). For train_ppo_lag.py, after config/hh/task.py:
# $ torchrun ... train_ppo_lag.py config/hh/task.py config/trlx/ppo.py
# Upstream includes padding when it whitens advantages; here only responses' tokens count.
out_dir = "out/trlx/ppo"
max_new_tokens = 128
batch_size = 32
ppo_epochs = 4
actor_learning_rate = 8e-6
critic_learning_rate = 8e-6
actor_weight_decay = 1e-6
kl_coef = 0.05
kl_target = 6.0
reward_scaling = "std"
reward_clip = 10.0
clip_value = 0.2
normalize_advantage = True
