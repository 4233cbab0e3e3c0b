# Safe-RLHF's reward shaping (its scripts/ppo-reward-shaping.sh): the cost has a fixed weight.
# For train_ppo_lag.py, after the recipe with a constraint, from which it differs in these values:
# $ torchrun ... train_ppo_lag.py config/beaver_7b/ppo_lag.py config/beaver_7b/shaping.py
# Upstream subtracts lambda * cost from the reward. Here costs have a critic of their own, and the
# mixed advantage is divided by 1 + lambda.
out_dir = "out/beaver_7b/shaping"
kl_coef = 0.02
lambda_lr = 0.0  # lambda stays at lambda_init
