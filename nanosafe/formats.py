"""
What a model folder looks like: the names of its tensors, and how they are read in slices.
"""

import os
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open

from nanosafe.tokenizer import read_json

IGNORED = ("rotary_emb.inv_freq", "masked_bias")  # buffers that old files carry
NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")


def hf_names(config, name):
    """The tensors of a Hugging Face folder that make up our parameter `name`: [(their name, rows)],
    laid one upon the other.

    We multiply by q, k and v at once, and by gate and up at once; the folder keeps them apart.
    """
    c = config
    if name.startswith(("lm_head.", "score_head.")):
        return [(name, None)]
    name = "model." + name
    if ".qkv_proj." in name:
        rows = {
            "q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads,
            "v_proj": c.num_key_value_heads,
        }
        return [(name.replace("qkv_proj", part), heads * c.head_dim)
                for part, heads in rows.items()]
    if ".gate_up_proj." in name:
        return [(name.replace("gate_up_proj", part), c.intermediate_size)
                for part in ("gate_proj", "up_proj")]
    return [(name, None)]



class Folder:
    """The tensors of a model folder, read in slices. Only files that the folder's index names are
    opened, and only inside it."""
    def __init__(self, path):
        self.path = os.fspath(path)
        if not os.path.isfile(os.path.join(self.path, "config.json")):
            raise SystemExit(f"error: no model at {self.path!r}: a model folder has a config.json")
        self.config = read_json(self.path, "config.json")
        if not self.config:
            raise SystemExit(f"error: the config.json of {self.path!r} is not JSON, or empty")
        self.files = {}  # tensor name -> file name
        self.handles = {}
        for single, index in (("model.safetensors", "model.safetensors.index.json"),
                              ("pytorch_model.bin", "pytorch_model.bin.index.json")):
            if os.path.isfile(os.path.join(self.path, single)):
                self.files = {name: single for name in self.open(single).keys()}
                break
            if os.path.isfile(os.path.join(self.path, index)):
                self.files = read_json(self.path, index).get("weight_map", {})
                break
        if not self.files:
            raise SystemExit(f"error: no weights in {self.path!r}: it needs model.safetensors or "
                             "pytorch_model.bin, or their index")
        prefixes = ("module.", "_orig_mod.")
        self.names = {}  # clean name -> name in the file
        for name in self.files:
            clean = name
            for prefix in prefixes:
                clean = clean.removeprefix(prefix)
            self.names[clean] = name

    def open(self, file):
        if file not in self.handles:
            full = os.path.join(self.path, file)
            if os.path.dirname(file) or not os.path.isfile(full):
                raise SystemExit(
                    f"error: {self.path!r}: the index names {file!r}, which is not in the folder")
            try:
                if file.endswith(".safetensors"):
                    self.handles[file] = safe_open(full, framework="pt")
                else:  # weights_only: tensors are read, nothing is executed
                    self.handles[file] = torch.load(full, map_location="cpu", mmap=True,
                                                    weights_only=True)
            except (SafetensorError, UnpicklingError, RuntimeError, OSError) as error:
                raise SystemExit(
                    f"error: {full!r} cannot be read: {str(error).splitlines()[0]}") from None
        return self.handles[file]

    def slice(self, name):
        """A lazily read tensor: index it to read rows."""
        name = self.names[name]
        handle = self.open(self.files[name])
        if isinstance(handle, dict):
            return handle[name]
        if name not in handle.keys():
            raise SystemExit(f"error: {self.path!r}: the index names {name!r} in "
                             f"{self.files[name]!r}, which does not hold it")
        return handle.get_slice(name)

    def shape(self, name):
        part = self.slice(name)
        return list(part.shape if isinstance(part, torch.Tensor) else part.get_shape())

    def has(self, name):
        return name in self.names

    def dtype(self):
        """The dtype of the weights."""
        name = next(name for name in self.names if name.endswith("weight"))
        return self.slice(name)[:1].dtype
