# RRHF on the toy world: eight answers to each prompt, scored; the README has sample.py's command.
objective = "rrhf"
out_dir = "out/demo/rrhf"
data = "out/demo/answers.jsonl"
epochs = 1.0
batch_size = 16
warmup_ratio = 0.1
learning_rate = 3e-4
save_interval = 0
