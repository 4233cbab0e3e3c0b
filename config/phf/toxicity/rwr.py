objective = "rwr"  # PHF on toxicity, after pretrain.py
beta = 10.0
batch_size = 1024
max_steps = 3147
