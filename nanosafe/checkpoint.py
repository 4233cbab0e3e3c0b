"""Model folders of the field <-> LLaMA.

What is written is a Hugging Face folder, of a score model with `score_head.weight`; what is read is
that and more (formats.py), row by row into this rank's slice: no rank holds a whole model.

$ python -m nanosafe.checkpoint SOURCE TARGET [--dtype=bfloat16]   # what opens -> a folder"""

import math
import os
import shutil
import sys
import zlib
import torch
from safetensors.torch import save_file
from nanosafe import parallel
from nanosafe.files import CHECKSUMS, damage, make_folder, put_folder, stop, untrusted, write_json
from nanosafe.formats import IGNORED, NORMALIZER, Folder, config_json, parts
from nanosafe.model import Config, LLaMA

SHARD_BYTES = 5 * 10**9
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def load(
    path, head="auto", dtype=None, device="cpu", place=None, vocab_size=0, score_type=None, seed=0
):
    """Read a model folder -> LLaMA. Stops with one line on missing, surplus or misshapen tensors.

    head        "lm", "score", "both", or "auto": what the folder holds. A score head that it lacks
                is drawn, and said.
    dtype       of the parameters; by default that of the files
    place       a parallel.Place instead of dtype and device: for training, and for many ranks
    vocab_size  rows that the tokenizer needs; missing ones are added as the mean of the others
    score_type  "reward", "cost" or "critic", over what the config says"""
    share = (parallel.rank(), parallel.world_size()) if place else (0, 1)
    if os.path.exists(os.path.join(path, CHECKSUMS)) and (name := damage(path, *share, True)):
        stop(f"{os.fspath(path)!r}: {name} is damaged; if you changed it, remove {CHECKSUMS}")
    with untrusted(path):
        folder = Folder(path)
        config, head = read_config(folder, head, score_type)
        known, config.vocab_size = config.vocab_size, max(config.vocab_size, vocab_size)
        fresh = {"score_head.weight"} - set(folder.tensors) if head != "lm" else ()
        places = locate(config, head, folder, fresh, known)
        config_json(config, head)  # what could not be saved is better refused now
    if known < config.vocab_size:
        tell(f"{path}: {config.vocab_size - known} rows for new tokens, each the others' mean")
    place = place or parallel.Place(torch.device(device), dtype=dtype)
    model = build(config, head, place, place.dtype or folder.dtype())
    if fresh:
        tell(f"{path}: no score head there: a new one is drawn")
        draw(model, *fresh, model.score_head.weight, seed)
    with untrusted(path):
        fill(parallel.parameters(model), folder, places)
    return model


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


def build(config, head, place, dtype):
    """A LLaMA at its place, its memory taken and not yet filled."""
    with torch.device("meta"):
        model = LLaMA(config, head).to(dtype)
    parallel.put(model, place)
    if head != "score" and config.tie_word_embeddings:  # to_empty() gave each name its own
        model.lm_head.weight = model.embed_tokens.weight
    return model


def scratch(config, head="lm", seed=0, place=None):
    """A LLaMA with random weights, the same for every layout.
    N(0, initializer_range); outputs into the residual stream are scaled by depth, as in GPT-2."""
    model = build(config, head, place or parallel.Place(torch.device("cpu")), torch.float32)
    for name, p in parallel.parameters(model):
        draw(model, name, p, seed)
    return model


@torch.no_grad()
def draw(model, name, p, seed):
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
        with untrusted(source):
            source = Config.from_dict(Folder(source).config)
    with torch.device("meta"):
        return sum(p.numel() for p in LLaMA(source).parameters())


def copy_rows(target, first, source, start, height, skip=0, step=1):
    """Copy the rows that two slices of a tensor share: `target` begins at its row `first`; `height`
    of the rows of `source` (read lazily), every step-th from `skip` on, at its row `start`."""
    begin, end = max(first, start), min(first + len(target), start + height)
    if begin < end:
        low, high = (skip + (row - start) * step for row in (begin, end - 1))
        rows = slice(low, high + 1) if step == 1 else slice(low, high + 1, step)
        target[begin - first : end - first] = source[rows].to(target)


def locate(config, head, folder, fresh=(), vocab_size=0):
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
        for tensor, first, height, step in parts(config, name, folder.family):
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
    lm_head = parts(config, "lm_head.weight", folder.family)[0][0]
    if lm_head in folder.tensors and lm_head not in shapes:
        why = "there is a score head" if head == "score" else "its embedding is its head"
        tell(f"{folder.path}: {lm_head} is left out: {why}")
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
def fill(parameters, folder, places):
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


@torch.no_grad()
def save(model, path, tokenizer=None, dtype=None, head=None):
    """Write a model folder that transformers opens, in files of 5 GB. A collective.
    Written beside its place and then renamed, with checksums. Of two heads, `head` is written."""
    head = head or model.head
    other = {"lm": "score_head.", "score": "lm_head."}[head]
    weights = (
        (name, parallel.full(p))
        for name, p in parallel.parameters(model)
        if not name.startswith(other)
    )
    dtype = dtype or next(model.parameters()).dtype
    write_folder(path, model.config, head, weights, tokenizer, dtype)
    parallel.barrier()


def write_folder(path, config, head, weights, tokenizer, dtype):
    """Write whole parameters, (name, tensor) one after the other, as a model folder, on rank 0."""
    config_dict, family = config_json(config, head)
    if parallel.rank() > 0:
        for _ in weights:  # it takes all ranks to gather one
            pass
        return
    path = os.fspath(path)
    temporary = path.rstrip("/") + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    files = []  # of each, its tensors' names and bytes
    for held in shards(weights, dtype, lambda name: parts(config, name, family)):
        with untrusted(path, "written"):
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
    with untrusted(path, "written"):
        put_folder(temporary, path)


def shards(weights, dtype, parts_of):
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


def tell(text):
    if parallel.rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    from nanosafe import convert

    convert.main(sys.argv[1:])
