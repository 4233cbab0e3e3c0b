"""What model folders look like: which tensor holds which of our rows, and how it is read in slices.
A Family says how a folder differs from LLaMA's; families.py has the others, and other layouts."""

import os
import zipfile
from typing import Callable, NamedTuple
import torch
from safetensors import safe_open
from nanosafe.files import read_json, stop, untrusted

IGNORED = ("rotary_emb.inv_freq", "masked_bias", "rope.freqs")  # buffers that old files carry
WEIGHTS = [
    name + ending
    for name in ("model.safetensors", "pytorch_model.bin")
    for ending in ("", ".index.json")
]  # the first that is there is read
NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")
WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "module.",
    "base_model.model.",
)  # what training libraries put before a tensor's name


def apart(tensors, H, K, E):
    """LLaMA's queries, keys and values: a tensor each."""
    return [(tensor, 0, heads * E, 1) for tensor, heads in zip(tensors, (H, K, K))]


class Family(NamedTuple):
    """How a family's folders differ from LLaMA's."""

    architecture: str = "Llama"  # in config.json, where folders of the family are written
    config: Callable = lambda d: {}  # its config.json -> the keys that LLaMA spells otherwise
    qkv: tuple = ("q_proj", "k_proj", "v_proj")  # the tensors with queries, keys and values
    layout: Callable = apart  # where these are in them: parts(), below, of qkv_proj
    gate_up: tuple = ("gate_proj", "up_proj")
    names: tuple = ()  # (ours, theirs): parts of tensors' names


LLAMA = Family()


def parts(config, name, family=LLAMA):
    """Where the rows of our parameter `name` are: [(tensor, first row, rows or None: all, step)].
    We multiply by q, k and v at once, and by gate and up at once; most folders keep them apart."""
    tensor = name if name.startswith(("lm_head.", "score_head.")) else "model." + name
    for ours, theirs in family.names:
        tensor = tensor.replace(ours, theirs)
    c = config
    if ".qkv_proj." in name:
        tensors = [tensor.replace("qkv_proj", part) for part in family.qkv]
        return family.layout(tensors, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    if ".gate_up_proj." in name:
        height = 2 * c.intermediate_size // len(family.gate_up)
        return [(tensor.replace("gate_up_proj", part), 0, height, 1) for part in family.gate_up]
    return [(tensor, 0, None, 1)]


def config_json(config, head):
    """What to write as config.json, and its Family: LLaMA, unless that cannot say it all."""
    d = config.to_dict(head)
    keys = ("sliding_window", "alibi", "norm_head", "output_bias")
    window, alibi, norm_head, output_bias = (d.pop(key) for key in keys)
    if window or alibi or norm_head or output_bias != config.attention_bias:
        from nanosafe import families

        return families.other_json(config, d, head)
    return d, LLAMA


class Folder:
    """The tensors of what is at a path, read in slices: a tensor has a .shape and takes rows.
    Only files that its index names are opened, inside it, one at a time; nothing is executed."""

    def __init__(self, path):
        self.path, self.tensors, self.family = os.fspath(path), {}, LLAMA
        if not os.path.isfile(os.path.join(self.path, "config.json")):
            from nanosafe import families

            self.config, self.tensors, self.family = families.read(self.path)
            return
        d = read_json(self.path, "config.json")
        if d.get("quantization_config"):
            stop(f"{self.path!r} is quantised: open the weights that it was made from")
        if d.get("hidden_act", "silu") not in ("silu", "swish"):
            stop(f"{self.path!r}: hidden_act {d['hidden_act']!r} is not LLaMA's silu")
        kind = (d.get("model_type") or "llama").lower()
        if kind != "llama":
            from nanosafe.families import FAMILIES

            if kind not in FAMILIES:
                stop(
                    f"{self.path!r}: model_type {kind!r} is not known here: {', '.join(FAMILIES)} "
                    "are (docs/formats.md says how to add one)"
                )
            self.family = FAMILIES[kind]
        there = [name for name in WEIGHTS if os.path.isfile(os.path.join(self.path, name))]
        indexed = there and there[0].endswith(".json")
        index = read_json(self.path, there[0]).get("weight_map", {}) if indexed else {}
        if not there or indexed and not index:
            stop(f"no weights in {self.path!r}: model.safetensors, pytorch_model.bin or an index")
        files = Files(self.path)
        for file in sorted(set(index.values())) if indexed else there[:1]:
            for key in files.open(file):
                name = clean(key)
                if name in self.tensors or index.get(key, file) != file:
                    stop(f"{self.path!r}: {name!r} stands in two places, once in {file!r}")
                self.tensors[name] = Stored(files, file, key)
        lost = {clean(key) for key in index} - set(self.tensors)
        if lost:
            stop(f"{self.path!r}: the index names {min(lost)!r}, which its files do not hold")
        biased = lambda part: any(name.endswith(part + ".bias") for name in self.tensors)
        self.config = {
            **d,
            "sliding_window": 0,
            "alibi": False,
            "norm_head": False,
            **self.family.config(d),
            "attention_bias": biased(self.family.qkv[0]),
            "output_bias": biased("o_proj") or biased("wo"),
            "mlp_bias": biased(self.family.gate_up[0]),
            "score_bias": "score_head.bias" in self.tensors,
        }  # the tensors know best

    def dtype(self):
        name = next(name for name in self.tensors if name.endswith("weight"))
        return self.tensors[name][:1].dtype


class Files:
    """A folder's files, of which one is open. They know no Stored and no Folder: without a cycle,
    what is mapped is freed with the last reference."""

    def __init__(self, path):
        self.path, self.current = path, (None, None)  # the file that is open, its tensors

    def open(self, file):
        """What read_file() gives for a file of the folder."""
        if self.current[0] != file:
            self.current = None, None
            full = os.path.join(self.path, file)
            if os.path.dirname(file) or not os.path.isfile(full):
                stop(f"{self.path!r}: the index names {file!r}, which is not in the folder")
            self.current = file, read_file(full)
        return self.current[1]


def read_file(path):
    """{tensor name: tensor, or what has its rows} of a safetensors or .bin file."""
    with untrusted(path):
        if path.endswith(".safetensors"):
            handle = safe_open(path, framework="pt")
            return {key: handle.get_slice(key) for key in handle.keys()}
        # weights_only: tensors are read, nothing is executed. Files before torch 1.6 are no zip.
        tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        stop(f"{path!r} holds something else than a table of tensors")
    return tensors


class Stored:
    """A tensor in a folder's file."""

    def __init__(self, files, file, key):
        self.files, self.file, self.key = files, file, key
        part = files.open(file)[key]
        self.shape = torch.Size(part.shape if torch.is_tensor(part) else part.get_shape())

    def __getitem__(self, rows):
        return self.files.open(self.file)[self.key][rows]


def clean(name):
    """A tensor's name, less what wrappers and other libraries' heads made of it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    if name.startswith(("embed_tokens.", "layers.", "norm.")):  # saved without a head
        return "model." + name
    return "score_head." + name[6:] if name.startswith("score.") else name
