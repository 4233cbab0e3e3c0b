# IPO, after DPO's recipe: train_pref.py config/hh/dpo.py config/hh/ipo.py
objective = "ipo"
out_dir = "out/hh/ipo"
beta = 0.1  # of per-token means, as its authors: a margin of 5 nats per token to reach
