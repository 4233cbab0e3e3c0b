# Unlikelihood training on segments with a score above the threshold.
# For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/toxicity/pretrain.py \
#     config/phf/toxicity/unlikelihood.py
objective = "unlikelihood"
score_threshold = 0.00078
alpha = 1.0
