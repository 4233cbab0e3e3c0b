# SimPO on the toy world: helpful, not safe. For train_pref.py, after SafeDPO's recipe:
# $ python train_pref.py config/toy/safedpo.py config/toy/simpo.py
objective = "simpo"
out_dir = "out/demo/simpo"
beta = 2.0
margin = 1.0  # half of beta
