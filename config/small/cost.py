# Which answer is safer, and is it safe, on PKU-SafeRLHF.
objective = "cost"
out_dir = "out/small/cost"
init_from = "out/small/sft/model"
data = "pku_saferlhf"
eval_data = "pku_saferlhf/test"
epochs = 2.0
batch_size = 32
learning_rate = 3e-4
max_len = 256
