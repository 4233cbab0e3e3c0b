# IPO on the toy world, after DPO's recipe: train_pref.py config/toy/dpo.py config/toy/ipo.py
objective = "ipo"
out_dir = "out/demo/ipo"
beta = 2.0  # a quarter of a nat per token to reach: 0.5 asks for a whole one, and the KL is 10
