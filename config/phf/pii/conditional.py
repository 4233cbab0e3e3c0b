objective = "conditional"  # PHF on pii, after pretrain.py
score_threshold = 0.0
drop_fraction = 0.01
