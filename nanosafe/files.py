"""
Other people's files: read with care, and refused in one line.
"""

import json
import os
from contextlib import contextmanager


def stop(message):
    raise SystemExit(f"error: {message}")


def choose(name, value, choices):
    """Stop unless the knob `name` has one of the values there are."""
    if value not in choices:
        stop(f"{name}={value!r}: choose one of {', '.join(choices)}")


@contextmanager
def untrusted(path):
    """Whatever goes wrong with a file, or a folder, that others made is one line, no traceback."""
    try:
        yield
    except (AssertionError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        words = " ".join(str(error).split()) or "it breaks off"
        stop(f"{os.fspath(path)!r} cannot be read: {type(error).__name__}: {words[:300]}")


def read_json(folder, name):
    """The object in a json file; {} where there is no file."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    if name == "generation_config.json":  # Llama-3.2 was published with one that is no JSON
        return {}
    stop(f"{os.path.join(folder, name)!r} is no JSON object")


def write_json(value, folder, name):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
