"""Model folders on disk, and the exact state of a run.

Read folder.py and families.py to follow a tensor in a file to a parameter."""

from nanosafe.checkpoint.model_folder import count_parameters, init_from_scratch, load, save

__all__ = ["count_parameters", "init_from_scratch", "load", "save"]
