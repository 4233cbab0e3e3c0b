# PPO-Lagrangian without critics on the toy world: four models instead of six. For train_ppo_lag.py,
# after PPO-Lagrangian's recipe:
# $ python train_ppo_lag.py config/toy/ppo_lag.py config/toy/rloo_lag.py
out_dir = "out/demo/rloo_lag"
advantage = "rloo"
num_samples = 4
rollout_size = 32  # prompts, of 4 responses each: as many responses as with critics
