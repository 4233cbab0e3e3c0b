# PPO-Lag on real prompts: actor, critics, reward and cost model are adapters on one frozen base,
# which is the SFT model. For train_ppo_lag.py.
out_dir = "out/real_run/ppo_lag"
actor_model = "out/real_run/sft/model"
reward_model = "out/real_run/reward/model"
cost_model = "out/real_run/cost/model"
prompts = "pku_saferlhf/halves/prompts"
lora_rank = 16
max_len = 256
max_new_tokens = 128
max_tokens = 2048
epochs = 10.0
max_steps = 48  # 24 rollouts
rollout_size = 64
batch_size = 32  # two updates for each rollout
kl_coef = 0.05
actor_learning_rate = 5e-4  # 2e-4 moves little in 24 rollouts; 1e-3 pays twice the KL
actor_lr_schedule = "constant"  # so that a run can be continued further than it was planned
actor_warmup_ratio = 0.0
critic_learning_rate = 5e-4
critic_warmup_ratio = 0.0
cost_limit = -2.0
lambda_init = 0.5  # costs differ three times as much as rewards
lambda_lr = 0.1
cost_window = 128
save_interval = 8
