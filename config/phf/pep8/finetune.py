# PHF's fine-tuning on code: a method on the second half of the tokens, after maximum
# likelihood on the first. For nanosafe/phf/train.py, followed by a method of this folder:
# $ torchrun ... -m nanosafe.phf.train config/phf/pep8/finetune.py config/phf/pep8/filter.py
# AWR has batches of 256 blocks, as in pretraining: add --max_steps=6294.
# Upstream starts from the middle of its run of maximum likelihood and skips the documents that were
# read until then. For the same start, end that run with --max_steps=25177; the documents are read
# from the beginning here.
from config.phf.pep8.pretrain import *

out_dir = "out/phf/pep8_finetune"
init_from = "out/phf/pep8/model"
max_steps = 25177
