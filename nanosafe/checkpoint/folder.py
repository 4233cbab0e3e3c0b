"""What model folders look like: which tensor holds which of our rows, and how it is read in slices.
A Family says how a folder differs from LLaMA's; families.py has the others, and other layouts."""

import os

import torch

from nanosafe import parallel
from nanosafe.checkpoint import meta
from nanosafe.checkpoint.families import FAMILIES, LLAMA, find_rows
from nanosafe.checkpoint.tensors import FLOATS, Files, Stored, clean_name, copy_rows
from nanosafe.errors import stop
from nanosafe.model import Config, LLaMA
from nanosafe.printing import print_once
from nanosafe.storage import read_json


IGNORED = ("rotary_emb.inv_freq", "masked_bias", "rope.freqs")  # buffers that old files carry


WEIGHTS = [
    name + ending
    for name in ("model.safetensors", "pytorch_model.bin")
    for ending in ("", ".index.json")
]  # the first that is there is read


NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")


class Folder:
    """The tensors of what is at a path, read in slices: a tensor has a .shape and takes rows.
    Only files that its index names are opened, inside it, one at a time; nothing is executed."""

    def __init__(self, path):
        self.path, self.tensors, self.family = os.fspath(path), {}, LLAMA
        if not os.path.isfile(os.path.join(self.path, "config.json")):
            self.config, self.tensors, self.family = meta.read_other_layout(self.path)
            return
        d = read_json(self.path, "config.json")
        if d.get("quantization_config"):
            stop(f"{self.path!r} is quantised: open the weights that it was made from")
        if d.get("hidden_act", "silu") not in ("silu", "swish"):
            stop(f"{self.path!r}: hidden_act {d['hidden_act']!r} is not LLaMA's silu")
        kind = (d.get("model_type") or "llama").lower()
        if kind != "llama":
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
                name = clean_name(key)
                if name in self.tensors or index.get(key, file) != file:
                    stop(f"{self.path!r}: {name!r} stands in two places, once in {file!r}")
                self.tensors[name] = Stored(files, file, key)
        lost = {clean_name(key) for key in index} - set(self.tensors)
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


def read_config(folder, head, score_type=None):
    """(Config, head) of a folder that is opened with `head`, as in load()."""
    scored = "score_head.weight" in folder.tensors
    if head == "lm" and scored:
        stop(f"{folder.path!r} is a score model: it cannot generate text")
    moments = {
        name: folder.tensors["normalizer." + name][:].flatten().tolist()
        for name in ("mean", "var")
        if "normalizer." + name in folder.tensors
    }
    stated = {"score_type": score_type} if score_type else {}
    config = Config.from_dict({**folder.config, **moments, **stated})
    return config, ("score" if scored else "lm") if head == "auto" else head


def map_tensors(config, head, folder, fresh=(), vocab_size=0):
    """Where a model's parameters are in a folder: {parameter: [(tensor, its first row, rows, step,
    row of the parameter)]}. Stops on a tensor missing, misshapen, left over, or of whole numbers.
    vocab_size: the folder's, where the config's is greater."""
    with torch.device("meta"):
        model = LLaMA(config, head)
    places, shapes = {}, {}  # shapes: of the folder's tensors, as they should be
    for name, p in model.named_parameters():
        if name in fresh:
            continue
        places[name], start = [], 0
        for tensor, first, height, step in find_rows(config, name, folder.family):
            height = height or len(p)
            places[name].append((tensor, first, height, step, start))
            shapes[tensor] = [shapes.get(tensor, [0])[0] + height, *p.shape[1:]]
            start += height
        if vocab_size and name in ("embed_tokens.weight", "lm_head.weight"):
            shapes[tensor][0] = vocab_size
    missing, misshapen = [name for name in shapes if name not in folder.tensors], []
    for name in filter(folder.tensors.__contains__, shapes):
        tensor = folder.tensors[name]
        if list(tensor.shape) != shapes[name]:
            misshapen.append(f"{name} {list(tensor.shape)}, not {shapes[name]}")
        elif tensor[:0].dtype not in FLOATS:
            misshapen.append(f"{name}, {tensor[:0].dtype}")
    lm_head = find_rows(config, "lm_head.weight", folder.family)[0][0]
    if lm_head in folder.tensors and lm_head not in shapes:
        why = "there is a score head" if head == "score" else "its embedding is its head"
        print_once(f"{folder.path}: {lm_head} is left out: {why}")
    known = {*shapes, lm_head, *(NORMALIZER if head == "score" else ())}
    surplus = [name for name in folder.tensors if name not in known and not name.endswith(IGNORED)]
    for what, names in (
        ("misses", missing),
        ("has a wrong shape or type for", misshapen),
        ("has no use for", surplus),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            stop(f"{folder.path!r} {what} {', '.join(names[:5])}{more}")
    return places


@torch.no_grad()
def copy_weights(parameters, folder, places):
    """Copy this rank's rows of the parameters, (name, tensor), from the folder, file by file."""
    parameters = dict(parameters)
    work = sorted(
        (getattr(folder.tensors[part[0]], "file", ""), name, part)
        for name in places.keys() & parameters.keys()
        for part in places[name]
    )
    for _, name, (tensor, skip, height, step, start) in work:
        rows, first, count, _ = parallel.local_rows(parameters[name])
        source = folder.tensors[tensor]
        there = min(height, len(range(skip, source.shape[0], step)))
        copy_rows(rows, first, source, start, there, skip, step)
        if count and there < height and first + count > there:  # rows for new tokens
            rows[max(0, there - first) :] = source[:].float().mean(dim=0).to(rows)
