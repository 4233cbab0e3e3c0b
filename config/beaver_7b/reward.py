# Safe-RLHF's scripts/reward-model.sh on PKU-SafeRLHF, 8 GPUs of 80 GB. Defaults are theirs.
objective = "reward"
out_dir = "out/beaver_7b/reward"
init_from = "out/beaver_7b/sft/model"  # theirs: PKU-Alignment/alpaca-7b-reproduced
data = "pku_saferlhf"
eval_data = "pku_saferlhf/test"
batch_size = 128  # 16 pairs per GPU x 8 GPUs
max_tokens = 16384
eval_interval = 500  # theirs: every epoch
seed = 42
activation_checkpointing = True
