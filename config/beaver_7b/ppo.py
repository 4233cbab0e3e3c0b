# Safe-RLHF's PPO without a constraint (its scripts/ppo.sh). For train_ppo_lag.py, after the recipe
# with a constraint, from which it differs in what is set here:
# $ torchrun ... train_ppo_lag.py config/beaver_7b/ppo_lag.py config/beaver_7b/ppo.py
out_dir = "out/beaver_7b/ppo"
cost_model = ""
kl_coef = 0.02
