"""Every family of models that opens. Its folder is made here, by code of the test's own, from a
LLaMA, Mistral or Qwen2 of transformers with random weights. Its logits are compared with theirs,
all at once and token by token."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run, small_config
from safetensors.torch import load_file, save_file

from nanosafe import attention, checkpoint, tokenizer
from nanosafe.checkpoint import convert, families, init_from_scratch, meta, model_folder
from nanosafe.rollout import generate

transformers = pytest.importorskip("transformers")
V, D, I, L, H, K, E = 98, 48, 80, 3, 6, 2, 8  # six heads: not a power of two, for ALiBi
TOKENS = torch.randint(0, V, (40,), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": I,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


# ---- the oracle ----


def make_theirs(config=transformers.LlamaConfig, model=transformers.LlamaForCausalLM, **changes):
    """A transformers model whose parameters all differ, biases and norms too."""
    torch.manual_seed(0)
    values = {**SHAPE, "num_key_value_heads": K, "attn_implementation": "eager", **changes}
    theirs = model(config(**values)).eval()
    for name, parameter in theirs.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.1)
    return theirs


def copy_state(theirs):
    return {name: tensor.clone() for name, tensor in theirs.state_dict().items()}


def logits_of(theirs, **options):
    with torch.no_grad():
        return theirs(TOKENS[None], **options).logits[0]


def open_in_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def remove_rope(theirs):
    theirs.model.rotary_emb.inv_freq.zero_()


def normalize_head(theirs, state):
    """Baichuan2 multiplies by its normalised head."""
    with torch.no_grad():
        theirs.lm_head.weight.copy_(torch.nn.functional.normalize(state["lm_head.weight"]))


def alibi_mask(heads, n):
    """Each head's bias, by the ALiBi paper's recipe for a number of heads not a power of two."""
    below = {6: 4, 40: 32}[heads]
    slopes = [2 ** (-8 / below * (i + 1)) for i in range(below)]
    finer = [2 ** (-8 / (2 * below) * (i + 1)) for i in range(2 * below)]
    slopes += finer[0::2][: heads - below]
    mask = torch.full((heads, n, n), float("-inf"))
    for h in range(heads):
        for i in range(n):
            for j in range(i + 1):
                mask[h, i, j] = slopes[h] * (j - i)
    return mask[None]


# ---- ours, compared ----


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


def decode_step_by_step(model, prompt):
    """Logits after each of TOKENS[prompt - 1:], from a prefill and then one cached step each."""
    config, n = model.config, len(TOKENS)
    shape = (1, config.num_key_value_heads, n, config.head_dim)
    caches = [attention.Cache(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
    slot = torch.zeros(1, dtype=torch.int64)
    prefill = attention.pack(ends(0, prompt), prompt, prompt, slots=slot)
    hidden = [model.hidden_states(TOKENS[:prompt], prefill, caches)[-1:]]
    for i in range(prompt, n):
        position = torch.tensor([i])
        mask = (torch.arange(n) <= position[:, None])[:, None, None]
        step = attention.DecodeBatch(position, slot, [(slice(0, 1), mask)])
        hidden.append(model.hidden_states(TOKENS[i : i + 1], step, caches))
    return torch.cat(hidden) @ model.output_embedding().T


@torch.no_grad()
def check_logits(folder, expected):
    """Open a folder, compare its logits by a forward and by cached steps, return the model."""
    model = checkpoint.load(folder)
    n = len(TOKENS)
    assert torch.allclose(model(TOKENS, ends(0, n), n), expected, atol=1e-4)
    assert torch.allclose(decode_step_by_step(model, 25), expected[24:], atol=1e-4)
    # The first of two packed sequences does not see the second.
    assert torch.allclose(model(TOKENS, ends(0, 7, n), n)[:7], expected[:7], atol=1e-4)
    logps = model(TOKENS[:-1], ends(0, n - 1), n - 1, TOKENS[1:])
    all_logps = expected[:-1].log_softmax(-1)
    assert torch.allclose(logps, all_logps.gather(1, TOKENS[1:, None])[:, 0], atol=1e-4)
    return model


def read_saved(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- folders in the layouts of families ----


def write(folder, tensors, removed=(), **config):
    """A folder with these tensors in two files and an index, as Hugging Face divides them."""
    os.makedirs(folder, exist_ok=True)
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    weight_map = {}
    for file, part in halves.items():
        save_file({name: tensors[name].contiguous().clone() for name in part}, folder / file)
        for name in part:
            weight_map[name] = file
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = {**SHAPE, "hidden_act": "silu", **config}
    for key in removed:
        del values[key]
    (folder / "config.json").write_text(json.dumps(values))


def rename(state, pairs):
    renamed = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def fuse(state, name, fuse_qkv):
    """The state with each layer's q, k and v replaced by one tensor."""
    state = dict(state)
    for i in range(L):
        stem = f"model.layers.{i}.self_attn."
        for leaf in ("weight", "bias"):
            if f"{stem}q_proj.{leaf}" in state:
                q, k, v = (state.pop(f"{stem}{letter}_proj.{leaf}") for letter in "qkv")
                state[f"{stem}{name}.{leaf}"] = fuse_qkv(q, k, v)
    return state


def stack(q, k, v):
    """Baichuan: one below the other."""
    return torch.cat([q, k, v])


def group(q, k, v):
    """InternLM2: a kv head's queries, then its key, then its value."""
    tail = q.shape[1:]
    q = q.view(K, H // K * E, *tail)
    k, v = k.view(K, E, *tail), v.view(K, E, *tail)
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


SHORT_NAMES = (
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


def make_internlm2_state(theirs):
    return rename(fuse(theirs.state_dict(), "wqkv", group), SHORT_NAMES)


def make_meta_state(theirs):
    """Meta's names, and the two dimensions that RoPE turns together side by side."""
    state = copy_state(theirs)
    for i in range(L):
        for letter, heads in (("q", H), ("k", K)):
            name = f"model.layers.{i}.self_attn.{letter}_proj.weight"
            halves = state[name].view(heads, 2, E // 2, D)
            state[name] = halves.transpose(1, 2).reshape(heads * E, D)
    projections = [(f"{letter}_proj", f"w{letter}") for letter in "qkv"]
    return rename(state, [("model.", ""), *projections, *SHORT_NAMES])


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
def test_a_family_of_transformers_opens_and_is_written_bit_by_bit(family, tmp_path):
    theirs = make_theirs(**NATIVE[family])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(theirs)
    ours = check_logits(tmp_path / "theirs", expected)
    checkpoint.save(ours, tmp_path / "ours")
    assert_equal_tensors(read_saved(tmp_path / "theirs"), read_saved(tmp_path / "ours"))
    again = open_in_transformers(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert torch.equal(logits_of(again), expected)
    check_logits(tmp_path / "ours", expected)


def test_a_sliding_window_changes_the_logits():
    """Without this, the test above would say nothing about windows."""
    options = NATIVE["mistral v0.1"]
    near = logits_of(make_theirs(**options))
    far = logits_of(make_theirs(**{**options, "sliding_window": None}))
    assert torch.equal(near[:9], far[:9])
    assert not torch.allclose(near[9:], far[9:], atol=1e-3)


# ---- families that transformers does not have: its LLaMA, with tensors renamed and fused ----


def test_internlm(tmp_path):
    theirs = make_theirs(attention_bias=True, num_key_value_heads=H)
    write(
        tmp_path,
        theirs.state_dict(),
        architectures=["InternLMForCausalLM"],
        model_type="internlm",
        bias=True,
        rotary={"base": 10000, "type": "dynamic"},
    )
    ours = check_logits(tmp_path, logits_of(theirs))
    assert ours.layers[0].self_attn.o_proj.bias is not None
    score = checkpoint.load(tmp_path, "score")
    assert score.score_head.bias is None  # the key `bias` is not about the score head
    checkpoint.save(ours, tmp_path / "llama")
    again = open_in_transformers(tmp_path / "llama")
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(logits_of(again), logits_of(theirs))


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2(bias, tmp_path):
    theirs = make_theirs(attention_bias=bias, rope_theta=1e6)
    write(
        tmp_path,
        make_internlm2_state(theirs),
        architectures=["InternLM2ForCausalLM"],
        model_type="internlm2",
        num_key_value_heads=K,
        rope_theta=1e6,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        bias=bias,
    )
    ours = check_logits(tmp_path, logits_of(theirs))
    with pytest.raises(SystemExit, match=r"80 tokens, but .* dynamic RoPE only up to 64"):
        ours(TOKENS.repeat(2), ends(0, 80), 80)
    with pytest.raises(SystemExit, match="lower max_len"):
        generate(ours, [TOKENS.tolist()], 30, eos_ids=[2], seed=0)
    checkpoint.save(ours, tmp_path / "llama")
    assert_equal_tensors(read_saved(tmp_path / "llama"), theirs.state_dict())


def test_baichuan_7b(tmp_path):
    theirs = make_theirs(num_key_value_heads=H)
    write(
        tmp_path,
        fuse(theirs.state_dict(), "W_pack", stack),
        architectures=["BaiChuanForCausalLM"],
        model_type="baichuan",
    )
    ours = check_logits(tmp_path, logits_of(theirs))
    checkpoint.save(ours, tmp_path / "llama")
    again = open_in_transformers(tmp_path / "llama")
    assert torch.equal(logits_of(again), logits_of(theirs))


@pytest.mark.parametrize("generation", [1, 2])
def test_baichuan_13b_and_baichuan2(generation, tmp_path):
    """The 13B models have ALiBi, the second generation a normalised head; both stay Baichuan."""
    theirs = make_theirs(num_key_value_heads=H)
    remove_rope(theirs)
    state = fuse(copy_state(theirs), "W_pack", stack)
    config = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
    config["model_max_length"] = 64
    if generation == 2:
        config["norm_head"] = True
        normalize_head(theirs, state)
    write(tmp_path / "source", state, removed=["max_position_embeddings"], **config)
    expected = logits_of(theirs, attention_mask=alibi_mask(H, len(TOKENS)))
    assert not torch.allclose(expected, logits_of(theirs), atol=1e-3)
    ours = check_logits(tmp_path / "source", expected)
    checkpoint.save(ours, tmp_path / "again")
    check_logits(tmp_path / "again", expected)
    assert_equal_tensors(read_saved(tmp_path / "again"), state)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["model_type"] == "baichuan"
    assert "max_position_embeddings" not in written


def test_baichuan2_7b_has_rope_and_is_known_by_its_vocabulary(tmp_path):
    sizes = {
        "vocab_size": 125696,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    theirs = make_theirs(num_key_value_heads=H, **sizes)
    state = copy_state(theirs)
    stem = "model.layers.0.self_attn."
    q, k, v = (state.pop(f"{stem}{letter}_proj.weight") for letter in "qkv")
    state[stem + "W_pack.weight"] = stack(q, k, v)
    write(tmp_path, state, model_type="baichuan", **sizes)
    normalize_head(theirs, state)
    check_logits(tmp_path, logits_of(theirs))


def test_alibi_slopes_of_forty_heads():
    slopes = attention.alibi_slopes(40)
    assert torch.allclose(slopes[:, None], -alibi_mask(40, 2)[0, :, 1, :1])


def test_the_docs_example_of_one_more_family_is_right(tmp_path, monkeypatch):
    """docs/formats.md adds Seed-OSS in a line, which is taken from there."""
    with open(os.path.join(ROOT, "docs", "formats.md")) as f:
        line = re.search(r'^    "seed_oss": (Family\(.*\)),$', f.read(), re.M)[1]
    theirs = make_theirs(transformers.SeedOssConfig, transformers.SeedOssForCausalLM, head_dim=16)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(SystemExit, match="model_type 'seed_oss' is not supported"):
        checkpoint.load(tmp_path / "theirs")
    monkeypatch.setitem(families.FAMILIES, "seed_oss", eval(line, vars(families)))
    ours = check_logits(tmp_path / "theirs", logits_of(theirs))
    checkpoint.save(ours, tmp_path / "ours")
    again = open_in_transformers(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert torch.equal(logits_of(again), logits_of(theirs))


def test_an_unknown_family_is_refused(tmp_path):
    write(tmp_path, make_theirs().state_dict(), model_type="gemma")
    words = "model_type 'gemma' is not supported: choose one of llama, mistral"
    with pytest.raises(SystemExit, match=words):
        checkpoint.load(tmp_path)


# ---- Meta's own layout ----


META_PARAMS = {"dim": D, "n_layers": L, "n_heads": H, "n_kv_heads": K}


def write_meta_shards(folder, state, shards, embedding_dim):
    """Divide matrices by rows, or by columns, and repeat vectors in each shard."""
    for shard in range(shards):
        part = {"rope.freqs": torch.ones(E // 2)}
        for name, tensor in state.items():
            dim = 0
            if name.endswith(("wo.weight", "w2.weight")):
                dim = 1
            if "tok_emb" in name:
                dim = embedding_dim
            if tensor.dim() > 1:
                tensor = tensor.chunk(shards, dim)[shard]
            part[name] = tensor.clone()
        torch.save(part, folder / f"consolidated.{shard:02d}.pth")


@pytest.mark.parametrize(
    "shards, embedding_dim",
    [(1, 1), (2, 1), (2, 0)],
    ids=["one", "llama 2 in two", "llama 3 in two"],
)
def test_meta_s_own_layout(shards, embedding_dim, tmp_path):
    theirs = make_theirs(rope_theta=5e5)
    write_meta_shards(tmp_path, make_meta_state(theirs), shards, embedding_dim)
    params = {
        **META_PARAMS,
        "vocab_size": -1,
        "multiple_of": 16,
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
    }
    if shards == 2:
        params = {"model": params}
    (tmp_path / "params.json").write_text(json.dumps(params))
    check_logits(tmp_path, logits_of(theirs))
    convert.main([str(tmp_path), str(tmp_path / "hf")])
    again = open_in_transformers(tmp_path / "hf")
    assert torch.equal(logits_of(again), logits_of(theirs))


def test_rope_of_meta_s_llama_3_2_is_scaled(tmp_path):
    torch.save(make_meta_state(make_theirs()), tmp_path / "consolidated.00.pth")
    params = {**META_PARAMS, "use_scaled_rope": True, "rope_theta": 5e5}
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = meta.read_meta_folder(str(tmp_path)).config
    assert config["rope_scaling"]["factor"] == 32.0
    os.remove(tmp_path / "params.json")
    with pytest.raises(SystemExit, match="no params.json"):
        checkpoint.load(tmp_path)


# ---- ranks ----

LOAD_STEP_SAVE = """
import sys
import torch
from nanosafe import checkpoint, optim, parallel

world = parallel.init("cpu")
placements = parallel.choose_placements(world, "float32", "fsdp", "none", False, False, 1)
for folder in sys.argv[1:]:
    model = checkpoint.load(folder, placement=placements.trained)
    optimizer = optim.make_adamw(model, 0.0, 0.9, 0.95)
    tokens = torch.arange(40)
    logps = model(tokens[:-1], torch.tensor([0, 39], dtype=torch.int32), 39, tokens[1:])
    parallel.backward(model, -logps.mean())
    assert optim.guarded_step(model, optimizer, 0.0, 1.0) > 0
    checkpoint.save(model, folder + "/saved")
parallel.close()
"""


def test_ranks_read_their_slices_of_rearranged_rows(tmp_path):
    """Two FSDP ranks load a model, take a step of length zero, and write the same LLaMA."""
    internlm2 = tmp_path / "internlm2"
    baichuan = tmp_path / "baichuan"
    meta_folder = tmp_path / "meta"
    grouped_query = make_theirs()
    state = make_internlm2_state(grouped_query)
    write(internlm2, state, model_type="internlm2", num_key_value_heads=K)
    full = make_theirs(num_key_value_heads=H)
    write(baichuan, fuse(full.state_dict(), "W_pack", stack), model_type="baichuan")
    meta_folder.mkdir()
    torch.save(make_meta_state(grouped_query), meta_folder / "consolidated.00.pth")
    params = {**META_PARAMS, "norm_eps": 1e-5}
    (meta_folder / "params.json").write_text(json.dumps(params))

    (tmp_path / "script.py").write_text(LOAD_STEP_SAVE)
    run(tmp_path / "script.py", internlm2, baichuan, meta_folder, ranks=2)
    assert_equal_tensors(read_saved(internlm2 / "saved"), grouped_query.state_dict())
    assert_equal_tensors(read_saved(baichuan / "saved"), full.state_dict())
    assert_equal_tensors(read_saved(meta_folder / "saved"), grouped_query.state_dict())


# ---- names and files ----


@pytest.mark.parametrize(
    "prefix", ["module.", "_fsdp_wrapped_module.", "base_model.model.", "_orig_mod."]
)
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    theirs = make_theirs()
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    write(tmp_path, state, model_type="llama", num_key_value_heads=K)
    check_logits(tmp_path, logits_of(theirs))


def test_a_classifier_s_score_layer_is_a_score_head(tmp_path):
    classifier = transformers.LlamaForSequenceClassification
    theirs = make_theirs(model=classifier, num_labels=1, pad_token_id=0)
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    assert ours.head == "score"
    assert ours.score_head.bias is None
    scores = ours(TOKENS, ends(0, len(TOKENS)), len(TOKENS))
    expected = logits_of(theirs, attention_mask=torch.ones(1, 40))
    assert torch.allclose(scores[-1], expected[0], atol=1e-5)


def test_a_folder_saved_without_a_head_gets_a_score_head_and_is_no_policy(tmp_path, capsys):
    theirs = make_theirs().model
    theirs.save_pretrained(tmp_path)
    model = checkpoint.load(tmp_path, "score")
    assert "a new one is drawn" in capsys.readouterr().out
    expected = theirs.layers[1].mlp.down_proj.weight
    assert torch.equal(model.layers[1].mlp.down_proj.weight, expected)
    with pytest.raises(SystemExit, match="misses lm_head.weight"):
        checkpoint.load(tmp_path, "lm")


def test_a_head_that_is_left_out_is_named(tmp_path, capsys):
    state = copy_state(make_theirs(tie_word_embeddings=True))
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    write(tmp_path, state, model_type="llama", num_key_value_heads=K, tie_word_embeddings=True)
    model = checkpoint.load(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    out = capsys.readouterr().out
    assert "lm_head.weight is left out: the model uses its embedding" in out
    checkpoint.load(tmp_path, "score")
    assert "lm_head.weight is left out: there is a score head" in capsys.readouterr().out


@pytest.mark.parametrize("row", [None, V - 1], ids=["all rows", "the last row only"])
@pytest.mark.parametrize("family", ["llama", "internlm2"])
def test_a_head_that_differs_from_the_embedding_is_untied(family, row, tmp_path, capsys):
    """config.json ties the two, and the files hold both: transformers 5 unties them, too."""
    theirs = make_theirs()
    if row is not None:
        with torch.no_grad():
            theirs.lm_head.weight[:row] = theirs.model.embed_tokens.weight[:row]
    state = theirs.state_dict() if family == "llama" else make_internlm2_state(theirs)
    source, saved, converted = tmp_path / "source", tmp_path / "saved", tmp_path / "converted"
    options = {"model_type": family, "num_key_value_heads": K, "tie_word_embeddings": True}
    write(source, state, **options)
    expected = logits_of(theirs)
    model = check_logits(source, expected)
    out = capsys.readouterr().out
    assert out.count(".weight differs from the embedding, to which its config.json ties it") == 1
    checkpoint.save(model, saved)
    convert.main([str(source), str(converted)])
    for folder in (saved, converted):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert_equal_tensors(read_saved(folder), theirs.state_dict())
        assert torch.equal(logits_of(open_in_transformers(folder)), expected)
    assert checkpoint.count_parameters(source) == sum(p.numel() for p in theirs.parameters())
    if family == "llama":
        assert torch.equal(logits_of(open_in_transformers(source)), expected)


def test_a_head_that_does_not_fit_a_tied_embedding_is_refused(tmp_path):
    state = copy_state(make_theirs())
    state["lm_head.weight"] = state["lm_head.weight"][:-1]
    write(tmp_path, state, model_type="llama", num_key_value_heads=K, tie_word_embeddings=True)
    with pytest.raises(SystemExit, match="wrong shape or type for lm_head.weight"):
        checkpoint.load(tmp_path)


def test_a_tensor_that_only_the_index_has_stops_the_load(tmp_path):
    write(tmp_path, make_theirs().state_dict(), model_type="llama", num_key_value_heads=K)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="names 'model.ghost', which its files do not hold"):
        checkpoint.load(tmp_path)


def test_a_bin_file_that_holds_no_tensors_is_refused(tmp_path):
    make_theirs().config.save_pretrained(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="something else than a table of tensors"):
        checkpoint.load(tmp_path)


def test_a_bin_file_from_before_torch_1_6_opens(tmp_path):
    theirs = make_theirs()
    theirs.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=False)
    check_logits(tmp_path, logits_of(theirs))


# ---- memory ----

MEASURE_LOAD = """
import json, re, sys, torch
from nanosafe import checkpoint

def read_peak():
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\\s+(\\d+)", f.read())[1]) * 1024

torch.set_num_threads(1)
checkpoint.load(sys.argv[1])
before = read_peak()
model = checkpoint.load(sys.argv[2])
print(json.dumps([read_peak() - before, sum(p.nbytes for p in model.parameters())]))
"""


def turn_into_bin(folder):
    """Write a folder's .safetensors files and their index as .bin files."""
    for shard in folder.glob("model-*"):
        torch.save(load_file(shard), folder / f"pytorch_{shard.stem}.bin")
        os.remove(shard)
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace('"model-0', '"pytorch_model-0')
    text = text.replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    os.remove(index)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_load_takes_no_more_memory_than_the_model_and_a_shard(kind, tmp_path, monkeypatch):
    checkpoint.save(init_from_scratch(small_config()), tmp_path / "small")
    large = small_config(
        vocab_size=20000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8
    )
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 42 * 10**6)
    folder = tmp_path / "large"
    checkpoint.save(init_from_scratch(large), folder)
    sizes = [shard.stat().st_size for shard in folder.glob("model-*")]
    assert len(sizes) > 4
    if kind == "bin":
        turn_into_bin(folder)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_LOAD, tmp_path / "small", folder],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    grown, model_bytes = json.loads(done.stdout.splitlines()[-1])
    assert model_bytes <= grown <= model_bytes + 1.2 * max(sizes)


# ---- the command ----


def test_the_command_converts_a_policy_to_half_precision(tmp_path, world):
    source, half = world / "policy", tmp_path / "half"
    run("-m", "nanosafe.checkpoint", source, half, "--to=hf", "--dtype=bfloat16")
    ours = checkpoint.load(source)
    converted = checkpoint.load(half)
    assert converted.norm.weight.dtype == torch.bfloat16
    assert torch.equal(ours.lm_head.weight.bfloat16(), converted.lm_head.weight)
    assert tokenizer.load(half).fingerprint == tokenizer.load(source).fingerprint


def test_the_command_converts_a_score_model(tmp_path, world):
    convert.main([str(world / "reward"), str(tmp_path / "reward")])
    assert checkpoint.load(tmp_path / "reward").head == "score"


def test_the_command_prints_its_usage(capsys):
    convert.main(["-h"])
    assert capsys.readouterr().out.startswith("python -m nanosafe.checkpoint SOURCE TARGET")


@pytest.mark.parametrize(
    "arguments", [["a"], ["a", "b", "--to=gguf"], ["a", "b", "c"], ["a", "b", "--dtype=int8"]]
)
def test_the_command_refuses_wrong_arguments(arguments):
    with pytest.raises(SystemExit, match="error: python -m nanosafe.checkpoint SOURCE"):
        convert.main(arguments)
