objective = "awr"  # PHF on toxicity, after pretrain.py
alpha = 0.5
beta = 10.0
learning_rate = 1e-3
batch_size = 1024
max_steps = 3147
