# Safe-RLHF's scripts/ppo-reward-shaping.sh, a fixed weight on cost, after the recipe with a limit:
# $ torchrun ... train_ppo_lag.py config/beaver_7b/ppo_lag.py config/beaver_7b/shaping.py
out_dir = "out/beaver_7b/shaping"
kl_coef = 0.02
lambda_lr = 0.0  # lambda stays
