"""The range of every number that a knob takes: what is outside stops a script before any work.

    config = configure(globals())
    check_ranges(config)

A knob has the same range in every script; tests/test_house.py demands one for each number. What one
knob asks of another, for instance that advantage=rloo needs two samples, scripts check themselves.
"""

import math
from typing import NamedTuple

from nanosafe.errors import stop


class Range(NamedTuple):
    """The numbers between two ends, of which at_least and at_most belong to them."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def contains(self, value):
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def describe(self):
        """For instance "above 0 and at most 1"."""
        ends = []
        for name, end in self._asdict().items():
            if math.isfinite(end):
                ends.append(f"{name.replace('_', ' ')} {end:.12g}")
        return " and ".join(ends)


INT32 = 2**31 - 1  # the largest index of a packed tensor
COUNT = Range(at_least=1, at_most=INT32)
COUNT_OR_0 = Range(
    at_least=0, at_most=INT32
)  # where 0 has a meaning, which the knob's comment says
NOT_NEGATIVE = Range(at_least=0)
POSITIVE = Range(above=0)
SHARE = Range(at_least=0, at_most=1)
DECAY = Range(at_least=0, below=1)  # the weight of what was before: with 1 nothing new counts
PROBABILITY = Range(above=0, at_most=1)
SECONDS = Range(at_least=0, at_most=3600)
TEMPERATURE = Range(at_least=0, at_most=1e9)
ANY = Range()

RANGES = {
    # a run
    "seed": Range(at_least=0, at_most=2**63 - 1),
    "epochs": POSITIVE,
    "max_steps": COUNT_OR_0,
    "batch_size": COUNT,
    "max_len": Range(at_least=2, at_most=INT32),
    "max_tokens": COUNT,
    "log_interval": COUNT,
    "eval_interval": COUNT_OR_0,
    "save_interval": COUNT_OR_0,
    "keep": COUNT,
    # a model from scratch
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT_OR_0,
    # the optimizer
    "learning_rate": NOT_NEGATIVE,
    "actor_learning_rate": NOT_NEGATIVE,
    "critic_learning_rate": NOT_NEGATIVE,
    "warmup_ratio": SHARE,
    "actor_warmup_ratio": SHARE,
    "critic_warmup_ratio": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "actor_weight_decay": NOT_NEGATIVE,
    "critic_weight_decay": NOT_NEGATIVE,
    "beta1": DECAY,
    "beta2": DECAY,
    "grad_clip": NOT_NEGATIVE,
    "max_skips": COUNT_OR_0,
    "ema": DECAY,
    # adapters
    "lora_rank": COUNT_OR_0,
    "lora_alpha": POSITIVE,
    # sampling
    "num_samples": COUNT,
    "best_of": COUNT,
    "max_new_tokens": COUNT,
    "temperature": TEMPERATURE,
    "top_k": COUNT_OR_0,
    "top_p": PROBABILITY,
    "slots": COUNT_OR_0,
    "eval_samples": COUNT_OR_0,
    "eval_max_new_tokens": COUNT,
    "eval_temperature": TEMPERATURE,
    "eval_top_p": PROBABILITY,
    # reward and cost models, and policies from pairs
    "regularization": NOT_NEGATIVE,
    "margin": NOT_NEGATIVE,
    "lm_coef": NOT_NEGATIVE,
    "normalizer_momentum": DECAY,
    "beta": POSITIVE,
    "helpful_weight": PROBABILITY,  # it divides the loss: 0 has no meaning
    "label_smoothing": Range(at_least=0, below=0.5),  # from 0.5 on the labels mean their opposite
    # PPO
    "rollout_size": COUNT,
    "ppo_epochs": COUNT,
    "kl_coef": NOT_NEGATIVE,
    "kl_target": NOT_NEGATIVE,
    "kl_horizon": POSITIVE,
    "clip_ratio": NOT_NEGATIVE,
    "clip_ratio_high": NOT_NEGATIVE,
    "cut_penalty": NOT_NEGATIVE,
    "cut_buffer": COUNT_OR_0,
    "max_ratio": NOT_NEGATIVE,
    "is_cap": NOT_NEGATIVE,
    "clip_score": NOT_NEGATIVE,
    "clip_value": NOT_NEGATIVE,
    "gamma": SHARE,
    "gae_lambda": SHARE,
    "reward_clip": NOT_NEGATIVE,
    "entropy_coef": NOT_NEGATIVE,
    "critic_warmup": COUNT_OR_0,
    "ptx_coef": NOT_NEGATIVE,
    # the constraint
    "cost_limit": ANY,
    "cost_scale": POSITIVE,
    "pessimism": Range(at_least=0, below=0.5),  # from 0.5 on the bound would lie below the mean
    "pessimism_test": COUNT_OR_0,
    "lambda_init": POSITIVE,  # lambda grows and falls by factors: from 0 it would never move
    "lambda_lr": NOT_NEGATIVE,
    "lambda_max": NOT_NEGATIVE,
    "lambda_kp": NOT_NEGATIVE,
    "lambda_kd": NOT_NEGATIVE,
    "lambda_ema": DECAY,
    "lambda_lookback": COUNT,
    "lambda_delay": COUNT_OR_0,
    "cost_window": COUNT,
    # pretraining with human preferences
    "score_threshold": ANY,
    "hit_threshold": ANY,
    "drop_fraction": SHARE,
    "alpha": NOT_NEGATIVE,
    "weight_max": POSITIVE,
    # evaluation
    "delta": Range(above=0, below=0.5),  # from 0.5 on the bound would lie below the mean
    "scale": PROBABILITY,
    "judges": COUNT,
    "worst": COUNT_OR_0,
    "shots": COUNT_OR_0,
    "max_examples": COUNT_OR_0,
    "max_per_set": COUNT_OR_0,
    "concurrency": COUNT,
    "attempts": COUNT,
    "pause": SECONDS,
    "timeout": Range(above=0, at_most=3600),
    "input_price": NOT_NEGATIVE,
    "output_price": NOT_NEGATIVE,
    # data and tools
    "holdout": DECAY,
    "gpus": COUNT_OR_0,
    "length": COUNT_OR_0,
    "response": COUNT_OR_0,
    "longest": COUNT_OR_0,
    "steps": COUNT,
    "repetitions": COUNT,
    "kills": COUNT_OR_0,
    "soak": NOT_NEGATIVE,
    "grow": COUNT_OR_0,
    "tuning_seed": Range(at_least=0, at_most=2**63 - 1),
    "trials": COUNT,
    "processes": COUNT,
}


def check_ranges(config):
    """Stop with one line unless every number of a configuration is in its knob's range."""
    for name, value in config.items():
        allowed = RANGES.get(name, ANY)
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if type(number) in (int, float) and not allowed.contains(number):
                stop(f"{name}={value!r} must be {allowed.describe()}")


def check_cost_limit(cost_kind, cost_limit):
    """Stop with one line unless the limit of indicator costs is a share."""
    if cost_kind == "unsafe" and not 0 <= cost_limit <= 1:
        stop(
            f"cost_kind='unsafe' makes cost_limit a share of answers, so cost_limit={cost_limit} "
            "must be from 0 to 1"
        )


def check_heads(hidden_size, num_attention_heads, num_key_value_heads):
    """Stop with one line unless a new model's width can be cut into its heads."""
    if num_attention_heads % (num_key_value_heads or num_attention_heads):
        stop(
            f"num_attention_heads={num_attention_heads} must be a multiple of "
            f"num_key_value_heads={num_key_value_heads}"
        )
    head_width = hidden_size // num_attention_heads
    if head_width == 0 or head_width % 2:  # RoPE turns pairs of dimensions
        stop(
            f"hidden_size={hidden_size} over num_attention_heads={num_attention_heads} gives heads "
            f"of width {head_width}, which must be even and at least 2"
        )
