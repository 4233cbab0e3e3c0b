"""Rows of jsonl files -> examples as token ids -> packed micro-batches.

dataset.tokenize() takes a row all the way: spec (which files), reader (their rows), layouts
(published rows -> nanosafe's rows), examples (what a task takes from a row), which calls template
(a conversation as token ids), and dataset itself (the cache of token ids). batching then packs what
a Dataset holds into micro-batches."""

from nanosafe.data.dataset import Dataset, report_shared_prompts, tokenize
from nanosafe.data.reader import load

__all__ = ["Dataset", "load", "report_shared_prompts", "tokenize"]
