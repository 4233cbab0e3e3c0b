"""Files: other people's, read with care and refused in one line, and ours. Words in tables."""

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

def make_folder(path):
    """Make a folder to write to: before there is anything that could be lost."""
    with untrusted(path):
        os.makedirs(path, exist_ok=True)

def read_jsonl(path):
    """The rows of a file of ours; none where there is none. A line that broke off is left out."""
    with untrusted(path):
        lines = open(path, encoding="utf-8").readlines() if os.path.exists(path) else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

def write_jsonl(rows, path):
    """Write rows to a file that appears when it is whole."""
    with untrusted(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(path + ".tmp", path)

def table(rows):
    """Lines of a table: rows of cells, the first row being the head."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(str(cell).ljust(width)
                               for cell, width in zip(row, widths)).rstrip()
                     for row in rows)
