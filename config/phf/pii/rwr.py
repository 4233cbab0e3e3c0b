objective = "rwr"  # PHF on pii, after pretrain.py
beta = 10.0
