# PPO-Lagrangian: as helpful as possible while the mean cost stays below cost_limit.
# For train_ppo_lag.py.
out_dir = "out/demo/ppo_lag"
actor_model = "out/demo/sft/model"
reward_model = "out/demo/reward/model"
cost_model = "out/demo/cost/model"
prompts = "toy/prompts"
max_new_tokens = 64
max_steps = 140  # 70 rollouts
batch_size = 64  # two updates for each rollout of 128
kl_coef = 0.2  # the toy's rewards are large; this keeps the language of the reference
epochs = 100.0
actor_learning_rate = 5e-4
critic_learning_rate = 1e-3
cost_limit = -5.2
lambda_init = 1.5
lambda_lr = 0.02
lambda_max = 5.0
cost_window = 256
save_interval = 0
