# ORPO on the toy world: helpful, not safe. For train_pref.py, after SafeDPO's recipe:
# $ python train_pref.py config/toy/safedpo.py config/toy/orpo.py
objective = "orpo"
out_dir = "out/demo/orpo"
beta = 1.0
lm_coef = 0.0  # the likelihood is in its loss
