"""Model folders on disk <-> LLaMA, and the exact state of a run."""

from nanosafe.checkpoint.model_folder import count_parameters, load, save, init_from_scratch

__all__ = ["count_parameters", "load", "save", "init_from_scratch"]
