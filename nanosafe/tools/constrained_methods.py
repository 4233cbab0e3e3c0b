"""The constrained methods that docs/constrained.md compares: their commands, and what is tried.

All start from one SFT of their seed and take as many optimizer steps of 64 examples. One that
learns from rollouts draws 64 answers for each step. One that learns from pairs has as many answers
of SFT, drawn once, and learns from 64 pairs of them in each step."""

from typing import NamedTuple

from nanosafe.tools.toy_runs import (
    PPO,
    PPO_LAG,
    REWARD,
    REWARD_AND_COST,
    RUN,
    SAMPLE,
    SHARED_STAGES,
)

# ---- what a seed's methods share ----

BUDGET = " --max_steps={steps} --batch_size=64"
HALF_OF_IT = " --max_steps={half} --batch_size=64"
OFFLINE = "train_pref.py config/toy/safedpo.py"
FROM_SFT = " --init_from={out}/sft/model --data={out}/pairs.jsonl"
SCORERS = " --reward_model={out}/reward/model --cost_model={out}/cost/model"
STAGES = {  # in the order in which they run
    **SHARED_STAGES,
    # 9,216 answers of SFT, as many as 140 steps of 64 draw. Gold labels a pair for each prompt.
    "pairs": [
        SAMPLE + " --prompts=toy/prompts --num_samples=4 --out={out}/answers.jsonl",
        "data/toy/prepare.py --annotate={out}/answers.jsonl --out={out}/pairs.jsonl",
    ],
    # As many again, of half the prompts: the dual asks how one prompt's answers differ.
    "scored": [
        SAMPLE + " --prompts=toy/prompts:1152/-1 --num_samples=8 --out={out}/scored.jsonl" + SCORERS
    ],
    # SACPO's first stage, with half of its steps.
    "helpful": [OFFLINE + " --objective=dpo --lm_coef=0" + FROM_SFT + HALF_OF_IT + RUN],
}
FILES_ONLY = ("pairs", "scored")  # stages that train no model

# ---- the methods ----


class Method(NamedTuple):
    label: str
    models: int  # in memory while the policy is trained
    needs: tuple  # the stages that it needs beside SFT
    commands: list  # whose fields are those of `constrained.py fields_of`
    grid: list  # of settings, {knob: value}, that are tried
    knob: str = ""  # of every setting: the trade-off between help and harm; empty: none
    values: tuple = ()  # of the knob, for the picture


def list_settings(**choices):
    """Every combination of the values of some knobs: a list of settings."""
    settings = [{}]
    for name, values in choices.items():
        longer = []
        for setting in settings:
            for value in values:
                longer.append({**setting, name: value})
        settings = longer
    return settings


def online(flags=""):
    """The commands of a method that is PPO-Lag with some flags."""
    return [PPO_LAG + flags + REWARD_AND_COST + BUDGET + RUN + " {flags}"]


def offline(flags):
    """The commands of a method that learns from the labelled pairs."""
    return [OFFLINE + flags + FROM_SFT + BUDGET + RUN + " {flags}"]


# The limits of costs that are scores: -5.2 is that of the demo, where every answer is safe.
LIMITS = (-5.2, -4.5, -4.0, -2.0)
# Those of costs that are indicators: shares of unsafe answers.
SHARES = (0.02, 0.05, 0.1, 0.2)
UNSAFE = " --cost_kind=unsafe"
GROUPS = " config/toy/rloo_lag.py --advantage=grpo"
RATES = (3e-4, 1e-3)  # learning rates of the offline methods
SCORE_MODELS = ("reward", "cost")
# A run from rollouts takes twice as long as one from pairs: two settings are tried, not four.
LIMIT_AND_SPEED = list_settings(cost_limit=(-5.2,), lambda_lr=(0.02, 0.05))
SHARE_AND_SPEED = list_settings(cost_limit=(0.02,), lambda_lr=(0.2, 0.5))
DUAL = (
    "-m nanosafe.eval.dual --samples={out}/scored.jsonl --cost_limit={cost_limit} --beta={beta}"
    " --seed={seed} --out_dir={out}/{name}/dual"
)
FROM_THE_DUAL = (
    " --objective=dpo --init_from={out}/sft/model --data={out}/{name}/dual/pairs.jsonl"
    " --beta={beta} --learning_rate={learning_rate} --lm_coef={lm_coef}"
)
SECOND_STAGE = " config/toy/sacpo.py --init_from={out}/helpful/model --data={out}/pairs.jsonl"
MERGE = (
    "-m nanosafe.checkpoint {out}/helpful/model {out}/{name}/safer/model --merge={share}"
    " {out}/{name}/model"
)
METHODS = {
    "ppo": Method("PPO, reward only", 4, ("reward",), [PPO + REWARD + BUDGET + RUN], [{}]),
    "shaping": Method(
        "PPO, fixed shaping",
        6,
        SCORE_MODELS,
        online(" --lambda_lr=0"),
        list_settings(lambda_init=(1.0, 2.0)),
        "lambda_init",
        (0.5, 0.75, 1.0, 4.0),
    ),
    "ppo_lag": Method("PPO-Lag", 6, SCORE_MODELS, online(), LIMIT_AND_SPEED, "cost_limit", LIMITS),
    "pid": Method(
        "PPO-Lag, PID multiplier",
        6,
        SCORE_MODELS,
        online(" --multiplier=pid --lambda_ema=0.9 --lambda_kd=0.2"),
        list_settings(cost_limit=(-5.2,), lambda_lr=(0.02,), lambda_kp=(0.1, 0.5)),
        "cost_limit",
        LIMITS,
    ),
    "optimistic": Method(
        "PPO-Lag, optimistic multiplier",
        6,
        SCORE_MODELS,
        online(" --multiplier=optimistic"),
        list_settings(cost_limit=(-5.2,), lambda_lr=(0.02, 0.1)),
        "cost_limit",
        LIMITS,
    ),
    "bounded": Method(
        "PPO-Lag, bounded multiplier",
        6,
        SCORE_MODELS,
        online(" --multiplier=bounded"),
        list_settings(cost_limit=(-5.2,), lambda_lr=(0.05, 0.2)),
        "cost_limit",
        LIMITS,
    ),
    "indicator": Method(
        "PPO-Lag, indicator costs",
        6,
        SCORE_MODELS,
        online(UNSAFE + " --cost_scale=10"),
        SHARE_AND_SPEED,
        "cost_limit",
        SHARES,
    ),
    "repo": Method(
        "RePO",
        6,
        SCORE_MODELS,
        online(" --constraint=prompt --cost_limit=0"),
        list_settings(lambda_max=(5.0,), lambda_lr=(0.02, 0.05)),
        "lambda_max",
        (0.5, 0.75, 1.0, 5.0),
    ),
    "hc_rlhf": Method(
        "HC-RLHF",
        6,
        SCORE_MODELS,
        online(" --pessimism=0.1 --pessimism_test=768"),
        LIMIT_AND_SPEED,
        "cost_limit",
        LIMITS,
    ),
    "grpo_lag": Method(
        "GRPO-Lag, mixed first, scores",
        4,
        SCORE_MODELS,
        online(GROUPS),
        LIMIT_AND_SPEED,
        "cost_limit",
        LIMITS,
    ),
    "grpo_each": Method(
        "GRPO-Lag, normalised first, scores",
        4,
        SCORE_MODELS,
        online(GROUPS + " --normalize_groups=each"),
        list_settings(cost_limit=(-5.2,), lambda_max=(5.0, 1.5)),
        "cost_limit",
        LIMITS,
    ),
    "grpo_unsafe": Method(
        "GRPO-Lag, mixed first, indicators",
        4,
        SCORE_MODELS,
        online(GROUPS + UNSAFE + " --cost_scale=10"),
        SHARE_AND_SPEED,
        "cost_limit",
        SHARES,
    ),
    "grpo_each_unsafe": Method(
        "GRPO-Lag, normalised first, indicators",
        4,
        SCORE_MODELS,
        online(GROUPS + " --normalize_groups=each" + UNSAFE),
        SHARE_AND_SPEED,
        "cost_limit",
        SHARES,
    ),
    "gdpo": Method(
        "GDPO, indicators",
        4,
        SCORE_MODELS,
        online(GROUPS + " --normalize_groups=gdpo" + UNSAFE),
        SHARE_AND_SPEED,
        "cost_limit",
        SHARES,
    ),
    "dpo": Method(
        "DPO on better",
        1,
        ("pairs",),
        offline(" --objective=dpo"),
        list_settings(learning_rate=RATES, lm_coef=(0.0, 1.0)),
    ),
    "safedpo": Method(
        "SafeDPO",
        1,
        ("pairs",),
        offline(""),
        list_settings(margin=(2.0,), learning_rate=RATES, beta=(0.1, 0.3)),
        "margin",
        (0.0, 2.0, 5.0, 10.0),
    ),
    "bso": Method(
        "BSO, sba",
        1,
        ("pairs",),
        offline(" config/toy/bso.py"),
        list_settings(learning_rate=(1e-4, 3e-4), margin=(1.0, 0.0)),
        "margin",
        (0.0, 1.0, 2.0, 3.0),
    ),
    "bfpo": Method(
        "BFPO",
        1,
        ("pairs",),
        offline(" config/toy/bfpo.py"),
        list_settings(learning_rate=RATES, beta=(0.1, 0.2)),
        "beta",
        (0.05, 0.1, 0.2, 0.5),
    ),
    "sacpo": Method(
        "SACPO",
        1,
        ("pairs", "helpful"),
        [OFFLINE + SECOND_STAGE + HALF_OF_IT + RUN + " {flags}"],
        list_settings(learning_rate=RATES, beta=(0.1, 0.05)),
        "beta",
        (0.025, 0.05, 0.1, 0.5),
    ),
    "p_sacpo": Method(
        "P-SACPO",
        1,
        ("pairs", "helpful"),
        [
            OFFLINE
            + SECOND_STAGE
            + HALF_OF_IT
            + RUN
            + "/safer --beta={beta} --learning_rate={learning_rate}",
            MERGE,
        ],
        list_settings(beta=(0.05,), learning_rate=RATES, share=(0.75, 0.9)),
        "share",
        (0.25, 0.5, 0.75, 0.9),
    ),
    "modpo": Method(
        "MODPO, cost model",
        1,
        ("cost", "pairs"),
        offline(" config/toy/modpo.py --safety_model={out}/cost/model"),
        list_settings(learning_rate=RATES, helpful_weight=(0.5, 0.1)),
        "helpful_weight",
        (0.1, 0.25, 0.5, 0.9),
    ),
    "kto": Method(
        "KTO on is_safe",
        1,
        ("pairs",),
        offline(" config/toy/kto.py"),
        list_settings(learning_rate=RATES, beta=(0.1, 0.3)),
        "beta",
        (0.05, 0.1, 0.3, 1.0),
    ),
    "mocan": Method(
        "MoCAN",
        1,
        (*SCORE_MODELS, "scored"),
        [DUAL, OFFLINE + FROM_THE_DUAL + BUDGET + RUN],
        list_settings(cost_limit=(-4.5,), learning_rate=RATES, beta=(1.0,), lm_coef=(0.0, 1.0)),
        "cost_limit",
        (-4.5, -4.0, -3.0, -2.0),
    ),
}
