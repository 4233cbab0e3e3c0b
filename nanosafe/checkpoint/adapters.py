"""Low-rank adapters (LoRA, arXiv:2106.09685), merged into their base as its tensors are read.

An adapter adds to the weight W (out, in) of a matrix the product of two thin ones:

    W + s B A        A (r, in)   B (out, r)   s = alpha / r, or alpha / sqrt(r) with use_rslora

PEFT writes A and B of each matrix that it trained (the targets), and whole tensors of what it
trained beside them: modules_to_save, such as a score head, and biases. open_folder() gives the base
of an adapter folder to merge_adapter(), which returns it with those tensors replaced. Nothing is
added up before rows are read, so each rank computes the rows that it holds.

A module is called here as PEFT calls it: "model.layers.0.self_attn.q_proj" has the tensor of that
name with ".weight". A family's fused matrices are single modules."""

import math
import os
import re
from dataclasses import replace
from typing import NamedTuple

import torch

from nanosafe.adapter_base import ADAPTER_CONFIG, OWN_CONFIG, warn_of_another_base
from nanosafe.checkpoint.families import name_tensor
from nanosafe.checkpoint.tensors import FolderReader, LazyTensor, clean_name
from nanosafe.errors import one_line_errors, stop
from nanosafe.hub import ADAPTER_FILES
from nanosafe.storage import read_json

TASKS = (None, "CAUSAL_LM", "SEQ_CLS")
BIASES = ("none", "all", "lora_only")
ALL_LINEAR = "all-linear"  # as target_modules: all matrices but the embedding and the heads
LARGEST_ALPHA = 1e9  # larger numbers are mistakes
SCORE_MODULES = ("classifier", "score")  # which PEFT saves of each SEQ_CLS model
# How A and B are drawn, where the base stays as it is. Others, such as pissa, change its weights.
INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
# Keys of adapter_config.json that read_adapter_config() reads, and keys that change no weight.
KNOWN_KEYS = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
}
HARMLESS_KEYS = {
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}


class AdapterConfig(NamedTuple):
    """What adapter_config.json says, with checked types."""

    task_type: str
    rank: int
    alpha: float
    ranks: dict  # {a name or regular expression: rank} of modules with another one
    alphas: dict  # likewise
    is_rank_stabilized: bool
    targets: object  # a list of names or ends of names, or a text: a regular expression
    excluded: object  # likewise, or None
    layers: list  # the numbers of the layers with adapters; []: all
    layer_lists: list  # what the model calls its list of layers, as regular expressions; []: any
    saved: tuple  # the ends of the names of modules_to_save
    bias: str


class LowRankPair(NamedTuple):
    """The two thin matrices of an adapter, and the scale s of their product."""

    A: object  # (r, in)
    B: object  # (out, r)
    scale: float
    is_embedding: bool  # whose table (vocabulary, width) is (in, out): the product is transposed

    def multiply_rows(self, rows, dtype):
        """Rows of what is added to the weight, before it is scaled."""
        if self.is_embedding:
            return self.A[:].to(dtype)[:, rows].T @ self.B[:].to(dtype).T
        return self.B[rows].to(dtype) @ self.A[:].to(dtype)


class MergedTensor:
    """A base's weight with the product of a LowRankPair added to the rows that are read.

    The sum is computed in float32, or in float64 where the weight is, and rounded once."""

    def __init__(self, weight, pair, dtype):
        self.weight = weight  # read by rows, as of a folder
        self.pair = pair  # None where an adapter brings the weight itself
        self.dtype = dtype  # that of the base, though the adapter's is often another
        self.shape = weight.shape

    def __getitem__(self, rows):
        weight = self.weight[rows]
        if self.pair is None:
            return weight.to(self.dtype)
        exact = torch.promote_types(self.dtype, torch.float32)
        total = self.pair.multiply_rows(rows, exact)
        total *= self.pair.scale
        total += weight
        return total.to(self.dtype)


# ---- adapter_config.json ----


def read_adapter_config(path):
    """The AdapterConfig of a folder. Stops with one line on what nanosafe does not know."""
    with one_line_errors(path):
        values = read_json(path, ADAPTER_CONFIG)
    check_keys(path, values)
    task_type = values.get("task_type")
    saved = read_names(path, values, "modules_to_save")
    if task_type == "SEQ_CLS":
        saved += SCORE_MODULES
    if "score" in saved:
        saved.append("score_head")  # clean_name() calls it so
    return AdapterConfig(
        task_type,
        rank=read_rank(path, "r", values.get("r")),
        alpha=read_alpha(path, "lora_alpha", values.get("lora_alpha")),
        ranks=read_pattern(path, values, "rank_pattern", read_rank),
        alphas=read_pattern(path, values, "alpha_pattern", read_alpha),
        is_rank_stabilized=read_flag(path, values, "use_rslora"),
        targets=read_targets(path, values, "target_modules"),
        excluded=read_targets(path, values, "exclude_modules"),
        layers=read_layers(path, values),
        layer_lists=read_layer_lists(path, values),
        saved=tuple(saved),
        bias=values.get("bias") or "none",
    )


def check_keys(path, values):
    """Stop unless each key of adapter_config.json is known, or has a value that switches it off.

    Each version of PEFT has more keys than the last, with null, false, [] or {} by default."""
    known_values = (
        ("peft_type", ("LORA",)),
        ("task_type", TASKS),
        ("bias", (None, *BIASES)),
        ("init_lora_weights", INITIALIZATIONS),
    )
    for key, choices in known_values:
        if values.get(key) not in choices:
            refuse(path, key, values.get(key))
    for key, value in sorted(values.items()):
        if value and key not in KNOWN_KEYS and key not in HARMLESS_KEYS:
            refuse(path, key, value)


def refuse(path, key, value):
    stop(
        f"{path!r} is an adapter with {key}={value!r}, which nanosafe does not support: merge it "
        "into its base with PEFT (merge_and_unload), and give the folder of the merged model"
    )


def stop_at_value(path, key, value, wanted):
    stop(f"{path!r}: {key} in {ADAPTER_CONFIG} is {value!r}, not {wanted}")


def read_rank(path, key, value):
    if type(value) is not int or value <= 0:
        stop_at_value(path, key, value, "a positive whole number")
    return value


def read_alpha(path, key, value):
    if type(value) not in (int, float) or not abs(value) < LARGEST_ALPHA:
        stop_at_value(path, key, value, f"a number below {LARGEST_ALPHA:g}")
    return value


def read_flag(path, values, key):
    value = values.get(key) or False
    if value is not True and value is not False:
        stop_at_value(path, key, value, "true or false")
    return value


def read_names(path, values, key):
    names = values.get(key) or []
    if not is_list_of_names(names):
        stop_at_value(path, key, names, "a list of names")
    return list(names)


def is_list_of_names(value):
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def read_targets(path, values, key):
    """A list of names, a regular expression, or None."""
    value = values.get(key)
    if isinstance(value, str) and value:
        check_expression(path, key, value)
    elif value and not is_list_of_names(value):
        stop_at_value(path, key, value, "a list of names or a regular expression")
    if not value and key == "target_modules":
        stop(f"{path!r}: {ADAPTER_CONFIG} names no target_modules")
    return value or None


def read_pattern(path, values, key, read_number):
    """{a name or regular expression: a number}, in the order of the file."""
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        stop_at_value(path, key, pattern, "an object")
    for expression, number in pattern.items():
        check_expression(path, key, expression)
        read_number(path, f"{key} of {expression!r}", number)
    return pattern


def read_layers(path, values):
    layers = values.get("layers_to_transform")
    if layers is None:
        return []
    if not isinstance(layers, list):
        layers = [layers]
    for layer in layers:
        if type(layer) is not int:
            stop_at_value(path, "layers_to_transform", layers, "a list of whole numbers")
    return layers


def read_layer_lists(path, values):
    expressions = values.get("layers_pattern") or []
    if isinstance(expressions, str):
        expressions = [expressions]
    expressions = read_names(path, {"layers_pattern": expressions}, "layers_pattern")
    for expression in expressions:
        check_expression(path, "layers_pattern", expression)
    return expressions


def check_expression(path, key, expression):
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        stop_at_value(path, key, expression, "a regular expression")


# ---- which modules have adapters ----


def is_target(module, config):
    """Whether PEFT trained an adapter of a module. A full name in the list counts in each layer."""
    if matches(module, config.excluded) or is_saved(module, config):
        return False
    if isinstance(config.targets, str) or module in config.targets:
        return matches(module, config.targets)
    return matches(module, config.targets) and is_in_chosen_layer(module, config)


def matches(module, targets):
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == name or module.endswith("." + name) for name in targets)


def is_in_chosen_layer(module, config):
    if not config.layers:
        return True
    for name in config.layer_lists or ["[^.]*"]:
        found = re.match(rf"(?:.*?\.)?(?:{name})\.(?P<layer>\d{{1,9}})\.", module)
        if found:
            return int(found["layer"]) in config.layers
    return False


def is_saved(module, config):
    """Whether a module, or one that it is in, is one of modules_to_save.

    PEFT compares the ends of names, dots or not: "norm" is each module whose name ends so."""
    while module:
        if module.endswith(config.saved):
            return True
        module = module.rpartition(".")[0]
    return False


def find_value(pattern, module, default):
    """The value of the first key of a pattern that fits a module."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def find_scale(module, config):
    rank = find_value(config.ranks, module, config.rank)
    alpha = find_value(config.alphas, module, config.alpha)
    return alpha / math.sqrt(rank) if config.is_rank_stabilized else alpha / rank


# ---- merging ----


class Vocabulary(NamedTuple):
    """What a family calls its two tensors with a row for each token."""

    embedding: str
    lm_head: str


def merge_adapter(path, base):
    """The Folder of an adapter folder: its base's, with the tensors that the adapter changes.

    Stops with one line where the adapter's tensors are not those that its config names modules for,
    or where their shapes do not fit the base."""
    path = os.fspath(path)
    config = read_adapter_config(path)
    stored = read_stored(path)
    vocabulary = Vocabulary(
        name_tensor("embed_tokens.weight", base.family),
        name_tensor("lm_head.weight", base.family),
    )
    weights = list_weights(base, config, vocabulary)
    targets = find_targets(path, base, weights, config, vocabulary)
    check_names(path, config, weights, stored, targets, vocabulary)
    merged = replace_tensors(path, weights, stored, vocabulary)

    has_tied_head = vocabulary.lm_head in weights and vocabulary.lm_head not in base.tensors
    trains_embedding = is_saved(module_of(vocabulary.embedding), config)
    if has_tied_head and vocabulary.lm_head not in stored and not trains_embedding:
        merged[vocabulary.lm_head] = merged[vocabulary.embedding]  # perhaps with new tokens' rows
    for module in targets:
        name = module + ".weight"
        is_embedding = name == vocabulary.embedding
        pair = find_pair(path, stored, module, config, merged[name].shape, is_embedding)
        merged[name] = MergedTensor(merged[name], pair, weights[name].dtype)
    if has_tied_head and merged[vocabulary.lm_head] is merged[vocabulary.embedding]:
        del merged[vocabulary.lm_head]  # as in the base's files: the two are tied still

    with one_line_errors(path):
        changes = read_json(path, OWN_CONFIG)
    warn_of_another_base(path, base.path, changes.pop("base_fingerprint", None))
    changes["score_bias"] = "score_head.bias" in merged
    if vocabulary.embedding in stored:
        changes["vocab_size"] = stored[vocabulary.embedding].shape[0]
    return replace(base, path=path, config={**base.config, **changes}, tensors=merged)


def list_weights(base, config, vocabulary):
    """{name: tensor} of the model that an adapter was trained on: the base, with another head.

    A score model has no LM head. An LM head that is tied to the embedding has a name of its own: an
    adapter of one of the two leaves the other as it was."""
    weights = dict(base.tensors)
    if config.task_type == "SEQ_CLS":
        weights.pop(vocabulary.lm_head, None)
    elif vocabulary.lm_head not in weights and vocabulary.embedding in weights:
        weights[vocabulary.lm_head] = weights[vocabulary.embedding]
    return weights


def module_of(name):
    """The module that has the tensor of a name."""
    return name.rpartition(".")[0]


def read_stored(path):
    """{name: LazyTensor} of the adapter's file, under the names of base tensors.

    Where a module has an adapter, PEFT calls the module itself its "base_layer". Where a vocabulary
    got new rows, and embedding and LM head are among modules_to_save, it writes each three times:
    under its name, again under "modules_to_save", and untrained as "original_module"."""
    for file in ADAPTER_FILES:
        if os.path.isfile(os.path.join(path, file)):
            break
    else:
        stop(f"no weights in the adapter folder {path!r}: {' or '.join(ADAPTER_FILES)}")
    reader = FolderReader(path)
    keys = list(reader.open(file))
    stored = {}
    for key in keys:
        plain_key = key.replace(".modules_to_save.", ".")
        is_copy = plain_key != key and plain_key in keys
        if is_copy or ".original_module." in key:
            continue
        name = clean_name(plain_key).replace(".base_layer.", ".")
        if name in stored:
            stop(f"{path!r} holds {name!r} twice")
        stored[name] = LazyTensor(reader, file, key)
        if not stored[name].dtype.is_floating_point:
            stop(f"{path!r} holds {name!r} as {stored[name].dtype}, not as a floating-point type")
    return stored


def find_targets(path, base, weights, config, vocabulary):
    """The modules with adapters, in the order of the base's tensors."""
    not_linear = ()
    if config.targets == ALL_LINEAR:
        config = config._replace(targets=".*")
        not_linear = (*vocabulary, "score_head.weight")
    targets = []
    for name, tensor in weights.items():
        module = module_of(name)
        is_matrix = name.endswith(".weight") and len(tensor.shape) == 2
        if is_matrix and name not in not_linear and is_target(module, config):
            targets.append(module)
    if not targets:
        stop(
            f"{path!r}: its target_modules {config.targets!r} are no matrices of the base "
            f"{base.path!r}"
        )
    return targets


def names_of_pair(module, is_embedding):
    if is_embedding:
        return [module + ".lora_embedding_A", module + ".lora_embedding_B"]
    return [module + ".lora_A.weight", module + ".lora_B.weight"]


def check_names(path, config, weights, stored, targets, vocabulary):
    """Stop unless the adapter's file holds the tensors that it should, and no other.

    PEFT writes the embedding and the LM head, too, where these have adapters, or new tokens."""
    expected = set()
    for module in targets:
        is_embedding = module + ".weight" == vocabulary.embedding
        expected.update(names_of_pair(module, is_embedding))
        if config.bias == "lora_only" and module + ".bias" in weights:
            expected.add(module + ".bias")
    for name in weights:
        is_trained_bias = config.bias == "all" and name.endswith(".bias")
        if is_trained_bias or is_saved(module_of(name), config):
            expected.add(name)
    if config.task_type == "SEQ_CLS":
        expected.add("score_head.weight")
    may_be_there = {*expected, *(weights.keys() & vocabulary)}
    if is_saved("score_head", config):
        may_be_there.update(("score_head.weight", "score_head.bias"))
    missing = sorted(expected - stored.keys())
    left_over = sorted(stored.keys() - may_be_there)
    if missing:
        stop(f"{path!r} misses {list_some(missing)}, which its {ADAPTER_CONFIG} asks for")
    if left_over:
        stop(f"{path!r} holds {list_some(left_over)}, which its {ADAPTER_CONFIG} does not ask for")


def list_some(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def replace_tensors(path, weights, stored, vocabulary):
    """A copy of the base's {name: tensor}, with those that the adapter's file holds whole."""
    merged = dict(weights)
    for name, tensor in stored.items():
        if ".lora_" in name:
            continue
        if name not in weights:  # a score head, whose shape check_tensors() knows
            merged[name] = tensor
            continue
        wanted = list(weights[name].shape)
        if name in vocabulary:  # there may be rows for new tokens
            wanted[:1] = tensor.shape[:1]
        check_shape(path, name, tensor, wanted)
        merged[name] = MergedTensor(tensor, None, weights[name].dtype)
    return merged


def find_pair(path, stored, module, config, shape, is_embedding):
    """The LowRankPair of a module whose weight has this shape."""
    name_of_A, name_of_B = names_of_pair(module, is_embedding)
    rank = find_value(config.ranks, module, config.rank)
    outputs, inputs = reversed(shape) if is_embedding else shape
    check_shape(path, name_of_A, stored[name_of_A], [rank, inputs])
    check_shape(path, name_of_B, stored[name_of_B], [outputs, rank])
    scale = find_scale(module, config)
    return LowRankPair(stored[name_of_A], stored[name_of_B], scale, is_embedding)


def check_shape(path, name, tensor, wanted):
    if list(tensor.shape) != wanted:
        stop(
            f"{path!r}: {name} has the shape {list(tensor.shape)}, not {wanted}: the adapter is "
            f"of another base, or {ADAPTER_CONFIG} of another adapter"
        )
