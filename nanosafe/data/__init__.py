"""Rows of jsonl files -> examples as token ids -> packed micro-batches.

The files import each other in one direction, which is the way of a row: spec (which files), reader
(their rows), template (a conversation as token ids), examples (what a task takes from a row),
dataset (the cache of token ids), batching (packed micro-batches)."""

from nanosafe.data.dataset import Dataset, report_shared_prompts, tokenize
from nanosafe.data.reader import load

__all__ = ["Dataset", "load", "report_shared_prompts", "tokenize"]
