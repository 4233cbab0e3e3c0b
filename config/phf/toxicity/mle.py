objective = "mle"  # PHF on toxicity, after pretrain.py
