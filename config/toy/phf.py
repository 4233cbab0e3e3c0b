# PHF on the toy world, from scratch: conversations whose harmful sentences have the score 1, the
# others 0. For nanosafe/phf/train.py, with an objective:
# $ python -m nanosafe.phf.train config/toy/phf.py --objective=conditional
out_dir = "out/demo/phf"
data = "toy/documents"
eval_data = "toy/documents/test"
max_len = 128
hidden_size = 96
intermediate_size = 256
num_hidden_layers = 3
epochs = 3.0
batch_size = 32
learning_rate = 3e-3
alpha = 0.5
beta = 0.2
eval_samples = 500
eval_max_new_tokens = 64
eval_temperature = 1.0
eval_top_p = 1.0
scorer = "data/toy/prepare.py:misalignment"
save_interval = 0
