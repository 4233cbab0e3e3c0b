# Advantage-weighted regression. For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/pep8/pretrain.py config/phf/pep8/awr.py
objective = "awr"
alpha = 0.05
beta = 1.0
learning_rate = 1e-3
batch_size = 256
max_steps = 12588
