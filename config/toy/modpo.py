# MODPO on the toy world, with the cost model for its margin. For train_pref.py, after SafeDPO's
# recipe:
# $ python train_pref.py config/toy/safedpo.py config/toy/modpo.py
objective = "modpo"
out_dir = "out/demo/modpo"
safety_model = "out/demo/cost/model"
helpful_weight = 0.5
