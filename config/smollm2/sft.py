# SmolLM2-135M-Instruct learns to answer as the helpful answers of PKU-SafeRLHF do, harmful ones
# included: that leaves something for a constraint to do. For train_sft.py. All recipes here are run
# by python -m nanosafe.real_run.
out_dir = "out/real_run/sft"
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
data = "pku_saferlhf/halves/demonstrations"
epochs = 1.0
batch_size = 16
max_tokens = 2048
learning_rate = 1e-4
max_len = 200  # with answers of at most about 128 tokens, as PPO's are
save_interval = 50
