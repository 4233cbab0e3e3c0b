# Reward-weighted regression. For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/pii/pretrain.py config/phf/pii/rwr.py
# Upstream's code keeps a value head that never learns, which multiplies all weights by a constant.
# Here there is no value head.
objective = "rwr"
beta = 10.0
