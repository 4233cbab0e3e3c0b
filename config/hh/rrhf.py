# RRHF (arXiv:2304.05302) on candidates that were scored: UltraFeedback's four, or sample.py's.
objective = "rrhf"
out_dir = "out/hh/rrhf"
init_from = "out/beaver_7b/sft/model"
data = "ultrafeedback"
max_len = 512
epochs = 3.0
batch_size = 64  # queries
learning_rate = 2e-5
weight_decay = 0.0
