# PPO-max as MOSS-RLHF's paper lists it (arXiv:2307.04964, Fig. 5, whose numbers stand below).
# For train_ppo_lag.py, after config/hh/task.py:
# $ torchrun ... train_ppo_lag.py config/hh/task.py config/moss/ppo_max.py
# Upstream's own script differs from its paper: see script.py.
out_dir = "out/moss/ppo_max"
reward_model = "out/moss/rm/model"
ptx_data = "alpaca"
max_len = 2048
rollout_size = 128
batch_size = 32
max_steps = 1000
epochs = 10.0
temperature = 0.8  # upstream also has top_p 0.9, and its ratios ignore both
actor_learning_rate = 5e-7
critic_learning_rate = 1.65e-6
actor_warmup_ratio = 0.1
critic_warmup_ratio = 0.1
actor_weight_decay = 0.0
kl_coef = 0.05  # 1. KL penalty per token
reward_scaling = "mean_std"  # 5. rewards are normalised by their history and clipped
reward_clip = 5.0  # 5. the paper tried 0.3 and 0.8, and warns of tight bounds
clip_value = 0.2  # 7. the value loss is clipped
critic_warmup = 2  # 8. the critic is trained first; the paper does not say for how long
gae_lambda = 0.9  # 10. GAE
clip_ratio = 0.2  # 11. clipped surrogate loss
grad_clip = 1.0  # 12. gradients are clipped
