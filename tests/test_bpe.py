"""Byte-level BPE against Hugging Face's tokenizers and tiktoken, text by text; and SentencePiece
against both."""

import base64
import os
import re
import shutil
import time
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

tokenizers = pytest.importorskip("tokenizers")

import oracles  # noqa: E402

from nanosafe import tokenizer
from nanosafe.storage import read_json, write_json
from nanosafe.tokenizer import bpe, patterns

LLAMA = os.path.join(ROOT, "..", "shared", "data", "llama-tokenizer", "tokenizer.model")
RANKS = "nanosafe.tokenizer.llama3.RANKS"  # tests have fewer
TEXTS = 20000


class Trained(NamedTuple):
    """A folder with a tokenizer.json, and Hugging Face's tokenizer of it."""

    folder: Path
    theirs: tokenizers.Tokenizer


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{family: Trained} of each family in oracles.py."""
    trained = {}
    for name, options in oracles.FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        trained[name] = Trained(folder, oracles.byte_level(folder, **options))
    return trained


def find_mismatches(ours, theirs, n=TEXTS):
    """Texts on which the ids, with and without BOS, or their decoding differ."""
    found = []
    for text in oracles.make_texts(n):
        ids = theirs.encode(text, add_special_tokens=False).ids
        same = (
            ours.encode(text) == ids
            and ours.encode(text, bos=True) == theirs.encode(text).ids
            and ours.decode(ids) == theirs.decode(ids)
        )
        if not same:
            found.append(text)
    return found


def write_tiktoken_file(path, ranks):
    """Write {token: rank} as Llama 3's tokenizer.model."""
    with open(path, "wb") as f:
        for token, rank in ranks.items():
            f.write(base64.b64encode(token) + b" %d\n" % rank)


# ---- tokenizer.json ----


@pytest.mark.parametrize("family", oracles.FAMILIES)
def test_tokenizer_json_equals_tokenizers(family, families, tmp_path):
    folder, theirs = families[family]
    ours = tokenizer.load(folder)
    assert find_mismatches(ours, theirs) == []
    special = theirs.token_to_id("<|endoftext|>")
    assert special in ours.encode("a<|endoftext|>")
    plain = ours.encode("a<|endoftext|>", allow_special=False)
    assert special not in plain
    assert ours.decode(plain) == "a<|endoftext|>"
    assert ours.vocab_size == theirs.get_vocab_size()
    ours.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert again.eos_id == ours.eos_id


def test_bos_is_what_the_file_says(families):
    assert tokenizer.load(families["llama3"].folder).bos_id > 0
    assert tokenizer.load(families["qwen2"].folder).bos_id == -1
    assert not tokenizer.load(families["smollm2"].folder).engine.adds_bos


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
@pytest.mark.parametrize("source", ["toy", "llama"])
def test_the_tokenizer_json_of_a_sentencepiece_model(source, legacy, world, tmp_path):
    """LLaMA's kind, as transformers 4 and 5 write it, equals tokenizers; and where SentencePiece
    has the same rules, it equals SentencePiece."""
    if source == "llama" and not os.path.exists(LLAMA):
        pytest.skip("needs LLaMA's tokenizer.model")
    pieces = tokenizer.load(world / "tokenizer" if source == "toy" else LLAMA)
    theirs = oracles.from_sentencepiece(pieces.engine.sp, tmp_path, legacy)
    ours = tokenizer.load(tmp_path)
    assert find_mismatches(ours, theirs, TEXTS if source == "llama" else 5000) == []
    if not legacy:
        return
    # U+2581 is how SentencePiece writes a space. Only it tells the two apart.
    texts = [text for text in oracles.make_texts(TEXTS, seed=1) if text and "▁" not in text]
    assert sum("<s>" in text or "</s>" in text for text in texts) > 500
    mismatches = []
    for text in texts:
        expected = pieces.encode(text, allow_special=False)
        if ours.encode(text, allow_special=False) != expected:
            mismatches.append(text)
        if pieces.encode(text, bos=True) != theirs.encode(text).ids:
            mismatches.append(text)
    assert mismatches == []


def test_a_special_token_is_never_made_of_text(tmp_path):
    """Not even where it is in the vocabulary, and words of the vocabulary are taken whole."""
    oracles.byte_level(tmp_path, oracles.LLAMA3, ignore_merges=True, specials=("X",), eos_token="X")
    spec = read_json(tmp_path, "tokenizer.json")
    id = len(spec["model"]["vocab"]) + 50
    spec["model"]["vocab"]["ZZZ"] = id
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": id, "content": "ZZZ"})
    write_json(spec, tmp_path, "tokenizer.json")
    ours = tokenizer.load(tmp_path)
    assert id in ours.encode("ZZZ")
    assert id not in ours.encode("ZZZ", allow_special=False)


@pytest.mark.parametrize("key", [True, False], ids=["as a key", "as a file"])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_chat_template_of_the_base_folder_is_exported_in_one_place(
    kind, key, families, world, tmp_path
):
    source = families["qwen2"].folder if kind == "byte-level" else world / "tokenizer"
    base, exported = tmp_path / "base", tmp_path / "exported"
    shutil.copytree(source, base)
    config = read_json(base, "tokenizer_config.json")
    if key:
        write_json({**config, "chat_template": "{{ x }}"}, base, "tokenizer_config.json")
    else:
        (base / "chat_template.jinja").write_text("{{ x }}")
    ours = tokenizer.load(base)
    ours.save(exported)
    ours.save(exported)
    assert not (exported / "chat_template.jinja").exists()
    assert read_json(exported, "tokenizer_config.json")["chat_template"] == "{{ x }}"
    again = tokenizer.load(exported)
    assert again.fingerprint == ours.fingerprint
    for name, value in config.items():
        assert read_json(exported, "tokenizer_config.json")[name] == value


@pytest.mark.parametrize(
    "part, words",
    [
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "the pre-tokenizer .* is not supported"),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": r"\w+"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            r"\\w",
        ),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "is not a BPE tokenizer"),
        ({"model": {}}, "is not a BPE tokenizer"),
    ],
)
def test_what_is_not_supported_stops_with_one_line(part, words, tmp_path):
    oracles.byte_level(tmp_path, bpe.GPT2, specials=("</s>",))
    spec = read_json(tmp_path, "tokenizer.json")
    write_json({**spec, **part}, tmp_path, "tokenizer.json")
    with pytest.raises(SystemExit, match=words):
        tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    oracles.byte_level(tmp_path, bpe.GPT2)
    with pytest.raises(SystemExit, match="no end-of-sequence token"):
        tokenizer.load(tmp_path)


def test_a_megabyte_of_english_takes_less_than_two_seconds(families):
    lines = "".join(oracles.LINES)
    text = (lines * (1 + 10**6 // len(lines)))[: 10**6]
    for trained in families.values():
        ours = tokenizer.load(trained.folder)
        ours.encode("warm up: the classes of the expressions are built once")
        began = time.process_time()
        ours.encode(text)
        assert time.process_time() - began < 2


# ---- Llama 3's tokenizer.model ----


@pytest.fixture(scope="module")
def llama3(families, tmp_path_factory):
    """A folder with Llama 3's kind of tokenizer.model, and the ranks in it."""
    vocab = read_json(families["llama3"].folder, "tokenizer.json")["model"]["vocab"]
    ranks = {}
    for token, rank in vocab.items():
        ranks[b"".join(bpe.BYTES[character] for character in token)] = rank
    folder = tmp_path_factory.mktemp("tiktoken")
    write_tiktoken_file(folder / "tokenizer.model", ranks)
    return folder, ranks


def test_llama_3_s_own_file_equals_tiktoken(llama3, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    folder, ranks = llama3
    monkeypatch.setattr(RANKS, len(ranks))
    ours = tokenizer.load(folder)
    special = {text: token.id for text, token in ours.added.items()}
    theirs = tiktoken.Encoding(
        "llama3", pat_str=oracles.LLAMA3, mergeable_ranks=ranks, special_tokens=special
    )
    for text in oracles.make_texts(TEXTS):
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text, bos=True) == [ours.bos_id, *ids]
        plain = theirs.encode(text, disallowed_special=())
        assert ours.encode(text, allow_special=False) == plain
    n = len(ranks)
    assert ours.bos_id == n
    assert ours.eos_id == n + 1
    assert special["<|reserved_special_token_4|>"] == n + 8
    assert special["<|eot_id|>"] == n + 9
    assert special["<|reserved_special_token_250|>"] == n + 255
    assert ours.vocab_size == n + 256


def test_llama_3_s_own_file_is_written_as_tokenizer_json(llama3, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder, ranks = llama3
    monkeypatch.setattr(RANKS, len(ranks))
    ours = tokenizer.load(folder)
    ours.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    again = tokenizer.load(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert again.eos_id == ours.eos_id
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in oracles.make_texts(1000, seed=2):
        ids = ours.encode(text, bos=True)
        assert theirs.encode(text) == ids
        assert again.encode(text, bos=True) == ids


def test_only_as_many_ranks_as_llama_3_has_are_taken_for_llama_3_s(tmp_path):
    """Llama 4's file has about 200,000, and is cut by another rule, so its ids would be wrong."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes([i, j]) for i in range(256) for j in range(256)]
    tokens += [b"abc" + i.to_bytes(3, "big") for i in range(140000)]
    for count in (200000, 127999):
        ranks = {token: rank for rank, token in enumerate(tokens[:count])}
        write_tiktoken_file(tmp_path / "tokenizer.model", ranks)
        with pytest.raises(SystemExit, match=f"has {count} tokens with ranks, but .* has 128000"):
            tokenizer.load(tmp_path)
    ranks = {token: rank for rank, token in enumerate(tokens[:128000])}
    write_tiktoken_file(tmp_path / "tokenizer.model", ranks)
    assert tokenizer.load(tmp_path).vocab_size == 128256
    ranks[tokens[0]] = 128000  # a gap: rank 0 is nobody's
    write_tiktoken_file(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(SystemExit, match="Llama 3's tokenizer.model has 128000"):
        tokenizer.load(tmp_path)


def test_llama_3_1_has_other_special_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(RANKS, 256)
    ranks = {bytes([i]): i for i in range(256)}
    write_tiktoken_file(tmp_path / "tokenizer.model", ranks)
    (tmp_path / "params.json").write_text('{"use_scaled_rope": true}')
    added = {text: token.id - 256 for text, token in tokenizer.load(tmp_path).added.items()}
    assert added["<|finetune_right_pad_id|>"] == 4
    assert added["<|reserved_special_token_2|>"] == 5
    assert added["<|eom_id|>"] == 8
    assert added["<|eot_id|>"] == 9
    assert added["<|python_tag|>"] == 10
    assert added["<|reserved_special_token_247|>"] == 255


# ---- regular expressions ----


@pytest.mark.parametrize(
    "pattern", [oracles.LLAMA3, bpe.GPT2, r"\p{Lu}+|\P{L}|[\p{Ll}\p{M}]+(a|b)?"]
)
def test_translated_expressions_cut_as_the_regex_module(pattern):
    regex = pytest.importorskip("regex")
    theirs = regex.compile(pattern)
    ours = re.compile(patterns.translate(pattern))
    for text in oracles.make_texts(5000, seed=3):
        # The regex module may know characters that this Python does not.
        if all(unicodedata.category(character) != "Cn" for character in text):
            expected = [match[0] for match in theirs.finditer(text)]
            assert [match[0] for match in ours.finditer(text)] == expected
