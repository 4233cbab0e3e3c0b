"""Families whose layers differ from LLaMA's, and from each other: their folders are made here by
transformers, from tiny configs and random weights, and compared with it."""

import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, run, small_config
from safetensors.torch import load_file, save_file
from test_formats import (
    LOAD_STEP_SAVE,
    TOKENS,
    assert_equal_tensors,
    check_logits,
    ends,
    logits_of,
    make_theirs,
    open_in_transformers,
    read_saved,
)
from torch import tensor

from nanosafe import checkpoint, model
from nanosafe.checkpoint import families, folder, init_from_scratch
from nanosafe.rollout import generate
from nanosafe.tools import toy_world

transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.2, 2.9, 3.6],
}
FACTORS_OF_THREE = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.2, 2.9]}


def yarn(**changes):
    return {"rope_parameters": {"rope_theta": 1e4, **YARN, **changes}}


def longrope(border, **changes):
    """Texts of up to `border` tokens have the short factors."""
    return {
        "rope_parameters": {**LONGROPE, "rope_theta": 1e4, **changes},
        "original_max_position_embeddings": border,
    }


def family(name, **changes):
    config = getattr(transformers, name + "Config")
    return {"config": config, "model": getattr(transformers, name + "ForCausalLM"), **changes}


def llama(**changes):
    return family("Llama", **changes)


def qwen3(**changes):
    return family("Qwen3", head_dim=16, **changes)


def smollm3(**changes):
    return family("SmolLM3", num_hidden_layers=5, pad_token_id=0, **changes)


def olmo3(**changes):
    return family("Olmo3", num_hidden_layers=5, sliding_window=7, **changes)


def phi3(**changes):
    return family("Phi3", pad_token_id=0, **changes)


def ministral3(**changes):
    growth = {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
    return family("Ministral3", head_dim=16, **yarn(**{**growth, **changes}))


WINDOW = {"use_sliding_window": True, "sliding_window": 7}
SLIDING, FULL = "sliding_attention", "full_attention"
MODELS = {
    "qwen3": qwen3(),
    "qwen3 with biases": qwen3(attention_bias=True),
    "qwen3 tied, with yarn": qwen3(tie_word_embeddings=True, **yarn()),
    "qwen3 with windows": qwen3(max_window_layers=1, **WINDOW),
    "qwen3 with windows everywhere": qwen3(max_window_layers=0, **WINDOW),
    "qwen2 with windows": family("Qwen2", max_window_layers=2, **WINDOW),
    "qwen2 with yarn": family("Qwen2", **yarn()),
    "smollm3": smollm3(),
    "smollm3 with named layers": smollm3(no_rope_layers=[0, 1, 1, 0, 1]),
    "smollm3 with windows": smollm3(**WINDOW),
    "smollm3 with yarn": smollm3(tie_word_embeddings=True, **yarn()),
    "olmo2": family("Olmo2"),
    "olmo2 with all heads": family("Olmo2", num_key_value_heads=6),
    "olmo3": olmo3(),
    "olmo3 with yarn": olmo3(
        rope_parameters={
            FULL: {"rope_theta": 5e5, **YARN},
            SLIDING: {"rope_theta": 5e5, "rope_type": "default"},
        }
    ),
    "olmo3 with yarn in all layers": olmo3(
        rope_parameters={
            FULL: {"rope_theta": 5e5, **YARN},
            SLIDING: {"rope_theta": 5e5, **YARN},
        }
    ),
    "phi3": phi3(),
    "phi3 with a window": phi3(sliding_window=9),
    "phi3 with longrope, short": phi3(**longrope(50)),
    "phi3 with longrope, long": phi3(**longrope(6)),
    "phi4 mini": phi3(
        tie_word_embeddings=True,
        **longrope(50, partial_rotary_factor=0.75, **FACTORS_OF_THREE),
    ),
    "mistral with head_dim": family("Mistral", head_dim=16, sliding_window=None),
    "mistral with yarn": family("Mistral", sliding_window=None, **yarn()),
    "ministral": family(
        "Ministral", head_dim=8, sliding_window=7, layer_types=[SLIDING, FULL, SLIDING]
    ),
    "ministral3": ministral3(),
    "ministral3 that does not grow": ministral3(llama_4_scaling_beta=0.0, mscale=0.7),
    "llama with yarn": llama(**yarn()),
    "llama with yarn by mscale": llama(**yarn(mscale=0.7, mscale_all_dim=1.0)),
    "llama with yarn by attention_factor": llama(**yarn(attention_factor=1.3, factor=None)),
    "llama with yarn of other betas": llama(**yarn(beta_fast=4, beta_slow=0.5, truncate=False)),
    "llama with longrope": llama(**longrope(50)),
    "llama with longrope by factor": llama(**longrope(6, factor=8.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_family_opens_and_is_written_bit_by_bit(name, tmp_path):
    theirs = make_theirs(**MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(theirs)
    ours = check_logits(tmp_path / "theirs", expected)
    checkpoint.save(ours, tmp_path / "ours")
    assert_equal_tensors(read_saved(tmp_path / "theirs"), read_saved(tmp_path / "ours"))
    again = open_in_transformers(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert torch.equal(logits_of(again), expected)
    reopened = check_logits(tmp_path / "ours", expected)
    assert reopened.config == checkpoint.load(tmp_path / "ours").config


@pytest.mark.parametrize("name", MODELS)
def test_a_score_model_of_a_family_is_written_and_opens(name, tmp_path):
    theirs = make_theirs(**MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    score = checkpoint.load(tmp_path / "theirs", "score", score_type="cost", seed=1)
    checkpoint.save(score, tmp_path / "score")
    config = json.loads((tmp_path / "score" / "config.json").read_text())
    architecture = type(theirs).__name__.replace("ForCausalLM", "ForScore")
    assert config["architectures"] == [architecture]
    again = checkpoint.load(tmp_path / "score")
    n = len(TOKENS)
    assert torch.equal(again(TOKENS, ends(0, n), n), score(TOKENS, ends(0, n), n))


# ---- what the comparison above would not notice ----


def difference_of_logits(**changes):
    """How much each token's logits change with these fields of a config (40,)."""
    tokens = TOKENS % 97
    n = len(tokens)
    plain = init_from_scratch(small_config(rope_scaling=YARN), seed=1)
    changed = init_from_scratch(small_config(rope_scaling=YARN, **changes), seed=1)
    with torch.no_grad():
        difference = plain(tokens, ends(0, n), n) - changed(tokens, ends(0, n), n)
    return difference.abs().amax(1)


def test_a_layer_without_rope_changes_the_logits():
    assert difference_of_logits(no_rope_layers=[1, 0])[1:].min() > 1e-6


def test_a_window_of_one_layer_changes_the_logits_beyond_it():
    difference = difference_of_logits(sliding_window=7, layer_types=[FULL, SLIDING])
    assert difference[:7].max() == 0
    assert difference[7:].min() > 1e-6


def test_queries_grow_beyond_the_first_period_only():
    difference = difference_of_logits(llama_4_scaling_beta=5.0)
    assert difference[:16].max() < 1e-6
    assert difference[16:].min() > 1e-6


# ---- longrope ----


def greedy_from_scratch(net, prompt, count):
    """The likeliest tokens, each by a forward over the whole text before it."""
    text = list(prompt)
    for _ in range(count):
        n = len(text)
        with torch.no_grad():
            logits = net(tensor(text), ends(0, n), n)
        text.append(logits[-1].argmax().item())
    return text[len(prompt) :]


@pytest.fixture
def longrope_model(tmp_path):
    theirs = make_theirs(**phi3(**longrope(20)))
    theirs.save_pretrained(tmp_path)
    return checkpoint.load(tmp_path)


@pytest.mark.parametrize("slots", [0, 2])
def test_a_response_that_crosses_the_border_equals_forwards_from_scratch(longrope_model, slots):
    """Of these prompts, one stays below the border, one begins beyond it, and the others cross."""
    prompts = []
    for length in (1, 12, 18, 19, 20, 21, 30):
        prompts.append(TOKENS[:length].tolist())
    options = {"temperature": 0, "eos_ids": [], "seed": 0, "slots": slots}
    responses = generate(longrope_model, prompts, 10, **options)
    for prompt, response in zip(prompts, responses):
        assert response == greedy_from_scratch(longrope_model, prompt, 10)


def test_the_border_matters_to_a_response(longrope_model):
    """Without this, the test above would say nothing."""
    n = len(TOKENS)
    as_long = longrope_model(TOKENS, ends(0, n), n)[:20]
    as_short = longrope_model(TOKENS[:20], ends(0, 20), 20)
    assert (as_long - as_short).abs().max() > 1e-2


def test_a_text_has_the_same_logits_beside_a_long_one(longrope_model):
    n = len(TOKENS)
    alone = longrope_model(TOKENS[:8], ends(0, 8), 8)
    packed = longrope_model(torch.cat((TOKENS[:8], TOKENS)), ends(0, 8, 8 + n), n)
    assert torch.allclose(packed[:8], alone, atol=1e-5)
    assert torch.allclose(packed[8:], longrope_model(TOKENS, ends(0, n), n), atol=1e-5)


def test_phi3_s_old_names_of_longrope_are_read(tmp_path):
    theirs = make_theirs(**phi3(**longrope(6)))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    for name in ("su", "yarn", "longrope"):
        scaling = {**LONGROPE, "type": name}
        del scaling["rope_type"]
        path.write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": scaling}))
        check_logits(tmp_path, logits_of(theirs))


# ---- the spellings of transformers 4, and what config.json may leave out ----


def config_of(kind, **config_json):
    sizes = {"vocab_size": 9, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 6}
    values = {"model_type": kind, **sizes, **config_json}
    return model.Config.from_dict(folder.translate_config("x", values, kind))


def test_keys_that_are_left_out_have_the_family_s_defaults():
    assert config_of("qwen3").head_dim == 128
    smol = config_of("smollm3")
    assert smol.no_rope_layers == [1, 1, 1, 0, 1, 1]
    assert smol.rope_theta == 2e6
    assert smol.tie_word_embeddings
    assert config_of("olmo2").rope_theta == 1e4
    olmo = config_of("olmo3")
    assert olmo.rope_theta == 5e5
    assert olmo.windows_of_layers() == (4096, 4096, 4096, 0, 4096, 4096)
    assert config_of("ministral").windows_of_layers() == (4096,) * 6
    assert config_of("phi3").windows_of_layers() == (0,) * 6
    assert config_of("qwen2", sliding_window=8).windows_of_layers() == (0,) * 6


def test_windows_begin_at_max_window_layers():
    for kind in ("qwen2", "qwen3"):
        changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
        config = config_of(kind, attention_bias=True, output_bias=kind == "qwen3", **changes)
        assert config.windows_of_layers() == (0, 0, 0, 0, 8, 8)
        written = families.make_config_json(config, "lm")
        written = {**written, "layer_types": None}  # which transformers knows since 4.53
        assert config_of(kind, **written).windows_of_layers() == (0, 0, 0, 0, 8, 8)


def test_the_original_length_is_taken_from_where_transformers_looks():
    key = "original_max_position_embeddings"
    scaling = {"rope_type": "yarn", "factor": 2.0}
    top = {key: 64, "max_position_embeddings": 128}
    inside = config_of("llama", rope_scaling={**scaling, key: 32}, **top)
    assert inside.rope_scaling[key] == 64
    inside = config_of("llama", rope_scaling={**scaling, key: 32}, max_position_embeddings=128)
    assert inside.rope_scaling[key] == 32
    nowhere = config_of("llama", rope_scaling=scaling, max_position_embeddings=128)
    assert nowhere.rope_scaling[key] == 128


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("qwen3", {"use_sliding_window": True, "layer_types": ["chunked"] * 6}, "'chunked'"),
        ("qwen3", {"use_sliding_window": True, "layer_types": [FULL]}, "1 entries for 6 layers"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers"),
        ("qwen2", {"use_sliding_window": True, "layer_types": 5}, "layer_types is 5"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1, 1, 1]}, "no_rope_layers 2"),
        ("smollm3", {"no_rope_layers": [0]}, "1 entries for 6 layers"),
        ("smollm3", {"no_rope_layer_interval": -1}, "no_rope_layer_interval"),
        ("olmo3", {"rope_parameters": {FULL: 5}}, "full_attention is 5"),
        ("olmo3", {"rope_parameters": {SLIDING: YARN}}, "layers with a window"),
        ("qwen3", {"rope_parameters": {FULL: {"rope_type": "default"}}}, "differs by layer"),
        ("phi3", {"partial_rotary_factor": 0.4}, "0.4 of heads of 8 dimensions"),
        ("phi3", {"partial_rotary_factor": 2.0}, "2.0 of heads of 8 dimensions"),
        ("phi3", {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "short_factor"),
        ("phi3", {"rope_scaling": {"type": ["su"]}}, "rope_type"),
        ("llama", {"rope_scaling": {**YARN, "factor": "4"}}, "factor of its yarn RoPE is '4'"),
        ("llama", {"rope_scaling": YARN, "rope_theta": 1.0}, "both must be above 1"),
        ("llama", {"rope_scaling": LONGROPE}, "original_max_position_embeddings .* is None"),
        ("llama", longrope(9, long_factor=[1.0]), "list of 4 numbers"),
        ("llama", longrope(9, long_factor=[1, 0, 1, 1]), "has a 0"),
        ("llama", {"rope_scaling": {"rope_type": "proportional"}}, "'proportional'"),
        ("ministral3", {}, "has no rope_parameters"),
        ("ministral3", {"rope_scaling": {**YARN, "llama_4_scaling_beta": -1.0}}, "is -1.0"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(kind, changes, words):
    with pytest.raises((SystemExit, ValueError), match=words):
        config_of(kind, **changes)


def test_models_that_no_family_can_say_are_named(tmp_path):
    config = small_config(qk_norm="head", post_norm=True, sliding_window=4)
    words = "a model that has all of this: norm of each query, norms after, one window"
    with pytest.raises(SystemExit, match=words):
        checkpoint.save(init_from_scratch(config), tmp_path / "x")


# ---- arithmetic ----


def test_olmo_s_norm_rounds_once_in_bfloat16():
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    ours = model.RMSNorm(48, small_config(post_norm=True)).bfloat16()
    theirs = Olmo2RMSNorm(48, eps=1e-6).bfloat16()
    weight = torch.randn(48, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "olmo3 with yarn", "phi4 mini", "ministral3"])
def test_bfloat16_logits_are_near_those_in_float32(name, tmp_path):
    theirs = make_theirs(**MODELS[name])
    theirs.save_pretrained(tmp_path)
    n = len(TOKENS)
    ours = checkpoint.load(tmp_path, dtype=torch.bfloat16)(TOKENS, ends(0, n), n)
    expected = logits_of(theirs)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", ["qwen3 with windows", "smollm3", "olmo3 with yarn", "phi4 mini"])
def test_activation_checkpointing_changes_no_gradient(name, tmp_path):
    make_theirs(**MODELS[name]).save_pretrained(tmp_path)
    net = checkpoint.load(tmp_path)
    gradients = []
    for net.activation_checkpointing in (False, True):
        net.zero_grad()
        net(TOKENS[:-1], ends(0, 9, 39), 30, TOKENS[1:]).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for stored, recomputed in zip(*gradients):
        assert stored.abs().max() > 0
        assert torch.equal(stored, recomputed)


def test_gradients_equal_transformers(tmp_path):
    """Of norms of queries and keys, of norms after the sublayers, and through windows and YaRN."""
    for name in ("qwen3 with windows", "olmo3 with yarn", "phi4 mini"):
        theirs = make_theirs(**MODELS[name])
        theirs.save_pretrained(tmp_path / name)
        logps = theirs(TOKENS[None, :-1]).logits[0].log_softmax(-1)
        logps.gather(1, TOKENS[1:, None]).sum().backward()
        net = checkpoint.load(tmp_path / name)
        n = len(TOKENS) - 1
        net(TOKENS[:-1], ends(0, n), n, TOKENS[1:]).sum().backward()
        expected = theirs.get_parameter("model.norm.weight").grad
        assert torch.allclose(net.norm.weight.grad, expected, atol=1e-3)
        if net.config.qk_norm:
            ours = net.layers[1].self_attn.q_norm.weight.grad
            expected = theirs.get_parameter("model.layers.1.self_attn.q_norm.weight").grad
            assert torch.allclose(ours, expected, atol=1e-3)


@pytest.mark.slow
def test_ranks_train_and_write_families(tmp_path):
    """Two FSDP ranks load each model, take a step of length zero, and write the same tensors."""
    names = ("qwen3 with windows", "smollm3", "olmo3 with yarn", "phi4 mini")
    folders = []
    for name in names:
        make_theirs(**MODELS[name]).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    (tmp_path / "script.py").write_text(LOAD_STEP_SAVE)
    run(tmp_path / "script.py", *folders, ranks=2)
    for path in folders:
        assert_equal_tensors(read_saved(path / "saved"), read_saved(path))


SHAPES_OF_FAMILIES = {
    "olmo3": {
        "model_type": "olmo3",
        "qk_norm": "width",
        "post_norm": True,
        "sliding_window": 16,
        "layer_types": [SLIDING, FULL],
        "rope_scaling": YARN,
        "scale_full_layers_only": True,
    },
    "phi3": {
        "model_type": "phi3",
        "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 40},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("kind", SHAPES_OF_FAMILIES)
def test_ppo_lag_trains_a_family(kind, ranks, toy, tmp_path, monkeypatch):
    """The whole loop: responses, which cross the border of longrope, scores, values and updates."""
    changes = SHAPES_OF_FAMILIES[kind]
    make_shape = toy_world.small_config
    monkeypatch.setattr(toy_world, "small_config", lambda **others: make_shape(**changes, **others))
    world = toy_world.make_world(toy, tmp_path)
    command = toy_world.trainer_flags(world)["ppo_lag"]
    flags = ["--max_steps=4", "--parallel=fsdp"] if ranks else ["--max_steps=4"]
    run(*command, *flags, f"--out_dir={tmp_path}/out", ranks=ranks)
    trained = checkpoint.load(tmp_path / "out" / "model")
    assert trained.config.model_type == kind
    before = checkpoint.load(world / "policy")
    assert not torch.equal(trained.norm.weight, before.norm.weight)
    opened = open_in_transformers(tmp_path / "out" / "model")
    tokens = TOKENS % 97
    n = len(tokens)
    with torch.no_grad():
        expected = opened(tokens[None]).logits[0]
        assert torch.allclose(trained(tokens, ends(0, n), n), expected, atol=1e-4)


# ---- tied heads ----


def test_a_head_alone_is_the_embedding_of_a_tied_model(tmp_path):
    theirs = make_theirs(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    tensors = read_saved(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    ours = check_logits(tmp_path, logits_of(theirs))
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert checkpoint.load(tmp_path, "score").head == "score"


def test_a_model_that_is_not_tied_needs_both_matrices(tmp_path):
    theirs = make_theirs(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for tied in (False, None):
        config = {**json.loads(path.read_text()), "tie_word_embeddings": tied}
        path.write_text(json.dumps(config))
        with pytest.raises(SystemExit, match="misses lm_head.weight"):
            checkpoint.load(tmp_path)


# ---- reference vectors that are kept beside the repository, where they are there ----

GOLDEN = os.path.join(ROOT, "..", "shared", "spec", "models", "families")
NAMES = sorted(os.listdir(GOLDEN)) if os.path.isdir(GOLDEN) else []


@pytest.mark.skipif(not NAMES, reason="the reference checkpoints are not beside the repository")
@pytest.mark.parametrize("spelling", ["config.json", "config.transformers4.json"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_responses_equal_the_reference_vectors(name, spelling, tmp_path):
    source = os.path.join(GOLDEN, name)
    for file in ("model.safetensors", "logits.safetensors", "golden.json"):
        shutil.copy(os.path.join(source, file), tmp_path)
    shutil.copy(os.path.join(source, spelling), tmp_path / "config.json")
    golden = json.loads((tmp_path / "golden.json").read_text())
    expected = load_file(tmp_path / "logits.safetensors")
    os.remove(tmp_path / "logits.safetensors")
    net = checkpoint.load(tmp_path)
    for i, tokens in enumerate(golden["inputs"]):
        n = len(tokens)
        with torch.no_grad():
            logits = net(tensor(tokens), ends(0, n), n)
        assert torch.allclose(logits, expected[f"logits.{i}"], atol=1e-4)
    prompts = [case["prompt"] for case in golden["greedy"]]
    responses = generate(net, prompts, 12, temperature=0, eos_ids=[], seed=0)
    assert responses == [case["generate"] for case in golden["greedy"]]
    checkpoint.save(net, tmp_path / "saved")
    assert_equal_tensors(read_saved(tmp_path / "saved"), read_saved(tmp_path))
