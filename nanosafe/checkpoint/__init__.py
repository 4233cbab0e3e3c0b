"""Model folders on disk, and the exact state of a run.

Read folder.py and families.py to follow a tensor in a file to a parameter."""

from nanosafe.checkpoint.folder import check_score_model
from nanosafe.checkpoint.model_folder import (
    Counts,
    count_parameters,
    count_trained_and_frozen,
    init_from_scratch,
    load,
    load_trained,
    save,
    save_merged,
)

__all__ = [
    "Counts",
    "check_score_model",
    "count_parameters",
    "count_trained_and_frozen",
    "init_from_scratch",
    "load",
    "load_trained",
    "save",
    "save_merged",
]
