# Safe-RLHF's cost model (its scripts/cost-model.sh). For train_pref.py, after the reward model's
# recipe, from which it differs in what is set here:
# $ torchrun ... train_pref.py config/beaver_7b/reward.py config/beaver_7b/cost.py
objective = "cost"
out_dir = "out/beaver_7b/cost"
