# Filtering: documents with a mean score above the threshold are left out.
# For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/toxicity/pretrain.py config/phf/toxicity/filter.py
objective = "filter"
score_threshold = 0.00078
