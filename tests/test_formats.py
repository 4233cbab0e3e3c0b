"""Every family of models that opens: its folder made here from a transformers LLaMA, Mistral or Qwen2 with random
weights, by code of the test's own, and its logits compared with theirs, all at once and token by token."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run, small_config
from safetensors.torch import load_file, save_file

from nanosafe import attention, checkpoint, tokenizer
from nanosafe.checkpoint import convert, families
from nanosafe.rollout import generate
from nanosafe.checkpoint import init_from_scratch, model_folder

transformers = pytest.importorskip("transformers")
V, D, I, L, H, K, E = 98, 48, 80, 3, 6, 2, 8  # six heads: no power of two, for ALiBi
TOKENS = torch.randint(0, V, (40,), generator=torch.Generator().manual_seed(1))


def theirs_with(config=transformers.LlamaConfig, model=transformers.LlamaForCausalLM, **changes):
    """A random transformers model whose every parameter, biases and norms too, is told apart from the others'."""
    torch.manual_seed(0)
    made = model(
        config(
            **{
                "vocab_size": V,
                "hidden_size": D,
                "intermediate_size": I,
                "num_hidden_layers": L,
                "num_attention_heads": H,
                "num_key_value_heads": K,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
                "attn_implementation": "eager",
                "tie_word_embeddings": False,
                **changes,
            }
        )
    ).eval()
    for name, p in made.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.1)
    return made


def logits_of(theirs, **options):
    with torch.no_grad():
        return theirs(TOKENS[None], **options).logits[0]


def without_rope(theirs):
    theirs.model.rotary_emb.inv_freq.zero_()
    return theirs


def decoded(model, prompt):
    """Logits after each of TOKENS[prompt - 1:], from a prefill and then one cached step after the other."""
    c, n = model.config, len(TOKENS)
    shape = 1, c.num_key_value_heads, n, c.head_dim
    caches = [attention.Cache(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
    row = torch.zeros(1, dtype=torch.int64)
    head = attention.pack(torch.tensor([0, prompt], dtype=torch.int32), prompt, prompt, slots=row)
    out = [model.hidden_states(TOKENS[:prompt], head, caches)[-1:]]
    for i in range(prompt, n):
        position = torch.tensor([i])
        mask = (torch.arange(n) <= position[:, None])[:, None, None]
        out.append(
            model.hidden_states(
                TOKENS[i : i + 1],
                attention.DecodeBatch(position, row, [(slice(0, 1), mask)]),
                caches,
            )
        )
    return torch.cat(out) @ model.output_embedding().T


@torch.no_grad()
def compare(folder, expected):
    """Opens the folder; its logits are the expected ones, forward and by cached steps; returns the model."""
    model = checkpoint.load(folder)
    cu_seqlens = torch.tensor([0, len(TOKENS)], dtype=torch.int32)
    assert torch.allclose(model(TOKENS, cu_seqlens, len(TOKENS)), expected, atol=1e-4)
    assert torch.allclose(decoded(model, 25), expected[24:], atol=1e-4)
    two = torch.tensor(
        [0, 7, len(TOKENS)], dtype=torch.int32
    )  # the first of two packed sequences is not disturbed
    assert torch.allclose(model(TOKENS, two, len(TOKENS))[:7], expected[:7], atol=1e-4)
    logps = model(
        TOKENS[:-1],
        torch.tensor([0, len(TOKENS) - 1], dtype=torch.int32),
        len(TOKENS) - 1,
        TOKENS[1:],
    )
    assert torch.allclose(
        logps, expected[:-1].log_softmax(-1).gather(1, TOKENS[1:, None])[:, 0], atol=1e-4
    )
    return model


def write(folder, tensors, **config):
    """A folder with these tensors in two files and an index, as Hugging Face divides them."""
    os.makedirs(folder, exist_ok=True)
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in halves.items():
        save_file(
            {name: tensors[name].contiguous().clone() for name in part}, os.path.join(folder, file)
        )
    index = {
        "metadata": {},
        "weight_map": {name: file for file, part in halves.items() for name in part},
    }
    shape = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": I,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    for name, value in (
        ("model.safetensors.index.json", index),
        ("config.json", {**shape, **config}),
    ):
        with open(os.path.join(folder, name), "w") as f:
            json.dump({key: v for key, v in value.items() if v is not ...}, f)


def renamed(state, *pairs):
    def new(name):
        for old, replacement in pairs:
            name = name.replace(old, replacement)
        return name

    return {new(name): tensor for name, tensor in state.items()}


def fused(state, name, fuse):
    """The state with each layer's q, k and v replaced by one tensor."""
    state = dict(state)
    for i in range(L):
        stem = f"model.layers.{i}.self_attn."
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{stem}{x}_proj.{leaf}", None) for x in "qkv"]
            if parts[0] is not None:
                state[f"{stem}{name}.{leaf}"] = fuse(*parts)
    return state


def grouped(q, k, v):
    """InternLM2: a kv head's queries, then its key, then its value."""
    tail = q.shape[1:]
    g = H // K
    return torch.cat(
        [
            torch.cat((q.view(K, g * E, *tail)[j], k.view(K, E, *tail)[j], v.view(K, E, *tail)[j]))
            for j in range(K)
        ]
    )


def short_names(state):
    return renamed(
        state,
        ("self_attn", "attention"),
        ("o_proj", "wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    )


# ---- families that transformers has ----

NATIVE = {
    "llama 2": {},
    "tied": {"tie_word_embeddings": True},
    "mistral v0.2": {
        "config": transformers.MistralConfig,
        "model": transformers.MistralForCausalLM,
        "sliding_window": None,
    },
    "mistral v0.1": {
        "config": transformers.MistralConfig,
        "model": transformers.MistralForCausalLM,
        "sliding_window": 9,
    },
    "qwen2": {"config": transformers.Qwen2Config, "model": transformers.Qwen2ForCausalLM},
    "qwen2 tied": {
        "config": transformers.Qwen2Config,
        "model": transformers.Qwen2ForCausalLM,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("family", NATIVE)
def test_native_families_open_and_go_back_bit_by_bit(family, tmp_path):
    theirs = theirs_with(**NATIVE[family])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(theirs)
    ours = compare(tmp_path / "theirs", expected)
    checkpoint.save(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    # A Mistral without a window is a LLaMA.
    assert type(again) is (
        transformers.LlamaForCausalLM if family == "mistral v0.2" else type(theirs)
    )
    assert torch.equal(logits_of(again), expected)
    compare(tmp_path / "ours", expected)


def test_a_window_is_seen():
    """So that the test above means something: the window changes the logits, from the tenth token on."""
    options = NATIVE["mistral v0.1"]
    near, far = (
        logits_of(theirs_with(**options)),
        logits_of(theirs_with(**{**options, "sliding_window": None})),
    )
    assert torch.equal(near[:9], far[:9]) and not torch.allclose(near[9:], far[9:], atol=1e-3)


def test_qwen2_with_a_window_in_some_layers_is_refused(tmp_path):
    theirs_with(**NATIVE["qwen2"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_sliding_window": True}))
    with pytest.raises(SystemExit, match="only some layers have a window"):
        checkpoint.load(tmp_path)


# ---- families that transformers has not: a LLaMA of theirs, its tensors renamed and fused ----


def test_internlm(tmp_path):
    theirs = theirs_with(attention_bias=True, num_key_value_heads=H)
    write(
        tmp_path,
        theirs.state_dict(),
        architectures=["InternLMForCausalLM"],
        model_type="internlm",
        bias=True,
        rotary={"base": 10000, "type": "dynamic"},
    )
    ours = compare(tmp_path, logits_of(theirs))
    assert ours.layers[0].self_attn.o_proj.bias is not None
    score = checkpoint.load(tmp_path, "score")  # its key `bias` is not the score head's
    assert score.score_head.bias is None
    checkpoint.save(ours, tmp_path / "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama", attn_implementation="eager"
    )
    assert type(again) is transformers.LlamaForCausalLM and torch.equal(
        logits_of(again), logits_of(theirs)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2(bias, tmp_path):
    theirs = theirs_with(attention_bias=bias, rope_theta=1e6)
    state = short_names(fused(theirs.state_dict(), "wqkv", grouped))
    write(
        tmp_path,
        state,
        architectures=["InternLM2ForCausalLM"],
        model_type="internlm2",
        num_key_value_heads=K,
        rope_theta=1e6,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        bias=bias,
    )
    ours = compare(tmp_path, logits_of(theirs))
    with pytest.raises(SystemExit, match="80 tokens, but beyond 64 this model's RoPE"):
        ours(TOKENS.repeat(2), torch.tensor([0, 80], dtype=torch.int32), 80)
    with pytest.raises(SystemExit, match="lower max_len"):
        generate(ours, [TOKENS.tolist()], 30, eos_ids=[2], seed=0)
    checkpoint.save(ours, tmp_path / "llama")
    saved, state = load_file(tmp_path / "llama" / "model.safetensors"), theirs.state_dict()
    assert saved.keys() == state.keys() and all(
        torch.equal(saved[name], state[name]) for name in state
    )


def test_baichuan_7b(tmp_path):
    theirs = theirs_with(num_key_value_heads=H)
    write(
        tmp_path,
        fused(theirs.state_dict(), "W_pack", lambda *qkv: torch.cat(qkv)),
        architectures=["BaiChuanForCausalLM"],
        model_type="baichuan",
    )
    checkpoint.save(compare(tmp_path, logits_of(theirs)), tmp_path / "llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama", attn_implementation="eager"
    )
    assert torch.equal(logits_of(again), logits_of(theirs))


def normed(theirs, state):
    """Baichuan2: what is multiplied is the normalised head."""
    with torch.no_grad():
        theirs.lm_head.weight.copy_(torch.nn.functional.normalize(state["lm_head.weight"]))
    return theirs


def alibi_mask(heads, n):
    """The bias of each head, by the recipe of the ALiBi paper for a number of heads that is no power of two."""
    below = {6: 4, 40: 32}[heads]
    slopes = [2 ** (-8 / below * (i + 1)) for i in range(below)]
    slopes += [2 ** (-8 / (2 * below) * (i + 1)) for i in range(2 * below)][0::2][: heads - below]
    mask = torch.full((heads, n, n), float("-inf"))
    for h in range(heads):
        for i in range(n):
            for j in range(i + 1):
                mask[h, i, j] = slopes[h] * (j - i)
    return mask[None]


@pytest.mark.parametrize("generation", [1, 2])
def test_baichuan_13b_and_baichuan2(generation, tmp_path):
    """ALiBi (the 13B models) and the normalised head (the second generation); both go back as Baichuan."""
    theirs = without_rope(theirs_with(num_key_value_heads=H))
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    state = fused(state, "W_pack", lambda *qkv: torch.cat(qkv))
    write(
        tmp_path / "source",
        state,
        architectures=["BaichuanForCausalLM"],
        model_type="baichuan",
        max_position_embeddings=...,
        model_max_length=64,
        **({"norm_head": True} if generation == 2 else {}),
    )
    if generation == 2:
        normed(theirs, state)
    expected = logits_of(theirs, attention_mask=alibi_mask(H, len(TOKENS)))
    assert not torch.allclose(expected, logits_of(theirs), atol=1e-3)
    ours = compare(tmp_path / "source", expected)
    checkpoint.save(ours, tmp_path / "again")
    compare(tmp_path / "again", expected)
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == state.keys() and all(
        torch.equal(saved[name], state[name]) for name in state
    )
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == "baichuan" and "max_position_embeddings" not in config


def test_baichuan2_7b_has_rope_and_is_known_by_its_vocabulary(tmp_path):
    theirs = theirs_with(
        num_key_value_heads=H,
        vocab_size=125696,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
    )
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    stem = "model.layers.0.self_attn."
    state[stem + "W_pack.weight"] = torch.cat([state.pop(f"{stem}{x}_proj.weight") for x in "qkv"])
    write(
        tmp_path,
        state,
        model_type="baichuan",
        vocab_size=125696,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
    )
    compare(tmp_path, logits_of(normed(theirs, state)))


def test_alibi_of_forty_heads():
    from nanosafe.attention import alibi_slopes

    assert torch.allclose(alibi_slopes(40)[:, None], -alibi_mask(40, 2)[0, :, 1, :1])


def test_the_docs_example_of_one_more_family_is_right(tmp_path, monkeypatch):
    """docs/formats.md adds Phi-3 in a line; the line is taken from there."""
    with open(os.path.join(ROOT, "docs", "formats.md")) as f:
        line = re.search(r'^    "phi3": (Family\(.*\)),$', f.read(), re.M)[1]
    theirs = theirs_with(
        transformers.Phi3Config, transformers.Phi3ForCausalLM, sliding_window=9, pad_token_id=0
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="model_type 'phi3' is not known here"):
        checkpoint.load(tmp_path)
    monkeypatch.setitem(families.FAMILIES, "phi3", eval(line, vars(families)))
    compare(tmp_path, logits_of(theirs))


def test_an_unknown_family_is_refused(tmp_path):
    write(tmp_path, theirs_with().state_dict(), model_type="gemma")
    with pytest.raises(SystemExit, match="model_type 'gemma' is not known here: llama, mistral"):
        checkpoint.load(tmp_path)


# ---- layouts that are no Hugging Face folder ----


def meta_state(theirs):
    """Meta's names, and RoPE's pairs side by side."""
    pairs = lambda w, n: w.view(n, 2, E // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
    state = dict(theirs.state_dict())
    for i in range(L):
        for x, n in (("q", H), ("k", K)):
            name = f"model.layers.{i}.self_attn.{x}_proj.weight"
            state[name] = pairs(state[name], n)
    return renamed(
        state,
        ("model.", ""),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attention_norm"),
        ("embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    )


@pytest.mark.parametrize(
    "shards, embedding", [(1, 1), (2, 1), (2, 0)], ids=["one", "llama 2 in two", "llama 3 in two"]
)
def test_meta_s_own_layout(shards, embedding, tmp_path):
    theirs = theirs_with(rope_theta=5e5)
    state = meta_state(theirs)
    for shard in range(shards):
        part = {}
        for name, tensor in state.items():
            dim = (
                1
                if name.endswith(("wo.weight", "w2.weight"))
                else embedding
                if "tok_emb" in name
                else 0
            )
            part[name] = (tensor if tensor.dim() == 1 else tensor.chunk(shards, dim)[shard]).clone()
        part["rope.freqs"] = torch.ones(E // 2)
        torch.save(part, tmp_path / f"consolidated.{shard:02d}.pth")
    params = {
        "dim": D,
        "n_layers": L,
        "n_heads": H,
        "n_kv_heads": K,
        "vocab_size": -1,
        "multiple_of": 16,
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
    }
    (tmp_path / "params.json").write_text(json.dumps({"model": params} if shards == 2 else params))
    compare(tmp_path, logits_of(theirs))
    convert.main([str(tmp_path), str(tmp_path / "hf")])
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    assert torch.equal(logits_of(again), logits_of(theirs))


def test_meta_s_llama_3_2_has_its_rope_scaled(tmp_path):
    from nanosafe.checkpoint.meta import read_meta_folder

    torch.save(meta_state(theirs_with()), tmp_path / "consolidated.00.pth")
    params = {
        "dim": D,
        "n_layers": L,
        "n_heads": H,
        "n_kv_heads": K,
        "use_scaled_rope": True,
        "rope_theta": 5e5,
    }
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert read_meta_folder(str(tmp_path))[0]["rope_scaling"]["factor"] == 32.0
    with pytest.raises(SystemExit, match="no params.json"):
        os.remove(tmp_path / "params.json")
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("version, shared", [(0, False), (0, True), (1, False), (1, True)])
def test_llama2c_s_files(version, shared, tmp_path):
    theirs = theirs_with(tie_word_embeddings=shared)
    state = meta_state(theirs)
    per_layer = lambda name: torch.stack([state[f"layers.{i}.{name}.weight"] for i in range(L)])
    attention, mlp = [f"attention.w{x}" for x in "qkvo"], [f"feed_forward.w{i}" for i in (1, 2, 3)]
    head = [] if shared else [state["output.weight"]]
    dims = [D, I, L, H, K, V, 64]
    if version == 0:
        dims[5] *= 1 if shared else -1
        header = struct.pack("<7i", *dims)
        order = [
            state["tok_embeddings.weight"],
            *map(per_layer, ["attention_norm", *attention, "ffn_norm", *mlp]),
            state["norm.weight"],
            torch.ones(64, E // 2),
            torch.ones(64, E // 2),
            *head,
        ]
    else:
        header = (struct.pack("<Ii7iB", 0x616B3432, 1, *dims, shared)).ljust(256, b"\0")
        order = [
            *map(per_layer, ["attention_norm", "ffn_norm"]),
            state["norm.weight"],
            state["tok_embeddings.weight"],
            *map(per_layer, [*attention, *mlp]),
            *head,
        ]
    path = tmp_path / "model.bin"
    path.write_bytes(header + b"".join(t.detach().numpy().tobytes() for t in order))
    compare(path, logits_of(theirs))
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) - 4)
    with pytest.raises(SystemExit, match="it is cut short"):
        checkpoint.load(path)
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 2).ljust(300, b"\0"))
    with pytest.raises(SystemExit, match="version 2 of llama2.c's files is not known"):
        checkpoint.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="no llama2.c model"):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", ["internlm2", "baichuan", "meta"])
def test_ranks_read_their_slices_of_rearranged_rows(kind, tmp_path, world):
    """What two FSDP ranks load, train for a step of length zero and write is the LLaMA that it was made from."""
    shutil.copy(world / "tokenizer" / "tokenizer.model", tmp_path)
    theirs = theirs_with(
        vocab_size=tokenizer.load(tmp_path).vocab_size,
        num_key_value_heads=H if kind == "baichuan" else K,
    )
    state = theirs.state_dict()
    if kind == "internlm2":
        write(
            tmp_path,
            short_names(fused(state, "wqkv", grouped)),
            model_type=kind,
            num_key_value_heads=K,
            vocab_size=theirs.config.vocab_size,
        )
    elif kind == "baichuan":
        write(
            tmp_path,
            fused(state, "W_pack", lambda *qkv: torch.cat(qkv)),
            model_type=kind,
            vocab_size=theirs.config.vocab_size,
        )
    else:
        torch.save(meta_state(theirs), tmp_path / "consolidated.00.pth")
        (tmp_path / "params.json").write_text(
            json.dumps({"dim": D, "n_layers": L, "n_heads": H, "n_kv_heads": K, "norm_eps": 1e-5})
        )
    run(
        "train_sft.py",
        f"--init_from={tmp_path}",
        f"--data={world}/data/sft/train.jsonl:9/-1",
        "--eval_data=",
        f"--out_dir={tmp_path}/out",
        "--max_steps=1",
        "--batch_size=4",
        "--learning_rate=0",
        "--weight_decay=0",
        "--parallel=fsdp",
        "--max_len=200",
        "--max_tokens=1024",
        ranks=2,
    )
    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert saved.keys() == state.keys() and all(
        torch.equal(saved[name], state[name]) for name in state
    )


# ---- names and files ----


@pytest.mark.parametrize(
    "prefix", ["module.", "_fsdp_wrapped_module.", "base_model.model.", "_orig_mod."]
)
def test_wrappers_names_are_stripped(prefix, tmp_path):
    theirs = theirs_with()
    write(
        tmp_path,
        {prefix + name: tensor for name, tensor in theirs.state_dict().items()},
        model_type="llama",
        num_key_value_heads=K,
    )
    compare(tmp_path, logits_of(theirs))


def test_a_folder_saved_without_a_head_and_one_for_sequence_classification(tmp_path, capsys):
    theirs = theirs_with(
        model=transformers.LlamaForSequenceClassification, num_labels=1, pad_token_id=0
    )
    theirs.save_pretrained(tmp_path / "classifier")
    ours = checkpoint.load(tmp_path / "classifier")
    assert ours.head == "score" and ours.score_head.bias is None
    scores = ours(TOKENS, torch.tensor([0, len(TOKENS)], dtype=torch.int32), len(TOKENS))
    with torch.no_grad():
        assert torch.allclose(
            scores[-1],
            theirs(TOKENS[None], attention_mask=torch.ones(1, 40)).logits[0, 0],
            atol=1e-5,
        )
    theirs.model.save_pretrained(tmp_path / "headless")
    model = checkpoint.load(tmp_path / "headless", "score")
    assert "a new one is drawn" in capsys.readouterr().out
    assert torch.equal(
        model.layers[1].mlp.down_proj.weight, theirs.model.layers[1].mlp.down_proj.weight
    )
    with pytest.raises(SystemExit, match="misses lm_head.weight"):
        checkpoint.load(tmp_path / "headless", "lm")


def test_what_is_left_out_is_said(tmp_path, capsys):
    theirs = theirs_with()
    write(
        tmp_path,
        theirs.state_dict(),
        model_type="llama",
        num_key_value_heads=K,
        tie_word_embeddings=True,
    )
    checkpoint.load(tmp_path)
    assert "lm_head.weight is left out: its embedding is its head" in capsys.readouterr().out
    checkpoint.load(tmp_path, "score")
    assert "lm_head.weight is left out: there is a score head" in capsys.readouterr().out


def test_an_index_that_lies_and_files_of_other_things(tmp_path):
    write(tmp_path, theirs_with().state_dict(), model_type="llama", num_key_value_heads=K)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="names 'model.ghost', which its files do not hold"):
        checkpoint.load(tmp_path)
    os.remove(path)
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="something else than a table of tensors"):
        checkpoint.load(tmp_path)


def test_a_bin_file_from_before_torch_1_6_opens(tmp_path):
    theirs = theirs_with()
    theirs.config.save_pretrained(tmp_path)
    torch.save(
        theirs.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    compare(tmp_path, logits_of(theirs))


MEASURE = """
import json, re, sys, torch
from nanosafe import checkpoint
torch.set_num_threads(1)
checkpoint.load(sys.argv[1])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = checkpoint.load(sys.argv[2])
print(json.dumps([peak() - before, sum(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory"
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_load_takes_no_more_memory_than_the_model_and_a_shard(kind, tmp_path, monkeypatch):
    checkpoint.save(init_from_scratch(small_config()), tmp_path / "small")
    model = init_from_scratch(
        small_config(vocab_size=20000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    )
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 42 * 10**6)
    folder = tmp_path / "large"
    checkpoint.save(model, folder)
    shards = sorted(folder.glob("model-*"))
    assert len(shards) > 4
    largest = max(shard.stat().st_size for shard in shards)
    if kind == "bin":
        for shard in shards:
            torch.save(load_file(shard), folder / f"pytorch_{shard.stem}.bin")
            os.remove(shard)
        text = (folder / "model.safetensors.index.json").read_text()
        text = text.replace('"model-0', '"pytorch_model-0').replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        os.remove(folder / "model.safetensors.index.json")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", folder],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    grown, held = json.loads(done.stdout.splitlines()[-1])
    assert held <= grown <= held + 1.2 * largest, (grown, held, largest)


def test_the_command_converts_and_refuses(tmp_path, world):
    run(
        "-m",
        "nanosafe.checkpoint",
        world / "policy",
        tmp_path / "half",
        "--to=hf",
        "--dtype=bfloat16",
    )
    ours, half = checkpoint.load(world / "policy"), checkpoint.load(tmp_path / "half")
    assert half.norm.weight.dtype == torch.bfloat16
    assert torch.equal(ours.lm_head.weight.bfloat16(), half.lm_head.weight)
    assert (
        tokenizer.load(tmp_path / "half").fingerprint
        == tokenizer.load(world / "policy").fingerprint
    )
    convert.main([str(world / "reward"), str(tmp_path / "reward")])
    assert checkpoint.load(tmp_path / "reward").head == "score"
    for arguments in (["a"], ["a", "b", "--to=gguf"], ["a", "b", "c"], ["a", "b", "--dtype=int8"]):
        with pytest.raises(SystemExit, match="error: python -m nanosafe.checkpoint SOURCE"):
            convert.main(arguments)
