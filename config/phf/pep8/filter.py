objective = "filter"  # PHF on pep8, after pretrain.py
score_threshold = 0.002361
