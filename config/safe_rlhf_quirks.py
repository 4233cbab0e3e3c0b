# Quirks of Safe-RLHF's code, for those who need its own numbers. For train_ppo_lag.py, after a
# recipe for PPO:
# $ torchrun ... train_ppo_lag.py config/beaver_7b/ppo_lag.py config/safe_rlhf_quirks.py
# docs/details.md lists all differences, also those that no knob reproduces.
top_k = 50  # the default of its library; its log-probabilities are of the whole vocabulary
ptx_average = True  # the ptx batch doubles the accumulation steps, which halves both gradients
