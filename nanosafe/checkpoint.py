"""Model folders of the field <-> LLaMA.

What is written is a Hugging Face folder, of a score model with `score_head.weight`; what is read is
that and more (formats.py), row by row into this rank's slice: no rank holds a whole model.

$ python -m nanosafe.checkpoint SOURCE TARGET [--dtype=bfloat16]   # what opens -> a folder"""

import math
import os
import shutil
import sys
import zlib
from collections import Counter

import torch
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.files import CHECKSUMS, damage, make_folder, put_folder, stop, untrusted, write_json
from nanosafe.formats import IGNORED, NORMALIZER, Folder, config_json, parts
from nanosafe.model import Config, LLaMA

SHARD_BYTES = 5 * 10**9
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64

def load(path, head="auto", dtype=None, device="cpu", place=None, vocab_size=0, score_type=None,
         seed=0):
    """Read a model folder -> LLaMA.

    head        "lm", "score", "both", or "auto": what the folder holds. A score head that it lacks
                is drawn, and said.
    dtype       of the parameters; by default that of the files
    place       a parallel.Place instead of dtype and device: for training, and for many ranks
    vocab_size  rows that the tokenizer needs; missing ones are added as the mean of the others
    score_type  "reward", "cost" or "critic", over what the config says

    Stops with one line that lists missing, surplus or misshapen tensors."""
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
    moments = {name: folder.tensors["normalizer." + name][:].flatten().tolist()
               for name in ("mean", "var") if "normalizer." + name in folder.tensors}
    stated = {"score_type": score_type} if score_type else {}
    config = Config.from_dict({**folder.config, **moments, **stated})
    return config, head if head != "auto" else "score" if scored else "lm"

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
        rows.copy_(torch.normal(0.0, std, p.shape, generator=generator)[start:start + count])

def count_parameters(source):
    """How many parameters a Config, or the model in a folder, has; no weight is read."""
    if not isinstance(source, Config):
        with untrusted(source):
            source = Config.from_dict(Folder(source).config)
    with torch.device("meta"):
        model = LLaMA(source)
    return sum(p.numel() for p in model.parameters())

def copy_rows(target, first, source, start, height, skip=0, step=1):
    """Copy the rows that two slices of a tensor share: `target` begins at its row `first`; `height`
    of the rows of `source` (read lazily), every step-th from `skip` on, at its row `start`."""
    begin, end = max(first, start), min(first + len(target), start + height)
    if begin < end:
        low, high = (skip + (row - start) * step for row in (begin, end - 1))
        rows = slice(low, high + 1) if step == 1 else slice(low, high + 1, step)
        target[begin - first:end - first] = source[rows].to(target)

def locate(config, head, folder, fresh=(), vocab_size=0):
    """Where a model's parameters are in a folder: {parameter: [(tensor, its first row, rows, step,
    row of the parameter)]}. Stops on a tensor missing, misshapen, left over, or of whole numbers.

    vocab_size: the folder's, where the config's is greater."""
    with torch.device("meta"):
        model = LLaMA(config, head)
    missing, misshapen, used, places = [], [], set(), {}
    for name, p in model.named_parameters():
        if name in fresh:
            continue
        heights, places[name] = Counter(), []
        for tensor, first, height, step in parts(config, name, folder.family):
            height = height or len(p)
            places[name].append((tensor, first, height, step, sum(heights.values())))
            heights[tensor] += height
        for tensor, height in heights.items():
            if tensor not in folder.tensors:
                missing.append(tensor)
                continue
            source, want = folder.tensors[tensor], [height, *p.shape[1:]]
            if vocab_size and name in ("embed_tokens.weight", "lm_head.weight"):
                want[0] = vocab_size
            if list(source.shape) != want:
                misshapen.append(f"{tensor} {list(source.shape)}, not {want}")
            elif source[:0].dtype not in FLOATS:
                misshapen.append(f"{tensor}, {source[:0].dtype}")
        used |= set(heights)
    unread = [parts(config, "lm_head.weight", folder.family)[0][0]]
    if unread[0] in folder.tensors and unread[0] not in used:
        why = "there is a score head" if head == "score" else "its embedding is its head"
        tell(f"{folder.path}: {unread[0]} is left out: {why}")
    unread += NORMALIZER if head == "score" else ()
    surplus = [name for name in folder.tensors
               if name not in used and name not in unread and not name.endswith(IGNORED)]
    for what, names in (("misses", missing), ("has a wrong shape or type for", misshapen),
                        ("has no use for", surplus)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            stop(f"{folder.path!r} {what} {', '.join(names[:5])}{more}")
    return places

@torch.no_grad()
def fill(parameters, folder, places):
    """Copy this rank's rows of the parameters, (name, tensor), from the folder, file by file."""
    parameters = dict(parameters)
    work = sorted((folder.files.get(part[0], ""), name, part)
                  for name in places.keys() & parameters.keys() for part in places[name])
    for _, name, (tensor, skip, height, step, start) in work:
        rows, first, count, _ = parallel.local_rows(parameters[name])
        source = folder.tensors[tensor]
        there = min(height, len(range(skip, source.shape[0], step)))
        copy_rows(rows, first, source, start, there, skip, step)
        if there < height and first + count > there:  # rows for new tokens
            rows[max(0, there - first):] = source[:].float().mean(dim=0).to(rows)

@torch.no_grad()
def save(model, path, tokenizer=None, dtype=None, head=None):
    """Write a model folder that transformers opens, in files of 5 GB. A collective.

    Written beside its place and then renamed, with checksums. Of two heads, `head` is written."""
    head = head or model.head
    other = {"lm": "score_head.", "score": "lm_head."}[head]
    weights = ((name, parallel.full(p)) for name, p in parallel.parameters(model)
               if not name.startswith(other))
    dtype = dtype or next(model.parameters()).dtype
    write_folder(path, model.config, head, weights, tokenizer, dtype)
    parallel.barrier()

def write_folder(path, config, head, weights, tokenizer, dtype):
    """Write whole parameters, (name, tensor) one after the other, as a model folder, on rank 0."""
    config_dict, family = config_json(config, head)
    main = parallel.rank() == 0
    path = os.fspath(path)
    temporary = path.rstrip("/") + ".tmp"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
    held, files, index, size, total = {}, [], {}, 0, 0

    def flush():
        files.append(f"part-{len(files)}")
        with untrusted(path, "written"):
            save_file(held, os.path.join(temporary, files[-1]), metadata={"format": "pt"})
        index.update({name: len(files) - 1 for name in held})
        held.clear()

    for name, whole in weights:
        if not main:
            continue
        offset = 0
        for part, _, height, _ in parts(config, name, family):
            height = height or len(whole)
            tensor = whole[offset:offset + height].to("cpu", dtype, copy=True).contiguous()
            offset += height
            if held and size + tensor.nbytes > SHARD_BYTES:
                flush()
                size = 0
            held[part] = tensor
            size, total = size + tensor.nbytes, total + tensor.nbytes
    if main:
        flush()
        config_dict["torch_dtype"] = config_dict["dtype"] = str(dtype).removeprefix("torch.")
        finish_folder(temporary, config_dict, tokenizer, files, index, total)
        with untrusted(path, "written"):
            put_folder(temporary, path)

def finish_folder(folder, config, tokenizer, files, index, total):
    names = (["model.safetensors"] if len(files) == 1 else
             [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))])
    for old, new in zip(files, names):
        os.rename(os.path.join(folder, old), os.path.join(folder, new))
    if len(files) > 1:
        weight_map = {name: names[i] for name, i in sorted(index.items())}
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder,
                   "model.safetensors.index.json")
    if tokenizer is not None:
        config.update(
            bos_token_id=tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
            eos_token_id=tokenizer.eos_ids if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id if tokenizer.pad_id >= 0 else None)
        tokenizer.save(folder)
    write_json(config, folder, "config.json")

def tell(text):
    if parallel.rank() == 0:
        print(text, flush=True)

if __name__ == "__main__":
    from nanosafe import convert
    convert.main(sys.argv[1:])
