# PPO-max on the toy world, after the task: train_ppo_lag.py config/toy/ppo.py config/toy/ppo_max.py
out_dir = "out/demo/ppo_max"
reward_scaling = "mean_std"
reward_clip = 5.0  # the paper warns of tight ones
kl_coef = 0.05  # rewards of deviation 1 weigh less than the toy's own
gae_lambda = 0.9
critic_warmup = 2
clip_value = 0.2
