# Adapters on the toy world, on the base or the adapter that init_from names. For train_sft.py and
# train_pref.py, after a stage's recipe:
# $ python train_pref.py config/toy/reward.py config/toy/lora.py
lora_rank = 16
lora_alpha = 32.0
learning_rate = 3e-3  # for reward and cost models thrice that of full fine-tuning
