"""jsonl files -> examples as token ids -> packed micro-batches."""

from nanosafe.data.dataset import Dataset, tokenize
from nanosafe.data.reader import load

__all__ = ["Dataset", "load", "tokenize"]
