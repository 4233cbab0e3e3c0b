"""Models that are almost LLaMA: what a family calls otherwise (one more is a line in FAMILIES, see
docs/formats.md), and Meta's checkpoints and llama2.c's files, which are memory-mapped."""

import glob
import math
import os
import struct
import numpy as np
import torch
from nanosafe.files import read_json, stop
from nanosafe.formats import LLAMA, Family, read_file


def mistral(d):
    return {"sliding_window": d.get("sliding_window", 4096)}


def qwen2(d):
    if d.get("use_sliding_window"):
        stop("a Qwen2 with use_sliding_window, only some layers have a window: not known here")
    return {"sliding_window": 0}


def internlm(d):
    rotary = d.get("rotary") or {}
    return {"bias": None, "rope_theta": rotary.get("base", d.get("rope_theta"))}


def baichuan(d):
    """The 13B models have ALiBi and no max_position_embeddings; Baichuan2 a larger vocabulary."""
    length = d.get("max_position_embeddings")
    return {
        "alibi": length is None,
        "max_position_embeddings": length or d["model_max_length"],
        "norm_head": d.get("norm_head", d["vocab_size"] >= 125696),
    }


def together(tensors, H, K, E):
    """Queries, keys and values one below the other in one tensor."""
    return [(tensors[0], 0, (H + 2 * K) * E, 1)]


def groups(tensors, H, K, E):
    """In one tensor, for each kv head its queries, its key and its value."""
    G = H // K
    return [
        (tensors[0], (group * (G + 2) + first) * E, heads * E, 1)
        for first, heads in ((0, G), (G, 1), (G + 1, 1))
        for group in range(K)
    ]


def pairs(tensors, H, K, E):
    """Dimensions that RoPE turns together are neighbours; in LLaMA they are half a head apart."""
    q, k, v = tensors
    return [
        (tensor, head * E + odd, E // 2, 2)
        for tensor, heads in ((q, H), (k, K))
        for head in range(heads)
        for odd in (0, 1)
    ] + [(v, 0, K * E, 1)]


SHORT = (
    ("self_attn.", "attention."),
    ("o_proj", "wo"),
    ("mlp.", "feed_forward."),
    ("down_proj", "w2"),
    ("input_layernorm", "attention_norm"),
    ("lm_head", "output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("embed_tokens", "tok_embeddings"),
)
FAMILIES = {  # by the model_type of config.json
    "llama": LLAMA,
    "mistral": Family("Mistral", mistral),
    "qwen2": Family("Qwen2", qwen2),
    "internlm": Family("InternLM", internlm),
    "internlm2": Family("InternLM2", internlm, ("wqkv",), groups, ("w1", "w3"), SHORT),
    "baichuan": Family("Baichuan", baichuan, ("W_pack",), together),
}
META = Family(
    qkv=("wq", "wk", "wv"), layout=pairs, gate_up=("w1", "w3"), names=(*SHORT, ("model.", ""))
)


def other_json(config, d, head):
    """LLaMA's config.json `d` for a model that needs another family's, and that Family."""
    biases = config.attention_bias, config.output_bias, config.mlp_bias
    special, window = config.alibi or config.norm_head, config.sliding_window
    if (
        sum(map(bool, (special, window, any(biases)))) > 1
        or any(biases[1:])
        and config.attention_bias != config.output_bias
    ):
        stop(
            "no family's config.json can say what this model has: windows, ALiBi, a normalised "
            "head and biases together, or only some of the biases"
        )
    if special:
        kind, more = (
            "baichuan",
            {"norm_head": config.norm_head, "model_max_length": config.max_position_embeddings},
        )
        if config.alibi:
            del d["max_position_embeddings"]
    elif window:
        kind, more = "mistral", {"sliding_window": window}
    else:
        kind, more = "qwen2", {"use_sliding_window": False}
    name = FAMILIES[kind].architecture + ("ForCausalLM" if head == "lm" else "ForScore")
    return {**d, **more, "model_type": kind, "architectures": [name]}, FAMILIES[kind]


# ---- no Hugging Face folder: both kinds name their tensors as Meta does ----

COLUMNS = ("wo.weight", "w2.weight")  # what Meta's model parallelism divides by columns


def read(path):
    """(config.json's dict, tensors, Family) of what is at `path`."""
    if path.endswith(".bin") and os.path.isfile(path):
        return *llama2c(path), META
    if glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")):
        return *meta(path), META
    stop(f"no model at {path!r}: a model folder has a config.json, or Meta's params.json")


class Joined:
    """A tensor that model parallelism divided into `pieces`, by rows (dim 0) or columns (dim 1)."""

    def __init__(self, pieces, dim):
        self.pieces, self.dim = pieces, dim
        self.shape = torch.cat([piece.to("meta") for piece in pieces], dim).shape

    def __getitem__(self, rows):
        if self.dim == 1:
            return torch.cat([piece[rows] for piece in self.pieces], dim=1)
        wanted, height = torch.arange(self.shape[0])[rows], len(self.pieces[0])
        return torch.cat(
            [piece[wanted[wanted // height == i] % height] for i, piece in enumerate(self.pieces)]
        )


def meta(path):
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
