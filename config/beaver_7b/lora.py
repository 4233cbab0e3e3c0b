# Adapters on one frozen base, for one GPU of 24 GB or more. For train_sft.py and train_pref.py,
# after a recipe for 8 GPUs, from which it differs in what is set here:
# $ python train_sft.py config/beaver_7b/sft.py config/beaver_7b/lora.py
# $ python train_pref.py config/beaver_7b/reward.py config/beaver_7b/lora.py
# The cost model's recipe stands between the two, as without adapters.
lora_rank = 16
learning_rate = 2e-4  # ten times that of full fine-tuning; not tried at 7B
activation_checkpointing = True
max_tokens = 4096  # with 40 GB or more, --activation_checkpointing=False is a third faster
