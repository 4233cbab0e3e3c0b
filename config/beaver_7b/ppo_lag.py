# Safe-RLHF's scripts/ppo-lag.sh: six 7B models, 8 GPUs of 80 GB. Defaults are theirs.
out_dir = "out/beaver_7b/ppo_lag"
actor_model = "out/beaver_7b/sft/model"  # theirs: PKU-Alignment/alpaca-7b-reproduced
reward_model = "out/beaver_7b/reward/model"
cost_model = "out/beaver_7b/cost/model"
prompts = "pku_saferlhf"
ptx_data = "alpaca"
max_len = 512  # prompt and response together
rollout_size = 128  # 16 prompts per GPU x 8 GPUs
ppo_epochs = 1  # update_iters
batch_size = 128  # 16 per GPU x 8 GPUs
max_tokens = 16384
critic_warmup_ratio = 0.0  # theirs says 0.03, which their constant schedule ignores
cost_limit = 0.0  # --threshold
cost_window = 1024  # 128 on each of 8 GPUs
seed = 42
activation_checkpointing = True
