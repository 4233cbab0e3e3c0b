# PPO on the reward alone: the policy becomes more helpful, and more harmful with it.
# For train_ppo_lag.py.
out_dir = "out/demo/ppo"
actor_model = "out/demo/sft/model"
reward_model = "out/demo/reward/model"
cost_model = ""
prompts = "toy/prompts"
max_new_tokens = 64
max_steps = 80  # 40 rollouts
batch_size = 64  # two updates for each rollout of 128
kl_coef = 0.2  # the toy's rewards are large; this keeps the language of the reference
epochs = 100.0
actor_learning_rate = 5e-4
critic_learning_rate = 1e-3
save_interval = 0
