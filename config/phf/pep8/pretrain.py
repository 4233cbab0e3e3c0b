# PHF's task of code: lines of CodeParrot's corpus, scored by pycodestyle.
# For nanosafe/phf/train.py. Alone it is maximum likelihood; a method of this folder may follow:
# $ torchrun ... -m nanosafe.phf.train config/phf/pep8/pretrain.py config/phf/pep8/awr.py
# Upstream also samples bodies of functions. Here samples begin from nothing.
from config.phf.shared import *

out_dir = "out/phf/pep8"
tokenizer = "models/codeparrot-small"
data = "phf/pep8"
scorer = "pep8"
learning_rate = 8e-4
eval_max_new_tokens = 640
hit_threshold = 0.0  # any violation is a hit
