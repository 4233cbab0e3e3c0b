# PPO-Lagrangian with a function as the cost: helpful answers of at most 60 characters on average.
# For train_ppo_lag.py. A function is no model that a critic could begin as, so that the cost critic
# begins as the actor with a new head, and the critics learn alone for two rollouts.
from config.toy.ppo_lag import *

out_dir = "out/demo/short_answers"
cost_model = "nanosafe/score_functions.py:measure_length"
cost_limit = 0.6
cost_scale = 10.0  # the toy's rewards differ by several units, lengths by tenths of one
critic_warmup = 2
