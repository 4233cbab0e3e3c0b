# BFPO on the toy world. For train_pref.py, after SafeDPO's recipe:
# $ python train_pref.py config/toy/safedpo.py config/toy/bfpo.py
objective = "bfpo"
out_dir = "out/demo/bfpo"
beta = 0.1  # targets of 5 and 10 nats; the published 0.01 asks for 50 and 100
