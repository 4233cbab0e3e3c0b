"""nanosafe: Safe-RLHF in plain PyTorch. Start reading at train_ppo_lag.py."""

__version__ = "0.1.0"
