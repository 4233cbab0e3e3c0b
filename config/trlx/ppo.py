# trlX's examples/hh/ppo_hh.py, after config/hh/task.py.
out_dir = "out/trlx/ppo"
max_new_tokens = 128
batch_size = 32
ppo_epochs = 4
actor_learning_rate = 8e-6
critic_learning_rate = 8e-6
actor_weight_decay = 1e-6
kl_coef = 0.05
kl_target = 6.0
reward_scaling = "std"
reward_clip = 10.0
clip_value = 0.2
normalize_advantage = True
