# PPO on the reward alone, beside PPO-Lag. For train_ppo_lag.py, after its recipe:
# $ python train_ppo_lag.py config/smollm2/ppo_lag.py config/smollm2/ppo.py
out_dir = "out/real_run/ppo"
cost_model = ""
