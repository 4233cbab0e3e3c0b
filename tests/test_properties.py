"""Random and hostile input, by hypothesis: it is read correctly, or refused in one line, or dropped
and counted."""

import json
import os
import re
import shutil
import string
import struct
import sys
import traceback

import numpy as np
import pytest
import torch
from conftest import encode_texts, small_config
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import configurator
from nanosafe import checkpoint, data, tokenizer
from nanosafe.checkpoint.families import FAMILIES
from nanosafe.data import batching, examples, reader
from nanosafe.data.spec import Source, parse_spec
from nanosafe.storage import read_jsonl

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
SOME = settings(MANY, max_examples=120)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def stops(function, *arguments):
    """What a function returns, or None when it stops with one line.

    Whatever else it raises is a defect."""
    try:
        return function(*arguments)
    except SystemExit as stopped:
        assert str(stopped).startswith("error: ")
        assert "\n" not in str(stopped)


# ---- configurator ----

KNOBS = {"whole": 3, "rate": 0.5, "name": "a", "on": False}


@MANY
@given(
    st.sampled_from(list(KNOBS)),
    st.text(max_size=30) | st.sampled_from(["1e5", "nan", "-0", "inf", "True", "0x10", "1_0", "٣"]),
)
def test_flags_are_values_of_their_knob_s_type_or_refused(name, text):
    value = stops(configurator.parse, name, text, KNOBS)
    if name == "name":
        assert value == text
    elif value is not None:
        assert type(value) is type(KNOBS[name])
        assert abs(value) < float("inf")


@MANY
@given(st.text(max_size=20), JSON)
def test_a_file_s_values_are_of_their_knob_s_type_or_refused(name, value):
    assert stops(configurator.check, name, value, KNOBS, "file") is None or name in KNOBS
    for name, default in KNOBS.items():
        checked = stops(configurator.check, name, value, KNOBS, "file")
        if checked is not None:
            assert type(checked) is type(default)
            # A whole number beyond 2^53 becomes the nearest float.
            assert checked == (float(value) if type(default) is float else value)


@SOME
@given(
    st.dictionaries(
        st.sampled_from(["whole", "rate", "name", "on"]),
        st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"]))
        | st.booleans(),
        min_size=1,
    )
)
def test_a_saved_configuration_reads_back(tmp_path_factory, config):
    path = str(tmp_path_factory.getbasetemp() / "saved.py")
    configurator.save(config, path)
    assert configurator.run_file(path) == config


@SOME
@given(st.text(string.ascii_letters + string.digits + " =\"'\n()[]{}#:,.-+\\", max_size=80))
def test_a_config_file_of_anything_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_text(text)
    try:
        stops(configurator.run_file, str(path))
    except Exception as error:  # of the user's own code: the traceback leads to its line
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        assert str(path) in files


# ---- datasets ----


@MANY
@given(st.text(string.ascii_letters + "/:.,-0123456789 ~*", max_size=30) | st.text(max_size=20))
def test_specifications_are_understood_or_refused(spec):
    for source in stops(parse_spec, spec) or ():
        assert os.path.isfile(source.path)
        if source.count is None:
            assert isinstance(source.fraction, float)
            assert source.fraction >= 0
        else:
            assert isinstance(source.count, int)
            assert source.count >= 0
            assert source.fraction is None


FRACTION = st.floats(0, 4).map(lambda fraction: Source("", fraction, None))
COUNT = st.integers(1, 100).map(lambda count: Source("", None, count))


@MANY
@given(st.integers(0, 50), FRACTION | COUNT, st.integers(0, 9))
def test_proportions_take_as_many_rows_as_they_say(n, source, seed):
    count = reader.count_samples(n, source)
    if source.count is None:
        assert count == round(n * source.fraction)
    else:
        assert count == source.count
    indices = reader.sample_indices(n, count, np.random.SeedSequence(seed))
    assert len(indices) == (count if n else 0)
    if indices:
        times_drawn = np.bincount(indices, minlength=n)
        assert len(times_drawn) == n
        assert times_drawn.max() - times_drawn.min() <= 1  # whole copies, and the rest once


RECORD = st.fixed_dictionaries(
    {},
    optional={
        "input": TEXT | st.lists(TEXT, max_size=4) | JSON,
        "answer": TEXT | JSON,
        "other_answer": TEXT | JSON,
        "dialogue": st.lists(TEXT) | JSON,
        "better": st.booleans() | JSON,
        "safer": st.booleans() | JSON,
        "is_safe": st.booleans() | JSON,
        "is_other_safe": st.booleans() | JSON,
        "answers": st.lists(TEXT, max_size=3) | JSON,
        "scores": st.lists(st.floats(), max_size=3) | JSON,
    },
)


@MANY
@given(RECORD, st.sampled_from(list(examples.TASKS)))
def test_a_row_gives_conversations_or_a_reason_to_drop_it(record, task):
    try:
        conversations, labels = examples.parse_record(record, task)
    except ValueError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    assert len(conversations) == len(labels)
    assert all(np.isfinite(labels))
    for turns in conversations:
        assert all(isinstance(turn, str) and turn.strip() for turn in turns)
        assert len(turns) % 2 == (task == "prompts")


LINE = (
    st.binary(max_size=60)
    | JSON.map(lambda x: json.dumps(x).encode())
    | RECORD.map(lambda x: json.dumps(x).encode())
)


@SOME
@given(st.lists(LINE, max_size=6), st.sampled_from(["sft", "prompts", "reward", "cost", "rank"]))
def test_every_row_of_a_file_is_kept_or_dropped_and_counted(
    world, tmp_path_factory, monkeypatch_session, lines, task
):
    tok = tokenizer.load(world / "tokenizer")
    folder = tmp_path_factory.getbasetemp() / "rows"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = [line.replace(b"\n", b" ").replace(b"\r", b" ") for line in lines]
    (folder / "x.jsonl").write_bytes(b"\n".join(lines))
    monkeypatch_session.setenv("NANOSAFE_CACHE", str(folder))
    dataset = stops(data.tokenize, str(folder / "x.jsonl"), tok, task, 64)
    if dataset:
        read, kept = re.match(r"(\d+) rows, (\d+) kept", dataset.report["text"]).groups()
        assert int(kept) == len(dataset)
        assert int(read) == len(dataset) + sum(dataset.report["dropped"].values())
        assert dataset.lengths.max() <= 64 * dataset.width
        assert dataset.tokens.max() < tok.vocab_size


@pytest.fixture(scope="session")
def monkeypatch_session():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@SOME
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 90), st.integers(1, 5)
)
def test_plans_hold_everything_once(lengths, max_tokens, ranks):
    plan = batching.plan_micro_batches(lengths, max_tokens, ranks)
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    dealt = []
    for micro_batches in plan:
        for indices in micro_batches:
            assert sum(lengths[i] for i in indices) <= max_tokens
            dealt += indices
    assert sorted(dealt) == list(range(len(lengths)))


# ---- text ----

SPECIAL = st.lists(
    st.sampled_from(
        ["<s>", "</s>", "<unk>", "<pad>", "ASSISTANT:", "USER:", " ", "▁", "\n", "<0x41>"]
    )
    | TEXT,
    max_size=8,
).map("".join)


@MANY
@given(SPECIAL)
def test_a_user_s_text_stays_text(world, text):
    tok = tokenizer.load(world / "tokenizer")
    ids = tok.encode(text, allow_special=False)
    assert not {tok.bos_id, tok.eos_id, tok.pad_id} & set(ids)
    # SentencePiece writes a space as U+2581: the two are one to it
    assert tok.decode(ids).strip(" ") == text.replace("▁", " ").strip(" ")
    assert tok.encode_batch([text]) == [ids]
    if text.strip():
        ids, mask = encode_texts([text, "fine", text], tok)
        assert ids.count(tok.bos_id) == 1  # ours, at the start
        assert ids.count(tok.eos_id) == 1  # ours, at the answer's end
        assert sum(mask) == len(tok.encode_suffix("fine")) + 1


@SOME
@given(st.lists(st.integers(0, 10**6), max_size=20))
def test_any_ids_decode(world, ids):
    assert isinstance(tokenizer.load(world / "tokenizer").decode(ids), str)


@SOME
@given(st.binary(max_size=200))
def test_a_tokenizer_file_of_anything_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "tokenizer.model"
    path.write_bytes(content)
    assert stops(tokenizer.load, path) is None
    path = path.with_suffix(".json")
    path.write_bytes(content)
    assert stops(tokenizer.load, path) is None


@SOME
@given(
    st.sampled_from(
        [
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "generation_config.json",
            "config.json",
        ]
    ),
    JSON
    | st.dictionaries(
        st.sampled_from(
            [
                "eos_token",
                "bos_token",
                "pad_token",
                "added_tokens_decoder",
                "eos_token_id",
                "legacy",
                "additional_special_tokens",
                "add_bos_token",
            ]
        ),
        JSON,
    ),
)
def test_the_files_beside_a_tokenizer_are_understood_or_refused(
    world, tmp_path_factory, name, value
):
    folder = tmp_path_factory.getbasetemp() / "beside"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / "tokenizer", folder)
    (folder / name).write_text(json.dumps(value))
    tok = stops(tokenizer.load, folder)
    if tok:
        assert isinstance(tok.eos_id, int)
        assert 0 <= tok.eos_id < tok.vocab_size
        assert tok.decode(tok.encode("First, get the rope.")) == "First, get the rope."


# ---- model folders ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model"
    checkpoint.save(checkpoint.init_from_scratch(small_config(), seed=3), path)
    os.remove(path / "checksums.json")
    return path


def copy_of(folder):
    target = folder.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


CONFIG = st.dictionaries(
    st.sampled_from(
        [
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "num_hidden_layers",
            "head_dim",
            "vocab_size",
            "rope_theta",
            "rope_scaling",
            "rms_norm_eps",
            "tie_word_embeddings",
            "model_type",
            "hidden_act",
            "max_position_embeddings",
            "mean",
            "var",
            "score_type",
            "bos_token_id",
            "eos_token_id",
            "torch_dtype",
            "architectures",
            "rope_parameters",
            "intermediate_size",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
            "no_rope_layers",
            "no_rope_layer_interval",
            "partial_rotary_factor",
            "original_max_position_embeddings",
        ]
    ),
    JSON
    | st.integers(-5, 300)
    | st.sampled_from([*FAMILIES, "silu", "cost"])
    | st.lists(st.sampled_from(["full_attention", "sliding_attention", 0, 1, 2]), max_size=3)
    | st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "short_factor", "truncate"]),
        st.sampled_from(["yarn", "longrope", "su", "llama3", "default", 0, 2.0, [1.0] * 4, None]),
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


@MANY
@given(CONFIG)
def test_a_config_of_anything_opens_or_is_refused(folder, changes):
    target = copy_of(folder)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    model = stops(checkpoint.load, target)
    if model:
        out = stops(model, torch.arange(5), torch.tensor([0, 5], dtype=torch.int32), 5)
        assert out is None or out.shape == (5, 97)


@SOME
@given(st.integers(0, 2**16), st.binary(min_size=1, max_size=8), st.booleans())
def test_safetensors_with_a_broken_header_or_end_are_refused(folder, place, junk, cut):
    target = copy_of(folder)
    path = target / "model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0] + 8
    place %= size
    changed = content[:place] if cut else content[:place] + junk + content[place + len(junk) :]
    assume(changed != content)
    path.write_bytes(changed)
    known = load_file(folder / "model.safetensors")
    model = stops(checkpoint.load, target)
    if model:  # then the change was in something that does not matter, a space for example
        checkpoint.save(model, folder.parent / "again")
        again = load_file(folder.parent / "again" / "model.safetensors")
        assert again.keys() == known.keys()
        for name, tensor in again.items():
            assert tensor.shape == known[name].shape


@SOME
@given(
    JSON
    | st.fixed_dictionaries(
        {
            "weight_map": JSON
            | st.dictionaries(
                st.sampled_from(["model.norm.weight", "lm_head.weight", "x"]),
                st.sampled_from(["a.safetensors", "../a.safetensors", "/etc/passwd", "", "."])
                | JSON,
            )
        }
    )
)
def test_an_index_of_anything_is_refused(folder, index):
    target = copy_of(folder)
    os.rename(target / "model.safetensors", target / "a.safetensors")
    save_file({"x": torch.zeros(1)}, target.parent / "a.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    model = stops(checkpoint.load, target)
    if model:  # it names some of the tensors of the one file, which has them all
        assert index["weight_map"]
        assert set(index["weight_map"].values()) == {"a.safetensors"}
        known = checkpoint.load(folder)
        for parameter, expected in zip(model.parameters(), known.parameters(), strict=True):
            assert torch.equal(parameter, expected)


@SOME
@given(st.lists(st.binary(max_size=30), max_size=5))
def test_a_jsonl_file_of_ours_is_read_or_refused(tmp_path_factory, lines):
    path = str(tmp_path_factory.getbasetemp() / "ours.jsonl")
    with open(path, "wb") as f:
        f.write(b"".join(line + b"\n" for line in lines) + b'{"broken": ')
    found = stops(read_jsonl, path)
    assert found is None or len(found) <= len(b"\n".join(lines).split(b"\n"))


def test_python_is_as_new_as_promised():
    assert sys.version_info >= (3, 10)
