# PPO-Lagrangian without critics, four models instead of six, after the task:
# $ python train_ppo_lag.py config/toy/ppo_lag.py config/toy/rloo_lag.py
out_dir = "out/demo/rloo_lag"
advantage = "rloo"
num_samples = 4
rollout_size = 32  # prompts: as many responses as with critics
