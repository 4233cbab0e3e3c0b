# Safe-RLHF's scripts/ppo.sh, after the recipe with a constraint, from which it differs in this:
# $ torchrun ... train_ppo_lag.py config/beaver_7b/ppo_lag.py config/beaver_7b/ppo.py
out_dir = "out/beaver_7b/ppo"
cost_model = ""
kl_coef = 0.02
