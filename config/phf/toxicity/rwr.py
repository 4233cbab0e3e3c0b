# Reward-weighted regression. For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/toxicity/pretrain.py config/phf/toxicity/rwr.py
# Upstream's code keeps a value head that never learns, which multiplies all weights by a constant.
# Here there is no value head.
objective = "rwr"
beta = 10.0
batch_size = 1024
max_steps = 3147
