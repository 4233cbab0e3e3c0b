# What the three tasks of PHF have in common (arXiv:2302.08582); their pretrain.py imports it.
# For nanosafe/phf/train.py. Upstream trains GPT-2 small on 3.3e9 tokens from scratch. Differences:
# - The model is a LLaMA of the same size.
# - A block holds tokens of one document, and short tails are kept. Upstream packs blocks across
#   documents and drops tails, so the same number of steps reads fewer tokens here.
# - beta2 of AdamW is 0.95, the trainer's default. Upstream has 0.999, the default of its library.
# - Upstream measures KL(GPT-3 || model). Here --reference names the other model.
objective = "mle"  # without a method's recipe it is maximum likelihood
max_len = 1024
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 12
num_key_value_heads = 12
epochs = 100.0  # the steps are the limit
max_steps = 50354  # 3.3e9 tokens in batches of 64 blocks
max_tokens = 16384
learning_rate = 5e-4
lr_schedule = "linear"
warmup_ratio = 0.01
weight_decay = 0.1
eval_interval = 1000
eval_samples = 4096
seed = 42
