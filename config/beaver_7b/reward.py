# Safe-RLHF's reward model (its scripts/reward-model.sh): PKU-SafeRLHF, 8 GPUs of 80 GB.
# For train_pref.py. What is not set here is Safe-RLHF's value by default.
objective = "reward"
out_dir = "out/beaver_7b/reward"
init_from = "out/beaver_7b/sft/model"  # upstream: PKU-Alignment/alpaca-7b-reproduced
data = "pku_saferlhf"
eval_data = "pku_saferlhf/test"
batch_size = 128  # 16 pairs per GPU x 8 GPUs
max_tokens = 4096  # planned to take 39 GB of 80
eval_interval = 500  # upstream evaluates after every epoch
seed = 42
