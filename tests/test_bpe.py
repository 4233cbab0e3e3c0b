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
from nanosafe.tokenizer.tiktoken import BY_RANKS, LLAMA4

SHARED = os.path.join(ROOT, "..", "shared")
LLAMA = os.path.join(SHARED, "data", "llama-tokenizer", "tokenizer.model")
GOLDEN = Path(SHARED).glob("spec/models/chat/*/tokenizer.json")
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
    assert oracles.find_mismatches(ours, theirs, TEXTS) == []
    assert oracles.find_decoding_mismatches(ours, theirs, 2000) == []
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
    count = TEXTS if source == "llama" else 5000
    assert oracles.find_mismatches(ours, theirs, count) == []
    assert oracles.find_decoding_mismatches(ours, theirs, 2000) == []
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


def split_at(pattern, behavior="Isolated", invert=False):
    """A Split as tokenizer.json has it. pattern: an expression, or {"String": ..}"""
    if isinstance(pattern, str):
        pattern = {"Regex": pattern}
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# What published files have as a pre-tokenizer, beside those in oracles.FAMILIES.
PRE_TOKENIZERS = {
    "Phi-4, OLMo 2": [split_at(oracles.LLAMA3, "Removed", invert=True), BYTE_LEVEL],
    "Mistral Nemo": [split_at(LLAMA4), BYTE_LEVEL],
    "DeepSeek V3": [
        split_at(r"\p{N}{1,3}"),
        split_at("[一-龥\u3040-ゟ゠-ヿ]+"),
        split_at(DEEPSEEK_V3),
        BYTE_LEVEL,
    ],
    "DeepSeek LLM": [
        split_at("[\r\n]"),
        split_at(r"\s?\p{L}+"),
        split_at(r"\s?\p{P}+"),
        split_at("[一-龥ࠀ-一가-\ud7ff]+"),
        {"type": "Digits", "individual_digits": True},
        BYTE_LEVEL,
    ],
    "a space in front": [{**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True}],
    "numbers removed": [split_at(r"\p{N}", "Removed"), BYTE_LEVEL],
    "merged with previous": [split_at(r"\p{N}", "MergedWithPrevious"), BYTE_LEVEL],
    "merged, inverted": [split_at(r"\p{N}+", "MergedWithPrevious", invert=True), BYTE_LEVEL],
    "isolated, inverted": [split_at({"String": "a"}, invert=True), BYTE_LEVEL],
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_published_pre_tokenizer_equals_tokenizers(name, families, tmp_path):
    spec = read_json(families["qwen2"].folder, "tokenizer.json")
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name]}
    write_json(spec, tmp_path, "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(tmp_path)
    assert oracles.find_mismatches(ours, theirs, 3000) == []


def test_gemma_s_manner_equals_tokenizers(world, tmp_path):
    """Spaces become marks, no space is put in front, and decoding leaves none out."""
    pieces = tokenizer.load(world / "tokenizer")
    oracles.from_sentencepiece(pieces.engine.sp, tmp_path)
    spec = read_json(tmp_path, "tokenizer.json")
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["pre_tokenizer"] = split_at({"String": " "}, "MergedWithPrevious")
    spec["decoder"]["decoders"].pop()
    write_json(spec, tmp_path, "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(tmp_path)
    assert oracles.find_mismatches(ours, theirs, 3000) == []
    assert oracles.find_decoding_mismatches(ours, theirs, 2000) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN))
def test_the_tokenizer_of_a_golden_chat_folder_equals_tokenizers(name):
    folder = os.path.join(SHARED, "spec", "models", "chat", name)
    theirs = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    if read_json(folder, "tokenizer_config.json").get("add_bos_token") is False:
        theirs.post_processor = tokenizers.processors.ByteLevel()
    ours = tokenizer.load(folder)
    further = tuple(text for text in ours.added if text)
    assert oracles.find_mismatches(ours, theirs, 2000, further) == []
    assert oracles.find_decoding_mismatches(ours, theirs, 2000) == []


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
    config.pop("chat_template", None)
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
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer .*Lowercase.* is not supported"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "the pre-tokenizer .* is not supported"),
        ({"pre_tokenizer": split_at(r"\w+")}, r"\\w"),
        ({"pre_tokenizer": split_at(r"\p{N}{1,3}+")}, r"}\+ in the pattern"),
        ({"pre_tokenizer": split_at(r"^\p{N}")}, r"\^.* in the pattern"),
        ({"pre_tokenizer": split_at("a", "Contiguous")}, "Contiguous.* is not supported"),
        ({"pre_tokenizer": split_at("a")}, "must either have a ByteLevel pre-tokenizer"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [BYTE_LEVEL, {"type": "Digits"}],
                }
            },
            "Digits after ByteLevel",
        ),
        ({"decoder": {"type": "WordPiece"}}, "the decoder .* is not supported"),
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
    monkeypatch.setitem(BY_RANKS, len(ranks), BY_RANKS[128000])  # the published file has more
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
    monkeypatch.setitem(BY_RANKS, len(ranks), BY_RANKS[128000])  # the published file has more
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


def make_tokens(count):
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes([i, j]) for i in range(256) for j in range(256)]
    tokens += [b"abc" + i.to_bytes(3, "big") for i in range(140000)]
    return {token: rank for rank, token in enumerate(tokens[:count])}


@pytest.mark.parametrize(
    "count, first_special, vocab_size",
    [
        (128000, "<|begin_of_text|>", 128256),  # Llama 3
        (200000, "<|begin_of_text|>", 202048),  # Llama 4
        (151643, "<|endoftext|>", 151646),  # Qwen
    ],
)
def test_a_tiktoken_file_is_told_by_its_number_of_ranks(count, first_special, vocab_size, tmp_path):
    ranks = make_tokens(count)
    write_tiktoken_file(tmp_path / "tokenizer.model", ranks)
    ours = tokenizer.load(tmp_path)
    assert ours.added[first_special].id == count
    assert ours.vocab_size == vocab_size
    ranks[b"\0"] = count  # a gap: rank 0 is nobody's
    write_tiktoken_file(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(SystemExit, match="use its tokenizer.json"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("count", [199998, 127999, 100256])
def test_a_tiktoken_file_of_another_model_is_refused(count, tmp_path):
    """Such as GPT-4o's, with 199,998 ranks: other texts are cut in another way."""
    write_tiktoken_file(tmp_path / "tokenizer.model", make_tokens(count))
    with pytest.raises(SystemExit, match=f"has {count:,} tokens with ranks.* Llama 3 .128,000."):
        tokenizer.load(tmp_path)


def test_llama_3_1_has_other_special_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(BY_RANKS, 256, BY_RANKS[128000])
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


# ---- Mistral's tekken.json ----


def make_tekken(ranks, special_count=30, **entries):
    """A tekken.json with more tokens than its vocabulary has."""
    vocab = []
    for token, rank in [*ranks.items(), (b"not in the vocabulary", len(ranks))]:
        vocab.append({"rank": rank, "token_bytes": base64.b64encode(token).decode()})
    config = {
        "pattern": LLAMA4,
        "default_vocab_size": len(ranks) + special_count,
        "default_num_special_tokens": special_count,
    }
    return {"config": config, "vocab": vocab, **entries}


def test_tekken_json_equals_tiktoken(llama3, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    _, ranks = llama3
    own, saved = tmp_path / "own", tmp_path / "saved"
    own.mkdir()
    write_json(make_tekken(ranks), own, "tekken.json")
    ours = tokenizer.load(own)
    theirs = tiktoken.Encoding("", pat_str=LLAMA4, mergeable_ranks=ranks, special_tokens={})
    for text in oracles.make_texts(5000, seed=4):
        ids = [30 + rank for rank in theirs.encode(text)]
        assert ours.encode(text, allow_special=False) == ids
    assert ours.encode("[INST]a[/INST]", bos=True) == [1, 3, *ours.encode("a"), 4]
    assert ours.added["<SPECIAL_20>"].id == 20
    assert ours.eos_ids == [2]
    assert ours.vocab_size == len(ranks) + 30
    ours.save(saved)
    assert sorted(os.listdir(saved)) == ["tokenizer.json", "tokenizer_config.json"]
    again = tokenizer.load(saved)
    assert again.fingerprint == ours.fingerprint
    assert (again.bos_id, again.eos_id) == (1, 2)


def test_a_newer_tekken_json_lists_its_special_tokens(tmp_path):
    listed = []
    texts = ("<unk>", "<s>", "</s>", "[THINK]", "<shown>")
    for rank, text in enumerate(texts):
        listed.append({"rank": rank, "token_str": text, "is_control": text != "<shown>"})
    ranks = {bytes([i]): i for i in range(256)}
    write_json(make_tekken(ranks, special_tokens=listed), tmp_path, "tekken.json")
    ours = tokenizer.load(tmp_path)
    ids = ours.encode("[THINK]x<shown>")
    assert ids == [3, 30 + ord("x"), 4]
    assert ours.decode(ids) == "x<shown>"


@pytest.mark.parametrize(
    "broken",
    [
        {"config": {}},
        {"config": []},
        {"vocab": {}},
        {"vocab": [1]},
        {"vocab": []},
        {"vocab": [{"rank": 0, "token_bytes": "?"}]},
        {"special_tokens": [{"rank": 30, "token_str": "x"}]},
        {"special_tokens": {}},
        {"config": {"pattern": "x", "default_vocab_size": 9, "default_num_special_tokens": 2**40}},
        {"config": {"pattern": 1, "default_vocab_size": 9, "default_num_special_tokens": 2}},
    ],
)
def test_a_broken_tekken_json_stops_with_one_line(broken, tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    write_json({**make_tekken(ranks), **broken}, tmp_path, "tekken.json")
    with pytest.raises(SystemExit, match="tekken.json' cannot be read"):
        tokenizer.load(tmp_path)


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


@pytest.mark.parametrize("pattern", [oracles.LLAMA3, LLAMA4, bpe.GPT2])
def test_the_faster_expression_cuts_the_same(pattern):
    splitter = patterns.compile_splitter(pattern)
    for text in oracles.make_texts(5000, seed=5):
        if not patterns.RARE_CHARACTER.search(text):
            assert splitter.for_most_texts.split(text) == splitter.expression.split(text)


@pytest.mark.slow
@pytest.mark.parametrize("category", "L Lu Ll Lt Lm Lo M Mn Mc N Nd No P Po S So Z".split())
def test_a_category_has_the_characters_that_it_has_in_tokenizers(category):
    """Unicode 16's. An older Python does not know them all, and a newer one knows more."""
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    expression = re.compile(patterns.translate(rf"\p{{{category}}}"))
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rf"\p{{{category}}}"), "removed")
    differing = []
    for begin in range(0, len(codes), 20000):
        text = "".join(map(chr, codes[begin : begin + 20000]))
        theirs = "".join(piece for piece, _ in splitter.pre_tokenize_str(text))
        if theirs != expression.sub("", text):
            for character in set(theirs) ^ set(expression.sub("", text)):
                differing.append(character)
    newer = set("\U0001171e")  # Unicode 16 moved it from Mn to Mc
    if unicodedata.unidata_version < "17":
        assert set(differing) <= newer
