# The toy world's policy: 0.5 M parameters from scratch, in about 20 seconds on two cores.
# For train_sft.py.
out_dir = "out/demo/sft"
data = "toy/sft"
eval_data = "toy/sft/test"
hidden_size = 96
intermediate_size = 256
num_hidden_layers = 3
epochs = 2.0
batch_size = 32
learning_rate = 3e-3  # small models take larger steps: this is a hundred times a 7B model's
save_interval = 0
