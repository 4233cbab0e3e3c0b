"""Load and save models. What is written is a Hugging Face folder, which transformers and vLLM open.

load   folder on disk -> RowRanges -> this rank's rows; no rank holds a whole model. With `bases`,
       adapters stand on a base that is read once (lora.py)
save   each parameter gathered -> tensors of the folder's family -> files of at most 5 GB"""

import math
import os
import zlib
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.adapter_base import (
    find_base,
    find_whole_model,
    fingerprint_base,
    is_adapter,
    list_model_folders,
)
from nanosafe.checkpoint import exports
from nanosafe.checkpoint.adapter_folder import (
    Base,
    can_share_base,
    count_adapter_parameters,
    new_adapter,
    read_adapter,
    write_adapter_folder,
)
from nanosafe.checkpoint.families import (
    FAMILIES,
    check_can_be_saved,
    choose_written_family,
    find_rows,
    make_config_json,
)
from nanosafe.checkpoint.folder import (
    check_tensors,
    choose_head,
    copy_weights,
    fill_new_rows,
    list_shapes,
    make_config,
    map_tensors,
    open_folder,
)
from nanosafe.errors import one_line_errors, stop
from nanosafe.hub import find_model
from nanosafe.lora import AdaptedLLaMA
from nanosafe.model import Config, LLaMA
from nanosafe.printing import print_once, say_once
from nanosafe.storage import (
    CHECKSUMS,
    find_corrupt_file,
    make_empty_folder,
    read_json,
    replace_folder,
    write_json,
)

SHARD_BYTES = 5 * 10**9  # of a file of weights, at most


# ---- models ----


def load(
    path,
    head="auto",
    dtype=None,
    device="cpu",
    placement=None,
    vocab_size=0,
    score_type=None,
    seed=0,
    bases=None,
):
    """Read a model folder -> LLaMA. Stops with one line on missing, surplus or misshapen tensors.

    path        a folder, or a model's name on the hub
    head        "lm", "score", "both", or "auto": what the folder holds. A score head that it lacks
                is drawn with `seed`, and a line says so.
    dtype       of the parameters; by default that of the files
    placement   a parallel.Placement instead of dtype and device: for training, and for many ranks
    vocab_size  rows that the tokenizer needs; missing ones become the mean of the others
    score_type  "reward", "cost" or "critic", whatever the config says. A script that only reads
                scores calls check_score_model() first.
    bases       {folder: Base}, the models in memory that adapters can share; a model is added to
                it as it is read. An adapter folder then becomes a frozen AdaptedLLaMA on its base.
                None: an adapter is merged into a base of its own."""
    among_ranks = placement is not None  # else each rank may read another model
    if placement is None:
        placement = parallel.Placement(torch.device(device), dtype=dtype)
    if bases is None:
        return load_whole(path, head, placement, vocab_size, score_type, seed, among_ranks)
    if not is_adapter(find_model(path)):
        model = load_base(path, head, bases, placement, vocab_size, score_type).model
        if model.head == "lm" or score_type in (None, model.config.score_type):
            return model
        # It is there as a reward model, say, and is wanted as a cost model.
        return load_whole(path, head, placement, vocab_size, score_type, seed, among_ranks)
    folder = open_folder(path)
    if not can_share_base(folder):
        print_once(f"{path} trains more than matrices of blocks: it is merged into its base")
        return load_whole(path, head, placement, vocab_size, score_type, seed, among_ranks)
    base_path = find_base(folder.path)
    base = load_base(base_path, "auto", bases, placement, vocab_size)
    say_that_base_is_shared(base_path, base)
    check_for_damage(folder.path, among_ranks=False)
    head = choose_head(folder, head)
    model = read_adapter(folder, base, head, score_type)
    fill_score_head(model, folder.tensors, path, seed)
    return model.to(placement.device).requires_grad_(False)


def load_trained(path, head, placements, bases, lora, vocab_size=0, score_type=None, seed=0):
    """The model at `path`, to be trained: a LLaMA, or with lora.rank an adapter on a frozen base.

    placements  the parallel.Placements: a base is placed as frozen models are
    lora        the Lora of a new adapter. If `path` is an adapter, a copy of it is trained further,
                with its own rank, alpha and targets.

    Other arguments are those of load()."""
    if not lora.rank:
        return load(
            path,
            head,
            placement=placements.trained,
            vocab_size=vocab_size,
            score_type=score_type,
            seed=seed,
        )
    placement = placements.frozen
    folder = open_folder(path)
    rows = make_config(folder).vocab_size
    if rows < vocab_size:
        print_once(
            f"note: {path} has no rows for {vocab_size - rows} of the tokenizer's tokens, and "
            "adapters do not train those that they get. Padding needs none; for a template's "
            "tokens, choose another template, or lora_rank=0"
        )
    if is_adapter(folder.path):
        model = load(
            path,
            head,
            placement=placement,
            vocab_size=vocab_size,
            score_type=score_type,
            seed=seed,
            bases=bases,
        )
        if not isinstance(model, AdaptedLLaMA):
            stop(
                f"{path!r} has trained more than matrices of blocks, and cannot go on as an "
                "adapter: merge it first, with python -m nanosafe.checkpoint ADAPTER TARGET"
            )
        own = model.peft_config
        print_once(
            f"{path} is an adapter: a copy of it is trained, with its own rank {own['r']}, alpha "
            f"{own['lora_alpha']} and targets, and without dropout"
        )
    else:
        base = load_base(path, "auto", bases, placement, vocab_size)
        say_that_base_is_shared(path, base)
        model = new_adapter(path, base, head, lora, score_type, seed)
        fill_score_head(model, folder.tensors, path, seed)
    return model.to(placement.device).requires_grad_(True)


def load_base(path, head, bases, placement, vocab_size, score_type=None):
    """The Base at a path, from `bases` or read into them.

    One that is there and has too few rows for a tokenizer is read again: `head` and `placement` are
    those of the process's other bases anyway."""
    folder = find_model(path)
    key = os.path.realpath(folder)
    if key not in bases or bases[key].model.config.vocab_size < vocab_size:
        model = load_whole(path, head, placement, vocab_size, score_type)
        family = open_folder(path).family
        bases[key] = Base(model.requires_grad_(False), family, fingerprint_base(folder))
    return bases[key]


def say_that_base_is_shared(path, base):
    """Say which base adapters stand on: another line than one says that there are two bases."""
    count = sum(math.prod(parameter.shape) for parameter in base.model.parameters())
    say_once(f"{path}: {count:,} parameters in memory once, frozen, for all adapters of it")


@torch.no_grad()
def fill_score_head(model, tensors, path, seed):
    """Copy an AdaptedLLaMA's score head from {name: tensor}, or draw it where it is not there."""
    if model.head == "lm":
        return
    if "score_head.weight" not in tensors:
        print_once(f"{path}: no score head there: a new one is drawn")
        draw_parameter(model, "score_head.weight", model.score_head.weight, seed)
        if model.score_head.bias is not None:
            model.score_head.bias.zero_()
        return
    for name, parameter in model.score_head.named_parameters():
        parameter.copy_(tensors["score_head." + name][:])


def load_whole(path, head, placement, vocab_size, score_type, seed=0, among_ranks=True):
    """load() without shared bases -> LLaMA.

    among_ranks  whether all ranks read this model: then each checks its share of the files"""
    for folder_path in list_model_folders(find_model(path)):
        check_for_damage(folder_path, among_ranks)
    folder = open_folder(path)
    head = choose_head(folder, head)
    config = make_config(folder, score_type)
    shapes = list_shapes(config, head)
    lacks_score_head = head != "lm" and "score_head.weight" not in folder.tensors
    if lacks_score_head:
        del shapes["score_head.weight"]
    if "score_head.weight" in shapes and score_type != "critic":
        if not folder.config.get("score_type"):
            print_once(
                f"{path}: its config.json states no score_type: it is taken as a "
                f"{config.score_type} model"
            )
    ranges = map_tensors(shapes, config, folder.family)
    check_tensors(folder, head, shapes, ranges)
    check_can_be_saved(config)

    new_rows = max(0, vocab_size - config.vocab_size)
    if new_rows:
        print_once(f"{path}: {new_rows} rows for new tokens, each the others' mean")
        config.vocab_size = vocab_size
    model = build_model(config, head, placement, placement.dtype or folder.dtype())
    if lacks_score_head:
        print_once(f"{path}: no score head there: a new one is drawn")
        draw_parameter(model, "score_head.weight", model.score_head.weight, seed)
    parameters = dict(parallel.named_local_parameters(model))
    copy_weights(parameters, folder, ranges)
    if new_rows:
        fill_new_rows(parameters, folder, ranges)
    return model


def check_for_damage(path, among_ranks):
    """Stop on a file that does not fit its checksum. among_ranks: each rank checks its share."""
    if not os.path.exists(os.path.join(path, CHECKSUMS)):
        return
    part, parts = 0, 1
    if among_ranks:
        part, parts = parallel.rank(), parallel.world_size()
    name = find_corrupt_file(path, part, parts, may_be_replaced=True)
    if name:
        stop(f"{path!r}: {name} is damaged; if you changed it, remove {CHECKSUMS}")


def build_model(config, head, placement, dtype):
    """A LLaMA at its placement. Its memory is taken, and not filled yet."""
    with torch.device("meta"):
        model = LLaMA(config, head).to(dtype)
    parallel.shard_model(model, placement)
    if head != "score" and config.tie_word_embeddings:  # to_empty() has untied them
        model.lm_head.weight = model.embed_tokens.weight
    return model


def init_from_scratch(config, head="lm", seed=0, placement=None):
    """A LLaMA with random weights, the same for every layout.

    N(0, initializer_range); outputs into the residual stream are scaled by depth, as in GPT-2."""
    if placement is None:
        placement = parallel.Placement(torch.device("cpu"))
    model = build_model(config, head, placement, torch.float32)
    for name, parameter in parallel.named_local_parameters(model):
        draw_parameter(model, name, parameter, seed)
    return model


@torch.no_grad()
def draw_parameter(model, name, parameter, seed):
    """Draw this rank's rows of a parameter. Each has its own generator: no layout changes them."""
    local = parallel.local_rows(parameter)
    if name.endswith("norm.weight"):
        local.rows.fill_(1.0)
    elif name.endswith(".bias"):
        local.rows.zero_()
    else:
        std = model.config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * model.config.num_hidden_layers)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        whole = torch.normal(0.0, std, parameter.shape, generator=generator)
        local.rows.copy_(whole[local.first : local.first + local.count])


def count_parameters(source):
    """How many parameters a Config has, or the model in a folder; no weights are read."""
    config = source
    if not isinstance(source, Config):
        config = make_config(open_folder(source))
    return sum(shape.numel() for shape in list_shapes(config, "lm").values())


class Counts(NamedTuple):
    """How many parameters a training has in memory."""

    trained: int
    frozen: int  # of the base; 0 without adapters


def count_trained_and_frozen(path, lora):
    """The Counts of what load_trained() gives; no weights are read."""
    folder = open_folder(path)
    parameters = count_parameters(make_config(folder))
    if not lora.rank:
        return Counts(parameters, 0)
    return Counts(count_adapter_parameters(folder, lora), parameters)


# ---- saving ----


@torch.no_grad()
def save(model, path, tokenizer=None, dtype=None, head=None):
    """Write a model folder, with checksums. It appears when it is whole. A collective.

    Of an AdaptedLLaMA the adapter alone is written, in float32.

    dtype  of the tensors; by default that of the parameters
    head   "lm" or "score", the one to write of a model with both"""
    head = head or model.head
    assert head in ("lm", "score"), "a folder has one head"
    if isinstance(model, AdaptedLLaMA):
        write_adapter_folder(model, path, tokenizer, head)
        parallel.barrier()
        return
    dtype = dtype or next(model.parameters()).dtype
    write_model_folder(path, model.config, head, gather_weights(model, head), tokenizer, dtype)
    parallel.barrier()


@torch.no_grad()
def save_merged(adapter, path, tokenizer, dtype):
    """Write an adapter folder merged into its base, as a model folder. A collective.

    Rank 0 reads both from their files, so that nothing is rounded twice."""
    if parallel.rank() == 0:
        model = load(adapter, dtype=dtype, vocab_size=tokenizer.vocab_size)
        sampling = read_json(find_whole_model(adapter), "generation_config.json")
        weights = model.named_parameters()
        write_model_folder(path, model.config, model.head, weights, tokenizer, dtype, sampling)
    parallel.barrier()


def gather_weights(model, head):
    """Yield (name, whole tensor) of the parameters that a model with this head has."""
    other_head = "score_head." if head == "lm" else "lm_head."
    for name, parameter in parallel.named_local_parameters(model):
        if not name.startswith(other_head):
            yield name, parallel.full_tensor(parameter)


def write_model_folder(path, config, head, weights, tokenizer, dtype, sampling=None):
    """Write whole parameters as a model folder, on rank 0.

    head      "lm" or "score"; "classifier" writes a score model in the layout that others open
    weights   yields (name, tensor)
    sampling  a generation_config.json whose values for sampling are kept"""
    check_can_be_saved(config)
    if parallel.rank() > 0:
        for _ in weights:  # each is gathered from all ranks
            pass
        return
    # Of a symbolic link, the folder that it leads to is written: it may be on another disk.
    target = os.path.realpath(path)
    temporary = target + ".tmp"
    make_empty_folder(temporary)
    tensors = split_parameters(weights, config, dtype)
    if head == "classifier":
        tensors = exports.rename_score_head(tensors)
        tokenizer = exports.choose_padding(tokenizer)
    write_weight_files(path, temporary, split_into_shards(tensors))
    config_json = make_config_json(config, "lm" if head == "lm" else "score")
    config_json["torch_dtype"] = str(dtype).removeprefix("torch.")
    config_json["dtype"] = config_json["torch_dtype"]
    if head == "classifier":
        config_json = exports.make_classifier_json(config_json)
    if tokenizer is not None:
        config_json.update(exports.describe_special_tokens(tokenizer))
        exports.warn_of_another_tokenizer(config_json["model_type"], tokenizer)
        tokenizer.save(temporary)
    write_json(config_json, temporary, "config.json")
    generation = exports.make_generation_json(sampling or {}, tokenizer)
    if head == "lm" and generation:
        write_json(generation, temporary, "generation_config.json")
    with one_line_errors(path, "written"):
        replace_folder(temporary, target)


def split_parameters(weights, config, dtype):
    """Yield (name, tensor) as the files have them; a tensor of a written family is one range."""
    family = FAMILIES[choose_written_family(config)]
    for name, whole in weights:
        for row_range in find_rows(config, name, len(whole), family):
            end = row_range.target_start + row_range.rows
            rows = whole[row_range.target_start : end]
            yield row_range.tensor, rows.to("cpu", dtype, copy=True).contiguous()


def split_into_shards(tensors):
    """Yield {name: tensor} with SHARD_BYTES at most, or with a single tensor.

    It is one dict, filled again and again, so that only one shard is in memory."""
    shard = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard.clear()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write_weight_files(path, temporary, shards):
    """Write shards to the folder `temporary`; their names tell how many there are, so come last."""
    sizes_of_shards = []  # of each {tensor: bytes}
    for i, shard in enumerate(shards):
        with one_line_errors(path, "written"):
            save_file(shard, os.path.join(temporary, f"part-{i}"), {"format": "pt"})
        sizes_of_shards.append({name: tensor.nbytes for name, tensor in shard.items()})
    count = len(sizes_of_shards)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        write_index(temporary, names, sizes_of_shards)
    for i, name in enumerate(names):
        os.rename(os.path.join(temporary, f"part-{i}"), os.path.join(temporary, name))


def write_index(folder, names, sizes_of_shards):
    weight_map = {}
    total = 0
    for file, sizes in zip(names, sizes_of_shards):
        for tensor, size in sizes.items():
            weight_map[tensor] = file
            total += size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index, folder, "model.safetensors.index.json")
