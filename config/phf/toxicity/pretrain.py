# PHF's task of toxicity: sentences of the Pile, scored by Detoxify.
# For nanosafe/phf/train.py. Alone it is maximum likelihood; a method of this folder may follow:
# $ torchrun ... -m nanosafe.phf.train config/phf/toxicity/pretrain.py config/phf/toxicity/awr.py
# Upstream labels its data by Detoxify's model "original" and scores samples by "unbiased". Here
# samples are scored by "original", too.
from config.phf.shared import *

out_dir = "out/phf/toxicity"
tokenizer = "models/gpt2"
data = "phf/toxicity"
scorer = "toxicity"
