"""Special tokens, SentencePiece's settings, added tokens, bytes, and saving."""

import os

import pytest
import sentencepiece
from conftest import ROOT

from nanosafe import tokenizer
from nanosafe.storage import read_json, write_json
from nanosafe.tokenizer import special_tokens, spm
from nanosafe.tools import demo

LLAMA = os.path.join(ROOT, "..", "shared", "data", "llama-tokenizer", "tokenizer.model")
needs_llama = pytest.mark.skipif(not os.path.exists(LLAMA), reason="needs LLaMA's tokenizer.model")


@pytest.fixture
def tok(world):
    return tokenizer.load(world / "tokenizer")


def sentencepiece_folder(
    path, config=None, texts=("the cat sat on the mat", "a dog ran"), **options
):
    """Train a SentencePiece model and write its folder; returns the path.

    config   what tokenizer_config.json says; None: there is no such file
    options  of SentencePiece's trainer"""
    settings = {
        "vocab_size": 320,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    settings.update(options)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "tokenizer.model"), "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(list(texts) * 50),
            model_writer=out,
            model_type="bpe",
            minloglevel=2,
            **settings,
        )
    if config:
        write_json(config, path, "tokenizer_config.json")
    return path


# ---- encoding and decoding ----


@pytest.mark.parametrize(
    "text",
    [
        "How do I paint the boat?",
        " two  spaces",
        "naïve 漢字 🙂",
        "a\nb\tc",
        "</s> as text",
    ],
)
def test_decoding_gives_the_text_back(tok, text):
    assert tok.decode(tok.encode(text, allow_special=False)) == text


def test_special_tokens_are_found_unless_the_text_is_a_user_s(tok):
    sure = tok.encode("Sure.")
    assert tok.encode("Sure.</s>Sure.") == [*sure, tok.eos_id, *sure]
    assert tok.eos_id not in tok.encode("Sure.</s>", allow_special=False)
    assert tok.bos_id not in tok.encode("<s>", allow_special=False)
    assert tok.encode("Sure.", bos=True, eos=True) == [tok.bos_id, *sure, tok.eos_id]


def test_only_a_legacy_tokenizer_puts_a_space_in_front_of_every_piece(tok, tmp_path):
    tok.save(tmp_path)
    config = read_json(tmp_path, "tokenizer_config.json")
    write_json({**config, "legacy": False}, tmp_path, "tokenizer_config.json")
    new = tokenizer.load(tmp_path)
    expected = [*tok.encode("Sure."), tok.eos_id, *tok.encode_suffix("Sure.")]
    assert new.encode("Sure.</s>Sure.") == expected
    assert tok.decode(tok.encode_suffix("Sure.")) == "Sure."


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


# ---- SentencePiece's settings ----


def test_a_model_without_a_dummy_prefix(tmp_path):
    """Baichuan's model puts no space in front of a text, and adds no BOS."""
    sentencepiece_folder(tmp_path, {"add_bos_token": False}, add_dummy_prefix=False)
    tok = tokenizer.load(tmp_path)
    sp = tok.engine.sp
    ids = sp.encode("cat")
    assert tok.encode("cat", bos=True) == ids
    assert tok.encode_suffix("cat") == ids
    assert not sp.id_to_piece(ids[0]).startswith("▁")
    assert tok.decode(tok.encode("cat</s>cat")) == "catcat"


def test_a_model_that_normalizes(tmp_path):
    tok = tokenizer.load(sentencepiece_folder(tmp_path, normalization_rule_name="nmt_nfkc"))
    assert tok.encode("ｃａｔ") == tok.encode("cat")
    assert tok.bos_id == 1
    assert tok.encode("cat", bos=True)[0] == 1


@pytest.mark.parametrize(
    "text",
    [
        "<reserved_106>the cat",
        "the <reserved_106><reserved_106> cat[unused1]",
        "a\n\nb <reserved_106>",
    ],
)
def test_a_user_cannot_write_what_the_model_itself_finds_in_text(tmp_path, text):
    """Baichuan2's roles are user-defined pieces: SentencePiece finds them wherever they stand."""
    symbols = ["<reserved_106>", "[unused1]", "\n\n"]
    tok = tokenizer.load(sentencepiece_folder(tmp_path, user_defined_symbols=symbols))
    role, unused, line_ends = [tok.engine.sp.piece_to_id(symbol) for symbol in symbols]
    assert role in tok.encode(text)  # where special tokens are allowed
    for ids in (
        tok.encode(text, allow_special=False),
        *tok.encode_batch([text]),
        tok.encode_suffix(text),
    ):
        assert role not in ids
        assert unused not in ids
        assert tok.decode(ids) == text
    # White space marks nothing, and stays a piece.
    assert line_ends in tok.encode("a\n\nb", allow_special=False)


# ---- the files beside a tokenizer ----


def test_added_tokens_and_eos_ids_come_from_the_folder(tok, tmp_path):
    n = tok.vocab_size
    tok.save(tmp_path)
    write_json({"<pad>": n}, tmp_path, "added_tokens.json")
    write_json({"pad_token": "<pad>"}, tmp_path, "special_tokens_map.json")
    write_json({"eos_token_id": [2, 7]}, tmp_path, "generation_config.json")
    again = tokenizer.load(tmp_path)
    assert again.pad_id == n
    assert again.vocab_size == n + 1
    assert again.eos_ids == [2, 7]
    assert again.encode("Sure.<pad>")[-1] == n
    assert again.decode([n]) == ""
    assert again.fingerprint != tok.fingerprint
    assert tok.fingerprint == tokenizer.load(tok.file).fingerprint


def added_token(content, special, rstrip=False):
    """An entry of added_tokens_decoder."""
    return {
        "content": content,
        "special": special,
        "lstrip": False,
        "rstrip": rstrip,
        "normalized": False,
    }


@pytest.fixture
def internlm2(tmp_path):
    """A folder like InternLM2's: it names ids that its SentencePiece model calls unused."""
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["evil.py", None]},
        "eos_token": "",
        "added_tokens_decoder": {
            "310": added_token("<|im_start|>", special=True),
            "400": added_token("<word>", special=False, rstrip=True),
        },
    }
    return sentencepiece_folder(tmp_path / "internlm2", config)


def test_an_added_token_may_take_the_id_of_a_piece_and_need_not_be_special(internlm2):
    tok = tokenizer.load(internlm2)
    assert tok.eos_id == 2
    assert tok.vocab_size == 401
    ids = tok.encode("<|im_start|>cat<word>  dog")
    assert ids[0] == 310
    assert tok.decode(ids) == "cat<word> dog"
    assert 310 not in tok.encode("<|im_start|>", allow_special=False)
    assert tok.decode([310, 350, 399, 5]) == tok.decode([350, 5])  # 399 is an id without a token


def test_added_tokens_are_saved_without_code_of_the_model_s_own(internlm2, tmp_path):
    tok = tokenizer.load(internlm2)
    saved = tmp_path / "saved"
    tok.save(saved)
    config = read_json(saved, "tokenizer_config.json")
    assert "auto_map" not in config
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer.load(saved).fingerprint == tok.fingerprint
    files = os.listdir(saved)
    tok.save(saved)
    assert os.listdir(saved) == files


def test_wrong_special_tokens_of_old_folders(tmp_path):
    """decapoda's LLaMA names its tokens with empty texts and wrong ids: the model's own count."""
    sentencepiece_folder(tmp_path, {"bos_token": "", "eos_token": "", "unk_token": ""})
    write_json({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}, tmp_path, "config.json")
    tok = tokenizer.load(tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.eos_ids, tok.pad_id) == (1, 2, [2], -1)


def test_a_missing_or_broken_file_stops_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no tokenizer at"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(SystemExit, match="is not a SentencePiece model"):
        tokenizer.load(tmp_path)


# ---- a tokenizer of one's own ----


def test_training_is_deterministic(tmp_path):
    texts = ["the cat sat on the mat", "a dog ran to the cat"] * 50
    a = demo.train_tokenizer(texts, 290, str(tmp_path / "a"))
    b = demo.train_tokenizer(texts, 290, str(tmp_path / "b"))
    assert a.engine.identity == b.engine.identity
