# AlpacaFarm's PPO (its scripts/rlhf_ppo.sh). For train_ppo_lag.py, after config/hh/task.py:
# $ torchrun ... train_ppo_lag.py config/hh/task.py config/alpaca_farm/ppo.py
# Upstream found its best policies between step 20 and step 80.
out_dir = "out/alpaca_farm/ppo"
prompts = "alpaca_farm"
max_len = 492  # 192 for the query, 300 for the response
max_new_tokens = 300
rollout_size = 512
batch_size = 256
ppo_epochs = 2
actor_warmup_ratio = 0.06  # 5 of 80 steps
critic_learning_rate = 1e-5
max_steps = 80
save_interval = 20
kl_coef = 0.0067  # for simulated preferences; upstream has 0.02 for people's
reward_scaling = "std"  # upstream divides by the deviation of each rollout alone
clip_value = 0.2
gae_lambda = 1.0
normalize_advantage = True
