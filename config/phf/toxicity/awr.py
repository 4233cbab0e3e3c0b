# Advantage-weighted regression. For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/toxicity/pretrain.py config/phf/toxicity/awr.py
objective = "awr"
alpha = 0.5
beta = 10.0
learning_rate = 1e-3
batch_size = 1024
max_steps = 3147
