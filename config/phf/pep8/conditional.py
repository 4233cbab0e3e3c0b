objective = "conditional"  # PHF on pep8, after pretrain.py
score_threshold = 0.0
drop_fraction = 0.1
