# PPO-max on the toy world. For train_ppo_lag.py, after PPO's recipe:
# $ python train_ppo_lag.py config/toy/ppo.py config/toy/ppo_max.py
out_dir = "out/demo/ppo_max"
reward_scaling = "mean_std"
reward_clip = 5.0  # the paper warns of tight bounds
kl_coef = 0.05  # smaller than PPO's: scaled rewards are smaller than the toy's own
gae_lambda = 0.9
critic_warmup = 2
clip_value = 0.2
