# A 14 M parameter LLaMA from scratch on real text, for a laptop; no partner for conversation.
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
