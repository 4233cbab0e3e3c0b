objective = "unlikelihood"  # PHF on toxicity, after pretrain.py
score_threshold = 0.00078
alpha = 1.0
