# RRHF on the toy world: eight answers to each prompt, with scores. For train_pref.py.
# The README has the command of sample.py that makes the answers.
objective = "rrhf"
out_dir = "out/demo/rrhf"
data = "out/demo/answers.jsonl"
epochs = 1.0
batch_size = 16
warmup_ratio = 0.1
learning_rate = 3e-4
save_interval = 0
