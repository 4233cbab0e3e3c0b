objective = "unlikelihood"  # PHF on pep8, after pretrain.py
score_threshold = 0.0
alpha = 0.01
