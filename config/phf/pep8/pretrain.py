from config.phf.shared import *  # PHF on pep8; then a method beside it

out_dir = "out/phf/pep8"
tokenizer = "models/codeparrot-small"
data = "phf/pep8"
scorer = "pep8"
learning_rate = 8e-4
eval_max_new_tokens = 640
hit_threshold = 0.0
