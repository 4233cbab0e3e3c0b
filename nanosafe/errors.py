"""Errors for users: one line that says what is wrong, what was given, and what to do.

A mistake of the user's, a bad file, a full disk or too little memory end a script with one line. A
defect of nanosafe's own keeps its traceback."""

import errno
import lzma
import os
import pickle
import re
import struct
import traceback
import zipfile
import zlib
from contextlib import contextmanager

from safetensors import SafetensorError

from configurator import stop

__all__ = ["choose", "explain_failure", "one_line_errors", "stop"]

# What reading a broken file raises: in the libraries that parse it, or where a parser of ours looks
# for a key that the file does not have.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
    KeyError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,  # of a .gz file
    lzma.LZMAError,  # of a .xz file
)
WRITE_ERRORS = (OSError, SafetensorError)
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
}
# The knobs that lower the peak of memory, and where to turn each.
SAMPLING_KNOBS = {
    "slots": "fewer, for example 64",
    "max_new_tokens": "fewer",
    "offload": "frozen, or all",
}
TRAINING_KNOBS = {
    "max_tokens": "fewer",
    "activation_checkpointing": "True",
    "offload": "frozen, or all",
}


def choose(name, value, choices):
    """Stop unless the knob `name` has one of the values that it may have."""
    if value not in choices:
        stop(f"{name}={value!r}: choose one of {', '.join(choices)}")


@contextmanager
def one_line_errors(path, action="read"):
    """Stop with one line where a file or a folder cannot be read, written or made.

    Wrap only the calls that touch the file: any other error in the block is a defect of ours, and
    keeps its traceback."""
    expected = READ_ERRORS if action == "read" else WRITE_ERRORS
    try:
        yield
    except expected as error:
        words = " ".join(str(error).split()) or "the file ends too early"
        stop(f"{os.fspath(path)!r} cannot be {action}: {type(error).__name__}: {words[:300]}")


def explain_failure(error, knobs, ranks=1):
    """A sentence about an exception that is no defect of the code's; None about any other.

    knobs  the script's configuration: those that would help are named with their values"""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    out_of_memory = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    if out_of_memory or "allocate memory" in text:
        return explain_memory(error, text, knobs)
    if ranks > 1 and re.search("(closed|reset) by peer|Timed out|process exited", text):
        return f"another rank ended, and this one with it ({text[:80]})"
    if getattr(error, "errno", None) in DISK_ERRORS:
        return f"{text}; fix this, then continue from the last state with --resume=True"
    return None


def explain_memory(error, text, knobs):
    """Where the memory ran out, and which knobs lower the peak there."""
    was_sampling = "rollout.py" in "".join(traceback.format_tb(error.__traceback__))
    where = "sampling" if was_sampling else "a forward or backward"
    helpful = SAMPLING_KNOBS if was_sampling else TRAINING_KNOBS
    hints = [f"{name}={knobs[name]!r} ({hint})" for name, hint in helpful.items() if name in knobs]
    return f"out of memory in {where}: {', '.join(hints) or 'take fewer'}. {text}"
