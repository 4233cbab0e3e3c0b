objective = "awr"  # PHF on pep8, after pretrain.py
alpha = 0.05
beta = 1.0
learning_rate = 1e-3
batch_size = 256
max_steps = 12588
