"""Written folders, opened as they are by those who serve them. transformers stands for them here:
its tokenizer gives our ids, its generation stops where ours does, its classifier our scores."""

import json

import oracles
import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file
from test_checkpoint import assert_equal_tensors
from test_tokenizer import added_token, sentencepiece_folder

from nanosafe import checkpoint, tokenizer
from nanosafe.checkpoint import convert, exports, init_from_scratch
from nanosafe.storage import read_json, write_json
from nanosafe.tokenizer import bpe
from nanosafe.tokenizer.special_tokens import add_control_tokens

transformers = pytest.importorskip("transformers")
HARD_TEXTS = (
    "a  b   c    d",
    " begins with a space",
    "ends with a space  ",
    "½ ² Ⅷ x½y²",
    "12345678901234567890 1234 567 8",
    "x\n\n\ny\t\tz\r\n",
    "don't DON'T",
    "\u00a0a\u3000b\u200b",
    "你好 мир 🙂",
    "",
    " ",
    "def f(x):\n    return x  # ½",
)
SPECIAL_TEXTS = (
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|aligned|>",
    "[unused1]",
)


def list_texts():
    """More than 500 texts: what is hard, special text within it, and random mixtures."""
    texts = list(HARD_TEXTS)
    for special in SPECIAL_TEXTS:
        texts += [special, f"a{special}b", f"a {special} b", f" {special} b{special}"]
    return [*texts, *oracles.make_texts(500, seed=21)]


def find_mismatches(ours, theirs, texts):
    """The texts to which two tokenizers give other ids or, from those, another text."""
    mismatches = []
    for text in texts:
        ids = ours.encode(text)
        if theirs.encode(text, add_special_tokens=False) != ids:
            mismatches.append(text)
        elif theirs.encode(text) != ours.encode(text, bos=True):
            mismatches.append(text)
        elif theirs.decode(ids, skip_special_tokens=True) != ours.decode(ids):
            mismatches.append(text)
    return mismatches


def export(folder, tok, head="lm", **changes):
    """Save a small model with a tokenizer; returns the model."""
    config = small_config(vocab_size=tok.vocab_size, **changes)
    model = init_from_scratch(config, head, seed=4)
    checkpoint.save(model, folder, tok)
    return model


# ---- tokenizers ----


def make_source(kind, folder, world):
    """A folder with a tokenizer of one of KINDS."""
    if kind in oracles.FAMILIES:
        oracles.byte_level(folder, **oracles.FAMILIES[kind])
    elif kind == "the toy's":
        return world / "tokenizer"
    elif kind.startswith("tokenizer.json"):
        pieces = tokenizer.load(world / "tokenizer").engine.sp
        oracles.from_sentencepiece(pieces, folder, legacy=kind.endswith("4"))
    elif kind == "no space in front":
        sentencepiece_folder(folder, {"add_bos_token": False}, add_dummy_prefix=False)
    elif kind == "user-defined pieces":
        sentencepiece_folder(folder, user_defined_symbols=["<|im_end|>", "[unused1]"])
    elif kind == "ids of pieces":
        names = {
            "310": added_token("<|im_start|>", special=True),
            "400": added_token("<|im_end|>", special=False, rstrip=True),
        }
        sentencepiece_folder(folder, {"added_tokens_decoder": names})
    return folder


KINDS = (
    *oracles.FAMILIES,
    "the toy's",
    "tokenizer.json of transformers 4",
    "tokenizer.json of transformers 5",
    "no space in front",
    "user-defined pieces",
    "ids of pieces",
)


@pytest.mark.parametrize("grown", [False, True], ids=["as it is", "with control tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_a_written_tokenizer_as_nanosafe(kind, grown, world, tmp_path):
    ours = tokenizer.load(make_source(kind, tmp_path / "source", world))
    if grown:
        ours = add_control_tokens(ours)
    export(tmp_path / "exported", ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert find_mismatches(ours, theirs, list_texts()) == []
    assert theirs.eos_token_id == ours.eos_id
    assert sorted(theirs("a")) == ["attention_mask", "input_ids"]
    assert theirs.padding_side == "left"
    again = tokenizer.load(tmp_path / "exported")
    assert again.fingerprint == ours.fingerprint
    assert again.eos_ids == ours.eos_ids


def test_a_tokenizer_that_is_not_legacy_differs_only_on_texts_that_begin_with_a_space(
    world, tmp_path
):
    """A tokenizer.json cannot say that a second space is put in front of the first one."""
    tokenizer.load(world / "tokenizer").save(tmp_path)
    config = read_json(tmp_path, "tokenizer_config.json")
    write_json({**config, "legacy": False}, tmp_path, "tokenizer_config.json")
    ours = tokenizer.load(tmp_path)
    export(tmp_path / "exported", ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    mismatches = find_mismatches(ours, theirs, list_texts())
    assert [text for text in mismatches if not text.startswith((" ", "▁"))] == []
    assert " begins with a space" in mismatches


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["\n\n"]},
    ],
)
def test_a_tokenizer_json_that_would_give_other_ids_is_not_written(options, tmp_path):
    ours = tokenizer.load(sentencepiece_folder(tmp_path / "source", **options))
    ours.save(tmp_path / "exported")
    assert not (tmp_path / "exported" / "tokenizer.json").exists()
    assert tokenizer.load(tmp_path / "exported").fingerprint == ours.fingerprint


def test_a_tokenizer_json_that_lacks_a_token_is_replaced(world, tmp_path):
    """A published folder has both files, and tokens that were added later in a third."""
    source = tmp_path / "source"
    pieces = tokenizer.load(world / "tokenizer")
    oracles.from_sentencepiece(pieces.engine.sp, source)
    (source / "tokenizer.model").write_bytes((world / "tokenizer" / "tokenizer.model").read_bytes())
    write_json({"[PAD]": pieces.vocab_size}, source, "added_tokens.json")
    write_json({"pad_token": "[PAD]"}, source, "special_tokens_map.json")
    ours = tokenizer.load(source)
    assert ours.pad_id == pieces.vocab_size
    export(tmp_path / "exported", ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs.pad_token_id == ours.pad_id
    assert len(theirs) == ours.vocab_size
    assert theirs.encode("[PAD]", add_special_tokens=False) == [ours.pad_id]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_texts_begin_as_add_bos_token_says(adds_bos, tmp_path):
    """Phi-3's says that there is no BOS in front, and its tokenizer.json puts one there."""
    source = tmp_path / "source"
    bos = None if adds_bos else "<s>"
    names = {"bos_token": "<s>", "add_bos_token": adds_bos}
    oracles.byte_level(source, bpe.GPT2, specials=("<s>", "</s>"), bos=bos, **names)
    ours = tokenizer.load(source)
    assert ours.engine.adds_bos == adds_bos
    export(tmp_path / "exported", ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert find_mismatches(ours, theirs, list_texts()) == []
    assert (theirs.encode("a")[0] == ours.bos_id) == adds_bos
    assert tokenizer.load(tmp_path / "exported").fingerprint == ours.fingerprint


def test_the_special_tokens_are_said_in_one_file(tmp_path):
    """transformers and nanosafe disagree on which of the two wins."""
    source = tmp_path / "source"
    oracles.byte_level(source, bpe.GPT2, specials=("</s>", "<|im_end|>"), eos_token="<|im_end|>")
    separator = {"content": "</s>", "lstrip": False, "rstrip": False, "single_word": False}
    further = {"eos_token": "</s>", "sep_token": separator}
    further["additional_special_tokens"] = [separator]
    write_json(further, source, "special_tokens_map.json")
    ours = tokenizer.load(source)
    export(tmp_path / "exported", ours)
    assert not (tmp_path / "exported" / "special_tokens_map.json").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.sep_token == "</s>"


@pytest.mark.parametrize("kind", ["qwen2", "llama3", "the toy's"])
def test_a_qwen2_folder_says_when_transformers_reads_its_tokenizer_otherwise(
    kind, world, tmp_path, capsys
):
    ours = tokenizer.load(make_source(kind, tmp_path / "source", world))
    exports.say_once.cache_clear()
    for _ in range(2):
        export(tmp_path / "exported", ours, attention_bias=True)
    assert read_json(tmp_path / "exported", "config.json")["model_type"] == "qwen2"
    said = capsys.readouterr().out.count("take PreTrainedTokenizerFast.from_pretrained there")
    assert said == (kind != "qwen2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    is_equal = find_mismatches(ours, theirs, list_texts()) == []
    assert is_equal == (kind == "qwen2")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported")
    assert find_mismatches(ours, theirs, list_texts()) == []


# ---- generation_config.json ----


@pytest.fixture
def two_ends(tmp_path):
    """A tokenizer with a pad token, and two tokens that end a sequence."""
    source = tmp_path / "two_ends"
    specials = ("<|begin|>", "</s>", "<|im_end|>", "<|pad|>")
    options = {"eos_token": "</s>", "pad_token": "<|pad|>"}
    oracles.byte_level(source, bpe.GPT2, specials=specials, bos="<|begin|>", **options)
    ends = read_json(source, "tokenizer.json")["added_tokens"]
    ids = {token["content"]: token["id"] for token in ends}
    generation = {
        "eos_token_id": [ids["<|im_end|>"]],
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
        "_from_model_config": True,
        "transformers_version": "4.40.0",
    }
    write_json(generation, source, "generation_config.json")
    return tokenizer.load(source)


def test_a_policy_says_every_token_that_ends_an_answer(two_ends, tmp_path):
    model = export(tmp_path / "exported", two_ends)
    assert len(two_ends.eos_ids) == 2
    written = read_json(tmp_path / "exported", "generation_config.json")
    assert written == {
        "bos_token_id": two_ends.bos_id,
        "eos_token_id": two_ends.eos_ids,
        "pad_token_id": two_ends.pad_id,
    }
    assert read_json(tmp_path / "exported", "config.json")["eos_token_id"] == two_ends.eos_ids
    assert tokenizer.load(tmp_path / "exported").eos_ids == two_ends.eos_ids

    # Weights that answer with the second end, whatever the prompt: theirs stop at it.
    end = two_ends.added["<|im_end|>"].id
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[end] = 1.0
    checkpoint.save(model, tmp_path / "exported", two_ends)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    answer = theirs.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5)
    assert answer.tolist() == [[3, 4, 5, end]]


def test_a_single_end_is_a_list_as_well(world, tmp_path):
    tok = tokenizer.load(world / "tokenizer")
    export(tmp_path, tok)
    assert read_json(tmp_path, "generation_config.json")["eos_token_id"] == [tok.eos_id]
    assert read_json(tmp_path, "config.json")["eos_token_id"] == tok.eos_id


def test_a_conversion_keeps_what_the_source_says_about_sampling(two_ends, tmp_path):
    source = tmp_path / "two_ends"
    before = read_json(source, "generation_config.json")
    export(source, two_ends)  # which replaces the folder
    write_json({**before, "eos_token_id": two_ends.eos_ids}, source, "generation_config.json")
    convert.main([str(source), str(tmp_path / "converted")])
    assert read_json(tmp_path / "converted", "generation_config.json") == {
        "bos_token_id": two_ends.bos_id,
        "eos_token_id": two_ends.eos_ids,
        "pad_token_id": two_ends.pad_id,
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
    }
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "converted")
    assert theirs.temperature == 0.6


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_broken_generation_config_is_left_out(content, world, tmp_path):
    tok = tokenizer.load(world / "tokenizer")
    export(tmp_path / "source", tok)
    (tmp_path / "source" / "generation_config.json").write_text(content)
    convert.main([str(tmp_path / "source"), str(tmp_path / "converted")])
    written = read_json(tmp_path / "converted", "generation_config.json")
    assert written["eos_token_id"] == [tok.eos_id]


def test_without_a_tokenizer_no_ids_are_written_as_sure(tmp_path):
    checkpoint.save(init_from_scratch(small_config()), tmp_path / "policy")
    assert not (tmp_path / "policy" / "generation_config.json").exists()


def test_a_score_model_does_not_generate(world, tmp_path):
    export(tmp_path, tokenizer.load(world / "tokenizer"), "score")
    assert not (tmp_path / "generation_config.json").exists()


# ---- classifiers ----


SHAPES = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"attention_bias": True},
}


def score_each(model, sequences):
    """Our score of the last token of each sequence."""
    scores = []
    for ids in sequences:
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            scores.append(model(torch.tensor(ids), ends, len(ids))[-1])
    return torch.stack(scores)


def pad(sequences, id, side):
    """What transformers' tokenizer gives for sequences: ids and a mask, padded on a side."""
    longest = max(map(len, sequences))
    rows = []
    masks = []
    for ids in sequences:
        padding = longest - len(ids)
        mask = [1] * len(ids)
        if side == "left":
            rows.append([id] * padding + ids)
            masks.append([0] * padding + mask)
        else:
            rows.append(ids + [id] * padding)
            masks.append(mask + [0] * padding)
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


@pytest.mark.parametrize("score_type", ["reward", "cost"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_classifier_gives_our_scores(family, score_type, world, tmp_path):
    tok = tokenizer.load(world / "tokenizer")
    source, target = tmp_path / "score", tmp_path / "classifier"
    ours = export(source, tok, "score", score_type=score_type, **SHAPES[family])
    convert.main([str(source), str(target), "--to=classifier"])

    config = read_json(target, "config.json")
    assert config["architectures"] == [family + "ForSequenceClassification"]
    assert config["num_labels"] == 1
    assert config["id2label"] == {"0": score_type}
    assert config["score_type"] == score_type
    assert config["problem_type"] == "regression"
    assert not set(exports.ONLY_OF_SCORE_MODELS) & set(config)
    assert not (target / "generation_config.json").exists()

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(target)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert type(theirs).__name__ == family + "ForSequenceClassification"
    assert theirs.config.num_labels == 1
    assert theirs.config.pad_token_id == their_tokenizer.pad_token_id == config["pad_token_id"]
    assert config["pad_token_id"] not in tok.eos_ids
    texts = ["How do I paint the boat?", "No.", "Sand it, wash it, and let it dry for a day."]
    sequences = [tok.encode(text, bos=True, eos=True) for text in texts]
    expected = score_each(ours, sequences)
    for side in ("left", "right"):
        batch = pad(sequences, config["pad_token_id"], side)
        with torch.no_grad():
            scores = theirs(**batch).logits[:, 0]
        assert torch.allclose(scores, expected, atol=1e-5)

    # It opens in nanosafe as the score model that it was.
    checkpoint.check_score_model(target, score_type)
    again = checkpoint.load(target)
    assert again.config.score_type == score_type
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    checkpoint.save(again, tmp_path / "again", tok)
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert_equal_tensors(written, load_file(source / "model.safetensors"))


@pytest.mark.parametrize(
    "unknown, expected",
    [
        ("<|unknown|>", "<|unknown|>"),
        ({"content": "<|unknown|>"}, "<|unknown|>"),
        (None, "<|begin|>"),
    ],
)
def test_a_classifier_does_not_pad_with_what_ends_a_text(unknown, expected, tmp_path):
    """SmolLM2 does; the score of the end would be taken one token too early."""
    source, target = tmp_path / "score", tmp_path / "classifier"
    specials = ("<|begin|>", "<|end|>", "<|unknown|>")
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": unknown}
    oracles.byte_level(tmp_path / "tok", bpe.GPT2, specials=specials, bos="<|begin|>", **names)
    tok = tokenizer.load(tmp_path / "tok")
    ours = export(source, tok, "score")
    convert.main([str(source), str(target), "--to=classifier"])
    padding = tok.added[expected].id
    assert read_json(target, "config.json")["pad_token_id"] == padding
    assert tokenizer.load(target).pad_id == padding
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(target)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    texts = ["the boat<|end|>", "no, I think it was the other one<|end|>"]
    batch = their_tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0]
    sequences = [tok.encode(text, bos=True) for text in texts]
    assert torch.allclose(scores, score_each(ours, sequences), atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"score_bias": True}, "has a score head with a bias, which a classifier has not"),
        ({"do_normalize": True, "var": [4.0]}, "normalizes its scores, .* set do_normalize to"),
        ({"alibi": True}, "no classifier for the model_type baichuan"),
    ],
)
def test_what_a_classifier_cannot_say_is_refused(changes, words, world, tmp_path):
    export(tmp_path / "score", tokenizer.load(world / "tokenizer"), "score", **changes)
    with pytest.raises(SystemExit, match=words):
        convert.main([str(tmp_path / "score"), str(tmp_path / "x"), "--to=classifier"])
    assert not (tmp_path / "x").exists()


def test_a_critic_s_scores_are_never_normalized_so_that_it_may_be_a_classifier(world, tmp_path):
    tok = tokenizer.load(world / "tokenizer")
    export(tmp_path / "critic", tok, "score", score_type="critic", do_normalize=True)
    convert.main([str(tmp_path / "critic"), str(tmp_path / "x"), "--to=classifier"])
    assert checkpoint.load(tmp_path / "x").config.score_type == "critic"


def test_only_a_score_model_with_a_tokenizer_becomes_a_classifier(world, tmp_path):
    policy, target = str(world / "policy"), str(tmp_path / "x")
    with pytest.raises(SystemExit, match="is a policy, and has no score head"):
        convert.main([policy, target, "--to=classifier"])
    checkpoint.save(init_from_scratch(small_config(), "score"), tmp_path / "score")
    with pytest.raises(SystemExit, match="has no tokenizer, and a classifier must"):
        convert.main([str(tmp_path / "score"), target, "--to=classifier"])
    oracles.byte_level(tmp_path / "tok", bpe.GPT2, specials=("</s>",))
    export(tmp_path / "other", tokenizer.load(tmp_path / "tok"), "score")
    with pytest.raises(SystemExit, match="needs a token to pad with that ends no text"):
        convert.main([str(tmp_path / "other"), target, "--to=classifier"])


# ---- what llama.cpp and vLLM look at ----


def test_the_tokenizer_files_name_the_class_that_takes_them_unchanged(world, tmp_path):
    tok = tokenizer.load(world / "tokenizer")
    export(tmp_path, tok)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "</s>"
    assert (tmp_path / "tokenizer.model").read_bytes() == tok.engine.identity
    assert (tmp_path / "tokenizer.json").exists()
