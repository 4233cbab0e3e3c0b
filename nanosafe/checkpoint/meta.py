"""TODO."""

import glob
import math
import os
import struct

import numpy as np
import torch

from nanosafe.checkpoint.families import META
from nanosafe.checkpoint.tensors import Joined, read_file
from nanosafe.errors import stop
from nanosafe.storage import read_json


COLUMNS = ("wo.weight", "w2.weight")  # what Meta's model parallelism divides by columns


def read_other_layout(path):
    """(config.json's dict, tensors, Family) of what is at `path`."""
    if path.endswith(".bin") and os.path.isfile(path):
        return *llama2c(path), META
    if glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")):
        return *read_meta_folder(path), META
    stop(f"no model at {path!r}: a model folder has a config.json, or Meta's params.json")


def read_meta_folder(path):
    """(config.json's dict, tensors) of a folder of Meta's: consolidated.*.pth and params.json."""
    params = read_json(path, "params.json")
    params = params.get("model", params)
    if not params:
        stop(f"{path!r} has consolidated.*.pth and no params.json that says what they are")
    files = sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))
    if not os.path.basename(files[0]).startswith("consolidated.00"):
        stop(f"{path!r}: there is no consolidated.00.pth beside {os.path.basename(files[0])!r}")
    shards = [read_file(file) for file in files]
    if any(shard.keys() != shards[0].keys() for shard in shards):
        stop(f"{path!r}: its shards do not hold the same tensors")
    D, H = params["dim"], params["n_heads"]
    tensors = dict(shards[0])
    for name, first in shards[0].items():
        if len(shards) > 1 and first.dim() > 1:
            # Llama 1 and 2 divide the embedding by columns, Llama 3 by rows
            columns = name.endswith(COLUMNS) or ("tok_embeddings" in name and first.shape[1] < D)
            tensors[name] = Joined([shard[name] for shard in shards], int(columns))
    vocabulary = tensors["tok_embeddings.weight"].shape[0]
    eps, scaled = params.get("norm_eps", 1e-5), params.get("use_scaled_rope", False)
    length = (2048 if eps == 1e-6 else 4096) if vocabulary < 100000 else 131072 if scaled else 8192
    inner = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    config = {
        "vocab_size": vocabulary,
        "hidden_size": D,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": H,
        "num_key_value_heads": params.get("n_kv_heads"),
        "intermediate_size": inner,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": params.get("rope_theta", 1e4),
        "max_position_embeddings": length,
        "rms_norm_eps": eps,
    }
    if scaled:  # params.json does not say by how much: 8 in Llama 3.1, 32 in the small 3.2
        factor = params.get("rope_scaling_factor", 8.0 if D >= 4096 else 32.0)
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config, tensors


def llama2c(path):
    """(config.json's dict, tensors) of a float32 file of karpathy/llama2.c, version 0 or 1."""
    with open(path, "rb") as f:
        header = f.read(256).ljust(256, b"\0")
    magic, version = struct.unpack("<Ii", header[:8])
    if magic == 0x616B3432:  # "ak42"
        if version != 1:
            stop(f"{path!r}: version {version} of llama2.c's files is not known here: 0 and 1 are")
        sizes, shared, start = struct.unpack("<7i", header[8:36]), header[36] == 1, 256
    else:
        sizes, version, start = struct.unpack("<7i", header[:28]), 0, 28
        shared = sizes[5] > 0  # a negative vocabulary: the head has its own weights
    D, I, L, H, K, V, T = map(abs, sizes)
    if (
        not 0 < K <= H <= D < 2**20
        or D % H
        or H % K
        or not 0 < L < 2**10
        or not 0 < T < 2**24
        or not V * I
    ):
        stop(f"{path!r} is no llama2.c model: its header makes no sense")
    letters = {"D": D, "I": I, "L": L, "V": V, "T": T, "E": D // H, "C": K * (D // H)}
    layout = read_json(os.path.dirname(__file__), "llama2c.json")[f"version {version}"]
    if shared:
        del layout["output"]
    shapes = [[letters[letter] for letter in shape] for shape in layout.values()]
    lengths = list(map(math.prod, shapes))
    want = start + 4 * sum(lengths)
    if os.path.getsize(path) != want:
        stop(f"{path!r}: {os.path.getsize(path)} bytes, not {want}: it is cut short or no llama2.c")
    flat = torch.from_numpy(np.memmap(path, np.float32, "c", offset=start))
    tensors = {}
    for name, shape, numbers in zip(layout, shapes, flat.split(lengths)):
        tensor = numbers.view(shape)
        if layout[name][0] == "L":  # of all layers, one after the other
            tensors.update({f"layers.{i}.{name}.weight": tensor[i] for i in range(L)})
        else:
            tensors[name + ".weight"] = tensor
    tensors.pop("RoPE table.weight", None)
    return {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": I,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "max_position_embeddings": T,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shared,
    }, tensors
