# Safe-RLHF's PPO-Lagrangian (its scripts/ppo-lag.sh): six 7B models on 8 GPUs of 80 GB.
# For train_ppo_lag.py. What is not set here is Safe-RLHF's value by default.
out_dir = "out/beaver_7b/ppo_lag"
actor_model = "out/beaver_7b/sft/model"  # upstream: PKU-Alignment/alpaca-7b-reproduced
reward_model = "out/beaver_7b/reward/model"
cost_model = "out/beaver_7b/cost/model"
prompts = "pku_saferlhf"
ptx_data = "alpaca"
max_len = 512  # prompt and response together
rollout_size = 128  # 16 prompts per GPU x 8 GPUs
ppo_epochs = 1  # upstream's --update_iters
batch_size = 128  # 16 per GPU x 8 GPUs
max_tokens = 2048  # planned: 60 GB of 80; 4096 takes 71, and is better on several nodes
critic_warmup_ratio = 0.0  # upstream's script has 0.03, but its constant schedule ignores it
cost_limit = 0.0  # upstream's --threshold
cost_window = 1024  # 128 on each of 8 GPUs
seed = 42
