# Unlikelihood training on segments with a score above the threshold.
# For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/pep8/pretrain.py config/phf/pep8/unlikelihood.py
# In upstream's code the threshold 0 means that there is none, and the score mixes likelihood and
# unlikelihood, which is almost maximum likelihood. Here 0 means 0.
objective = "unlikelihood"
score_threshold = 0.0
alpha = 0.01
