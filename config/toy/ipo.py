# IPO on the toy world. For train_pref.py, after DPO's recipe:
# $ python train_pref.py config/toy/dpo.py config/toy/ipo.py
objective = "ipo"
out_dir = "out/demo/ipo"
beta = 2.0  # a target of 0.25 nats per token; 0.5 would ask for 1 nat, and the KL would be 10
