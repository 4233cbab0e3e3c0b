"""Meta's own checkpoints: a folder with params.json and consolidated.*.pth, memory-mapped."""

import glob
import os
from typing import NamedTuple

from nanosafe.checkpoint.tensors import JoinedTensor, read_file
from nanosafe.errors import one_line_errors, stop
from nanosafe.storage import read_json

DIVIDED_BY_COLUMNS = ("wo.weight", "w2.weight")  # by model parallelism; other matrices: by rows
LLAMA3_VOCABULARY = 100000  # Llama 1 and 2 have fewer rows, Llama 3 has more


class MetaFolder(NamedTuple):
    config: dict  # as LLaMA's config.json spells it
    tensors: dict  # Meta's name -> a tensor, or what reads it by rows


def find_shards(path):
    """The consolidated.*.pth of a folder, in order; [] where it is not Meta's."""
    return sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))


def read_meta_folder(path):
    """Read params.json, and map the shards. A matrix lies in all shards, so all are open."""
    params = read_params(path)
    tensors = join_shards(path, read_shards(path), params["dim"])
    return MetaFolder(make_config(path, params, tensors), tensors)


def read_params(path):
    with one_line_errors(path):
        params = read_json(path, "params.json")
    params = params.get("model", params)
    if not params:
        stop(f"{path!r} has consolidated.*.pth, but no params.json that describes them")
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(params, dict) or not isinstance(params.get(key), int):
            stop(f"{path!r}: params.json has no whole number {key!r}")
    return params


def read_shards(path):
    files = find_shards(path)
    first = os.path.basename(files[0])
    if not first.startswith("consolidated.00"):
        stop(f"{path!r}: there is no consolidated.00.pth beside {first!r}")
    shards = [read_file(file) for file in files]
    for shard in shards:
        if shard.keys() != shards[0].keys():
            stop(f"{path!r}: its shards do not hold the same tensors")
    return shards


def join_shards(path, shards, width):
    """{name: tensor} of all shards. Vectors are whole in each of them; matrices are divided."""
    tensors = dict(shards[0])
    if len(shards) == 1:
        return tensors
    for name, first in shards[0].items():
        if first.dim() < 2:
            continue
        # Llama 1 and 2 divide the embedding by columns, Llama 3 by rows.
        narrow_embedding = "tok_embeddings" in name and first.shape[1] < width
        by_columns = narrow_embedding or name.endswith(DIVIDED_BY_COLUMNS)
        pieces = [shard[name] for shard in shards]
        for piece in pieces:
            if piece.shape != first.shape:
                stop(f"{path!r}: its shards hold {name} in different shapes")
        tensors[name] = JoinedTensor(pieces, dim=1 if by_columns else 0)
    return tensors


def make_config(path, params, tensors):
    """A config.json's dict from params.json and from the shapes of tensors."""
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors:
            stop(f"{path!r} misses {name}")
    vocabulary = tensors["tok_embeddings.weight"].shape[0]
    eps = params.get("norm_eps", 1e-5)
    scaled = params.get("use_scaled_rope", False)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads"),
        "intermediate_size": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": params.get("rope_theta", 1e4),
        "max_position_embeddings": find_longest_input(vocabulary, eps, scaled),
        "rms_norm_eps": eps,
    }
    if scaled:
        # params.json does not say by how much: 8 in Llama 3.1, 32 in the small models of 3.2.
        usual = 8.0 if params["dim"] >= 4096 else 32.0
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": params.get("rope_scaling_factor", usual),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config


def find_longest_input(vocabulary, eps, scaled):
    """In tokens. params.json does not say it; what tells the generations apart does."""
    if vocabulary >= LLAMA3_VOCABULARY:
        return 131072 if scaled else 8192
    return 2048 if eps == 1e-6 else 4096  # Llama 1, Llama 2
