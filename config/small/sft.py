# A LLaMA of 14 M parameters from scratch on real text, for a laptop. It is too small to converse.
# For train_sft.py.
out_dir = "out/small/sft"
tokenizer = "../shared/data/llama-tokenizer"
data = "lima,hh_rlhf/harmless-base-dialogue,hh_rlhf/helpful-base-dialogue"
eval_data = "hh_rlhf/harmless-base-dialogue/test,hh_rlhf/helpful-base-dialogue/test"
hidden_size = 192
intermediate_size = 512
num_hidden_layers = 4
num_attention_heads = 6
num_key_value_heads = 6
epochs = 1.0
batch_size = 16
learning_rate = 1e-3
max_len = 256
