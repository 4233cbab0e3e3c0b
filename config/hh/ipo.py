# IPO (arXiv:2310.12036) on hh-rlhf. For train_pref.py, after DPO's recipe:
# $ torchrun ... train_pref.py config/hh/dpo.py config/hh/ipo.py
objective = "ipo"
out_dir = "out/hh/ipo"
beta = 0.1  # of per-token means, as its authors say: the target margin is 5 nats per token
