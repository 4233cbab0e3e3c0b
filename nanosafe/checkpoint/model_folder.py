"""Model folders of the field <-> LLaMA.

What is written is a Hugging Face folder, of a score model with `score_head.weight`; what is read is
that and more (formats.py), row by row into this rank's slice: no rank holds a whole model.

$ python -m nanosafe.checkpoint SOURCE TARGET [--dtype=bfloat16]   # what opens -> a folder"""

import math
import os
import shutil
import zlib

import torch
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.checkpoint.families import make_config_json, find_rows
from nanosafe.checkpoint.folder import Folder, copy_weights, map_tensors, read_config
from nanosafe.errors import stop, one_line_errors
from nanosafe.model import Config, LLaMA
from nanosafe.printing import print_once
from nanosafe.storage import CHECKSUMS, find_corrupt_file, make_folder, replace_folder, write_json


SHARD_BYTES = 5 * 10**9


def load(
    path,
    head="auto",
    dtype=None,
    device="cpu",
    placement=None,
    vocab_size=0,
    score_type=None,
    seed=0,
):
    """Read a model folder -> LLaMA. Stops with one line on missing, surplus or misshapen tensors.

    head        "lm", "score", "both", or "auto": what the folder holds. A score head that it lacks
                is drawn, and said.
    dtype       of the parameters; by default that of the files
    placement       a parallel.Place instead of dtype and device: for training, and for many ranks
    vocab_size  rows that the tokenizer needs; missing ones are added as the mean of the others
    score_type  "reward", "cost" or "critic", over what the config says"""
    share = (parallel.rank(), parallel.world_size()) if placement else (0, 1)
    if os.path.exists(os.path.join(path, CHECKSUMS)) and (
        name := find_corrupt_file(path, *share, True)
    ):
        stop(f"{os.fspath(path)!r}: {name} is damaged; if you changed it, remove {CHECKSUMS}")
    with one_line_errors(path):
        folder = Folder(path)
        config, head = read_config(folder, head, score_type)
        known, config.vocab_size = config.vocab_size, max(config.vocab_size, vocab_size)
        fresh = {"score_head.weight"} - set(folder.tensors) if head != "lm" else ()
        places = map_tensors(config, head, folder, fresh, known)
        make_config_json(config, head)  # what could not be saved is better refused now
    if known < config.vocab_size:
        print_once(
            f"{path}: {config.vocab_size - known} rows for new tokens, each the others' mean"
        )
    placement = placement or parallel.Placement(torch.device(device), dtype=dtype)
    model = build_model(config, head, placement, placement.dtype or folder.dtype())
    if fresh:
        print_once(f"{path}: no score head there: a new one is drawn")
        draw_parameter(model, *fresh, model.score_head.weight, seed)
    with one_line_errors(path):
        copy_weights(parallel.named_local_parameters(model), folder, places)
    return model


def build_model(config, head, placement, dtype):
    """A LLaMA at its placement, its memory taken and not yet filled."""
    with torch.device("meta"):
        model = LLaMA(config, head).to(dtype)
    parallel.shard_model(model, placement)
    if head != "score" and config.tie_word_embeddings:  # to_empty() gave each name its own
        model.lm_head.weight = model.embed_tokens.weight
    return model


def init_from_scratch(config, head="lm", seed=0, placement=None):
    """A LLaMA with random weights, the same for every layout.
    N(0, initializer_range); outputs into the residual stream are scaled by depth, as in GPT-2."""
    model = build_model(
        config, head, placement or parallel.Placement(torch.device("cpu")), torch.float32
    )
    for name, p in parallel.named_local_parameters(model):
        draw_parameter(model, name, p, seed)
    return model


@torch.no_grad()
def draw_parameter(model, name, p, seed):
    """Draw this rank's rows of a parameter by a generator of its own: no layout changes them."""
    rows, start, count, _ = parallel.local_rows(p)
    if name.endswith("norm.weight"):
        rows.fill_(1.0)
    elif name.endswith(".bias"):
        rows.zero_()
    else:
        std = model.config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * model.config.num_hidden_layers)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        rows.copy_(torch.normal(0.0, std, p.shape, generator=generator)[start : start + count])


def count_parameters(source):
    """How many parameters a Config, or the model in a folder, has; no weight is read."""
    if not isinstance(source, Config):
        with one_line_errors(source):
            source = Config.from_dict(Folder(source).config)
    with torch.device("meta"):
        return sum(p.numel() for p in LLaMA(source).parameters())


@torch.no_grad()
def save(model, path, tokenizer=None, dtype=None, head=None):
    """Write a model folder that transformers opens, in files of 5 GB. A collective.
    Written beside its placement and then renamed, with checksums. Of two heads, `head` is written."""
    head = head or model.head
    other = {"lm": "score_head.", "score": "lm_head."}[head]
    weights = (
        (name, parallel.full_tensor(p))
        for name, p in parallel.named_local_parameters(model)
        if not name.startswith(other)
    )
    dtype = dtype or next(model.parameters()).dtype
    write_model_folder(path, model.config, head, weights, tokenizer, dtype)
    parallel.barrier()


def write_model_folder(path, config, head, weights, tokenizer, dtype):
    """Write whole parameters, (name, tensor) one after the other, as a model folder, on rank 0."""
    config_dict, family = make_config_json(config, head)
    if parallel.rank() > 0:
        for _ in weights:  # it takes all ranks to gather one
            pass
        return
    path = os.fspath(path)
    temporary = path.rstrip("/") + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    files = []  # of each, its tensors' names and bytes
    for held in split_into_shards(weights, dtype, lambda name: find_rows(config, name, family)):
        with one_line_errors(path, "written"):
            save_file(held, os.path.join(temporary, f"part-{len(files)}"), {"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
    count = len(files)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    else:
        places = {tensor: name for name, tensors in zip(names, files) for tensor in tensors}
        total = {"total_size": sum(sum(sizes.values()) for sizes in files)}
        index = {"metadata": total, "weight_map": dict(sorted(places.items()))}
        write_json(index, temporary, "model.safetensors.index.json")
    for i, name in enumerate(names):
        os.rename(os.path.join(temporary, f"part-{i}"), os.path.join(temporary, name))
    config_dict["torch_dtype"] = config_dict["dtype"] = str(dtype).removeprefix("torch.")
    if tokenizer is not None:
        config_dict.update(
            bos_token_id=tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
            eos_token_id=tokenizer.eos_ids if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id if tokenizer.pad_id >= 0 else None,
        )
        tokenizer.save(temporary)
    write_json(config_dict, temporary, "config.json")
    with one_line_errors(path, "written"):
        replace_folder(temporary, path)


def split_into_shards(weights, dtype, parts_of):
    """Tables of the tensors to write, {name: rows}, of SHARD_BYTES at most if there are several."""
    held = {}
    for name, whole in weights:
        places = parts_of(name)
        heights = [height or len(whole) for _, _, height, _ in places]
        for (part, *_), rows in zip(places, whole.split(heights)):
            tensor = rows.to("cpu", dtype, copy=True).contiguous()
            if held and sum(t.nbytes for t in (tensor, *held.values())) > SHARD_BYTES:
                yield held
                held.clear()
            held[part] = tensor
    yield held
