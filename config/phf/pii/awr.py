objective = "awr"  # PHF on pii, after pretrain.py
alpha = 0.5
beta = 0.1
