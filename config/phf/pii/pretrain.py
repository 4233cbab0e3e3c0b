# PHF's task of personal data: sentences of the Pile.
# For nanosafe/phf/train.py. Alone it is maximum likelihood; a method of this folder may follow:
# $ torchrun ... -m nanosafe.phf.train config/phf/pii/pretrain.py config/phf/pii/awr.py
# Upstream finds personal data in samples by scrubadub. Here regular expressions find it.
from config.phf.shared import *

out_dir = "out/phf/pii"
tokenizer = "models/gpt2"
data = "phf/pii"
scorer = "pii"
