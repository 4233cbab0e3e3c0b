# ColossalChat's PPO (its train_ppo.py). For train_ppo_lag.py, after config/hh/task.py:
# $ torchrun ... train_ppo_lag.py config/hh/task.py config/colossal_chat/ppo.py
# Upstream adds the reward to every token, seeds every rollout alike, and misaligns old values by
# padding. These defects are not reproduced.
out_dir = "out/colossal_chat/ppo"
actor_learning_rate = 9e-6
critic_learning_rate = 9e-6
actor_weight_decay = 0.1
critic_weight_decay = 0.1
kl_coef = 0.1
reward_clip = 5.0
clip_value = 0.2
max_ratio = 20.0
