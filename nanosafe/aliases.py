"""
Other names of what data/*/prepare.py writes: Safe-RLHF's, and those on the hub. In lower
case, without /train or /test.
"""

ALIASES = {
    "stanford-alpaca": "alpaca", "tatsu-lab/alpaca": "alpaca",
    "moss-002-sft": "moss/002", "moss-003-sft": "moss/003",
    "hh-rlhf-dialogue": "hh_rlhf/all-dialogue", "hh-dialogue": "hh_rlhf/all-dialogue",
    "hh-rlhf-preference": "hh_rlhf/all", "hh-preference": "hh_rlhf/all",
    "anthropic/hh-rlhf": "hh_rlhf/all",
    "slimorca": "slim_orca", "open-orca/slimorca": "slim_orca", "slimorca-dedup": "slim_orca/dedup",
    "open-orca/slimorca-dedup": "slim_orca/dedup", "alpaca-farm": "alpaca_farm",
    "tatsu-lab/alpaca_farm": "alpaca_farm", "pku-alignment/beavertails": "beavertails",
    "openbmb/ultrafeedback": "ultrafeedback",
}
for kind in ("harmless", "helpful"):
    for prefix in ("hh-rlhf", "hh"):
        ALIASES[f"{prefix}-{kind}-dialogue"] = f"hh_rlhf/{kind}-base-dialogue"
        ALIASES[f"{prefix}-dialogue/{kind}-base"] = f"hh_rlhf/{kind}-base-dialogue"
        ALIASES[f"{prefix}-{kind}-preference"] = f"hh_rlhf/{kind}-base"
        ALIASES[f"{prefix}-preference/{kind}-base"] = f"hh_rlhf/{kind}-base"
for prefix in ("", "pku-alignment/"):
    ALIASES[f"{prefix}pku-saferlhf"] = "pku_saferlhf"
    for version in ("10k", "30k"):
        ALIASES[f"{prefix}pku-saferlhf-{version}"] = f"pku_saferlhf/{version}"
