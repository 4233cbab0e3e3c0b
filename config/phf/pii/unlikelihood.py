objective = "unlikelihood"  # PHF on pii, after pretrain.py
score_threshold = 0.0
alpha = 1.0
