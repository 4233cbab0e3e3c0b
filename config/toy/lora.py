# Adapters instead of full fine-tuning on the toy world. For train_sft.py, train_pref.py and
# train_ppo_lag.py, after a stage's recipe:
# $ python train_pref.py config/toy/reward.py config/toy/lora.py
lora_rank = 16
lora_alpha = 32.0
