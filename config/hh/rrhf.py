# RRHF (arXiv:2304.05302) on answers with scores: UltraFeedback's four, or sample.py's own.
# For train_pref.py. Upstream's code divides log-probabilities by padded lengths (docs/methods.md).
objective = "rrhf"
out_dir = "out/hh/rrhf"
init_from = "out/beaver_7b/sft/model"
data = "ultrafeedback"
max_len = 512
epochs = 3.0
batch_size = 64  # prompts, each with all its answers
learning_rate = 2e-5
weight_decay = 0.0
