# ColossalChat's train_ppo.py, after config/hh/task.py; less its defects (docs/methods.md).
out_dir = "out/colossal_chat/ppo"
actor_learning_rate = 9e-6
critic_learning_rate = 9e-6
actor_weight_decay = 0.1
critic_weight_decay = 0.1
kl_coef = 0.1
reward_clip = 5.0
clip_value = 0.2
max_ratio = 20.0
