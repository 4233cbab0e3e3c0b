# Safe-RLHF's scripts/sft.sh: LLaMA-7B on Alpaca, 8 GPUs of 80 GB.
out_dir = "out/beaver_7b/sft"
init_from = "models/llama-7b"  # huggyllama/llama-7b, or any LLaMA folder
data = "alpaca"
max_len = 512
epochs = 3.0
batch_size = 256  # 4 per GPU x 8 accumulation x 8 GPUs
max_tokens = 16384
learning_rate = 2e-5
lr_schedule = "cosine"
warmup_ratio = 0.03
weight_decay = 0.0
beta1 = 0.9  # configs/constants.py
beta2 = 0.95  # configs/constants.py
grad_clip = 1.0  # configs/ds_train_config_template.json
seed = 42
activation_checkpointing = True
