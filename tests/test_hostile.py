"""Folders, tokenizers and data that are broken, contradictory or meant to harm.

Each stops with one line, never with a traceback, and no number is silently wrong. Each case was a
defect once, or could be."""

import gzip
import json
import os
import shutil

import oracles
import pytest
import sentencepiece
import torch
from conftest import encode_texts, run, small_config
from safetensors.torch import load_file, save_file
from test_prepare import PAIR, read_lines, run_prepare
from test_tokenizer import sentencepiece_folder

from nanosafe import checkpoint, data, tokenizer
from nanosafe.checkpoint import convert, families, init_from_scratch, meta
from nanosafe.data import reader
from nanosafe.tokenizer import bpe
from nanosafe.storage import read_json, write_json
from nanosafe.model import Config

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(init_from_scratch(small_config(), seed=3), tmp_path / "model")
    return tmp_path / "model"


def refuses(function, *arguments, match=None):
    """The call stops with one line that begins with error: and, if given, has the words."""
    with pytest.raises(SystemExit, match=match) as stopped:
        function(*arguments)
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)


def edit_config(folder, changes, removed=()):
    config = read_json(folder, "config.json")
    for key in removed:
        del config[key]
    write_json({**config, **changes}, folder, "config.json")


# ---- config.json ----


@pytest.mark.parametrize("text", ["5", '"x"', "[1, 2]", "[" * 10**5, "{", ""])
def test_a_config_that_is_not_an_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refuses(checkpoint.load, folder)


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "32"),
        ("hidden_size", -32),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 2.0),
        ("vocab_size", 97.0),
        ("vocab_size", 10**12),
        ("rms_norm_eps", "1e-6"),
        ("rope_theta", 0),
        ("rope_theta", "10000"),
        ("rope_scaling", ["linear"]),
        ("rope_scaling", {"rope_type": "proportional", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": "4"}),
        ("rope_scaling", {"type": "yarn", "original_max_position_embeddings": [32768]}),
        ("rope_scaling", {"type": "longrope", "short_factor": 1.0, "long_factor": [4.0]}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", [1]),
        ("tie_word_embeddings", "false"),
        ("hidden_act", "gelu"),
        ("model_type", 5),
        ("head_dim", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("score_type", "rewrad"),
    ],
)
def test_a_config_with_an_invalid_value_is_refused(folder, key, value):
    edit_config(folder, {key: value}, removed=["rope_parameters"])
    refuses(checkpoint.load, folder)


@pytest.mark.parametrize("key, value", [("hidden_size", "32"), ("num_attention_heads", 0)])
def test_a_head_width_that_cannot_be_computed_is_refused(folder, key, value):
    edit_config(folder, {key: value}, removed=["head_dim"])
    refuses(checkpoint.load, folder, match=f"{key} in config.json is {value!r}")


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mistral", {"sliding_window": "4096"}),
        ("mistral", {"sliding_window": -1}),
        ("baichuan", {"vocab_size": None}),
        ("internlm", {"rotary": "dynamic"}),
        ("baichuan", {"max_position_embeddings": None}),
    ],
)
def test_a_family_s_config_with_an_invalid_value_is_refused(folder, family, changes):
    edit_config(folder, {"model_type": family, **changes})
    refuses(checkpoint.load, folder)


def test_fewer_rows_than_the_config_says_are_not_taken_for_new_tokens(folder):
    edit_config(folder, {"vocab_size": 120})
    refuses(checkpoint.load, folder, match="embed_tokens.weight .97, 32., not .120, 32.")
    with pytest.raises(SystemExit):
        checkpoint.load(folder, vocab_size=130)


def test_rope_is_read_as_transformers_reads_it():
    linear = {"rope_type": "linear", "factor": 2.0}
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    spellings = (
        {"rope_scaling": {**linear, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": linear},
        {"rope_parameters": {**linear, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    )
    for spelling in spellings:
        config = Config.from_dict({**sizes, **spelling})
        assert config.rope_theta == 5e5, spelling
        assert config.rope_type == "linear", spelling
        assert config.rope_scaling["factor"] == 2.0, spelling
        once = Config.from_dict(config.to_dict())
        twice = Config.from_dict(once.to_dict())
        assert once == twice


def test_baichuan2_with_more_rows_keeps_its_normalised_head():
    baichuan2 = families.baichuan({"vocab_size": 125700, "max_position_embeddings": 4096})
    assert baichuan2["norm_head"]
    baichuan1 = families.baichuan({"vocab_size": 64000, "max_position_embeddings": 4096})
    assert not baichuan1["norm_head"]


def test_a_llama_ignores_other_families_keys(folder):
    edit_config(folder, {"sliding_window": 8, "alibi": True, "norm_head": True})
    config = checkpoint.load(folder).config
    assert not config.sliding_window
    assert not config.alibi
    assert not config.norm_head


# ---- files of weights ----


@pytest.mark.parametrize(
    "index",
    [
        [1],
        "x",
        {"weight_map": [1]},
        {"weight_map": {"a": None}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "../model.safetensors"}},
        {},
    ],
)
def test_an_invalid_index_is_refused(folder, index):
    os.rename(folder / "model.safetensors", folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(checkpoint.load, folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"\x80\x02", b"\x80\x02.", b"\x80\x02(l.", os.urandom(999)],
    ids=["empty", "zip", "pickle", "empty stack", "other pickle", "random"],
)
def test_broken_files_of_weights_are_refused(folder, content):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(content)
        refuses(checkpoint.load, folder)
        os.remove(folder / name)


def test_a_bin_file_with_a_damaged_archive_is_refused(folder):
    """Here torch.load raises RuntimeError."""
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 40 + content[40:])
    refuses(checkpoint.load, folder, match="pytorch_model.bin' cannot be read")


@pytest.mark.parametrize(
    "changes",
    [
        {1: torch.ones(1)},
        {"model.norm.weight": torch.tensor(1.0)},
        {"model.norm.weight": torch.ones(32).to_sparse()},
        {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
        {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)},
        {"module.model.norm.weight": torch.zeros(32)},
    ],
    ids=["number as a name", "scalar", "sparse", "int8", "float8", "twice"],
)
def test_a_bin_file_with_an_invalid_tensor_is_refused(folder, changes):
    tensors = load_file(folder / "model.safetensors")
    tensors.update(changes)
    os.remove(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    refuses(checkpoint.load, folder)


def test_a_bin_file_without_tensors_is_refused(folder):
    os.remove(folder / "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    refuses(checkpoint.load, folder)


def test_a_tensor_in_two_files_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    save_file(tensors, folder / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "b.safetensors")
    weight_map = {name: "a.safetensors" for name in tensors}
    weight_map["model.x"] = "b.safetensors"
    write_json({"weight_map": weight_map}, folder, "model.safetensors.index.json")
    refuses(checkpoint.load, folder, match="'model.norm.weight' is in two files")


# ---- models that no config.json can express ----


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"sliding_window": 8, "attention_bias": True, "output_bias": True},
        {"output_bias": True},
        {"norm_head": True, "sliding_window": 8},
        {"alibi": True, "attention_bias": True},
    ],
)
def test_a_model_that_no_config_can_express_is_not_written(tmp_path, changes):
    model = init_from_scratch(small_config(**changes))
    refuses(checkpoint.save, model, tmp_path / "x", match="no family's config.json")
    assert not os.listdir(tmp_path)


def test_a_mistral_with_biases_is_refused_before_it_is_trained(tmp_path):
    config = small_config(attention_bias=True, output_bias=True)
    checkpoint.save(init_from_scratch(config), tmp_path)
    edit_config(tmp_path, {"model_type": "mistral", "sliding_window": 8})
    refuses(checkpoint.load, tmp_path, match="no family's config.json")


# ---- the command that converts ----


def test_convert_never_overwrites(folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "new.old").mkdir()
    for target in (tmp_path / "thesis", tmp_path, tmp_path / "new", folder, ".", ""):
        refuses(convert.convert, str(folder), str(target), match="is there already")
    assert (tmp_path / "thesis").is_dir()
    assert (tmp_path / "new.old").is_dir()
    assert (folder / "config.json").exists()


def test_convert_refuses_weights_that_overflow_in_half_precision(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / "model.safetensors")
    source, target = str(folder), str(tmp_path / "half")
    words = "norm.weight is not finite in torch.float16"
    refuses(convert.convert, source, target, torch.float16, match=words)
    assert os.listdir(tmp_path) == ["model"]  # so that a second attempt is not refused
    convert.convert(source, target, torch.bfloat16)


# ---- Meta's folders ----


@pytest.fixture
def meta_folder(tmp_path):
    path = tmp_path / "llama[8b]"  # brackets are special to glob
    path.mkdir()
    weights = {
        "tok_embeddings.weight": torch.zeros(128256, 2),
        "layers.0.feed_forward.w1.weight": torch.zeros(4, 2),
    }
    torch.save(weights, path / "consolidated.00.pth")
    write_json({"dim": 2, "n_layers": 1, "n_heads": 1}, path, "params.json")
    return path


@pytest.mark.parametrize("scaled, length", [(False, 8192), (True, 131072)])
def test_meta_s_llama_3_has_its_longest_input(meta_folder, scaled, length):
    params = {"dim": 2, "n_layers": 1, "n_heads": 1, "use_scaled_rope": scaled}
    write_json(params, meta_folder, "params.json")
    config = meta.read_meta_folder(str(meta_folder)).config
    assert config["max_position_embeddings"] == length


@pytest.mark.parametrize(
    "params",
    [[1], {"dim": "2", "n_layers": 1, "n_heads": 1}, {"dim": 2}, {"model": [1]}],
)
def test_invalid_params_of_meta_s_are_refused(meta_folder, params):
    (meta_folder / "params.json").write_text(json.dumps(params))
    refuses(checkpoint.load, meta_folder)


def test_shards_of_meta_s_that_do_not_fit_are_refused(meta_folder):
    torch.save({"other": torch.zeros(2)}, meta_folder / "consolidated.01.pth")
    refuses(checkpoint.load, meta_folder, match="do not hold the same tensors")
    os.remove(meta_folder / "consolidated.00.pth")
    refuses(checkpoint.load, meta_folder, match="no consolidated.00.pth")


# ---- tokenizers ----


@pytest.mark.parametrize(
    "name, text",
    [
        ("generation_config.json", "{"),
        ("generation_config.json", "null"),
        ("generation_config.json", '{"eos_token_id": [2, null, "7"]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": null}'),
        ("tokenizer_config.json", '{"eos_token": ""}'),
    ],
)
def test_what_stands_beside_a_tokenizer_may_be_odd(world, tmp_path, name, text):
    shutil.copy(world / "tokenizer" / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(text)
    assert tokenizer.load(tmp_path).eos_ids == [2]


@pytest.mark.parametrize(
    "name, value",
    [
        ("added_tokens.json", {"<pad>": "x"}),
        ("added_tokens.json", {"<pad>": 10**11}),
        ("added_tokens.json", {"<pad>": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {}}}),
        ("tokenizer_config.json", {"additional_special_tokens": 5}),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}),
    ],
)
def test_what_stands_beside_a_tokenizer_may_be_wrong(world, tmp_path, name, value):
    shutil.copy(world / "tokenizer" / "tokenizer.model", tmp_path)
    write_json(value, tmp_path, name)
    refuses(tokenizer.load, tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
@pytest.mark.parametrize("text", ["[1]", "null", "{", "[" * 10**5])
def test_what_stands_beside_a_tokenizer_is_json(world, tmp_path, name, text):
    shutil.copy(world / "tokenizer" / "tokenizer.model", tmp_path)
    (tmp_path / name).write_text(text)
    refuses(tokenizer.load, tmp_path, match="is no JSON object")


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "BPE", "vocab": [], "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": None}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [5]}},
        {"added_tokens": [{"content": "x"}]},
        {"normalizer": "NFC"},
        {"post_processor": {"type": "TemplateProcessing", "single": []}},
    ],
)
def test_a_tokenizer_json_that_is_none(tmp_path, change):
    oracles.byte_level(tmp_path, bpe.GPT2, specials=("</s>",))
    write_json({**read_json(tmp_path, "tokenizer.json"), **change}, tmp_path, "tokenizer.json")
    refuses(tokenizer.load, tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    refuses(tokenizer.load, tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[\p{Han}\p{L}]+",
        r"\p{Letter}",
        r"\p{Script=Han}",
        r"\p{^L}",
        r"\h",
        r"[\S]",
        "(",
        "[a&&b]",
    ],
)
def test_expressions_that_python_reads_otherwise_are_refused(tmp_path, pattern):
    oracles.byte_level(tmp_path, bpe.GPT2, specials=("</s>",))
    spec = read_json(tmp_path, "tokenizer.json")
    spec["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    write_json(spec, tmp_path, "tokenizer.json")
    refuses(tokenizer.load, tmp_path)


def test_transformers_5_adds_tokens_in_tokenizer_json_only(world, tmp_path):
    pytest.importorskip("google.protobuf")
    shutil.copy(world / "tokenizer" / "tokenizer.model", tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.add_tokens(["<foo>"])
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.load(tmp_path)
    assert ours.vocab_size == len(theirs) and ours.pad_id == theirs.pad_token_id
    assert ours.encode("a<foo>")[-1] == theirs.convert_tokens_to_ids("<foo>")


def test_a_model_without_dummy_prefix_says_so_to_transformers(tmp_path):
    pytest.importorskip("google.protobuf")
    ours = tokenizer.load(
        sentencepiece_folder(tmp_path / "a", {"add_bos_token": False}, add_dummy_prefix=False)
    )
    ours.save(tmp_path / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    for text in ("cat", "the cat sat", "a dog\nran", "mat."):
        assert theirs.encode(text) == ours.encode(text, bos=True)


def test_ends_of_sequence_may_be_numbers_in_either_config(tmp_path):
    oracles.byte_level(tmp_path, bpe.GPT2, specials=("A", "B"))
    for wrong in (None, 10**6, -1, True, "x"):
        write_json({"eos_token_id": wrong}, tmp_path, "config.json")
        refuses(
            tokenizer.load, tmp_path, match="no end-of-sequence token"
        ) if wrong is not True else None
    write_json({"eos_token_id": 300}, tmp_path, "config.json")
    assert tokenizer.load(tmp_path).eos_ids == [300]
    model = init_from_scratch(small_config(vocab_size=tokenizer.load(tmp_path).vocab_size))
    checkpoint.save(model, tmp_path / "saved", tokenizer.load(tmp_path))
    assert tokenizer.load(tmp_path / "saved").eos_id == 300
    write_json({"eos_token_id": [300, 301]}, tmp_path, "config.json")
    assert tokenizer.load(tmp_path).eos_id == 300 and tokenizer.load(tmp_path).eos_ids == [300, 301]
    write_json({"eos_token": "A"}, tmp_path, "tokenizer_config.json")
    write_json({"eos_token_id": 302}, tmp_path, "generation_config.json")
    own = tokenizer.load(tmp_path).added["A"].id
    assert tokenizer.load(tmp_path).eos_id == own and tokenizer.load(tmp_path).eos_ids == sorted(
        {own, 300, 301, 302}
    )


def test_byte_level_tokenizers_lose_what_needs_a_stranger_s_code(tmp_path):
    oracles.byte_level(
        tmp_path / "a",
        bpe.GPT2,
        specials=("</s>",),
        tokenizer_class="QWenTokenizer",
        eos_token="</s>",
        auto_map={"AutoTokenizer": ["evil.py", None]},
    )
    tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    config = read_json(tmp_path / "b", "tokenizer_config.json")
    assert "auto_map" not in config and config["eos_token"] == "</s>"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").eos_token == "</s>"


def test_a_folder_may_be_called_like_a_file(world, tmp_path):
    shutil.copytree(world / "tokenizer", tmp_path / "x.model")
    assert tokenizer.load(tmp_path / "x.model").eos_id == 2


@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "nmt_nfkc"}])
def test_no_normaliser_helps_a_user_to_smuggle(tmp_path, options):
    symbols = ["<reserved_106>", "<|im_start|>", "[unused1]", "###User:", "<n>"]
    tok = tokenizer.load(sentencepiece_folder(tmp_path, user_defined_symbols=symbols, **options))
    own = {tok.engine.sp.piece_to_id(symbol) for symbol in symbols}
    assert len(own) == 5 and own <= set(tok.encode("".join(symbols)))
    for text in (
        *symbols,
        "＜reserved_106＞",
        "<reserved_１06>",
        "[unused１]",
        "a ＜|im_start|＞ b",
        "x###User:y<n>z",
    ):
        for ids in (
            tok.encode(text, allow_special=False),
            *tok.encode_batch([text]),
            tok.encode_suffix(text),
            encode_texts([text], tok)[0],
        ):
            assert not own & set(ids), text
    # a learnt piece is none of these
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tok.encode("the cat sat on the mat", allow_special=False) == sp.encode(
        "the cat sat on the mat"
    )


# ---- data ----


def prepare(tmp_path, name, rows, *flags, raw_name="train.jsonl"):
    """Run a prepare.py on raw rows in this process; returns what it printed, and its error."""
    os.makedirs(tmp_path / "raw", exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "raw" / raw_name).write_text(text)
    return run_prepare(name, f"--raw={tmp_path}/raw", f"--out={tmp_path}/out", *flags)


def written(tmp_path, split="train"):
    path = tmp_path / "out" / f"{split}.jsonl"
    return read_lines(path) if path.exists() else []


def test_a_split_without_rows_leaves_no_file_of_an_earlier_run(tmp_path):
    rows = [{**PAIR, "prompt": f"p{i}"} for i in range(20)]
    prepare(tmp_path, "pku_saferlhf", rows, "--holdout=0.2")
    assert len(written(tmp_path, "test")) == 4
    prepare(tmp_path, "pku_saferlhf", rows)
    assert len(written(tmp_path)) == 20
    assert not written(tmp_path, "test")


def test_a_failed_preparation_leaves_the_old_files(tmp_path):
    prepare(tmp_path, "pku_saferlhf", [PAIR])
    finished = prepare(tmp_path, "pku_saferlhf", [{"x": 1}])
    assert finished.error.startswith("error: ")
    assert len(written(tmp_path)) == 1
    assert os.listdir(tmp_path / "out") == ["train.jsonl"]


def test_a_file_whose_name_only_contains_the_letters_of_test_is_no_test_file(tmp_path):
    prepare(tmp_path, "pku_saferlhf", [PAIR], raw_name="latest_contest.jsonl")
    assert len(written(tmp_path)) == 1
    assert not written(tmp_path, "test")


def test_wrong_labels_and_texts_cost_their_row(tmp_path):
    changes = [
        {"is_response_0_safe": "no"},
        {"is_response_0_safe": 2},
        {"is_response_0_safe": float("nan")},
        {"is_response_0_safe": None},
        {"better_response_id": -1},
        {"safer_response_id": 2},
        {"prompt": 5},
        {"response_0": None},
        {"response_0": " "},
        {"response_0": "b"},
        {"prompt": "\ud83d"},
        {"better_response_id": float("inf")},
        {"prompt": ["a", "b"]},
    ]
    bad = [{**PAIR, **change} for change in changes]
    finished = prepare(tmp_path, "pku_saferlhf", [PAIR, *bad])
    assert not finished.error
    assert len(written(tmp_path)) == 1
    assert f"{1 + len(bad)} rows read, 1 kept" in finished.printed
    assert "half a character in the turn" in finished.printed
    second_line = f"{tmp_path}/raw/train.jsonl:2"
    reason = f"dropped 4 ('is_response_0_safe' is not true or false), first: {second_line}"
    assert reason in finished.printed


def feedback(instruction, *scored):
    """A row of UltraFeedback, of (response, score) pairs."""
    completions = [{"response": text, "overall_score": score} for text, score in scored]
    return {"instruction": instruction, "completions": completions}


@pytest.mark.parametrize(
    "name, row",
    [
        ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}),
        ("alpaca", {"instruction": "a", "output": "b", "history": [1]}),
        ("ultrafeedback", feedback(None, ("a", 1), ("b", 2))),
        ("ultrafeedback", feedback("x", ("a", float("nan")), ("b", 2))),
        ("phf", {"texts": "ab", "scores": [1, 2]}),
        ("phf", {"texts": [None], "scores": [1]}),
        ("phf", {"texts": ["a"], "scores": [float("nan")]}),
        ("beavertails", {"prompt": "a", "response": "b", "is_safe": "no"}),
        ("beavertails", {"prompt": "a", "response": "b", "is_safe": 1, "category": {"c": "x"}}),
    ],
)
def test_rows_of_a_wrong_structure_are_dropped(tmp_path, name, row):
    finished = prepare(tmp_path, name, [row])
    assert not written(tmp_path)
    assert "1 rows read, 0 kept; dropped 1" in finished.printed
    assert finished.error.startswith("error: none of the 1 rows")


def test_scores_are_compared_as_numbers(tmp_path):
    prepare(tmp_path, "ultrafeedback", [feedback("x", ("ten", "10.0"), ("nine", "9.0"))])
    assert written(tmp_path)[0]["answer"] == "ten"


def test_damaged_raw_files_are_refused(tmp_path):
    good = gzip.compress(b'{"a": 1}\n' * 999)
    (tmp_path / "middle.jsonl.gz").write_bytes(good[:60] + bytes(8) + good[68:])
    (tmp_path / "block.jsonl.gz").write_bytes(good[:10] + b"\xff" * 8 + good[18:])
    (tmp_path / "short.jsonl.gz").write_bytes(good[:40])
    (tmp_path / "text.jsonl.gz").write_bytes(b"{}")
    (tmp_path / "latin.jsonl").write_bytes("na\xefve".encode("latin-1"))
    (tmp_path / "deep.json").write_text("[" * 10**5)
    for path in sorted(tmp_path.iterdir()):
        refuses(lambda: list(reader.read_rows(str(path))))


def test_half_a_character_costs_one_row(world, tmp_path):
    path = tmp_path / "x.jsonl"
    half = json.dumps({"input": "a", "answer": "\ud83d"})
    whole = json.dumps({"input": "a", "answer": "b"})
    nested = "[" * 10**5
    path.write_text("\n".join([half, whole, nested, ""]))
    found = data.tokenize(str(path), tokenizer.load(world / "tokenizer"), "sft", 100)
    assert len(found) == 1
    assert "half a character in the answer" in found.report["text"]


def test_sample_refuses_in_one_line(world, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"input": 5}\n{"input": ["a", "b"]}\n{"input": "How?"}\n')
    done = run(
        "sample.py",
        f"--model={world}/policy",
        f"--prompts={tmp_path}/x.jsonl",
        "--max_new_tokens=2",
    )
    assert done.stdout.count("x.jsonl:1 is left out: ") == 1
    assert done.stdout.count(" is left out: ") == 2 and "> How?" in done.stdout
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    checkpoint.save(
        init_from_scratch(small_config(vocab_size=40)),
        tmp_path / "short",
        tokenizer.load(world / "tokenizer"),
    )
    done = run("sample.py", f"--model={tmp_path}/short", "--prompt=a", "--max_new_tokens=2")
    assert "rows for new tokens, each the others' mean" in done.stdout
    for flags in (
        ["--max_new_tokens=0", "--prompt=a"],
        [f"--model={world}/policy", f"--prompts={tmp_path}/latin.txt"],
    ):
        done = run("sample.py", *flags, check=False)
        assert (
            done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
        ), flags


def test_single_word_is_refused_everywhere(world, tmp_path):
    shutil.copy(world / "tokenizer" / "tokenizer.model", tmp_path)
    write_json(
        {"added_tokens_decoder": {"900": {"content": "foo", "single_word": True}}},
        tmp_path,
        "tokenizer_config.json",
    )
    refuses(tokenizer.load, tmp_path, match="single_word, of 'foo'")


def test_merges_in_either_spelling_are_one_tokenizer(tmp_path):
    oracles.byte_level(tmp_path / "a", bpe.GPT2, specials=("</s>",))
    spec = read_json(tmp_path / "a", "tokenizer.json")
    merges = [m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"]]
    for name, spelled in (("a", merges), ("b", [" ".join(m) for m in merges])):
        os.makedirs(tmp_path / name, exist_ok=True)
        write_json(
            {**spec, "model": {**spec["model"], "merges": spelled}},
            tmp_path / name,
            "tokenizer.json",
        )
    assert tokenizer.load(tmp_path / "a").fingerprint == tokenizer.load(tmp_path / "b").fingerprint
