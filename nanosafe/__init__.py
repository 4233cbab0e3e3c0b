"""nanosafe: Safe-RLHF in plain PyTorch. Start reading at train_ppo_lag.py."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin at every barrier unless they are told to sleep, and then anything else that
# the machine does makes a run several times slower (docs/benchmarks.md). OpenMP reads this as torch
# is loaded, so scripts import nanosafe before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
