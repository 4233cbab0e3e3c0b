# PPO-Lagrangian with six 7B models on one GPU of 24 GB or more: one frozen base, and adapters.
# For train_ppo_lag.py, after the recipe for 8 GPUs, from which it differs in what is set here:
# $ python train_ppo_lag.py config/beaver_7b/ppo_lag.py config/beaver_7b/lora_ppo_lag.py
lora_rank = 16
actor_learning_rate = 1e-4  # ten times that of full fine-tuning; not tried at 7B
critic_learning_rate = 5e-5
activation_checkpointing = True
max_tokens = 4096  # with 40 GB or more, --activation_checkpointing=False is a third faster
