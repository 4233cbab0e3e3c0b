"""Model folders: reading, refusing, writing; score models' four generations; new tokens' rows."""

import gc
import json
import os
import weakref

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file

from nanosafe import checkpoint, tokenizer
from nanosafe.checkpoint import init_from_scratch, model_folder
from nanosafe.checkpoint.folder import open_folder
from nanosafe.parallel import Placement

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    checkpoint.save(init_from_scratch(small_config(), seed=3), path)
    return path


def read_tensors(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def edit_tensors(folder, changes, removed=()):
    tensors = read_tensors(folder)
    for name in removed:
        del tensors[name]
    tensors.update(changes)
    save_file(tensors, os.path.join(folder, "model.safetensors"))


def edit_config(folder, changes, removed=()):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in removed:
        config.pop(key, None)
    config.update(changes)
    path.write_text(json.dumps(config))


def assert_equal_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def one_sequence(length):
    """The arguments of a forward: the tokens 0, 1, 2, .. as a single sequence."""
    return torch.arange(length), torch.tensor([0, length], dtype=torch.int32), length


# ---- writing, and reading again ----


def test_a_written_folder_opens_in_transformers_with_equal_logits(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = theirs(torch.arange(40)[None]).logits[0]
    ours = checkpoint.load(folder)(*one_sequence(40))
    assert torch.allclose(expected, ours, atol=1e-5)


def test_a_round_trip_is_bit_equal(folder, tmp_path):
    checkpoint.save(checkpoint.load(folder), tmp_path / "again")
    tensors = read_tensors(folder)
    assert_equal_tensors(tensors, read_tensors(tmp_path / "again"))
    assert "model.layers.0.self_attn.q_proj.weight" in tensors
    assert "model.layers.1.mlp.up_proj.weight" in tensors


def test_sharded_safetensors_and_bin_read_the_same(folder, tmp_path, monkeypatch):
    model = checkpoint.load(folder)
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20000)
    checkpoint.save(model, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    os.makedirs(tmp_path / "bin")
    torch.save(read_tensors(folder), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text((folder / "config.json").read_text())
    for name in ("sharded", "bin"):
        again = checkpoint.load(tmp_path / name)
        assert_equal_tensors(model.state_dict(), again.state_dict())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_tied_embeddings_are_stored_once(tmp_path):
    checkpoint.save(init_from_scratch(small_config(tie_word_embeddings=True)), tmp_path)
    assert "lm_head.weight" not in read_tensors(tmp_path)
    again = checkpoint.load(tmp_path)
    assert again.lm_head.weight is again.embed_tokens.weight


def test_tokenizer_and_dtype_are_written_with_the_model(world, tmp_path):
    tok = tokenizer.load(world / "tokenizer")
    model = checkpoint.load(world / "policy")
    checkpoint.save(model, tmp_path / "x", tok, dtype=torch.bfloat16)
    assert checkpoint.load(tmp_path / "x").norm.weight.dtype == torch.bfloat16
    assert tokenizer.load(tmp_path / "x").fingerprint == tok.fingerprint
    pytest.importorskip("google.protobuf")  # with it, transformers reads a tokenizer.model
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    text = "How do I paint the boat?"
    assert theirs.eos_token_id == tok.eos_id
    assert theirs.encode(text) == tok.encode(text, bos=True)


# ---- folders that are refused ----


@pytest.mark.parametrize(
    "changes, removed, words",
    [
        ({}, ["model.norm.weight"], "misses model.norm.weight"),
        ({"model.extra": torch.ones(1)}, [], "has no use for model.extra"),
        (
            {"model.norm.weight": torch.ones(31)},
            [],
            "wrong shape or type for model.norm.weight",
        ),
    ],
)
def test_missing_surplus_and_misshapen_tensors_stop_with_their_names(
    folder, changes, removed, words
):
    edit_tensors(folder, changes, removed)
    with pytest.raises(SystemExit, match=words):
        checkpoint.load(folder)


def test_buffers_of_old_files_are_ignored(folder):
    edit_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    checkpoint.load(folder)


def test_broken_and_hostile_folders_stop_with_one_line(folder, tmp_path):
    with pytest.raises(SystemExit, match="no model at"):
        checkpoint.load(tmp_path)
    with open(folder / "model.safetensors", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(SystemExit, match="cannot be read"):
        checkpoint.load(folder)
    os.remove(folder / "model.safetensors")
    with pytest.raises(SystemExit, match="no weights in"):
        checkpoint.load(folder)
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="not in the folder"):
        open_folder(folder)


def test_no_code_in_a_bin_file_is_executed(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/evil",)

    os.remove(folder / "model.safetensors")
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="cannot be read"):
        checkpoint.load(folder)
    assert not os.path.exists(tmp_path / "evil")
    (folder / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="is no JSON object"):
        checkpoint.load(folder)


# ---- score models ----


SCORE_KEYS = (
    "score_bias",
    "score_type",
    "do_normalize",
    "mean",
    "var",
    "normalizer_type",
    "momentum",
    "bias",
    "score_dim",
)
# Safe-RLHF's score models over time: keys of config.json, a bias?, the normaliser's tensors?
GENERATIONS = {
    "2023-05": (
        {"architectures": ["LlamaModelForScore"], "bias": False, "score_dim": 1},
        False,
        False,
    ),
    "2023-08": (
        {
            "architectures": ["LlamaModelForScore"],
            "bias": False,
            "score_type": "reward",
            "do_normalize": False,
            "mean": [0.0],
            "var": [1.0],
        },
        False,
        True,
    ),
    "2023-12": (
        {
            "architectures": ["LlamaForScore"],
            "bias": False,
            "score_type": "reward",
            "do_normalize": True,
            "normalizer_type": "ExponentialMovingAverage",
            "momentum": 0.9,
        },
        False,
        True,
    ),
    "2024-03": (
        {
            "architectures": ["LlamaForScore"],
            "bias": False,
            "score_bias": True,
            "score_type": "reward",
            "do_normalize": False,
        },
        True,
        False,
    ),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_score_models_opens(generation, tmp_path):
    keys, has_bias, has_normalizer = GENERATIONS[generation]
    folder = tmp_path / "score"
    model = init_from_scratch(small_config(score_bias=has_bias), "score", seed=5)
    if has_bias:
        torch.nn.init.constant_(model.score_head.bias, 0.25)
    checkpoint.save(model, folder)
    edit_config(folder, keys, removed=SCORE_KEYS)
    if has_normalizer:
        normalizer = {
            "normalizer.mean": torch.tensor([0.5]),
            "normalizer.var": torch.tensor([4.0]),
            "normalizer.count": torch.tensor([9]),
        }
        edit_tensors(folder, normalizer)
    again = checkpoint.load(folder)
    assert again.head == "score"
    assert (again.score_head.bias is not None) == has_bias
    batch = one_sequence(5)
    raw = model(*batch)
    expected = raw
    if keys.get("do_normalize"):
        expected = (raw - 0.5) / 2  # the tensors win over the config
    assert torch.allclose(again(*batch), expected)
    checkpoint.save(again, tmp_path / "again")
    assert torch.allclose(checkpoint.load(tmp_path / "again")(*batch), expected)
    critic = checkpoint.load(folder, score_type="critic")
    assert torch.allclose(critic(*batch), raw)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_written_score_model_is_one_by_safe_rlhf_s_rules(has_bias, tmp_path):
    """The oracle is transformers' body and a linear head, put together as upstream's class does."""
    config = small_config(
        score_bias=has_bias, score_type="cost", do_normalize=True, mean=[0.5], var=[4.0]
    )
    ours = init_from_scratch(config, "score")
    checkpoint.save(ours, tmp_path)

    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForScore"]
    assert written["score_type"] == "cost"
    assert written["score_dim"] == 1
    assert written["bias"] == written["score_bias"] == has_bias
    assert written["do_normalize"] is True
    assert written["mean"] == [0.5]
    assert written["var"] == [4.0]

    tensors = read_tensors(tmp_path)
    assert "lm_head.weight" not in tensors
    assert tensors["score_head.weight"].shape == (1, 32)
    assert ("score_head.bias" in tensors) == has_bias

    body = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = body(torch.arange(9)[None]).last_hidden_state[0]
        weight, bias = tensors["score_head.weight"], tensors.get("score_head.bias")
        raw = torch.nn.functional.linear(hidden, weight, bias)[:, 0]
        expected = raw / (4.0**0.5 + 1e-8)
        assert torch.allclose(ours(*one_sequence(9)), expected, atol=1e-5)


def test_a_folder_without_a_score_head_gets_a_new_one_and_says_so(folder, capsys):
    model = checkpoint.load(folder, "score", seed=1)
    assert "no score head there" in capsys.readouterr().out
    weight = model.score_head.weight
    assert 0 < weight.abs().max() < 0.2
    again = checkpoint.load(folder, "score", seed=1)
    assert torch.equal(weight, again.score_head.weight)


@pytest.mark.parametrize("stated", ["reward", "cost", "critic"])
def test_a_score_model_is_only_what_its_config_says(stated, tmp_path):
    checkpoint.save(init_from_scratch(small_config(score_type=stated), "score"), tmp_path)
    for asked in ("reward", "cost"):
        if asked == stated:
            checkpoint.check_score_model(tmp_path, asked)
            continue
        words = f"given as a {asked} model, but its config.json says score_type '{stated}'"
        with pytest.raises(SystemExit, match=words):
            checkpoint.check_score_model(tmp_path, asked)
    if stated == "critic":
        with pytest.raises(SystemExit, match="given as a reward or cost model"):
            checkpoint.check_score_model(tmp_path)
    else:
        checkpoint.check_score_model(tmp_path)


@pytest.mark.parametrize("asked", ["reward", "cost"])
def test_a_score_model_that_states_no_type_is_taken_as_asked(asked, tmp_path, capsys):
    checkpoint.save(init_from_scratch(small_config(), "score"), tmp_path)
    edit_config(tmp_path, {}, removed=["score_type"])
    checkpoint.check_score_model(tmp_path, asked)
    assert checkpoint.load(tmp_path, "score", score_type=asked).config.score_type == asked
    words = f"states no score_type: it is taken as a {asked} model"
    assert capsys.readouterr().out.count(words) == 1
    checkpoint.load(tmp_path, "score", score_type="critic")  # which any score model may become
    assert capsys.readouterr().out == ""


def test_a_policy_is_not_a_score_model(folder):
    with pytest.raises(SystemExit, match="is a policy: it has no score head"):
        checkpoint.check_score_model(folder, "reward")


def test_a_score_model_cannot_generate(tmp_path):
    checkpoint.save(init_from_scratch(small_config(), "score"), tmp_path)
    with pytest.raises(SystemExit, match="is a score model"):
        checkpoint.load(tmp_path, "lm")


# ---- new tokens, new weights, memory ----


def test_rows_of_new_tokens_are_the_mean_of_the_others(folder, capsys):
    old = checkpoint.load(folder)
    new = checkpoint.load(folder, vocab_size=99)
    assert "2 rows for new tokens" in capsys.readouterr().out
    for a, b in ((old.embed_tokens, new.embed_tokens), (old.lm_head, new.lm_head)):
        assert torch.equal(a.weight, b.weight[:97])
        assert torch.allclose(b.weight[97:], a.weight.mean(0).expand(2, -1), atol=1e-6)


def test_weights_from_scratch_depend_on_the_seed_alone():
    first = init_from_scratch(small_config(), seed=0)
    same_seed = init_from_scratch(small_config(), seed=0)
    other_seed = init_from_scratch(small_config(), seed=1)
    assert torch.equal(first.lm_head.weight, same_seed.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other_seed.lm_head.weight)
    placement = Placement(torch.device("cpu"), dtype=torch.float32)
    placed = init_from_scratch(small_config(), placement=placement)
    assert torch.equal(placed.norm.weight, first.norm.weight)


def test_a_folder_that_was_read_is_freed_without_the_garbage_collector(folder):
    """Otherwise its memory-mapped files stay in memory beside the model."""
    gc.disable()
    try:
        found = open_folder(folder)
        references = [weakref.ref(found)]
        for tensor in found.tensors.values():
            references.append(weakref.ref(tensor))
        del found, tensor
        for reference in references:
            assert reference() is None
    finally:
        gc.enable()
