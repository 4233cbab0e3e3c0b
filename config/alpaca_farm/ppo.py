# AlpacaFarm's scripts/rlhf_ppo.sh, after config/hh/task.py. The best policies: 20 to 80 steps.
out_dir = "out/alpaca_farm/ppo"
prompts = "alpaca_farm"
max_len = 492  # 192 for the query, 300 for the response
max_new_tokens = 300
rollout_size = 512
batch_size = 256
ppo_epochs = 2
actor_warmup_ratio = 0.06  # 5 steps of 80
critic_learning_rate = 1e-5
max_steps = 80
save_interval = 20
kl_coef = 0.0067  # with simulated preferences; 0.02 with people's
reward_scaling = "std"  # theirs: of each rollout
clip_value = 0.2
gae_lambda = 1.0
normalize_advantage = True
