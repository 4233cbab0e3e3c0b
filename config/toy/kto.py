# KTO on the toy world: safe answers are desirable, one by one. For train_pref.py, after SafeDPO's
# recipe:
# $ python train_pref.py config/toy/safedpo.py config/toy/kto.py
objective = "kto"
rank_by = "safer"
out_dir = "out/demo/kto"
