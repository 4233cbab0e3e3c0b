# Safe-RLHF's supervised fine-tuning (its scripts/sft.sh): LLaMA-7B on Alpaca, 8 GPUs of 80 GB.
# For train_sft.py. What is not set here is Safe-RLHF's value by default.
out_dir = "out/beaver_7b/sft"
init_from = "models/llama-7b"  # huggyllama/llama-7b, or any LLaMA folder
data = "alpaca"
batch_size = 256  # 4 per GPU x 8 accumulation x 8 GPUs
max_tokens = 4096  # planned to take 39 GB of 80
seed = 42
