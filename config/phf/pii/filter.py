objective = "filter"  # PHF on pii, after pretrain.py
score_threshold = 0.000286
