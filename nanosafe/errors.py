"""Files: others', refused in one line, and ours, which appear whole. Words in tables."""

import errno
import os
import re
import traceback
from contextlib import contextmanager


def stop(message):
    raise SystemExit("error: " + " ".join(message.splitlines()))


def choose(name, value, choices):
    """Stop unless the knob `name` has one of the values there are."""
    if value not in choices:
        stop(f"{name}={value!r}: choose one of {', '.join(choices)}")


@contextmanager
def one_line_errors(path, done="read"):
    """Whatever goes wrong with a file, or a folder, that others made is one line, no traceback."""
    try:
        yield
    except (AssertionError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        words = " ".join(str(error).split()) or "it breaks off"
        stop(f"{os.fspath(path)!r} cannot be {done}: {type(error).__name__}: {words[:300]}")


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


SAMPLING = {"slots": "fewer, 64 say", "max_new_tokens": "fewer", "offload": "frozen, or all"}


TRAINING = {"max_tokens": "fewer", "activation_checkpointing": "True", "offload": "frozen, or all"}


def explain_failure(error, knobs, ranks=1):
    """A sentence about an exception that is no mistake in the code, or None."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "allocate memory" in text:
        sampling = "rollout.py" in "".join(traceback.format_tb(error.__traceback__))
        where, turns = ("sampling", SAMPLING) if sampling else ("a forward or backward", TRAINING)
        turn = [f"{name}={knobs[name]!r} ({to})" for name, to in turns.items() if name in knobs]
        return f"out of memory in {where}: {', '.join(turn) or 'take fewer'}. {text}"
    if ranks > 1 and re.search("(closed|reset) by peer|Timed out|process exited", text):
        return f"another rank ended, and this one with it ({text[:80]})"
    if getattr(error, "errno", None) in DISK:
        return f"{text}; mend this: a run goes on from its last state with --resume=True"
