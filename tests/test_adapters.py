"""Adapter folders: what PEFT wrote opens as its base with the adapter merged, and stops with one
line where nanosafe does not know what it is.

tests/data/lora holds adapters that PEFT wrote, three small bases, and the logits that PEFT computed
without merging (its index.json names the versions). Other folders are made here."""

import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, rows_of, run, small_config, trainer_flags
from safetensors.torch import load_file, save_file

from nanosafe import adapter_base, checkpoint, inference, tokenizer
from nanosafe.checkpoint import convert, init_from_scratch, run_state
from nanosafe.checkpoint.folder import list_shapes, make_config, map_tensors, open_folder
from nanosafe.checkpoint.tensors import copy_rows
from nanosafe.storage import read_json, write_json

LORA = os.path.join(ROOT, "tests", "data", "lora")
WITH_MERGED_TENSORS = os.path.join(ROOT, "..", "shared", "spec", "models", "lora")
INDEX = read_json(LORA, "index.json")["adapters"]
OPEN = [name for name in INDEX if not name.startswith("refuse_")]
SCORE_MODELS = [name for name in OPEN if INDEX[name]["task"] == "score"]
PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


# ---- what PEFT wrote ----


@pytest.fixture(scope="module")
def expected_outputs():
    return load_file(os.path.join(LORA, "expected.safetensors"))


@torch.no_grad()
def outputs_of(model, tokens):
    """Logits (n, vocabulary) or scores (n,) of one sequence."""
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
    return model(torch.tensor(tokens), ends, len(tokens)).squeeze(-1)


@pytest.mark.parametrize("name", OPEN)
def test_outputs_are_those_that_peft_computes_unmerged(name, expected_outputs):
    model = checkpoint.load(os.path.join(LORA, name))
    expected = expected_outputs[name]
    outputs = outputs_of(model, INDEX[name]["tokens"])
    # Unmerged, float32 rounds otherwise. The largest logits are about 20.
    assert outputs.shape == expected.shape
    assert (outputs - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_pickle_that_peft_writes_on_request_is_read_as_the_safetensors_are(expected_outputs):
    model = checkpoint.load(os.path.join(LORA, "llama_q_v_bin"))
    expected = expected_outputs["llama_q_v"]
    outputs = outputs_of(model, INDEX["llama_q_v"]["tokens"])
    assert (outputs - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", OPEN)
def test_merged_tensors_are_those_that_peft_merges_and_no_other_tensor_changes(name):
    expected_file = os.path.join(WITH_MERGED_TENSORS, name, "expected_merged.safetensors")
    if not os.path.exists(expected_file):
        pytest.skip("the merged tensors are too large for the repository")
    expected = load_file(expected_file)
    if "score.weight" in expected:
        expected["score_head.weight"] = expected.pop("score.weight")
    base = open_folder(os.path.join(LORA, INDEX[name]["base"]))
    for tensor_name, tensor in open_folder(os.path.join(LORA, name)).tensors.items():
        wanted = expected.pop(tensor_name, None)
        if wanted is None:
            wanted = base.tensors[tensor_name][:]
        assert (tensor[:] - wanted).abs().max() <= 1e-6, tensor_name
    assert not expected


@pytest.mark.parametrize("name", ["llama_patterns_rslora", "llama_embedding_lora", "llama_score"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_rows_of_all_ranks_together_are_the_whole(name, ranks):
    folder = open_folder(os.path.join(LORA, name))
    head = "score" if "score" in name else "lm"
    config = make_config(folder)
    shapes = list_shapes(config, head)
    ranges = map_tensors(shapes, config, folder.family)
    whole = dict(checkpoint.load(folder.path).named_parameters())
    for parameter, shape in shapes.items():
        pieces = []
        for piece in torch.zeros(shape).chunk(ranks):
            first = sum(len(earlier) for earlier in pieces)
            for row_range in ranges[parameter]:
                copy_rows(piece, first, folder.tensors[row_range.tensor], row_range)
            pieces.append(piece)
        assert torch.allclose(torch.cat(pieces), whole[parameter], rtol=0, atol=1e-6), parameter


@pytest.mark.parametrize(
    "name, word",
    [
        ("refuse_dora", "use_dora=True"),
        ("refuse_lora_bias", "lora_bias=True"),
        ("refuse_trainable_tokens", r"trainable_token_indices=\[3, 5\]"),
        ("refuse_replication", r"layer_replication=\[\[0, 2\], \[1, 2\]\]"),
    ],
)
def test_what_nanosafe_does_not_support_is_refused_by_name(name, word):
    refuses(checkpoint.load, os.path.join(LORA, name), match=word)


def refuses(function, *arguments, match):
    """The call stops with one line that has the words."""
    with pytest.raises(SystemExit, match=match) as stopped:
        function(*arguments)
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)


# ---- adapters of the tests' own ----


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    checkpoint.save(init_from_scratch(small_config(), seed=3), path)
    return path


def write_adapter(folder, base, tensors, **changes):
    """Write an adapter folder: of q_proj with rank 4, unless the changes say otherwise."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    os.makedirs(folder, exist_ok=True)
    write_json({**config, **changes}, folder, "adapter_config.json")
    stored = {PREFIX + name: tensor for name, tensor in tensors.items()}
    save_file(stored, os.path.join(folder, "adapter_model.safetensors"))
    return folder


def draw_pairs(base, ends=("q_proj",), rank=4):
    """A and B of each matrix of a base whose name has one of the ends; of embeddings as PEFT
    writes them."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, tensor in load_file(os.path.join(base, "model.safetensors")).items():
        module = name.removesuffix(".weight")
        if not module.endswith(ends):
            continue
        outputs, inputs = tensor.shape
        if module.endswith("embed_tokens"):
            names = (module + ".lora_embedding_A", module + ".lora_embedding_B")
            outputs, inputs = inputs, outputs
        else:
            names = (module + ".lora_A.weight", module + ".lora_B.weight")
        tensors[names[0]] = torch.randn(rank, inputs, generator=generator)
        tensors[names[1]] = torch.randn(outputs, rank, generator=generator)
    return tensors


def edit_adapter(folder, changes=None, removed=(), **config):
    path = os.path.join(folder, "adapter_model.safetensors")
    tensors = load_file(path)
    for name in removed:
        del tensors[PREFIX + name]
    for name, tensor in (changes or {}).items():
        tensors[PREFIX + name] = tensor
    save_file(tensors, path)
    values = read_json(folder, "adapter_config.json")
    write_json({**values, **config}, folder, "adapter_config.json")


@pytest.fixture
def adapter(base, tmp_path):
    return write_adapter(tmp_path / "adapter", base, draw_pairs(base))


def merge_by_hand(base, pairs, scale):
    """A base's tensors, with s B A added to those that have a pair."""
    merged = load_file(os.path.join(base, "model.safetensors"))
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        if module + ".lora_A.weight" in pairs:
            A = pairs[module + ".lora_A.weight"]
            B = pairs[module + ".lora_B.weight"]
            merged[name] = tensor + scale * (B @ A)
        if module + ".lora_embedding_A" in pairs:
            A = pairs[module + ".lora_embedding_A"]
            B = pairs[module + ".lora_embedding_B"]
            merged[name] = tensor + scale * (B @ A).T
    return merged


def assert_tensors(folder, expected):
    """An opened folder has exactly these tensors."""
    tensors = open_folder(folder).tensors
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        assert torch.allclose(tensor[:], expected[name], rtol=0, atol=1e-6), name


def test_an_adapter_without_newer_keys_opens_with_their_defaults(adapter, base):
    assert_tensors(adapter, merge_by_hand(base, draw_pairs(base), scale=8 / 4))


def test_layers_are_chosen_in_the_lists_that_layers_pattern_names(base, tmp_path):
    pairs = draw_pairs(base, ("layers.1.self_attn.q_proj",))
    chosen = {"layers_to_transform": 1, "layers_pattern": "layers"}
    folder = write_adapter(tmp_path / "a", base, pairs, **chosen)
    assert_tensors(folder, merge_by_hand(base, pairs, 2))
    edit_adapter(folder, layers_pattern=["blocks"])
    refuses(open_folder, folder, match="no matrices of the base")


def test_all_linear_means_all_matrices_but_embedding_and_head(base, tmp_path):
    pairs = draw_pairs(base, ("_proj",))
    folder = write_adapter(tmp_path / "a", base, pairs, target_modules="all-linear")
    assert_tensors(folder, merge_by_hand(base, pairs, 2))


def test_a_module_to_save_holds_all_that_lies_in_it_and_is_never_a_target(base, tmp_path):
    pairs = draw_pairs(base, ("up_proj",))
    expected = merge_by_hand(base, pairs, 2)
    saved = {}
    for name, tensor in expected.items():
        if ".self_attn." in name:
            saved[name] = tensor + 1
    folder = write_adapter(
        tmp_path / "a",
        base,
        {**pairs, **saved},
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["self_attn"],
    )
    assert_tensors(folder, {**expected, **saved})


@pytest.fixture
def tied_base(tmp_path):
    path = tmp_path / "tied"
    checkpoint.save(init_from_scratch(small_config(tie_word_embeddings=True), seed=3), path)
    return path


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_an_adapter_of_one_of_two_tied_matrices_leaves_the_other_as_it_was(
    module, tied_base, tmp_path
):
    embedding = load_file(tied_base / "model.safetensors")["model.embed_tokens.weight"]
    vocabulary, width = embedding.shape
    A, B = torch.randn(4, vocabulary), torch.randn(width, 4)
    pair = {"model.embed_tokens.lora_embedding_A": A, "model.embed_tokens.lora_embedding_B": B}
    if module == "lm_head":
        pair = {"lm_head.lora_A.weight": B.T.contiguous(), "lm_head.lora_B.weight": A.T}
        pair["lm_head.lora_B.weight"] = pair["lm_head.lora_B.weight"].contiguous()
    # PEFT writes a copy of the base's weight, too.
    pair[module + ".base_layer.weight"] = embedding
    folder = write_adapter(tmp_path / "a", tied_base, pair, target_modules=[module.split(".")[-1]])
    model = checkpoint.load(folder)
    changed = embedding + 2 * (B @ A).T
    expected = (changed, embedding) if module != "lm_head" else (embedding, changed)
    assert not model.config.tie_word_embeddings
    assert torch.allclose(model.embed_tokens.weight, expected[0], atol=1e-5)
    assert torch.allclose(model.lm_head.weight, expected[1], atol=1e-5)


def test_an_adapter_of_other_matrices_keeps_a_tie(tied_base, tmp_path):
    folder = write_adapter(tmp_path / "a", tied_base, draw_pairs(tied_base))
    model = checkpoint.load(folder)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_vocabulary_with_new_rows_is_taken_from_the_adapter(base, tmp_path):
    rows = {
        "model.embed_tokens.weight": torch.randn(101, 32),
        "lm_head.weight": torch.randn(101, 32),
    }
    folder = write_adapter(tmp_path / "a", base, {**draw_pairs(base), **rows})
    model = checkpoint.load(folder)
    assert model.config.vocab_size == 101
    assert torch.equal(model.embed_tokens.weight, rows["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, rows["lm_head.weight"])

    # Among modules_to_save, PEFT 0.21 writes such tensors three times.
    copies = {}
    for name, tensor in rows.items():
        module = name.removesuffix(".weight")
        copies[module + ".modules_to_save.weight"] = tensor.clone()
        copies[module + ".original_module.weight"] = torch.zeros(101, 32)
    edit_adapter(folder, copies, modules_to_save=["embed_tokens", "lm_head"])
    again = checkpoint.load(folder)
    assert torch.equal(again.lm_head.weight, rows["lm_head.weight"])


def test_new_rows_keep_a_tie_though_the_adapter_holds_only_the_embedding(tied_base, tmp_path):
    rows = {"model.embed_tokens.weight": torch.randn(101, 32)}
    folder = write_adapter(tmp_path / "a", tied_base, {**draw_pairs(tied_base), **rows})
    model = checkpoint.load(folder)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, rows["model.embed_tokens.weight"])


def test_fused_matrices_of_a_family_are_single_modules(base, tmp_path):
    """Baichuan's W_pack is the queries, keys and values of a LLaMA, one below the other."""
    tensors = load_file(base / "model.safetensors")
    fused = {}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            parts = [
                tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            fused[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            fused[name] = tensor
    save_file(fused, base / "model.safetensors")
    config = read_json(base, "config.json")
    write_json({**config, "model_type": "baichuan"}, base, "config.json")
    os.remove(base / "checksums.json")
    pairs = draw_pairs(base, ("W_pack",))
    folder = write_adapter(tmp_path / "a", base, pairs, target_modules=["W_pack"])
    model = checkpoint.load(folder)
    merged = merge_by_hand(base, pairs, 2)[Q_PROJ.replace("q_proj", "W_pack") + ".weight"]
    assert torch.allclose(model.layers[0].self_attn.qkv_proj.weight, merged, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_rounded_once_after_a_float32_sum(dtype, base, tmp_path):
    half_base = tmp_path / "half"
    checkpoint.save(checkpoint.load(base), half_base, dtype=dtype)
    pairs = draw_pairs(base)
    norms = {"model.norm.weight": torch.randn(32)}
    folder = write_adapter(tmp_path / "a", half_base, {**pairs, **norms}, modules_to_save=["norm"])
    edit_adapter(folder, modules_to_save=["model.norm"])
    opened = open_folder(folder)
    assert opened.dtype() == dtype
    name = Q_PROJ + ".weight"
    weight = load_file(half_base / "model.safetensors")[name]
    A, B = pairs[Q_PROJ + ".lora_A.weight"], pairs[Q_PROJ + ".lora_B.weight"]
    exact = weight.double() + 2 * (B.double() @ A.double())
    wrong = (opened.tensors[name][:].double() - exact).abs()
    nearest = (exact.to(dtype).double() - exact).abs()
    assert opened.tensors[name].dtype == dtype
    assert (wrong <= nearest + 1e-5).all()  # float32's own error can tip a tie
    assert torch.equal(opened.tensors["model.norm.weight"][:], norms["model.norm.weight"].to(dtype))


# ---- wherever a model is named ----


@pytest.mark.parametrize("name", SCORE_MODELS)
def test_a_score_adapter_is_a_score_model(name, capsys):
    folder = os.path.join(LORA, name)
    checkpoint.check_score_model(folder, "cost")
    assert checkpoint.load(folder, head="score").score_head.weight.shape == (1, 32)
    assert checkpoint.load(folder, score_type="critic").config.score_type == "critic"
    refuses(checkpoint.load, folder, "lm", match="is a score model")
    assert "is left out" not in capsys.readouterr().out


def test_an_adapter_of_a_policy_is_no_score_model():
    folder = os.path.join(LORA, "llama_q_v")
    refuses(checkpoint.check_score_model, folder, match="is a policy")
    base = os.path.join(LORA, "base_llama")
    assert checkpoint.count_parameters(folder) == checkpoint.count_parameters(base)


@pytest.mark.parametrize("name", ["llama_patterns", "llama_score", "qwen2_bias_all"])
def test_merging_writes_a_plain_folder_with_the_same_outputs(name, tmp_path):
    source = os.path.join(LORA, name)
    target = str(tmp_path / "merged")
    convert.main([source, target])
    assert not os.path.exists(os.path.join(target, "adapter_config.json"))
    tokens = INDEX[name]["tokens"]
    merged = outputs_of(checkpoint.load(target), tokens)
    assert torch.equal(merged, outputs_of(checkpoint.load(source), tokens))


@pytest.fixture
def world_adapter(world, tmp_path):
    """An adapter of the toy world's policy, which has a tokenizer."""
    policy = world / "policy"
    small = {name: 0.02 * tensor for name, tensor in draw_pairs(policy).items()}
    return write_adapter(tmp_path / "adapter", policy, small)


def test_the_tokenizer_is_the_adapters_own_or_the_bases(world, world_adapter):
    of_base = tokenizer.load(world / "policy")
    assert tokenizer.load(world_adapter).fingerprint == of_base.fingerprint
    of_base.save(world_adapter)
    assert os.path.dirname(tokenizer.find_tokenizer_file(world_adapter)) == str(world_adapter)
    assert tokenizer.load(world_adapter).fingerprint == of_base.fingerprint


def test_ends_of_sequence_are_the_bases_though_the_adapter_has_a_tokenizer(
    world, world_adapter, tmp_path
):
    chat_base = tmp_path / "chat"
    shutil.copytree(world / "policy", chat_base)
    write_json({"eos_token_id": [2, 5]}, chat_base, "generation_config.json")
    tokenizer.load(chat_base).save(world_adapter)
    for name in ("generation_config.json", "config.json"):
        if os.path.exists(world_adapter / name):
            os.remove(world_adapter / name)
    edit_adapter(world_adapter, base_model_name_or_path=str(chat_base))
    assert tokenizer.load(world_adapter).eos_ids == tokenizer.load(chat_base).eos_ids
    assert 5 in tokenizer.load(world_adapter).eos_ids


def test_fingerprints_change_with_the_adapter_and_with_its_base(adapter, base):
    class World:
        device = torch.device("cpu")

    def fingerprints():
        of_model = inference.fingerprint_model(None, str(adapter), World)
        return {run_state.fingerprint(str(adapter)), of_model}

    first = fingerprints()
    edit_adapter(adapter, {Q_PROJ + ".lora_A.weight": torch.zeros(4, 32)})
    second = fingerprints()
    assert not first & second
    checkpoint.save(init_from_scratch(small_config(), seed=4), base)
    assert not fingerprints() & (first | second)


def test_a_damaged_base_is_found_when_its_adapter_is_loaded(adapter, base):
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refuses(checkpoint.load, adapter, match="base': model.safetensors is damaged")


def test_a_base_may_be_named_from_the_adapters_folder_or_the_current_one(
    adapter, base, monkeypatch
):
    expected = merge_by_hand(base, draw_pairs(base), 2)
    edit_adapter(adapter, base_model_name_or_path="../base")
    assert_tensors(adapter, expected)
    edit_adapter(adapter, base_model_name_or_path="base")
    refuses(open_folder, adapter, match="an adapter of the model 'base', which is not there")
    monkeypatch.chdir(base.parent)
    assert_tensors(adapter, expected)
    assert_tensors("adapter", expected)


@pytest.mark.slow
def test_training_from_an_adapter_on_two_ranks_is_training_from_the_merged_model(
    world, world_adapter, tmp_path
):
    merged = tmp_path / "merged"
    run("-m", "nanosafe.checkpoint", world_adapter, merged)
    rows = []
    for source in (world_adapter, merged):
        out = tmp_path / f"out_{source.name}"
        flags = [f"--init_from={source}", f"--out_dir={out}", "--parallel=fsdp", "--max_steps=2"]
        run(*trainer_flags(world)["reward"], *flags, ranks=2)
        rows.append(rows_of(out / "metrics.jsonl"))
    assert rows[0] and rows[0] == rows[1]


# ---- broken and hostile folders ----


@pytest.mark.parametrize(
    "key, value",
    [
        ("peft_type", None),
        ("peft_type", "IA3"),
        ("peft_type", ["LORA"]),
        ("task_type", "TOKEN_CLS"),
        ("r", None),
        ("r", 0),
        ("r", "8"),
        ("r", 4.0),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", [8]),
        ("lora_alpha", 10**400),
        ("lora_alpha", float("nan")),
        ("use_rslora", "yes"),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", 7),
        ("target_modules", ["q_proj", 7]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", "*"),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0.5]),
        ("layers_pattern", 3),
        ("layers_pattern", "["),
        ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"q_proj)": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"a{99999999999}": 4}),
        ("modules_to_save", "score"),
        ("modules_to_save", [""]),
        ("bias", "some"),
        ("init_lora_weights", "pissa_niter_4"),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("target_parameters", ["experts"]),
        ("megatron_config", {"a": 1}),
        ("ensure_weight_tying", True),
        ("a_key_of_some_later_version", "on"),
    ],
)
def test_a_config_with_a_wrong_value_is_refused_by_its_key(key, value, adapter):
    config = read_json(adapter, "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    refuses(checkpoint.load, adapter, match=key)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 10**5])
def test_a_config_that_is_not_an_object_is_refused(text, adapter):
    (adapter / "adapter_config.json").write_text(text)
    refuses(checkpoint.load, adapter, match="adapter_config.json' is no JSON object")


def test_keys_with_values_that_switch_them_off_are_harmless(adapter, base):
    edit_adapter(adapter, a=None, b=False, c=[], d={}, use_dora=False, fan_in_fan_out=None)
    assert_tensors(adapter, merge_by_hand(base, draw_pairs(base), 2))


@pytest.mark.parametrize("rank", [5, 10**12])
def test_a_rank_that_is_not_the_tensors_is_refused_without_taking_memory(rank, adapter):
    edit_adapter(adapter, r=rank)
    refuses(
        open_folder, adapter, match=rf"lora_A.weight has the shape \[4, 32\], not \[{rank}, 32\]"
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        (Q_PROJ + ".lora_A.weight", (4, 31)),
        (Q_PROJ + ".lora_A.weight", (0,)),  # of a run that sharded and did not gather
        (Q_PROJ + ".lora_A.weight", ()),
        (Q_PROJ + ".lora_B.weight", (32, 5)),
        (Q_PROJ + ".lora_B.weight", (33, 4)),
    ],
)
def test_tensors_whose_shapes_do_not_fit_are_refused(name, shape, adapter):
    edit_adapter(adapter, {name: torch.zeros(shape)})
    refuses(open_folder, adapter, match=f"{name} has the shape")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.lora_A.weight",
        "model.layers.9.self_attn.q_proj.lora_A.weight",
        Q_PROJ + ".lora_A.default.weight",
        Q_PROJ + ".lora_B.bias",
        Q_PROJ + ".lora_magnitude_vector",
        Q_PROJ + ".base_layer.weight",
        "model.norm.weight",
        "score.weight",
        "something",
    ],
)
def test_tensors_left_over_are_refused(name, adapter):
    edit_adapter(adapter, {name: torch.zeros(4, 32)})
    refuses(open_folder, adapter, match="which its adapter_config.json does not ask for")


def test_tensors_that_are_missing_are_refused(adapter):
    edit_adapter(adapter, removed=[Q_PROJ + ".lora_B.weight"])
    refuses(open_folder, adapter, match=f"misses {Q_PROJ}.lora_B.weight")


def test_a_score_adapter_without_a_head_is_refused(adapter):
    edit_adapter(adapter, task_type="SEQ_CLS")
    refuses(open_folder, adapter, match="misses score_head.weight")


def test_integers_are_refused(adapter):
    edit_adapter(adapter, {Q_PROJ + ".lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)})
    refuses(open_folder, adapter, match="not as a floating-point type")


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        7,
        ["base"],
        "no/such/model",
        "../../../../no/such/model",
        "/no/such/model",
        "a\0b",
        "a" * 10**5,
    ],
)
def test_a_base_that_is_not_there_is_refused_with_what_to_do(name, adapter):
    edit_adapter(adapter, base_model_name_or_path=name)
    refuses(checkpoint.load, adapter, match="set base_model_name_or_path in its adapter_config")


@pytest.mark.parametrize("name", ["..", "../.."])
def test_a_base_that_is_no_model_is_refused(name, adapter):
    edit_adapter(adapter, base_model_name_or_path=name)
    refuses(checkpoint.load, adapter, match="no model at")


def test_an_adapter_of_an_adapter_is_refused(adapter, base, tmp_path):
    second = write_adapter(tmp_path / "second", adapter, draw_pairs(base))
    refuses(checkpoint.load, second, match="merge that one first")
    edit_adapter(adapter, base_model_name_or_path=".")  # its own base
    refuses(checkpoint.load, adapter, match="merge that one first")


def test_a_folder_that_is_both_an_adapter_and_a_whole_model_is_refused(adapter, base):
    shutil.copy(base / "config.json", adapter)
    shutil.copy(base / "model.safetensors", adapter)
    refuses(checkpoint.load, adapter, match="both the weights of a whole model and an adapter")
    os.remove(adapter / "adapter_model.safetensors")
    assert not adapter_base.is_adapter(adapter)  # merged, with the config still there
    checkpoint.load(adapter)


def test_an_adapter_without_weights_or_with_broken_ones_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuses(checkpoint.load, adapter, match="cannot be read")
    path.write_bytes(b"")
    refuses(checkpoint.load, adapter, match="cannot be read")
    os.remove(path)
    refuses(checkpoint.load, adapter, match="no weights in the adapter folder")


def test_a_pickle_that_runs_code_is_refused(adapter):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    os.remove(adapter / "adapter_model.safetensors")
    torch.save({"x": Harm()}, adapter / "adapter_model.bin")
    refuses(checkpoint.load, adapter, match="cannot be read")


def test_a_quantised_base_is_refused(adapter, base):
    config = read_json(base, "config.json")
    write_json({**config, "quantization_config": {"bits": 4}}, base, "config.json")
    refuses(checkpoint.load, adapter, match="base' is quantised")
