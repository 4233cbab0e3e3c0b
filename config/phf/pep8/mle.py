objective = "mle"  # PHF on pep8, after pretrain.py
