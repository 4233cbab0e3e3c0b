# Plain RLHF on hh-rlhf with 7B models. For train_ppo_lag.py, followed by the recipe of a project:
# $ torchrun ... train_ppo_lag.py config/hh/task.py config/trlx/ppo.py
actor_model = "out/beaver_7b/sft/model"
reward_model = "out/beaver_7b/reward/model"
cost_model = ""  # with --cost_model=... any of these recipes is under a constraint
prompts = "hh_rlhf/helpful-base,hh_rlhf/harmless-base"
max_len = 1024
activation_checkpointing = True
