objective = "rwr"  # PHF on pep8, after pretrain.py
beta = 10.0
learning_rate = 1e-3
