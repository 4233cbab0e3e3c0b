# PPO-max, the list of MOSS-RLHF's paper (arXiv:2307.04964, Fig. 5), after config/hh/task.py. Their
# script does otherwise: script.py, after this one.
out_dir = "out/moss/ppo_max"
reward_model = "out/moss/rm/model"
ptx_data = "alpaca"
max_len = 2048
rollout_size = 128
batch_size = 32
max_steps = 1000
epochs = 10.0
temperature = 0.8  # theirs also cuts at top_p 0.9, and forgets both in the ratios
actor_learning_rate = 5e-7
critic_learning_rate = 1.65e-6
actor_warmup_ratio = 0.1
critic_warmup_ratio = 0.1
actor_weight_decay = 0.0
kl_coef = 0.05  # 1. token-level KL penalty
reward_scaling = "mean_std"  # 5. rewards normalised by their history and clipped,
reward_clip = 5.0  # loosely: the paper tried 0.3 and 0.8, and warns of tight ones
clip_value = 0.2  # 7. value loss clipped
critic_warmup = 2  # 8. critic from the reward model, trained first; how long is not said
gae_lambda = 0.9  # 10. GAE
clip_ratio = 0.2  # 11. clipped surrogate
grad_clip = 1.0  # 12. gradients clipped
