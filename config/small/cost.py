# Which answer is safer, and whether it is safe, on PKU-SafeRLHF. For train_pref.py, after the
# reward model's recipe:
# $ python train_pref.py config/small/reward.py config/small/cost.py
objective = "cost"
out_dir = "out/small/cost"
data = "pku_saferlhf"
eval_data = "pku_saferlhf/test"
