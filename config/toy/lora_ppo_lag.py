# Adapters on the toy world: six models on one base, if actor, reward and cost model are adapters of
# it. For train_ppo_lag.py, after a stage's recipe:
# $ python train_ppo_lag.py config/toy/ppo_lag.py config/toy/lora_ppo_lag.py
lora_rank = 16
lora_alpha = 32.0
actor_learning_rate = 3e-3  # six times that of full fine-tuning; for rank 4 half of it
critic_learning_rate = 3e-3  # three times
