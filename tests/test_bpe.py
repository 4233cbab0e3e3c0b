"""Byte-level BPE against Hugging Face's tokenizers and tiktoken, string by string; SentencePiece against both."""

import base64
import json
import os
import re
import time
import unicodedata

import pytest
from conftest import ROOT

tokenizers = pytest.importorskip("tokenizers")

import oracles  # noqa: E402

from nanosafe import tokenizer
from nanosafe.tokenizer import bpe, patterns

LLAMA = os.path.join(ROOT, "..", "shared", "data", "llama-tokenizer", "tokenizer.model")
N = 20000


def mismatches(ours, theirs, n=N, seed=0):
    """Texts on which the ids, with and without BOS, or their decoding differ."""
    found = []
    for text in oracles.strings(n, seed):
        ids = theirs.encode(text, add_special_tokens=False).ids
        if (ours.encode(text), ours.encode(text, bos=True)) != (ids, theirs.encode(text).ids) or (
            ours.decode(ids) != theirs.decode(ids)
        ):
            found.append(text)
    return found


@pytest.mark.parametrize("family", oracles.FAMILIES)
def test_tokenizer_json_equals_tokenizers(family, tmp_path):
    theirs = oracles.byte_level(tmp_path, **oracles.FAMILIES[family])
    ours = tokenizer.load(tmp_path)
    assert mismatches(ours, theirs) == []
    special = theirs.token_to_id("<|endoftext|>")
    assert special in ours.encode("a<|endoftext|>") and special not in ours.encode(
        "a<|endoftext|>", allow_special=False
    )
    assert ours.decode(ours.encode("a<|endoftext|>", allow_special=False)) == "a<|endoftext|>"
    assert ours.vocab_size == theirs.get_vocab_size()
    assert {
        "llama3": ours.bos_id > 0,
        "qwen2": ours.bos_id == -1,
        "smollm2": not ours.engine.adds_bos,
    }[family]
    ours.save(tmp_path / "again")
    again = tokenizer.load(tmp_path / "again")
    assert again.fingerprint == ours.fingerprint and again.eos_id == ours.eos_id


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not legacy"])
@pytest.mark.parametrize("source", ["toy", "llama"])
def test_a_sentencepiece_model_s_tokenizer_json(source, legacy, world, tmp_path):
    """Of LLaMA's kind, as transformers 4 and 5 write it: equal to tokenizers; and where SentencePiece has the same
    rules, to SentencePiece."""
    if source == "llama" and not os.path.exists(LLAMA):
        pytest.skip("needs LLaMA's tokenizer.model")
    pieces = tokenizer.load(world / "tokenizer" if source == "toy" else LLAMA)
    theirs = oracles.from_sentencepiece(pieces.engine.sp, tmp_path, legacy)
    ours = tokenizer.load(tmp_path)
    assert mismatches(ours, theirs, N if source == "llama" else 5000) == []
    if legacy:
        # U+2581 is how SentencePiece writes a space: only it tells the two apart.
        texts = [text for text in oracles.strings(N, seed=1) if text and "▁" not in text]
        assert [
            text
            for text in texts
            if pieces.encode(text, allow_special=False) != ours.encode(text, allow_special=False)
        ] == []
        assert sum("<s>" in text or "</s>" in text for text in texts) > 500
        assert [
            text for text in texts if pieces.encode(text, bos=True) != theirs.encode(text).ids
        ] == []


def test_llama_3_s_own_file_equals_tiktoken_and_is_written_for_others(tmp_path):
    tiktoken, transformers = pytest.importorskip("tiktoken"), pytest.importorskip("transformers")
    oracles.byte_level(tmp_path / "json", **oracles.FAMILIES["llama3"])
    vocab = json.loads((tmp_path / "json" / "tokenizer.json").read_text())["model"]["vocab"]
    ranks = {b"".join(bpe.BYTES[c] for c in token): rank for token, rank in vocab.items()}
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    ours = tokenizer.load(tmp_path)
    special = {text: t.id for text, t in ours.added.items()}
    theirs = tiktoken.Encoding(
        "llama3", pat_str=oracles.LLAMA3, mergeable_ranks=ranks, special_tokens=special
    )
    for text in oracles.strings(N):
        assert ours.encode(text, bos=True) == [
            ours.bos_id,
            *theirs.encode(text, allowed_special="all"),
        ]
        assert ours.encode(text, allow_special=False) == theirs.encode(text, disallowed_special=())
    n = len(ranks)
    assert (ours.bos_id, ours.eos_id, special["<|eot_id|>"], ours.vocab_size) == (
        n,
        n + 1,
        n + 9,
        n + 256,
    )
    assert (
        special["<|reserved_special_token_4|>"] == n + 8
        and special["<|reserved_special_token_250|>"] == n + 255
    )
    ours.save(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == ["tokenizer.json", "tokenizer_config.json"]
    again, hf = (
        tokenizer.load(tmp_path / "saved"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    assert again.fingerprint == ours.fingerprint and again.eos_id == ours.eos_id
    for text in oracles.strings(1000, seed=2):
        assert hf.encode(text) == ours.encode(text, bos=True) == again.encode(text, bos=True)


def test_llama_3_1_has_other_specials(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    )
    (tmp_path / "params.json").write_text('{"use_scaled_rope": true}')
    added = {text: t.id - 256 for text, t in tokenizer.load(tmp_path).added.items()}
    assert [
        added[x]
        for x in ("<|finetune_right_pad_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
    ] == [4, 8, 9, 10]
    assert (
        added["<|reserved_special_token_2|>"] == 5
        and added["<|reserved_special_token_247|>"] == 255
    )


def test_a_special_token_is_never_made_of_text(tmp_path):
    """Also where it is a word of the vocabulary, and words of the vocabulary are taken whole."""
    oracles.byte_level(tmp_path, oracles.LLAMA3, ignore_merges=True, specials=("X",), eos_token="X")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["ZZZ"] = len(spec["model"]["vocab"]) + 50
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "id": spec["model"]["vocab"]["ZZZ"], "content": "ZZZ"}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours = tokenizer.load(tmp_path)
    assert spec["model"]["vocab"]["ZZZ"] in ours.encode("ZZZ")
    assert spec["model"]["vocab"]["ZZZ"] not in ours.encode("ZZZ", allow_special=False)


@pytest.mark.parametrize(
    "pattern", [oracles.LLAMA3, bpe.GPT2, r"\p{Lu}+|\P{L}|[\p{Ll}\p{M}]+(a|b)?"]
)
def test_translated_expressions_cut_as_the_regex_module(pattern):
    regex = pytest.importorskip("regex")
    theirs, ours = regex.compile(pattern), re.compile(patterns.translate(pattern))
    newer = {c for c in range(0x110000) if unicodedata.category(chr(c)) == "Cn"}
    for text in oracles.strings(5000, seed=3):
        if not newer & set(map(ord, text)):
            assert [m[0] for m in theirs.finditer(text)] == [m[0] for m in ours.finditer(text)]


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
def test_what_is_not_known_stops_with_one_line(part, words, tmp_path):
    oracles.byte_level(tmp_path, bpe.GPT2, specials=("</s>",))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **part}))
    with pytest.raises(SystemExit, match=words):
        tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    oracles.byte_level(tmp_path, bpe.GPT2)
    with pytest.raises(SystemExit, match="no end-of-sequence token"):
        tokenizer.load(tmp_path)


def test_a_megabyte_of_english_takes_less_than_two_seconds(tmp_path, toy):
    for family, options in oracles.FAMILIES.items():
        oracles.byte_level(tmp_path / family, **options)
        ours = tokenizer.load(tmp_path / family)
        text = "".join(oracles.LINES)
        text = (text * (1 + 10**6 // len(text)))[: 10**6]
        ours.encode("warm up: the classes of the expressions are built once")
        began = time.process_time()
        ours.encode(text)
        assert time.process_time() - began < 2
