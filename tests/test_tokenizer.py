"""Special tokens, legacy and not, added tokens, bytes, saving, and a small one of our own."""

import os

import pytest
import sentencepiece
from conftest import ROOT

from nanosafe import tokenizer
from nanosafe.tokenizer import special_tokens, spm
from nanosafe.tools import demo
from nanosafe.storage import read_json, write_json

LLAMA = os.path.join(ROOT, "..", "shared", "data", "llama-tokenizer", "tokenizer.model")
needs_llama = pytest.mark.skipif(not os.path.exists(LLAMA), reason="needs LLaMA's tokenizer.model")


@pytest.fixture
def tok(world):
    return tokenizer.load(world / "tokenizer")


def test_round_trip_and_bytes(tok):
    for text in (
        "How do I paint the boat?",
        " two  spaces",
        "naïve 漢字 🙂",
        "a\nb\tc",
        "</s> as text",
    ):
        assert tok.decode(tok.encode(text, allow_special=False)) == text


def test_special_tokens_are_split_out_unless_the_text_is_a_user_s(tok):
    ids = tok.encode("Sure.</s>Sure.")
    assert tok.eos_id in ids and ids == tok.encode("Sure.") + [tok.eos_id] + tok.encode("Sure.")
    assert tok.eos_id not in tok.encode("Sure.</s>", allow_special=False)
    assert tok.bos_id not in tok.encode("<s>", allow_special=False)
    assert tok.encode("Sure.", bos=True, eos=True) == [tok.bos_id, *tok.encode("Sure."), tok.eos_id]


def test_not_legacy_puts_a_space_in_front_of_the_first_piece_only(tok, tmp_path):
    tok.save(tmp_path)
    config = read_json(tmp_path, "tokenizer_config.json")
    write_json({**config, "legacy": False}, tmp_path, "tokenizer_config.json")
    new = tokenizer.load(tmp_path)
    assert new.encode("Sure.</s>Sure.") == tok.encode("Sure.") + [tok.eos_id] + tok.encode_suffix(
        "Sure."
    )
    assert tok.decode(tok.encode_suffix("Sure.")) == "Sure."


def test_added_tokens_and_eos_ids_come_from_the_folder(tok, tmp_path):
    n = tok.vocab_size
    tok.save(tmp_path)
    write_json({"<pad>": n}, tmp_path, "added_tokens.json")
    write_json({"pad_token": "<pad>"}, tmp_path, "special_tokens_map.json")
    write_json({"eos_token_id": [2, 7]}, tmp_path, "generation_config.json")
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
@pytest.mark.parametrize(
    "legacy, text, ids",
    [
        (True, "<s>Hello", [1, 15043]),
        (True, "Hello</s>Hi", [15043, 2, 6324]),
        (True, "Hello</s> Hi", [15043, 2, 29871, 6324]),
        (True, " Hello", [29871, 15043]),
        (False, "<s>Hello", [1, 10994]),
        (False, "Hello</s>Hi", [15043, 2, 18567]),
        (False, "Hello</s> Hi", [15043, 2, 6324]),
        (False, " Hello", [29871, 15043]),
    ],
)
def test_llama_s_known_ids(legacy, text, ids):
    with open(LLAMA, "rb") as f:
        engine = spm.SentencePieceEngine(f.read(), {"legacy": legacy})
    assert special_tokens.Tokenizer(engine, engine.added).encode(text) == ids


def sentencepiece_folder(
    path, config=None, texts=("the cat sat on the mat", "a dog ran"), **options
):
    """A folder with a SentencePiece model of one's own settings."""
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "tokenizer.model"), "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(list(texts) * 50),
            model_writer=out,
            model_type="bpe",
            minloglevel=2,
            **{
                "vocab_size": 320,
                "byte_fallback": True,
                "hard_vocab_limit": False,
                "remove_extra_whitespaces": False,
                "normalization_rule_name": "identity",
                **options,
            },
        )
    if config:
        write_json(config, path, "tokenizer_config.json")
    return path


def test_flags_are_read_from_the_file(tmp_path):
    """Baichuan has no dummy prefix and adds no BOS; another model may normalise."""
    plain = tokenizer.load(
        sentencepiece_folder(tmp_path / "a", {"add_bos_token": False}, add_dummy_prefix=False)
    )
    sp = plain.engine.sp
    assert plain.encode("cat", bos=True) == sp.encode("cat") == plain.encode_suffix("cat")
    assert (
        sp.id_to_piece(plain.encode("cat")[0])[0] != "▁"
        and plain.decode(plain.encode("cat</s>cat")) == "catcat"
    )
    nfkc = tokenizer.load(sentencepiece_folder(tmp_path / "b", normalization_rule_name="nmt_nfkc"))
    assert (
        nfkc.encode("ｃａｔ") == nfkc.encode("cat")
        and nfkc.encode("cat", bos=True)[0] == nfkc.bos_id == 1
    )


def test_a_user_cannot_smuggle_in_what_the_model_itself_finds_in_text(tmp_path):
    """Baichuan2's roles are user-defined pieces: SentencePiece finds them wherever they stand."""
    tok = tokenizer.load(
        sentencepiece_folder(tmp_path, user_defined_symbols=["<reserved_106>", "[unused1]", "\n\n"])
    )
    role = tok.engine.sp.piece_to_id("<reserved_106>")
    for text in (
        "<reserved_106>the cat",
        "the <reserved_106><reserved_106> cat[unused1]",
        "a\n\nb <reserved_106>",
    ):
        assert role in tok.encode(text)  # asked for
        for ids in (
            tok.encode(text, allow_special=False),
            *tok.encode_batch([text]),
            tok.encode_suffix(text),
        ):
            assert role not in ids and tok.engine.sp.piece_to_id("[unused1]") not in ids
            assert tok.decode(ids) == text
    assert tok.engine.sp.piece_to_id("\n\n") in tok.encode(
        "a\n\nb", allow_special=False
    )  # no mark, only white space


def test_added_tokens_may_take_a_piece_s_place_and_need_not_be_special(tmp_path):
    """InternLM2 names rows that its SentencePiece model calls unused."""
    sentencepiece_folder(
        tmp_path,
        {
            "tokenizer_class": "InternLM2Tokenizer",
            "auto_map": {"AutoTokenizer": ["evil.py", None]},
            "eos_token": "",
            "added_tokens_decoder": {
                "310": {
                    "content": "<|im_start|>",
                    "special": True,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                },
                "400": {
                    "content": "<word>",
                    "special": False,
                    "lstrip": False,
                    "rstrip": True,
                    "normalized": False,
                },
            },
        },
    )
    tok = tokenizer.load(tmp_path)
    assert (
        tok.encode("<|im_start|>cat<word>  dog")[0] == 310
        and tok.eos_id == 2
        and tok.vocab_size == 401
    )
    assert tok.decode(tok.encode("<|im_start|>cat<word>  dog")) == "cat<word> dog"
    assert 310 not in tok.encode("<|im_start|>", allow_special=False)
    assert tok.decode([310, 350, 399, 5]) == tok.decode([350, 5])  # 399 is a row without a token
    tok.save(tmp_path / "saved")
    config = read_json(tmp_path / "saved", "tokenizer_config.json")
    assert "auto_map" not in config and config["tokenizer_class"] == "LlamaTokenizer"
    assert tokenizer.load(tmp_path / "saved").fingerprint == tok.fingerprint
    files = os.listdir(tmp_path / "saved")
    tok.save(tmp_path / "saved")
    assert os.listdir(tmp_path / "saved") == files


def test_broken_special_tokens_of_old_folders(tmp_path):
    """decapoda's LLaMA names its tokens with empty texts, and wrong ids: SentencePiece knows better."""
    sentencepiece_folder(tmp_path, {"bos_token": "", "eos_token": "", "unk_token": ""})
    write_json({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}, tmp_path, "config.json")
    tok = tokenizer.load(tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.eos_ids, tok.pad_id) == (1, 2, [2], -1)
