objective = "filter"  # PHF on toxicity, after pretrain.py
score_threshold = 0.00078
