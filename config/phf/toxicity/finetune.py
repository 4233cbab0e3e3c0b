# PHF's fine-tuning on toxicity: a method on the second half of the tokens, after maximum
# likelihood on the first. For nanosafe/phf/train.py, followed by a method of this folder:
# $ torchrun ... -m nanosafe.phf.train config/phf/toxicity/finetune.py config/phf/toxicity/filter.py
# Upstream has batches of 512 blocks for AWR and RWR: add --batch_size=512 --max_steps=3147.
# Upstream starts from the middle of its run of maximum likelihood and skips the documents that were
# read until then. For the same start, end that run with --max_steps=25177; the documents are read
# from the beginning here.
from config.phf.toxicity.pretrain import *

out_dir = "out/phf/toxicity_finetune"
init_from = "out/phf/toxicity/model"
max_steps = 25177
