"""Model folders: reading, refusing, writing; the four generations of score models; growing."""

import gc
import json
import os
import weakref

import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file

from nanosafe import checkpoint, tokenizer
from nanosafe.checkpoint import folder as folders
from nanosafe.parallel import Placement
from nanosafe.checkpoint import init_from_scratch, model_folder

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(init_from_scratch(small_config(), seed=3), tmp_path / "model")
    return tmp_path / "model"


def tensors_of(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def rewrite(folder, change):
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, os.path.join(folder, "model.safetensors"))


def edit_config(folder, **changes):
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        config = json.load(f)
    for key, value in changes.items():
        config.pop(key, None) if value is ... else config.update({key: value})
    with open(path, "w") as f:
        json.dump(config, f)


def test_what_is_written_opens_in_transformers_with_equal_logits(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(40)
    ours = checkpoint.load(folder)(tokens, torch.tensor([0, 40], dtype=torch.int32), 40)
    assert torch.allclose(theirs(tokens[None]).logits[0], ours, atol=1e-5)


def test_round_trip_is_bit_equal(folder, tmp_path):
    checkpoint.save(checkpoint.load(folder), tmp_path / "again")
    a, b = tensors_of(folder), tensors_of(tmp_path / "again")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (
        "model.layers.0.self_attn.q_proj.weight" in a and "model.layers.1.mlp.up_proj.weight" in a
    )


def test_sharded_safetensors_and_bin_read_the_same(folder, tmp_path, monkeypatch):
    model = checkpoint.load(folder)
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20000)
    checkpoint.save(model, tmp_path / "sharded")
    files = [f for f in os.listdir(tmp_path / "sharded") if f.endswith(".safetensors")]
    assert len(files) > 2
    os.makedirs(tmp_path / "bin")
    torch.save(tensors_of(folder), tmp_path / "bin" / "pytorch_model.bin")
    with open(folder / "config.json") as f:
        (tmp_path / "bin" / "config.json").write_text(f.read())
    for name in ("sharded", "bin"):
        again = checkpoint.load(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_tied_embeddings_are_stored_once(tmp_path):
    model = init_from_scratch(small_config(tie_word_embeddings=True))
    checkpoint.save(model, tmp_path / "tied")
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
    again = checkpoint.load(tmp_path / "tied")
    assert again.lm_head.weight is again.embed_tokens.weight


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("model.norm.weight"), "misses model.norm.weight"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "has no use for model.extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "wrong shape or type for model.norm.weight",
        ),
    ],
)
def test_missing_surplus_and_misshapen_tensors_stop_with_their_names(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(SystemExit, match=words):
        checkpoint.load(folder)


def test_old_buffers_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: torch.ones(4)}))
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
        folders.open_folder(folder)


def test_a_bin_file_executes_nothing(folder):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/evil",)

    os.remove(folder / "model.safetensors")
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="cannot be read"):
        checkpoint.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="is no JSON object"):
        checkpoint.load(folder)


GENERATIONS = {  # Safe-RLHF's score models over time: config keys, bias, normalizer tensors
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
    keys, bias, normalizer = GENERATIONS[generation]
    folder = tmp_path / "score"
    model = init_from_scratch(small_config(score_bias=bias), "score", seed=5)
    if bias:
        torch.nn.init.constant_(model.score_head.bias, 0.25)
    checkpoint.save(model, folder)
    edit_config(
        folder,
        **{
            k: ...
            for k in (
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
        },
    )
    edit_config(folder, **keys)
    if normalizer:
        rewrite(
            folder,
            lambda t: t.update(
                {
                    "normalizer.mean": torch.tensor([0.5]),
                    "normalizer.var": torch.tensor([4.0]),
                    "normalizer.count": torch.tensor([9]),
                }
            ),
        )
    again = checkpoint.load(folder)
    assert again.head == "score" and (again.score_head.bias is not None) == bias
    batch = torch.arange(5), torch.tensor([0, 5], dtype=torch.int32), 5
    expected = model(*batch)
    if keys.get("do_normalize"):
        expected = (expected - 0.5) / 2  # the buffers win over the config
    assert torch.allclose(again(*batch), expected)
    checkpoint.save(again, tmp_path / "again")
    assert torch.allclose(checkpoint.load(tmp_path / "again")(*batch), expected)
    critic = checkpoint.load(folder, score_type="critic")
    assert torch.allclose(critic(*batch), model(*batch))


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_written_is_a_safe_rlhf_score_model_by_its_rules(bias, tmp_path):
    """transformers' body and a linear head, put together by hand as upstream's class does."""
    ours = init_from_scratch(
        small_config(score_bias=bias, score_type="cost", do_normalize=True, mean=[0.5], var=[4.0]),
        "score",
    )
    checkpoint.save(ours, tmp_path)
    config, tensors = json.loads((tmp_path / "config.json").read_text()), tensors_of(tmp_path)
    assert (
        config["architectures"] == ["LlamaForScore"]
        and config["score_type"] == "cost"
        and config["score_dim"] == 1
    )
    assert config["bias"] == config["score_bias"] == bias == ("score_head.bias" in tensors)
    assert (config["do_normalize"], config["mean"], config["var"]) == (True, [0.5], [4.0])
    assert "lm_head.weight" not in tensors and tensors["score_head.weight"].shape == (1, 32)
    body, tokens = transformers.AutoModel.from_pretrained(tmp_path), torch.arange(9)
    with torch.no_grad():
        scores = torch.nn.functional.linear(
            body(tokens[None]).last_hidden_state[0],
            tensors["score_head.weight"],
            tensors.get("score_head.bias"),
        )[:, 0] / (4.0**0.5 + 1e-8)
        assert torch.allclose(
            ours(tokens, torch.tensor([0, 9], dtype=torch.int32), 9), scores, atol=1e-5
        )


def test_a_folder_without_a_head_gets_a_new_one_and_says_so(folder, capsys):
    model = checkpoint.load(folder, "score", seed=1)
    assert "no score head there" in capsys.readouterr().out
    assert 0 < model.score_head.weight.abs().max() < 0.2
    assert torch.equal(
        model.score_head.weight, checkpoint.load(folder, "score", seed=1).score_head.weight
    )


def test_a_score_model_cannot_generate(tmp_path):
    checkpoint.save(init_from_scratch(small_config(), "score"), tmp_path / "score")
    with pytest.raises(SystemExit, match="is a score model"):
        checkpoint.load(tmp_path / "score", "lm")


def test_new_rows_are_the_mean_of_the_old(folder, capsys):
    old, new = checkpoint.load(folder), checkpoint.load(folder, vocab_size=99)
    assert "2 rows for new tokens" in capsys.readouterr().out
    for a, b in ((old.embed_tokens, new.embed_tokens), (old.lm_head, new.lm_head)):
        assert torch.equal(a.weight, b.weight[:97])
        assert torch.allclose(b.weight[97:], a.weight.mean(0).expand(2, -1), atol=1e-6)


def test_tokenizer_and_dtype_travel_with_the_folder(world, tmp_path):
    tok = tokenizer.load(world / "tokenizer")
    model = checkpoint.load(world / "policy")
    checkpoint.save(model, tmp_path / "x", tok, dtype=torch.bfloat16)
    assert checkpoint.load(tmp_path / "x").norm.weight.dtype == torch.bfloat16
    assert tokenizer.load(tmp_path / "x").fingerprint == tok.fingerprint
    pytest.importorskip("google.protobuf")  # with it, transformers reads a tokenizer.model
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    text = "How do I paint the boat?"
    assert theirs.eos_token_id == tok.eos_id and theirs.encode(text) == tok.encode(text, bos=True)


def test_scratch_weights_are_those_of_the_seed():
    a, b, c = (init_from_scratch(small_config(), seed=s) for s in (0, 0, 1))
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    placement = Placement(torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(
        init_from_scratch(small_config(), placement=placement).norm.weight, a.norm.weight
    )


def test_a_folder_that_was_read_is_freed_without_the_garbage_collector(folder):
    """Else its memory-mapped files stay in memory beside the model."""
    gc.disable()
    try:
        found = folders.open_folder(folder)
        refs = [weakref.ref(found), *map(weakref.ref, found.tensors.values())]
        del found
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()
