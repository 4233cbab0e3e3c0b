# Which of two answers is safer, and whether it is safe: the proxy. For train_pref.py, after the
# reward model's recipe:
# $ python train_pref.py config/smollm2/reward.py config/smollm2/cost.py
objective = "cost"
out_dir = "out/real_run/cost"
