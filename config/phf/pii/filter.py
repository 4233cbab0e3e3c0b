# Filtering: documents with a mean score above the threshold are left out.
# For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/pii/pretrain.py config/phf/pii/filter.py
objective = "filter"
score_threshold = 0.000286
