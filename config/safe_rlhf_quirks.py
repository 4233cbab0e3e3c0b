# Upstream's quirks, for people who need Safe-RLHF's own numbers. Name it after a PPO recipe:
# $ torchrun ... train_ppo_lag.py config/beaver_7b/ppo_lag.py config/safe_rlhf_quirks.py
# docs/details.md lists every difference, also those that no knob undoes.
top_k = 50  # generate()'s hidden default, while log-probabilities are those of the whole vocabulary
ptx_average = True  # the ptx batch doubles the accumulation steps, which halves both gradients
