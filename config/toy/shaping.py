# Reward shaping: a fixed weight on cost, after the task:
# $ python train_ppo_lag.py config/toy/ppo_lag.py config/toy/shaping.py
out_dir = "out/demo/shaping"
lambda_init = 1.0
lambda_lr = 0.0  # lambda stays
