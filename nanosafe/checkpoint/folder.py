"""What is on disk at a path: a model's config, its tensors, and where our parameters lie in them.

model_folder.load() and convert() call, in this order:

    open_folder -> Folder -> choose_head, make_config -> list_shapes -> map_tensors -> check_tensors
    -> copy_weights

Only the files that an index names are opened, only inside the folder, and one at a time. No code
from a folder is executed."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanosafe import parallel
from nanosafe.adapter_base import find_base, is_adapter
from nanosafe.checkpoint import meta
from nanosafe.checkpoint.adapters import merge_adapter
from nanosafe.checkpoint.families import (
    FAMILIES,
    META,
    NOT_LLAMA,
    Family,
    find_rows,
    name_tensor,
)
from nanosafe.checkpoint.tensors import FolderReader, LazyTensor, clean_name, copy_rows
from nanosafe.errors import one_line_errors, stop
from nanosafe.hub import WEIGHT_FILES, find_model, read_weight_map
from nanosafe.model import Config, LLaMA
from nanosafe.printing import print_once
from nanosafe.storage import read_json

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IGNORED = ("rotary_emb.inv_freq", "masked_bias", "rope.freqs")  # buffers that old files carry
ROWS_AT_ONCE = 4096  # of two matrices that are compared
NORMALIZER = ("normalizer.mean", "normalizer.var", "normalizer.count")  # of old score models
# Keys of config.json that we compute with before Config checks them all.
COUNTS = ("vocab_size", "hidden_size", "num_attention_heads")
OBJECTS = ("rope_scaling", "rope_parameters", "rotary")


@dataclass
class Folder:
    path: str
    config: dict  # as LLaMA's config.json spells it
    tensors: dict  # name -> a tensor that is read by rows; file by file
    family: Family

    def dtype(self):
        """That of the weights."""
        for name, tensor in self.tensors.items():
            if name.endswith("weight"):
                return tensor.dtype


# ---- what is there ----


def open_folder(path):
    """The Folder at a path, in Hugging Face's layout or in Meta's. No weights are read yet.

    path  a folder, or a model's name on the hub"""
    path = find_model(path)
    if is_adapter(path):
        return merge_adapter(path, open_folder(find_base(path)))
    if os.path.isfile(os.path.join(path, "config.json")):
        config_json = read_config(path)
        kind = find_model_type(path, config_json)
        family = FAMILIES[kind]
        config = translate_config(path, config_json, kind)
        tensors = index_tensors(path, find_weight_files(path))
        if config.get("tie_word_embeddings") is True:
            share_head(tensors, family)
        config.update(find_biases(tensors, family))
        return Folder(path, config, tensors, family)
    if meta.find_shards(path):
        found = meta.read_meta_folder(path)
        return Folder(path, found.config, found.tensors, META)
    stop(f"no model at {path!r}: a model folder has a config.json, or Meta's params.json")


def read_config(path):
    """A folder's config.json, as it is, if nanosafe can open such a model."""
    with one_line_errors(path):
        config_json = read_json(path, "config.json")
    if config_json.get("quantization_config"):
        stop(f"{path!r} is quantised: open the weights that it was made from")
    activation = config_json.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        stop(f"{path!r}: hidden_act {activation!r} is not LLaMA's silu")
    for key in COUNTS:
        value = config_json.get(key)
        if value is not None and not (isinstance(value, int) and value > 0):
            stop(f"{path!r}: {key} in config.json is {value!r}, not a positive whole number")
    for key in OBJECTS:
        value = config_json.get(key)
        if value is not None and not isinstance(value, dict):
            stop(f"{path!r}: {key} in config.json is {value!r}, not an object")
    return config_json


def find_model_type(path, config_json):
    kind = str(config_json.get("model_type") or "llama").lower()
    if kind not in FAMILIES:
        stop(
            f"{path!r}: model_type {kind!r} is not supported: choose one of {', '.join(FAMILIES)} "
            "(docs/formats.md says how to add one)"
        )
    return kind


class WeightFiles(NamedTuple):
    names: list  # of the files
    weight_map: dict  # tensor -> file, of an index; empty where there is none


def find_weight_files(path):
    for name in WEIGHT_FILES:
        if not os.path.isfile(os.path.join(path, name)):
            continue
        if not name.endswith(".json"):
            return WeightFiles([name], {})
        weight_map = read_weight_map(path, name)
        return WeightFiles(sorted(set(weight_map.values())), weight_map)
    stop(f"no weights in {path!r}: model.safetensors, pytorch_model.bin or an index")


def index_tensors(path, weight_files):
    """{name: LazyTensor} of all files, file by file. Stops where file and index disagree."""
    reader = FolderReader(path)
    tensors = {}
    for file in weight_files.names:
        for key in reader.open(file):
            name = clean_name(key)
            if name in tensors or weight_files.weight_map.get(key, file) != file:
                stop(f"{path!r}: {name!r} is in two files, one of which is {file!r}")
            tensors[name] = LazyTensor(reader, file, key)
    for key in sorted(weight_files.weight_map):
        if clean_name(key) not in tensors:
            stop(f"{path!r}: the index names {key!r}, which its files do not hold")
    return tensors


def translate_config(path, config_json, kind):
    """config.json under LLaMA's keys, without biases: whether there are any, only tensors tell."""
    with one_line_errors(path):
        translated = FAMILIES[kind].translate_config(config_json)
    values = {}
    for key, value in config_json.items():
        if key not in NOT_LLAMA:
            values[key] = value
    return {**values, "model_type": kind, **translated}


def read_model_config(path):
    """The Config that a folder's config.json describes, with or without weights beside it.

    It has no biases, which only tensors tell."""
    config_json = read_config(path)
    values = translate_config(path, config_json, find_model_type(path, config_json))
    with one_line_errors(path):
        return Config.from_dict(values)


def share_head(tensors, family):
    """Let an LM head be the embedding, too, where the two are tied and files hold only the head."""
    head = name_tensor("lm_head.weight", family)
    embedding = name_tensor("embed_tokens.weight", family)
    if head in tensors and embedding not in tensors:
        tensors[embedding] = tensors.pop(head)


def find_biases(tensors, family):
    return {
        "attention_bias": has_bias(tensors, family.qkv[0]),
        "output_bias": has_bias(tensors, "o_proj") or has_bias(tensors, "wo"),
        "mlp_bias": has_bias(tensors, family.gate_up[0]),
        "score_bias": "score_head.bias" in tensors,
    }


def has_bias(tensors, projection):
    return any(name.endswith(projection + ".bias") for name in tensors)


# ---- which model it is ----


def choose_head(folder, head):
    """The head to open a folder with, where "auto" is the head that it has."""
    has_score_head = "score_head.weight" in folder.tensors
    if head == "lm" and has_score_head:
        stop(f"{folder.path!r} is a score model: it cannot generate text")
    if head == "auto":
        return "score" if has_score_head else "lm"
    return head


def check_score_model(path, score_type=None):
    """Stop unless a folder holds a score model of the type that is asked for. No weights are read.

    score_type  "reward" or "cost"; None: either of them

    A folder that states no type passes: load() says what it is taken as."""
    folder = open_folder(path)
    if "score_head.weight" not in folder.tensors:
        stop(f"{folder.path!r} is a policy: it has no score head")
    stated = folder.config.get("score_type")
    allowed = (score_type,) if score_type else ("reward", "cost")
    if stated and stated not in allowed:
        asked = " or ".join(allowed)
        stop(
            f"{folder.path!r} is given as a {asked} model, but its config.json says score_type "
            f"{stated!r}: give the folder of a {asked} model"
        )


def make_config(folder, score_type=None):
    """The Config of a folder. Its tensors win over what config.json says.

    These are a normaliser's, and an LM head that is not the embedding, to which config.json ties
    it: with a head of its own, the model is not tied."""
    values = dict(folder.config)
    if values.get("tie_word_embeddings") is True and has_own_lm_head(folder):
        values["tie_word_embeddings"] = False
    for name in ("mean", "var"):
        if "normalizer." + name in folder.tensors:
            moment = folder.tensors["normalizer." + name]
            values[name] = moment[...].flatten().tolist()
    if score_type:
        values["score_type"] = score_type
    with one_line_errors(folder.path):
        config = Config.from_dict(values)
    return config


def has_own_lm_head(folder):
    """Whether the files hold an LM head, and it is not equal to the embedding. Reads both."""
    head = folder.tensors.get(name_tensor("lm_head.weight", folder.family))
    embedding = folder.tensors.get(name_tensor("embed_tokens.weight", folder.family))
    if head is None or embedding is None:
        return False
    if head.shape != embedding.shape or len(head.shape) != 2:
        return True
    rows_of_head = head[:]  # whole: the other may be in another file, and each is opened once
    for begin in range(0, len(rows_of_head), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        if not torch.equal(rows_of_head[rows].double(), embedding[rows].double()):
            return True
    return False


def list_shapes(config, head):
    """{parameter: shape} of a model, without taking its memory."""
    with torch.device("meta"):
        model = LLaMA(config, head)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


# ---- tensors -> parameters ----


def map_tensors(shapes, config, family):
    """{parameter: [RowRange]}: where the rows of each parameter lie in a folder."""
    ranges = {}
    for name, shape in shapes.items():
        ranges[name] = find_rows(config, name, shape[0], family)
    return ranges


def check_tensors(folder, head, shapes, ranges):
    """Stop unless the folder has exactly the tensors that the ranges are of, in their shapes."""
    expected = expected_shapes(shapes, ranges)
    lm_head = name_tensor("lm_head.weight", folder.family)
    if lm_head in folder.tensors and lm_head not in expected:
        reason = "there is a score head" if head == "score" else "the model uses its embedding"
        print_once(f"{folder.path}: {lm_head} is left out: {reason}")
    if lm_head in expected and folder.config.get("tie_word_embeddings"):
        print_once(
            f"{folder.path}: {lm_head} differs from the embedding, to which its config.json ties "
            "it (tie_word_embeddings): the two are not tied"
        )
    missing = []
    misshapen = []
    for name, shape in expected.items():
        tensor = folder.tensors.get(name)
        if tensor is None:
            missing.append(name)
        elif list(tensor.shape) != shape:
            misshapen.append(f"{name} {list(tensor.shape)}, not {shape}")
        elif tensor.dtype not in FLOATS:
            misshapen.append(f"{name}, {tensor.dtype}")
    known = {*expected, lm_head}
    if head == "score":
        known.update(NORMALIZER)
    surplus = []
    for name in folder.tensors:
        if name not in known and not name.endswith(IGNORED):
            surplus.append(name)
    stop_with_names(folder, "misses", missing)
    stop_with_names(folder, "has a wrong shape or type for", misshapen)
    stop_with_names(folder, "has no use for", surplus)


def expected_shapes(shapes, ranges):
    """{tensor of the folder: its shape, a list}: as high as all its ranges together."""
    expected = {}
    for name, row_ranges in ranges.items():
        for row_range in row_ranges:
            shape = expected.setdefault(row_range.tensor, [0, *shapes[name][1:]])
            shape[0] += row_range.rows
    return expected


def stop_with_names(folder, problem, names):
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        stop(f"{folder.path!r} {problem} {', '.join(names[:5])}{more}")


@torch.no_grad()
def copy_weights(parameters, folder, ranges):
    """Copy this rank's rows of the parameters {name: tensor} from the folder.

    Its tensors are listed file by file, so each file is opened once."""
    readers = {}  # tensor -> [(parameter, RowRange)]
    for name, row_ranges in ranges.items():
        if name not in parameters:
            continue
        for row_range in row_ranges:
            readers.setdefault(row_range.tensor, []).append((name, row_range))
    for tensor_name, source in folder.tensors.items():
        for name, row_range in readers.get(tensor_name, ()):
            local = parallel.local_rows(parameters[name])
            copy_rows(local.rows, local.first, source, row_range)


@torch.no_grad()
def fill_new_rows(parameters, folder, ranges):
    """Set the rows of new tokens, which the folder does not have, to the mean of those it has."""
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name not in ranges:
            continue
        local = parallel.local_rows(parameters[name])
        row_range = ranges[name][0]
        begin = max(0, row_range.rows - local.first)  # the first new row, counted from local.first
        if begin < local.count:
            source = folder.tensors[row_range.tensor]
            local.rows[begin:] = source[:].float().mean(dim=0).to(local.rows)
