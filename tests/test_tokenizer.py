"""Special tokens, legacy and not, added tokens, bytes, saving, and a small one of our own."""

import os

import pytest
from conftest import ROOT

from nanosafe import demo, tokenizer

LLAMA = os.path.join(ROOT, "..", "shared", "data", "llama-tokenizer", "tokenizer.model")
needs_llama = pytest.mark.skipif(not os.path.exists(LLAMA), reason="needs LLaMA's tokenizer.model")


@pytest.fixture
def tok(world):
    return tokenizer.load(world / "tokenizer")


def test_round_trip_and_bytes(tok):
    for text in ("How do I paint the boat?", " two  spaces", "naïve 漢字 🙂", "a\nb\tc", "</s> as text"):
        assert tok.decode(tok.encode(text, allow_special=False)) == text


def test_special_tokens_are_split_out_unless_the_text_is_a_user_s(tok):
    ids = tok.encode("Sure.</s>Sure.")
    assert tok.eos_id in ids and ids == tok.encode("Sure.") + [tok.eos_id] + tok.encode("Sure.")
    assert tok.eos_id not in tok.encode("Sure.</s>", allow_special=False)
    assert tok.bos_id not in tok.encode("<s>", allow_special=False)
    assert tok.encode("Sure.", bos=True, eos=True) == [tok.bos_id, *tok.encode("Sure."), tok.eos_id]


def test_not_legacy_puts_a_space_in_front_of_the_first_piece_only(tok, tmp_path):
    tok.save(tmp_path)
    config = tokenizer.read_json(tmp_path, "tokenizer_config.json")
    tokenizer.write_json({**config, "legacy": False}, tmp_path, "tokenizer_config.json")
    new = tokenizer.load(tmp_path)
    assert new.encode("Sure.</s>Sure.") == tok.encode("Sure.") + [tok.eos_id] + tok.encode_suffix("Sure.")
    assert tok.decode(tok.encode_suffix("Sure.")) == "Sure."


def test_added_tokens_and_eos_ids_come_from_the_folder(tok, tmp_path):
    n = tok.vocab_size
    tok.save(tmp_path)
    tokenizer.write_json({"<pad>": n}, tmp_path, "added_tokens.json")
    tokenizer.write_json({"pad_token": "<pad>"}, tmp_path, "special_tokens_map.json")
    tokenizer.write_json({"eos_token_id": [2, 7]}, tmp_path, "generation_config.json")
    again = tokenizer.load(tmp_path)
    assert again.pad_id == n and again.vocab_size == n + 1 and again.eos_ids == [2, 7]
    assert again.encode("Sure.<pad>")[-1] == n and again.decode([n]) == ""
    assert again.fingerprint != tok.fingerprint == tokenizer.load(tok.file).fingerprint


def test_training_is_deterministic(tmp_path):
    texts = ["the cat sat on the mat", "a dog ran to the cat"] * 50
    a, b = (demo.train_tokenizer(texts, 290, str(tmp_path / name)) for name in "ab")
    assert a.engine.identity == b.engine.identity


def test_a_missing_or_broken_file_stops_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no tokenizer at"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(SystemExit, match="is not a SentencePiece model"):
        tokenizer.load(tmp_path)


@needs_llama
@pytest.mark.parametrize("legacy, text, ids", [
    (True, "<s>Hello", [1, 15043]), (True, "Hello</s>Hi", [15043, 2, 6324]),
    (True, "Hello</s> Hi", [15043, 2, 29871, 6324]), (True, " Hello", [29871, 15043]),
    (False, "<s>Hello", [1, 10994]), (False, "Hello</s>Hi", [15043, 2, 18567]),
    (False, "Hello</s> Hi", [15043, 2, 6324]), (False, " Hello", [29871, 15043]),
])
def test_llama_s_known_ids(legacy, text, ids):
    with open(LLAMA, "rb") as f:
        engine = tokenizer.Pieces(f.read(), {"legacy": legacy})
    assert tokenizer.Tokenizer(engine, engine.added).encode(text) == ids
