objective = "conditional"  # PHF on toxicity, after pretrain.py
score_threshold = 0.00056
drop_fraction = 0.01
