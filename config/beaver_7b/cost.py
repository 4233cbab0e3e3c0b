# Safe-RLHF's scripts/cost-model.sh, after the reward model's recipe, from which it differs in this:
# $ torchrun ... train_pref.py config/beaver_7b/reward.py config/beaver_7b/cost.py
objective = "cost"
out_dir = "out/beaver_7b/cost"
