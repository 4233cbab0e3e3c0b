# PHF (arXiv:2302.08582): 3.3e9 tokens from scratch, a LLaMA of GPT-2 small's size. Tasks import it.
max_len = 1024
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 12
num_key_value_heads = 12
epochs = 100.0
max_steps = 50354
max_tokens = 16384
learning_rate = 5e-4
lr_schedule = "linear"
warmup_ratio = 0.01
weight_decay = 0.1
eval_interval = 1000
eval_samples = 4096
seed = 42
