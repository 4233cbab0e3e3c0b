objective = "mle"  # PHF on pii, after pretrain.py
