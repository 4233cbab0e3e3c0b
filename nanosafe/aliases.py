"""Other names of what data/*/prepare.py writes: Safe-RLHF's and the hub's, in lower case."""

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
for prefix in ("hh-rlhf", "hh"):
    for kind in ("harmless", "helpful"):
        for what, ours in (("dialogue", "-dialogue"), ("preference", "")):
            for alias in (f"{prefix}-{kind}-{what}", f"{prefix}-{what}/{kind}-base"):
                ALIASES[alias] = f"hh_rlhf/{kind}-base{ours}"
for prefix in ("", "pku-alignment/"):
    ALIASES[f"{prefix}pku-saferlhf"] = "pku_saferlhf"
    for version in ("10k", "30k"):
        ALIASES[f"{prefix}pku-saferlhf-{version}"] = f"pku_saferlhf/{version}"
