# Which answer is safer, and is it safe, on PKU-SafeRLHF; after reward.py.
objective = "cost"
out_dir = "out/small/cost"
data = "pku_saferlhf"
eval_data = "pku_saferlhf/test"
