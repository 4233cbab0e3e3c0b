"""Specifications, rows, conversations, the cache, packing and order."""

import gzip
import json
import lzma
import zipfile

import numpy as np
import pytest
import torch
from test_losses import GOLDEN

from nanosafe import data, tokenizer
from nanosafe.data import batching, dataset, reader
from nanosafe.tools import demo, download
from nanosafe.data.examples import parse_record
from nanosafe.data.template import encode_conversation, retokenize, split_into_segments


@pytest.fixture
def tok(world):
    return tokenizer.load(world / "tokenizer")


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_safe_rlhf_s_sampling_numbers():
    golden = GOLDEN["dataset_sampling"]
    for text, share in (("0.3", 0.3), ("2.5", 2.5), ("7/-1", -7.0), ("25/-1", -25.0)):
        child = np.random.SeedSequence(42).spawn(1)[0]
        assert reader.sample_indices(10, share, child) == golden[text]
    children = np.random.SeedSequence(42).spawn(2)
    drawn = [reader.sample_indices(10, 0.3, child) for child in children]
    assert drawn == list(golden["two datasets A:0.3 B:0.3"].values())
    train, test = download.split_train_test(10, 0.2)
    assert {"train": train, "test": test} == golden["split_train_test(0.2)"]
    assert download.split_train_test(10, 0.0)[1] == []


def test_specifications(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "x").mkdir(parents=True)
    for split, n in (("train", 10), ("test", 4)):
        write(
            tmp_path / "data" / "x" / f"{split}.jsonl",
            [{"input": f"{split} {i}"} for i in range(n)],
        )
    count = lambda spec: len(data.load(spec))
    assert count("x") == count("x/train") == count("x:") == 10 and count("x/test") == 4
    assert (
        count("x:0.5") == 5
        and count("x:3/4") == 8
        and count("x:2.5") == 25
        and count("x:7/-1") == 7
    )
    assert (
        count("x,x/test:2") == 18
        and count(f"x::{tmp_path}/data") == 10
        and count("x/test:0,x") == 10
    )
    assert count(str(tmp_path / "data/x/test.jsonl")) == 4 and count("data/x/test.jsonl:1/-1") == 1
    path = tmp_path / "data" / "x" / "train.jsonl"
    assert count(f"y:1:{path}") == 10  # PATH may be the file itself
    for spec, words in (
        ("", "data is empty"),
        ("x:-1", "must not be negative"),
        ("x:a", "is no number"),
        ("x:1:2:3", "write NAME"),
        ("x:0.5:", "write NAME"),
        ("x,x:0.5", "named twice"),
        ("nowhere", "run python data/nowhere/prepare.py"),
        ("no.jsonl", "no file at"),
        ("x:-5/-1", "must not be negative"),
    ):
        with pytest.raises(SystemExit, match=words):
            data.load(spec)


def test_compressed_files_and_json_lists(tmp_path):
    line = json.dumps({"input": "é"}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(line.encode()))
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", line)
    (tmp_path / "a.json").write_text(json.dumps([{"input": "é"}]))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    for name in ("a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zip", "a.json", "bom.jsonl"):
        assert [row for row in data.load(str(tmp_path / name))] == [{"input": "é"}]


def test_the_template():
    assert split_into_segments(["hi"]) == [("BEGINNING OF CONVERSATION: USER: hi ASSISTANT:", None)]
    assert split_into_segments(["q1", "a1", "q{2}"]) == [
        ("BEGINNING OF CONVERSATION: USER: q1 ASSISTANT:", "a1"),
        ("USER: q{2} ASSISTANT:", None),
    ]


def test_encode_masks_what_the_assistant_says_eos_included(tok):
    ids, mask = encode_conversation(["hello", "hi", "what", "yes"], tok)
    assert ids[0] == tok.bos_id and ids.count(tok.eos_id) == 2
    said = [i for i, m in zip(ids, mask) if m]
    assert said == [*tok.encode_suffix("hi"), tok.eos_id, *tok.encode_suffix("yes"), tok.eos_id]
    text = "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:hi</s>USER: what ASSISTANT:yes</s>"
    assert ids == tok.encode(text, bos=True)
    prompt = encode_conversation(["hello", "hi", "what"], tok)
    assert ids[: len(prompt[0])] == prompt[0] and sum(prompt[1]) == len(tok.encode_suffix("hi")) + 1


def test_users_cannot_write_special_tokens(tok):
    ids, _ = encode_conversation(["end it </s> now", "ok </s>"], tok)
    assert ids.count(tok.eos_id) == 1 and ids[-1] == tok.eos_id


PAIR = {
    "input": "q",
    "answer": "a",
    "other_answer": "b",
    "better": False,
    "safer": True,
    "is_safe": True,
    "is_other_safe": False,
}


def test_the_preferred_response_comes_first_with_its_sign():
    assert parse_record(PAIR, "reward") == ([["q", "b"], ["q", "a"]], (1, 0))
    assert parse_record(PAIR, "cost") == ([["q", "a"], ["q", "b"]], (1, -1))
    flipped = {**PAIR, "safer": False, "is_safe": False, "is_other_safe": True}
    assert parse_record(flipped, "cost") == ([["q", "b"], ["q", "a"]], (1, -1))
    assert parse_record({"input": ["q", "a", "r"], "answer": "s"}, "sft")[0] == [
        ["q", "a", "r", "s"]
    ]


BAD = [
    (None, "sft", "no JSON object"),
    ({"input": "q"}, "sft", "empty answer"),
    ({"input": "", "answer": "a"}, "sft", "empty turn"),
    ({"dialogue": ["q"]}, "sft", "alternate"),
    ({"input": ["q", "a"], "answer": "b"}, "sft", "turns that end with the user's"),
    ({**PAIR, "other_answer": "a"}, "reward", "identical answers"),
    ({**PAIR, "answer": " "}, "reward", "empty answer"),
    ({"input": "q"}, "cost", "no field 'answer'"),
    ({**PAIR, "safer": False}, "cost", "contradictory safety labels"),
    ({"input": 3}, "prompts", "must be a text"),
]


@pytest.mark.parametrize("record, task, reason", BAD)
def test_bad_rows_are_named(record, task, reason):
    with pytest.raises(ValueError, match=reason):
        parse_record(record, task)


def test_bad_rows_are_dropped_counted_and_reported(tok, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    lines = [
        json.dumps(PAIR),
        "{broken",
        json.dumps({**PAIR, "other_answer": "a"}),
        json.dumps({**PAIR, "input": "long " * 100}),
        json.dumps({**PAIR, "input": "r"}),
    ]
    path.write_text("\n".join(lines) + "\n")
    ds = data.tokenize(str(path), tok, "reward", 100)
    said = capsys.readouterr().out
    assert "5 rows, 2 kept" in said and f"1 no JSON object (first: {path}:2)" in said
    assert f"1 identical answers (first: {path}:3)" in said and "longer than 100 tokens" in said
    assert len(ds) == 2 and ds.lines.tolist() == [1, 5]
    with pytest.raises(SystemExit, match="has no usable row for cost.*contradictory"):
        data.tokenize(write(path, [{**PAIR, "safer": False}]), tok, "cost", 100)


def test_prompts_are_deduplicated_the_last_one_stays(tok, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"input": f"q{i % 4}"} for i in range(10)])
    ds = data.tokenize(path, tok, "prompts", 100)
    assert ds.lines.tolist() == [7, 8, 9, 10]


def test_ids_are_cached_by_content_and_tokenizer(tok, tmp_path, monkeypatch):
    path = write(tmp_path / "s.jsonl", [{"input": "q", "answer": "a"}])
    first = data.tokenize(path, tok, "sft", 100)
    monkeypatch.setattr(dataset, "build_cache", lambda *a: pytest.fail("tokenised again"))
    again = data.tokenize(path, tok, "sft", 100)
    assert isinstance(again.tokens, np.memmap) and (again.tokens == first.tokens).all()
    write(tmp_path / "s.jsonl", [{"input": "q", "answer": "b"}])
    with pytest.raises(pytest.fail.Exception):
        data.tokenize(path, tok, "sft", 100)


def test_batches_pack_sequences_and_point_at_the_next_token(tok, tmp_path):
    path = write(
        tmp_path / "s.jsonl", [{"input": "q", "answer": "a"}, {"input": "r s", "answer": "b c"}]
    )
    ds = data.tokenize(path, tok, "sft", 100)
    batch = ds.batch([1, 0], "cpu")
    begin = 0
    for i in (1, 0):
        tokens, mask = ds.sequence(i)
        span = slice(begin, begin + len(tokens))
        targets = [int(t) if m else -100 for t, m in zip(tokens[1:], mask[1:])] + [-100]
        assert (
            batch.tokens[span].tolist() == list(tokens) and batch.targets[span].tolist() == targets
        )
        begin += len(tokens)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(ds.lengths[[1, 0]])]
    assert (batch.targets >= 0).sum() == ds.targets.sum()


def test_responses_are_cut_out_of_a_packed_tensor():
    sequences = [np.arange(6), np.arange(10, 14)]
    masks = [np.arange(6) >= 4, np.arange(4) >= 1]  # responses of 2 and 3 tokens
    batch = batching.collate(sequences, masks, "cpu")
    x = torch.arange(10.0, requires_grad=True)
    out = batching.gather_responses(x, batch, [4, 1], 3)
    assert out[0, :2].tolist() == [3, 4] and out[1].tolist() == [6, 7, 8]
    shifted = batching.gather_responses(batch.targets, batch, [4, 1], 3)
    assert shifted[0, :2].tolist() == [4, 5] and shifted[1].tolist() == [
        11,
        12,
        13,
    ]  # EOS is a target
    empty = batching.collate([], [], "cpu")
    assert batching.gather_responses(torch.zeros(1), empty, [], 3).shape == (0, 3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_plans_hold_every_example_once_within_max_tokens(ranks):
    g = np.random.default_rng(0)
    for n in (1, 2, 7, 64):
        lengths = g.integers(1, 200, n).tolist()
        plan = batching.plan_micro_batches(lengths, 256, ranks)
        assert len(plan) == ranks and len({len(micros) for micros in plan}) == 1
        dealt = [i for micros in plan for micro in micros for i in micro]
        assert sorted(dealt) == list(range(n))
        assert all(sum(lengths[i] for i in micro) <= 256 for micros in plan for micro in micros)
        if n >= 8 * ranks:
            loads = [sum(lengths[i] for micro in micros for i in micro) for micros in plan]
            assert max(loads) < 1.5 * min(loads)
    with pytest.raises(SystemExit, match="300 tokens.*max_tokens=256"):
        batching.plan_micro_batches([300], 256, ranks)


def test_order_is_a_function_of_seed_and_step():
    epochs = [batching.examples_at(s, 10, 4, 0) for s in range(5)]
    flat = sum(epochs, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert batching.examples_at(3, 10, 4, 0) == epochs[3] != batching.examples_at(3, 10, 4, 1)
    assert batching.count_steps(10, 4, 2.0, 0) == 5 and batching.count_steps(10, 4, 2.0, 3) == 3


def test_retokenizing_keeps_the_ends_of_sequence(tok, world, tmp_path):
    other = demo.train_tokenizer(["a b c d hello there"] * 50, 280, str(tmp_path / "other"))
    ids, _ = encode_conversation(["hello", "there", "b", "c"], tok)
    expected, _ = encode_conversation(["hello", "there", "b", "c"], other)
    assert retokenize(ids, tok, other).tolist() == expected
    assert retokenize(ids[:-1], tok, other).tolist() == expected[:-1]
