# DeepSpeed-Chat's step 3, after config/hh/task.py; but it samples, theirs is greedy.
out_dir = "out/deepspeed_chat/ppo"
ptx_coef = 27.8  # with ptx_data; reported as unstable
max_len = 512  # 256 for the prompt, 256 for the answer
max_new_tokens = 256
rollout_size = 64  # equal to the batch: nothing else was stable
batch_size = 64
actor_learning_rate = 9.65e-6
critic_lr_schedule = "cosine"
actor_warmup_ratio = 0.2  # 100 steps
critic_warmup_ratio = 0.2
kl_coef = 0.1
reward_clip = 5.0
clip_value = 0.2
ema = 0.992
