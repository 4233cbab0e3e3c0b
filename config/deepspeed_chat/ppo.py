# DeepSpeed-Chat's step 3. For train_ppo_lag.py, after config/hh/task.py:
# $ torchrun ... train_ppo_lag.py config/hh/task.py config/deepspeed_chat/ppo.py
# Upstream generates greedily; here responses are sampled.
out_dir = "out/deepspeed_chat/ppo"
ptx_coef = 27.8  # takes effect with --ptx_data; upstream reports that it was unstable
max_len = 512  # 256 for the prompt, 256 for the answer
max_new_tokens = 256
rollout_size = 64  # equal to batch_size: upstream found nothing else stable
batch_size = 64
actor_learning_rate = 9.65e-6
critic_lr_schedule = "cosine"
actor_warmup_ratio = 0.2  # 100 steps
critic_warmup_ratio = 0.2
kl_coef = 0.1
reward_clip = 5.0
clip_value = 0.2
ema = 0.992
