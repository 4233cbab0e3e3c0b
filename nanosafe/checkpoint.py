"""
Model folders of the field <-> LLaMA.

A model folder is Hugging Face's: config.json, safetensors (or .bin) files, a tokenizer. A score
model is the same folder with `score_head.weight`. Weights are read row by row into this rank's
slice of a model built without memory: no rank ever holds a sharded model in full.
"""

import math
import os
import shutil
import zlib

import torch
from safetensors.torch import save_file

from nanosafe import parallel
from nanosafe.formats import IGNORED, NORMALIZER, Folder, hf_names
from nanosafe.model import Config, LLaMA
from nanosafe.tokenizer import write_json

SHARD_BYTES = 5 * 10**9


def load(path, head="auto", dtype=None, device="cpu", place=None, vocab_size=0, score_type=None,
         seed=0):
    """Read a model folder -> LLaMA.

    head        "lm", "score", or "auto": what the folder holds. A score head that the folder lacks
                is drawn anew, and said.
    dtype       of the parameters; by default that of the files
    place       a parallel.Place instead of dtype and device: for training, and for many ranks
    vocab_size  rows that the tokenizer needs; missing ones are added as the mean of the others
    score_type  "reward", "cost" or "critic", over what the config says

    Stops with one line that lists missing, surplus or misshapen tensors.
    """
    folder = Folder(path)
    config = Config.from_dict(folder.config)
    has_score = folder.has("score_head.weight")
    if head == "auto":
        head = "score" if has_score else "lm"
    if head == "lm" and has_score:
        raise SystemExit(f"error: {path!r} is a score model: it cannot generate text")
    config.score_bias = folder.has("score_head.bias") if has_score else config.score_bias
    for name in ("mean", "var"):
        if folder.has("normalizer." + name):
            setattr(config, name, folder.slice("normalizer." + name)[:].flatten().tolist())
    config.score_type = score_type or config.score_type
    if vocab_size > config.vocab_size:
        tell(f"{path}: {vocab_size - config.vocab_size} rows for new tokens, each the mean of the "
             "others")
        config.vocab_size = vocab_size
    place = place or parallel.Place(torch.device(device), dtype=dtype)
    model = build(config, head, place, place.dtype or folder.dtype())
    fresh = () if head == "lm" or has_score else ("score_head.weight", "score_head.bias")
    if fresh:
        tell(f"{path}: no score head there: a new one is drawn")
    fill(model, folder, fresh, seed)
    return model


def scratch(config, head="lm", seed=0, place=None):
    """A LLaMA with random weights, the same for every layout.

    N(0, initializer_range); outputs into the residual stream are scaled by depth, as in GPT-2.
    """
    model = build(config, head, place or parallel.Place(torch.device("cpu")), torch.float32)
    for name, p in parallel.parameters(model):
        draw(model, name, p, seed)
    return model


def build(config, head, place, dtype):
    """A LLaMA at its place, its memory taken and not yet filled."""
    with torch.device("meta"):
        model = LLaMA(config, head).to(dtype)
    parallel.put(model, place)
    if head == "lm" and config.tie_word_embeddings:  # to_empty() gave each name a tensor of its own
        model.lm_head.weight = model.embed_tokens.weight
    return model


def count_parameters(source):
    """How many parameters a Config, or the model in a folder, has; nothing is read."""
    config = source if isinstance(source, Config) else Config.from_dict(Folder(source).config)
    with torch.device("meta"):
        model = LLaMA(config)
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def draw(model, name, p, seed):
    """Initialise this rank's rows of a parameter from a generator of the parameter's own, so that
    no layout changes them."""
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


def copy_rows(target, first, source, start, height):
    """Copy the rows that two slices of a tensor share: `target` begins at its row `first`, `source`
    (read lazily, `height` rows) at `start`."""
    begin, end = max(first, start), min(first + len(target), start + height)
    if begin < end:
        target[begin - first:end - first] = source[begin - start:end - start].to(target)


@torch.no_grad()
def fill(model, folder, fresh, seed):
    """Copy this rank's rows of every parameter from the folder; draw those in `fresh`."""
    missing, misshapen, used = [], [], set()
    for name, p in parallel.parameters(model):
        if name in fresh:
            draw(model, name, p, seed)
            continue
        parts = hf_names(model.config, name)
        used.update(part for part, _ in parts)
        absent = [part for part, _ in parts if not folder.has(part)]
        missing += absent
        if absent:
            continue
        grows = name in ("embed_tokens.weight", "lm_head.weight")
        rows, first, count, _ = parallel.local_rows(p)
        offset = 0  # of the part, in the parameter's rows
        for part, height in parts:
            shape = folder.shape(part)
            want = [height or len(p), *p.shape[1:]]
            if shape != want and not (grows and shape[0] < want[0] and shape[1:] == want[1:]):
                misshapen.append(f"{part} {shape}, not {want}")
                break
            tensor = folder.slice(part)
            copy_rows(rows, first, tensor, offset, shape[0])
            if shape[0] < want[0] and first + count > shape[0]:
                rows[max(0, shape[0] - first):] = tensor[:].float().mean(dim=0).to(rows)
            offset += want[0]
    allowed = ({*used, *NORMALIZER, "lm_head.weight"}
               if model.head == "score" else {*used, "lm_head.weight"})
    surplus = [name for name in folder.names if name not in allowed and not name.endswith(IGNORED)]
    for what, names in (("misses", missing), ("has a wrong shape for", misshapen),
                        ("has no use for", surplus)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise SystemExit(f"error: {folder.path!r} {what} {', '.join(names[:5])}{more}")



@torch.no_grad()
def save(model, path, tokenizer=None, dtype=None):
    """Write a model folder that transformers opens, in files of 5 GB; a collective when the model
    is sharded.

    Written beside its place and then renamed: a reader finds the old folder or the new one.
    """
    main = parallel.rank() == 0
    path = os.fspath(path)
    temporary = path.rstrip("/") + ".tmp"
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    held, files, index, total = {}, [], {}, 0

    def flush():
        files.append(f"part-{len(files)}")
        save_file(held, os.path.join(temporary, files[-1]), metadata={"format": "pt"})
        index.update({name: len(files) - 1 for name in held})
        held.clear()

    for name, p in parallel.parameters(model):
        whole = parallel.full(p)
        if not main:
            continue
        offset = 0
        for part, height in hf_names(model.config, name):
            height = height or len(whole)
            tensor = (whole[offset:offset + height].to("cpu", dtype or whole.dtype,
                                                       copy=True).contiguous())
            offset += height
            size = tensor.numel() * tensor.element_size()
            if (held and size + sum(t.numel() * t.element_size()
                                    for t in held.values()) > SHARD_BYTES):
                flush()
            held[part] = tensor
            total += size
    if main:
        flush()
        finish_folder(model, temporary, tokenizer, files, index, total, dtype)
        replace_folder(temporary, path)
    parallel.barrier()


def finish_folder(model, folder, tokenizer, files, index, total, dtype):
    names = (["model.safetensors"] if len(files) == 1 else
             [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))])
    for old, new in zip(files, names):
        os.rename(os.path.join(folder, old), os.path.join(folder, new))
    if len(files) > 1:
        weight_map = {name: names[i] for name, i in sorted(index.items())}
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder,
                   "model.safetensors.index.json")
    config = model.config.to_dict(model.head)
    name = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    config["torch_dtype"] = config["dtype"] = name
    if tokenizer is not None:
        config.update(
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_ids if len(tokenizer.eos_ids) > 1 else tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id if tokenizer.pad_id >= 0 else None,
        )
        tokenizer.save(folder)
    write_json(config, folder, "config.json")


def replace_folder(source, target):
    """Put the finished folder `source` in the place of `target`."""
    sync_tree(source)
    old = target.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(target):
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder):
    for name in (*os.listdir(folder), "."):
        handle = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def tell(text):
    if parallel.rank() == 0:
        print(text, flush=True)
