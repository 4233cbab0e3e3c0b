"""
What model folders look like: which tensor holds which of our rows, and how it is read in slices.

There is one decoder, model.py's. A family of models is a line in FAMILIES: how its config.json and
its tensors differ from LLaMA's.
"""

import glob
import os
from pickle import UnpicklingError
from typing import Callable, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nanosafe.parallel import stop
from nanosafe.tokenizer import read_json

IGNORED = ("rotary_emb.inv_freq", "masked_bias", "rope.freqs")  # buffers that old files carry
NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.",
            "base_model.model.")  # what training libraries put before a tensor's name


class Family(NamedTuple):
    """How a family's folders differ from LLaMA's."""

    architecture: str = "Llama"  # what its name for a head, ForCausalLM say, is put after
    config: Callable = lambda d: {}  # its config.json -> the keys that LLaMA spells otherwise
    qkv: tuple = ("q_proj", "k_proj", "v_proj")  # the tensors with queries, keys and values
    layout: str = "apart"  # of the rows in them. groups: queries, key, value of a kv head together;
    # pairs: the two dimensions that RoPE turns together are neighbours, in LLaMA half a head apart
    gate_up: tuple = ("gate_proj", "up_proj")
    names: tuple = ()  # (ours, theirs): parts of tensors' names


def qwen2(d):
    if d.get("use_sliding_window"):
        stop("a Qwen2 with use_sliding_window, where only some layers have a window, is not known here")
    return {"sliding_window": 0, "attention_bias": True, "output_bias": False}


def internlm(d):
    bias, rotary = d.get("bias", False), d.get("rotary") or {}
    return {"bias": None, "attention_bias": bias, "output_bias": bias,
            "rope_theta": rotary.get("base", d.get("rope_theta"))}


def baichuan(d):
    """The 13B models have ALiBi and no max_position_embeddings; the second generation is known by
    its vocabulary."""
    length = d.get("max_position_embeddings")
    return {"alibi": length is None, "max_position_embeddings": length or d["model_max_length"],
            "norm_head": d.get("norm_head", d["vocab_size"] == 125696)}


SHORT_NAMES = (("self_attn.", "attention."), ("o_proj", "wo"), ("mlp.", "feed_forward."),
               ("down_proj", "w2"), ("input_layernorm", "attention_norm"), ("lm_head", "output"),
               ("post_attention_layernorm", "ffn_norm"), ("embed_tokens", "tok_embeddings"))
FAMILIES = {  # by the model_type of config.json
    "llama": Family(),
    "mistral": Family("Mistral", lambda d: {"sliding_window": d.get("sliding_window", 4096)}),
    "qwen2": Family("Qwen2", qwen2),
    "internlm": Family("InternLM", internlm),
    "internlm2": Family("InternLM2", internlm, ("wqkv",), "groups", ("w1", "w3"), SHORT_NAMES),
    "baichuan": Family("Baichuan", baichuan, ("W_pack",)),
}
META = Family(qkv=("wq", "wk", "wv"), layout="pairs", gate_up=("w1", "w3"),
              names=(*SHORT_NAMES, ("model.", "")))


def parts(config, name, family=FAMILIES["llama"]):
    """Where the rows of our parameter `name` are: [(tensor, its first row, rows or None: all,
    step)], in our order.

    We multiply by q, k and v at once, and by gate and up at once; most folders keep them apart.
    """
    c, H, K, E = config, config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def named(name):
        name = name if name.startswith(("lm_head.", "score_head.")) else "model." + name
        for ours, theirs in family.names:
            name = name.replace(ours, theirs)
        return name

    if ".gate_up_proj." in name:
        return [(named(name.replace("gate_up_proj", part)), 0, c.intermediate_size, 1)
                for part in family.gate_up]
    if ".qkv_proj." not in name:
        return [(named(name), 0, None, 1)]
    tensors = [named(name.replace("qkv_proj", part)) for part in family.qkv]
    if family.layout == "groups":
        G = H // K  # queries to a key
        return [(tensors[0], (group * (G + 2) + first) * E, heads * E, 1)
                for first, heads in ((0, G), (G, 1), (G + 1, 1)) for group in range(K)]
    if len(tensors) == 1:
        return [(tensors[0], 0, (H + 2 * K) * E, 1)]
    q, k, v = zip(tensors, (H, K, K))
    if family.layout == "pairs":
        return [(tensor, head * E + odd, E // 2, 2)
                for tensor, heads in (q, k) for head in range(heads) for odd in (0, 1)
                ] + [(v[0], 0, K * E, 1)]
    return [(tensor, 0, heads * E, 1) for tensor, heads in (q, k, v)]


def config_json(config, head):
    """What to write as config.json, and the family that it names: LLaMA, unless the model has what
    LLaMA's config cannot say."""
    d = config.to_dict(head)
    window, alibi, norm_head, output_bias = (
        d.pop(key) for key in ("sliding_window", "alibi", "norm_head", "output_bias"))
    if alibi or norm_head:
        kind, more = "baichuan", {"model_max_length": d["max_position_embeddings"],
                                  "norm_head": norm_head}
        if alibi:
            del d["max_position_embeddings"]
    elif config.attention_bias and not output_bias:
        kind, more = "qwen2", {"use_sliding_window": False}
    else:
        kind, more = ("mistral", {"sliding_window": window}) if window else ("llama", {})
    family = FAMILIES[kind]
    suffix = "ForCausalLM" if head == "lm" else "ForScore"
    return {**d, **more, "model_type": kind, "architectures": [family.architecture + suffix]}, family


class Folder:
    """The tensors of a model folder, read in slices: .tensors[name] has a shape and takes a slice of
    rows. Also Meta's folders, and llama2.c's files.

    Only files that the folder's index names are opened, and only inside it; one at a time, so that
    no more than one is in memory. Nothing in them is executed.
    """
    def __init__(self, path):
        self.path = os.fspath(path)
        self.files = {}  # tensor name -> file name
        self.current = None, None  # the file that is open, its handle
        if self.path.endswith(".bin") and os.path.isfile(self.path):
            from nanosafe import layouts
            self.config, self.tensors, self.family = *layouts.llama2c(self.path), META
        elif os.path.isfile(os.path.join(self.path, "config.json")):
            self.read_index()
        elif glob.glob(os.path.join(self.path, "consolidated.*.pth")):
            from nanosafe import layouts
            self.config, self.tensors, self.family = *layouts.meta(self.path), META
        else:
            stop(f"no model at {self.path!r}: a model folder has a config.json, or Meta's params.json")

    def read_index(self):
        d = read_json(self.path, "config.json")
        if not d:
            stop(f"the config.json of {self.path!r} is not JSON, or empty")
        kind = d.get("model_type", "llama").lower()
        if kind not in FAMILIES:
            stop(f"{self.path!r}: model_type {kind!r} is not known here: {', '.join(FAMILIES)} are "
                 "(docs/formats.md says how to add one)")
        self.family = FAMILIES[kind]
        single, index = None, {}
        for name in ("model.safetensors", "pytorch_model.bin"):
            if os.path.isfile(os.path.join(self.path, name)):
                single = name
                break
            if os.path.isfile(os.path.join(self.path, name + ".index.json")):
                index = read_json(self.path, name + ".index.json").get("weight_map", {})
                break
        if not single and not index:
            stop(f"no weights in {self.path!r}: it needs model.safetensors or pytorch_model.bin, or "
                 "their index")
        self.tensors = {}
        for file in [single] if single else sorted(set(index.values())):
            for key in self.open(file).keys():
                name = clean(key)
                self.files[name], self.tensors[name] = file, Stored(self, file, key)
        lost = {clean(key) for key in index} - set(self.tensors)
        if lost:
            stop(f"{self.path!r}: the index names {min(lost)!r}, which its files do not hold")
        biased = lambda part: any(name.endswith(part + ".bias") for name in self.tensors)
        self.config = {**d, **self.family.config(d), "attention_bias": biased(self.family.qkv[0]),
                       "output_bias": biased("o_proj") or biased("wo"),
                       "mlp_bias": biased(self.family.gate_up[0]),
                       "score_bias": self.has("score_head.bias")}  # the tensors know best

    def open(self, file):
        """{tensor name: tensor} of a safetensors or .bin file."""
        if self.current[0] != file:
            self.current = None, None
            full = os.path.join(self.path, file)
            if os.path.dirname(file) or not os.path.isfile(full):
                stop(f"{self.path!r}: the index names {file!r}, which is not in the folder")
            self.current = file, read_file(full)
        return self.current[1]

    def has(self, name):
        return name in self.tensors

    def dtype(self):
        """The dtype of the weights."""
        name = next(name for name in self.tensors if name.endswith("weight"))
        return self.tensors[name][:1].dtype


def read_file(path):
    try:
        if path.endswith(".safetensors"):
            return safe_open(path, framework="pt")
        for mmap in (True, False):  # files older than torch 1.6 cannot be mapped
            try:  # weights_only: tensors are read, nothing is executed
                tensors = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
                break
            except RuntimeError as error:
                if not mmap or "mmap" not in str(error):
                    raise
        if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
            stop(f"{path!r} holds something else than a table of tensors")
        return tensors
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        stop(f"{path!r} cannot be read: {str(error).splitlines()[0]}")


class Stored:
    """A tensor in a folder's file."""
    def __init__(self, folder, file, key):
        self.folder, self.file, self.key = folder, file, key
        handle = folder.open(file)
        self.shape = torch.Size(handle[key].shape if isinstance(handle, dict) else
                                handle.get_slice(key).get_shape())

    def __getitem__(self, rows):
        handle = self.folder.open(self.file)
        return (handle[self.key] if isinstance(handle, dict) else handle.get_slice(self.key))[rows]


def clean(name):
    """A tensor's name, less what wrappers and other libraries' heads made of it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    if name.startswith(("embed_tokens.", "layers.", "norm.")):  # saved without a head
        return "model." + name
    return "score_head." + name[6:] if name.startswith("score.") else name
