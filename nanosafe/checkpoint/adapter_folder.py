"""Models that are adapters on a shared base (lora.py): new ones, and PEFT's folders of them.

    adapter_config.json  adapter_model.safetensors   PEFT's, with the score head among the tensors
    nanosafe.json            which base it was trained on, and a score model's part of config.json

adapters.py reads the same folders and merges them; here nothing is merged. `bases` maps a base's
folder to its Base in memory; a process has one such dict."""

import os
from dataclasses import replace
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.adapter_base import ADAPTER_CONFIG, OWN_CONFIG
from nanosafe.checkpoint.adapters import MergedTensor
from nanosafe.checkpoint.families import META, Family, find_rows
from nanosafe.checkpoint.folder import list_shapes, make_config
from nanosafe.errors import one_line_errors, stop
from nanosafe.hub import parse_name
from nanosafe.lora import (
    MATRICES,
    AdaptedLLaMA,
    MatrixAdapter,
    PairShape,
    draw_adapter,
    list_pairs,
)
from nanosafe.model import LLaMA
from nanosafe.storage import make_empty_folder, read_json, replace_folder, write_json

# What a score model's config.json says beside the base's.
SCORE_KEYS = ("score_type", "do_normalize", "normalizer_type", "momentum", "mean", "var")


class Base(NamedTuple):
    """A frozen model in memory that adapters stand on."""

    model: LLaMA
    family: Family  # how its folder names its tensors
    fingerprint: int  # fingerprint_base() of its folder


class Module(NamedTuple):
    """A matrix of a family, which is all or some of the rows of one of a block's matrices."""

    name: str  # as PEFT calls it
    rows: int
    first_row: int
    order: list  # as in a PairShape


# ---- which modules there are ----


def parameter_of(layer, matrix):
    """What LLaMA calls the weight of a block's matrix."""
    part = "self_attn" if matrix in ("qkv_proj", "o_proj") else "mlp"
    return f"layers.{layer}.{part}.{matrix}.weight"


def list_modules(config, parameter, height, family):
    """The Modules that a block's matrix of `height` rows is made of, in the order of their rows."""
    ranges_of_tensor = {}
    for row_range in find_rows(config, parameter, height, family):
        ranges_of_tensor.setdefault(row_range.tensor, []).append(row_range)
    modules = []
    for tensor, row_ranges in ranges_of_tensor.items():
        first_row = min(row_range.target_start for row_range in row_ranges)
        rows = sum(row_range.rows for row_range in row_ranges)
        order = [None] * rows
        for row_range in row_ranges:
            for i in range(row_range.rows):
                source = row_range.source_start + i * row_range.stride
                order[row_range.target_start + i - first_row] = source
        if order == list(range(rows)):
            order = None
        modules.append(Module(tensor.removesuffix(".weight"), rows, first_row, order))
    return modules


def make_blocks(config, family, choose):
    """The blocks of an AdaptedLLaMA, with parameters that are not filled yet.

    choose(name of a module) returns (rank, scale), or None for a module without an adapter."""
    shapes = list_shapes(config, "lm")
    blocks = []
    for layer in range(config.num_hidden_layers):
        block = {}
        for matrix in MATRICES:
            parameter = parameter_of(layer, matrix)
            height, inputs = shapes[parameter]
            pair_shapes = []
            for module in list_modules(config, parameter, height, family):
                chosen = choose(module.name)
                if chosen:
                    rank, scale = chosen
                    pair_shapes.append(
                        PairShape(
                            module.name,
                            rank,
                            scale,
                            inputs,
                            module.rows,
                            module.first_row,
                            module.order,
                        )
                    )
            if pair_shapes:
                block[matrix] = MatrixAdapter(pair_shapes, height)
        blocks.append(torch.nn.ModuleDict(block))
    return blocks


# ---- a new adapter ----


def new_adapter(path, base, head, lora, score_type, seed):
    """A new adapter on the base, whose folder is `path`. It changes nothing, since B is 0.

    lora  the Lora that is asked for

    The caller fills its score head."""
    check_can_generate(path, base, head)
    if base.family is META:
        stop(
            f"{path!r} is in Meta's layout, whose matrices PEFT has no names for: convert it "
            "first, with python -m nanosafe.checkpoint SOURCE TARGET"
        )
    config = replace(base.model.config, score_type=score_type or base.model.config.score_type)
    wanted = choose_targets(path, config, base.family, lora.targets)
    blocks = make_new_blocks(config, base.family, lora, wanted)
    draw_adapter(blocks, seed)
    peft_config = {
        "peft_type": "LORA",
        **describe_base(path),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": wanted,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    return AdaptedLLaMA(base.model, config, head, blocks, peft_config, base.fingerprint)


def check_can_generate(path, base, head):
    """Stop where a model is to generate text, and its base is a score model, without an LM head."""
    if head != "score" and base.model.head == "score":
        stop(f"{path!r} is a score model: it cannot generate text")


def make_new_blocks(config, family, lora, wanted):
    """The blocks with an adapter of each module whose name ends with one that is wanted."""

    def choose(module):
        return (lora.rank, lora.scale) if last_word(module) in wanted else None

    return make_blocks(config, family, choose)


def choose_targets(path, config, family, targets):
    """The names of the modules that get adapters, without their layers. Stops on unknown ones.

    targets  "all", or these names, comma separated: q_proj,v_proj"""
    names = []
    for module in list_modules_of_block(config, family, list_shapes(config, "lm"), 0):
        names.append(last_word(module))
    if targets == "all":
        return names
    wanted = [name.strip() for name in targets.split(",")]
    for name in wanted:
        if name not in names:
            stop(f"lora_targets={targets!r}: {path!r} has {', '.join(names)}, and no {name!r}")
    return [name for name in names if name in wanted]


def last_word(module):
    return module.rpartition(".")[2]


def count_adapter_parameters(folder, lora):
    """How many parameters the folder's adapter has, or if it has none, a new one on it.

    A score head is not counted."""
    pairs = find_pairs(folder).values()
    if pairs:
        return sum(pair.A.shape.numel() + pair.B.shape.numel() for pair in pairs)
    config = make_config(folder)
    wanted = choose_targets(folder.path, config, folder.family, lora.targets)
    with torch.device("meta"):
        blocks = make_new_blocks(config, folder.family, lora, wanted)
    count = 0
    for block in blocks:
        count += sum(parameter.numel() for parameter in block.parameters())
    return count


def describe_base(path):
    """How adapter_config.json names a base: a folder, or a name on the hub and its revision."""
    model = None if os.path.exists(path) else parse_name(path)
    if model is None:
        return {"base_model_name_or_path": path, "revision": None}
    revision = None if model.revision == "main" else model.revision
    return {"base_model_name_or_path": model.name, "revision": revision}


# ---- an adapter that is read ----


def can_share_base(folder):
    """Whether an opened adapter changes its base by pairs on the matrices of blocks alone.

    One that has trained embeddings, norms, biases or an LM head, too, is merged into a copy of its
    own instead."""
    config = make_config(folder)
    shapes = list_shapes(config, "lm")
    modules = set()
    for layer in range(config.num_hidden_layers):
        modules.update(list_modules_of_block(config, folder.family, shapes, layer))
    for name, tensor in folder.tensors.items():
        is_changed = isinstance(tensor, MergedTensor)
        if not is_changed or name.startswith("score_head."):
            continue
        if tensor.pair is None or name.removesuffix(".weight") not in modules:
            return False
    return True


def list_modules_of_block(config, family, shapes, layer):
    """The names of a block's modules; shapes: list_shapes() of the model."""
    names = []
    for matrix in MATRICES:
        parameter = parameter_of(layer, matrix)
        for module in list_modules(config, parameter, shapes[parameter][0], family):
            names.append(module.name)
    return names


def find_pairs(folder):
    """{name of a module: its LowRankPair} of an opened adapter folder."""
    pairs = {}
    for name, tensor in folder.tensors.items():
        if isinstance(tensor, MergedTensor) and tensor.pair is not None:
            pairs[name.removesuffix(".weight")] = tensor.pair
    return pairs


@torch.no_grad()
def read_adapter(folder, base, head, score_type):
    """The AdaptedLLaMA of an opened adapter folder that can share its base.

    The caller fills its score head."""
    check_can_generate(folder.path, base, head)
    config = make_config(folder, score_type)
    config.vocab_size = base.model.config.vocab_size  # which may have rows for new tokens
    pairs = find_pairs(folder)

    def choose(module):
        if module not in pairs:
            return None
        pair = pairs[module]
        return pair.A.shape[0], pair.scale

    blocks = make_blocks(config, base.family, choose)
    for shape, A, B in list_pairs(blocks):
        pair = pairs[shape.module]
        rows = pair.B[:]
        A.copy_(pair.A[:])
        B.copy_(rows if shape.order is None else rows[shape.order])
    peft_config = read_json(folder.path, ADAPTER_CONFIG)
    inside = os.path.join(folder.path, peft_config["base_model_name_or_path"])
    if os.path.isdir(inside):  # named from where this adapter is; others are elsewhere
        peft_config["base_model_name_or_path"] = os.path.normpath(inside)
    return AdaptedLLaMA(base.model, config, head, blocks, peft_config, base.fingerprint)


# ---- an adapter that is written ----


@torch.no_grad()
def write_adapter_folder(model, path, tokenizer, head):
    """Write an AdaptedLLaMA as a folder that PEFT opens, on rank 0. It appears when it is whole.

    head  "lm" or "score": the one to write of a model with both"""
    if parallel.rank() > 0:
        return
    target = os.path.realpath(path)
    temporary = target + ".tmp"
    make_empty_folder(temporary)
    tensors = name_tensors(model)
    own_config = {"base_fingerprint": model.base_fingerprint}
    peft_config = {**model.peft_config, "task_type": "CAUSAL_LM", "modules_to_save": None}
    if head == "score":
        peft_config.update(task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
        for name, parameter in model.score_head.named_parameters():
            tensors["base_model.model.score." + name] = parameter.detach().cpu()
        values = model.config.to_dict("score")
        own_config.update({key: values[key] for key in SCORE_KEYS})
    write_json(own_config, temporary, OWN_CONFIG)
    write_json(peft_config, temporary, ADAPTER_CONFIG)
    if tokenizer is not None:
        tokenizer.save(temporary)
    with one_line_errors(path, "written"):
        file = os.path.join(temporary, "adapter_model.safetensors")
        save_file(tensors, file, {"format": "pt"})
        replace_folder(temporary, target)


def name_tensors(model):
    """{PEFT's name: tensor} of all pairs of an AdaptedLLaMA."""
    tensors = {}
    for shape, A, B in list_pairs(model.blocks):
        rows = B.detach().cpu()
        if shape.order is not None:
            in_module = torch.empty_like(rows)
            in_module[shape.order] = rows
            rows = in_module
        prefix = f"base_model.model.{shape.module}"
        tensors[prefix + ".lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[prefix + ".lora_B.weight"] = rows.contiguous()
    return tensors
