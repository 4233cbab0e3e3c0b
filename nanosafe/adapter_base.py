"""Adapter folders, and the model that each of them was trained on: its base.

An adapter folder is written by PEFT. It holds only what training has added (adapter_config.json,
and adapter_model.safetensors or .bin), and it names its base. These functions find the base, for
all who read a model's folder; checkpoint/adapters.py reads what the adapter adds."""

import json
import os
import zlib

from nanosafe.errors import one_line_errors, stop
from nanosafe.hub import ADAPTER_FILES, find_model
from nanosafe.printing import say_once
from nanosafe.storage import describe_file, read_json

ADAPTER_CONFIG = "adapter_config.json"
OWN_CONFIG = "nanosafe.json"  # ours: the base's fingerprint, and what only score models state
MODEL_ENDINGS = ("config.json", "params.json", ".safetensors", ".bin", ".pth")
WHOLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # an index begins with the same words


def is_adapter(path):
    """Whether a folder is an adapter's. Stops with one line where it has a whole model's weights.

    These may be the base's, or have the adapter merged in them: nobody can tell."""
    path = os.fspath(path)
    if not os.path.isfile(os.path.join(path, ADAPTER_CONFIG)):
        return False
    names = os.listdir(path or ".")
    holds_whole_model = any(name.startswith(WHOLE_WEIGHTS) for name in names)
    holds_adapter = any(name in ADAPTER_FILES for name in names)
    if holds_whole_model and holds_adapter:
        stop(
            f"{path!r} holds both the weights of a whole model and an adapter: move one of them to "
            "another folder"
        )
    return not holds_whole_model


def find_base(path):
    """The folder of the model that an adapter folder names as its base."""
    path = os.fspath(path)
    with one_line_errors(path):
        config = read_json(path, ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        stop(
            f"{path!r} is an adapter that names no base: set base_model_name_or_path in its "
            f"{ADAPTER_CONFIG} to the model that it was trained on; it is {name!r}"
        )
    base = find_folder(path, name, config.get("revision"))
    if base is None:
        stop(
            f"{path!r} is an adapter of the model {name!r}, which is not there: put the model "
            f"there, or set base_model_name_or_path in its {ADAPTER_CONFIG} to the model's folder"
        )
    if is_adapter(base):
        stop(
            f"{path!r} is an adapter of {name!r}, which is an adapter, too: merge that one first, "
            "with python -m nanosafe.checkpoint ADAPTER TARGET"
        )
    return base


def find_folder(path, name, revision=None):
    """The folder that an adapter's base name means; None where it is not there.

    It is looked for in the adapter's folder, then in the current one, then on the hub, where the
    adapter may state a revision."""
    for folder in (os.path.join(path, name), name):
        if os.path.isdir(folder):
            return folder
    say_once(f"{path}: its base {name!r} is no folder here, so it is looked for on the hub")
    folder = find_model(f"{name}@{revision}" if revision else name)
    return folder if os.path.isdir(folder) else None


def find_whole_model(path):
    """The folder with a model's config.json: the base of an adapter's folder, or the folder."""
    return find_base(path) if is_adapter(path) else path


def list_model_folders(path):
    """The folders that a model's tensors are in: an adapter's own and its base's, or the one."""
    return [path, find_base(path)] if is_adapter(path) else [path]


def describe_model_files(folder):
    """describe_file() of a model folder's config and weights."""
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(MODEL_ENDINGS)]
    return [describe_file(folder, name) for name in names]


def fingerprint_base(folder):
    """A number that changes with the config and the weights of a base."""
    return zlib.crc32(json.dumps(describe_model_files(folder)).encode())


def warn_of_another_base(path, base, fingerprint):
    """Say so if a base has not the fingerprint of the one that an adapter was trained on."""
    if fingerprint is not None and fingerprint != fingerprint_base(base):
        say_once(
            f"warning: {path} was trained on other weights than {base} has now: what it gives "
            "means nothing on them"
        )
