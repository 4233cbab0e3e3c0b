# Advantage-weighted regression. For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/pii/pretrain.py config/phf/pii/awr.py
objective = "awr"
alpha = 0.5
beta = 0.1
