# BSO on the toy world. For train_pref.py, after SafeDPO's recipe:
# $ python train_pref.py config/toy/safedpo.py config/toy/bso.py
objective = "bso"
out_dir = "out/demo/bso"
generator = "sba"
margin = 1.0  # the slope of a pair at its beginning grows as exp(1.2 margin)
learning_rate = 1e-4  # a third of the others': a pair that is won is pushed on
