# Which of two answers is more helpful: the proxy, which trains the policy. It is an adapter on the
# SFT model, as all models after it are, so that PPO-Lag holds the large weights once. For
# train_pref.py.
objective = "reward"
out_dir = "out/real_run/reward"
init_from = "out/real_run/sft/model"
data = "pku_saferlhf/halves/proxy:1500/-1"
eval_data = "pku_saferlhf/halves/proxy/test,pku_saferlhf/halves/judge/test"
lora_rank = 16
epochs = 1.0
batch_size = 16
max_tokens = 2048
learning_rate = 1e-3  # with 3e-4 a cost model ends its one pass below a bag of words
warmup_ratio = 0.1
max_len = 256  # leaves out one pair in fifteen
save_interval = 25
