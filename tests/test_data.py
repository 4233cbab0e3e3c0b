"""Specifications, rows, conversations, the cache of token ids, packing and order."""

import gzip
import json

import numpy as np
import pytest
import torch
from test_losses import GOLDEN

from nanosafe import data, tokenizer
from nanosafe.data import batching, dataset, reader
from nanosafe.data.examples import parse_record
from nanosafe.data.spec import Source, find_file, parse_item
from nanosafe.data.template import encode_conversation, retokenize, split_into_segments
from nanosafe.tools import demo, download


@pytest.fixture
def tok(world):
    return tokenizer.load(world / "tokenizer")


def write(path, records):
    """Write a jsonl file; returns its path as a text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---- specifications ----


@pytest.fixture
def folder_of_x(tmp_path, monkeypatch):
    """The current folder, with 10 rows in data/x/train.jsonl and 4 in data/x/test.jsonl."""
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 10), ("test", 4)):
        rows = [{"input": f"{split} {i}"} for i in range(n)]
        write(tmp_path / "data" / "x" / f"{split}.jsonl", rows)
    return tmp_path


def draw(proportion, seed_sequence):
    """The indices of the rows that a proportion takes of x's 10 training rows."""
    source = parse_item("x:" + proportion)
    return reader.sample_indices(10, reader.count_samples(10, source), seed_sequence)


def test_rows_are_drawn_as_safe_rlhf_draws_them(folder_of_x):
    golden = GOLDEN["dataset_sampling"]
    for proportion in ("0.3", "2.5", "7/-1", "25/-1"):
        child = np.random.SeedSequence(42).spawn(1)[0]
        assert draw(proportion, child) == golden[proportion]
    children = np.random.SeedSequence(42).spawn(2)
    drawn = [draw("0.3", child) for child in children]
    assert drawn == list(golden["two datasets A:0.3 B:0.3"].values())


def test_a_train_test_split_is_safe_rlhf_s():
    train, test = download.split_train_test(10, 0.2)
    assert {"train": train, "test": test} == GOLDEN["dataset_sampling"]["split_train_test(0.2)"]
    assert download.split_train_test(10, 0.0)[1] == []


@pytest.mark.parametrize(
    "spec, count",
    [
        ("x", 10),
        ("x/train", 10),
        ("x:", 10),
        ("x/test", 4),
        ("x:0.5", 5),
        ("x:3/4", 8),
        ("x:2.5", 25),
        ("x:7/-1", 7),
        ("x,x/test:2", 18),
        ("x::{folder}/data", 10),
        ("x/test:0,x", 10),
        ("{folder}/data/x/test.jsonl", 4),
        ("{folder}/data/x", 10),
        ("data/x/test.jsonl:1/-1", 1),
        ("y:1:{folder}/data/x/train.jsonl", 10),  # PATH may be the file itself
    ],
)
def test_a_specification_names_a_file_and_a_number_of_rows(folder_of_x, spec, count):
    assert len(data.load(spec.format(folder=folder_of_x))) == count


@pytest.mark.parametrize(
    "spec, words",
    [
        ("", "data is empty"),
        ("x:-1", "must not be negative"),
        ("x:-5/-1", "must not be negative"),
        ("x:a", "is not a number"),
        ("x:1/0", "is not a number"),
        ("x:1e999", "is not a number"),
        ("x:1:2:3", "write NAME"),
        ("x:0.5:", "write NAME"),
        ("x,x:0.5", "named twice"),
        ("no.jsonl", "no file at"),
        ("x:1:nowhere", "no file at"),
        ("pku_saferlhf/9k", "run python data/pku_saferlhf/prepare.py first"),
    ],
)
def test_a_wrong_specification_is_refused_in_one_line(folder_of_x, spec, words):
    with pytest.raises(SystemExit, match=words):
        data.load(spec)


def test_a_proportion_is_a_fraction_or_a_count(folder_of_x):
    path = "data/x/train.jsonl"
    assert parse_item("x") == Source(path, fraction=1.0, count=None)
    assert parse_item("x:3/4") == Source(path, fraction=0.75, count=None)
    assert parse_item("x:7/-1") == Source(path, fraction=None, count=7)


def test_a_name_is_matched_whatever_its_case_and_its_hyphens(folder_of_x):
    write(folder_of_x / "data" / "pku_saferlhf" / "test.jsonl", [])
    write(folder_of_x / "data" / "pku_saferlhf" / "10k" / "train.jsonl", [])
    assert find_file("PKU-SafeRLHF/test") == "data/pku_saferlhf/test.jsonl"
    assert find_file("PKU-SafeRLHF/10K") == "data/pku_saferlhf/10k/train.jsonl"
    assert find_file("X") == "data/x/train.jsonl"
    assert find_file("PKU-SafeRLHF/test", "data") == "data/pku_saferlhf/test.jsonl"
    (folder_of_x / "data" / "X").mkdir()  # a folder with the very name comes first
    with pytest.raises(SystemExit, match="has no file 'data/X/train.jsonl'"):
        find_file("X")


@pytest.mark.parametrize(
    "name, nearest",
    [("ultra-feed", "ultrafeedback"), ("slimorca", "slim_orca"), ("hh-rlhf-all", "hh_rlhf")],
)
def test_an_unknown_name_is_told_the_nearest_folder(folder_of_x, name, nearest):
    with pytest.raises(SystemExit, match=f"nearest folder below data/ is '{nearest}'"):
        find_file(name)


# ---- files of rows ----


def test_compressed_files_and_json_lists_are_read(tmp_path):
    line = json.dumps({"input": "é"}) + "\n"
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "a.json").write_text("[" + line + "]")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(f"[{line}]".encode()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "bom.jsonl"):
        assert data.load(str(tmp_path / name)) == [{"input": "é"}]


@pytest.mark.parametrize(
    "name, words",
    [("x.parquet", "read_parquet"), ("x.jsonl.xz", "xz -d"), ("x.jsonl.zip", "unzip")],
)
def test_a_file_of_another_kind_says_how_to_convert_it(tmp_path, name, words):
    with pytest.raises(SystemExit, match=words):
        list(reader.read_rows(str(tmp_path / name)))


# ---- conversations ----


def test_the_template():
    assert split_into_segments(["hi"]) == [("BEGINNING OF CONVERSATION: USER: hi ASSISTANT:", None)]
    assert split_into_segments(["q1", "a1", "q{2}"]) == [
        ("BEGINNING OF CONVERSATION: USER: q1 ASSISTANT:", "a1"),
        ("USER: q{2} ASSISTANT:", None),
    ]


def test_the_loss_mask_is_1_on_the_assistant_s_tokens_and_their_eos(tok):
    ids, mask = encode_conversation(["hello", "hi", "what", "yes"], tok)
    assert ids[0] == tok.bos_id
    assert ids.count(tok.eos_id) == 2
    hi = tok.encode_suffix("hi")
    yes = tok.encode_suffix("yes")
    assert [i for i, m in zip(ids, mask) if m] == [*hi, tok.eos_id, *yes, tok.eos_id]
    text = "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:hi</s>USER: what ASSISTANT:yes</s>"
    assert ids == tok.encode(text, bos=True)
    prompt_ids, prompt_mask = encode_conversation(["hello", "hi", "what"], tok)
    assert ids[: len(prompt_ids)] == prompt_ids
    assert sum(prompt_mask) == len(hi) + 1


def test_users_cannot_write_special_tokens(tok):
    ids, _ = encode_conversation(["end it </s> now", "ok </s>"], tok)
    assert ids.count(tok.eos_id) == 1
    assert ids[-1] == tok.eos_id


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
    demonstration = {"input": ["q", "a", "r"], "answer": "s"}
    assert parse_record(demonstration, "sft").conversations == [["q", "a", "r", "s"]]


def test_a_pair_without_scores_is_a_ranking_of_two():
    assert parse_record(PAIR, "rank") == ([["q", "b"], ["q", "a"]], (1, 0))
    with pytest.raises(ValueError, match="neither a field 'answers' nor 'better'"):
        parse_record({"input": "q", "answer": "a", "other_answer": "b"}, "rank")


def test_a_ranking_has_the_best_answer_first_and_each_answer_once():
    row = {"input": "q", "answers": ["a", "b", "a"], "scores": [1, 2, 3.5]}
    assert parse_record(row, "rank") == ([["q", "a"], ["q", "b"]], (3.5, 2))


BAD = [
    (None, "sft", "not a JSON object"),
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
def test_a_row_that_cannot_be_used_has_a_reason(record, task, reason):
    with pytest.raises(ValueError, match=reason):
        parse_record(record, task)


# ---- the cache of token ids, and batches ----


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
    pairs = data.tokenize(str(path), tok, "reward", 100)
    printed = capsys.readouterr().out
    assert "5 rows, 2 kept" in printed
    assert f"1 not a JSON object (first: {path}:2)" in printed
    assert f"1 identical answers (first: {path}:3)" in printed
    assert "longer than 100 tokens" in printed
    assert len(pairs) == 2
    assert pairs.lines.tolist() == [1, 5]
    with pytest.raises(SystemExit, match="has no usable row for cost.*contradictory"):
        data.tokenize(write(path, [{**PAIR, "safer": False}]), tok, "cost", 100)


def test_of_repeated_prompts_the_last_one_stays(tok, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"input": f"q{i % 4}"} for i in range(10)])
    prompts = data.tokenize(path, tok, "prompts", 100)
    assert prompts.lines.tolist() == [7, 8, 9, 10]
    assert prompts.report["dropped"] == {"repeated prompt": 6}


def test_ids_are_cached_by_content_and_tokenizer(tok, tmp_path, monkeypatch):
    path = write(tmp_path / "s.jsonl", [{"input": "q", "answer": "a"}])
    first = data.tokenize(path, tok, "sft", 100)
    monkeypatch.setattr(dataset, "build_cache", lambda *arguments: pytest.fail("tokenised again"))
    again = data.tokenize(path, tok, "sft", 100)
    assert isinstance(again.tokens, np.memmap)
    assert (again.tokens == first.tokens).all()
    write(tmp_path / "s.jsonl", [{"input": "q", "answer": "b"}])
    with pytest.raises(pytest.fail.Exception):
        data.tokenize(path, tok, "sft", 100)


def test_batches_pack_sequences_and_point_at_the_next_token(tok, tmp_path):
    rows = [{"input": "q", "answer": "a"}, {"input": "r s", "answer": "b c"}]
    demonstrations = data.tokenize(write(tmp_path / "s.jsonl", rows), tok, "sft", 100)
    batch = demonstrations.batch([1, 0], "cpu")
    begin = 0
    for i in (1, 0):
        tokens, mask = demonstrations.sequence(i)
        span = slice(begin, begin + len(tokens))
        targets = [int(t) if m else -100 for t, m in zip(tokens[1:], mask[1:])] + [-100]
        assert batch.tokens[span].tolist() == list(tokens)
        assert batch.targets[span].tolist() == targets
        begin += len(tokens)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(demonstrations.lengths[[1, 0]])]
    assert (batch.targets >= 0).sum() == demonstrations.targets.sum()


def test_responses_are_cut_out_of_a_packed_tensor():
    sequences = [np.arange(6), np.arange(10, 14)]
    masks = [np.arange(6) >= 4, np.arange(4) >= 1]  # responses of 2 and 3 tokens
    batch = batching.collate(sequences, masks, "cpu")
    x = torch.arange(10.0, requires_grad=True)
    out = batching.gather_responses(x, batch, [4, 1], 3)
    assert out[0, :2].tolist() == [3, 4]
    assert out[1].tolist() == [6, 7, 8]
    shifted = batching.gather_responses(batch.targets, batch, [4, 1], 3)
    assert shifted[0, :2].tolist() == [4, 5]
    assert shifted[1].tolist() == [11, 12, 13]  # EOS is a target
    empty = batching.collate([], [], "cpu")
    assert batching.gather_responses(torch.zeros(1), empty, [], 3).shape == (0, 3)


# ---- micro-batches and order ----


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_plans_hold_every_example_once_within_max_tokens(ranks, n):
    lengths = np.random.default_rng(n).integers(1, 200, n).tolist()
    plan = batching.plan_micro_batches(lengths, 256, ranks)
    assert len(plan) == ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    loads = []
    dealt = []
    for micro_batches in plan:
        tokens = [sum(lengths[i] for i in indices) for indices in micro_batches]
        assert max(tokens) <= 256
        loads.append(sum(tokens))
        for indices in micro_batches:
            dealt += indices
    assert sorted(dealt) == list(range(n))
    if n >= 8 * ranks:
        assert max(loads) < 1.5 * min(loads)


def test_an_example_that_is_longer_than_max_tokens_is_refused():
    with pytest.raises(SystemExit, match="300 tokens.*max_tokens=256"):
        batching.plan_micro_batches([300], 256, 2)


def test_order_is_a_function_of_seed_and_step():
    steps = [batching.examples_at(step, 10, 4, 0) for step in range(5)]
    examples = sum(steps, [])
    assert sorted(examples[:10]) == list(range(10))
    assert sorted(examples[10:]) == list(range(10))
    assert examples[:10] != examples[10:]
    assert batching.examples_at(3, 10, 4, 0) == steps[3]
    assert batching.examples_at(3, 10, 4, 1) != steps[3]


def test_steps_are_counted_from_epochs_and_a_bound():
    assert batching.count_steps(10, 4, 2.0, 0) == 5
    assert batching.count_steps(10, 4, 2.0, 3) == 3


def test_retokenizing_keeps_the_ends_of_sequence(tok, world, tmp_path):
    other = demo.train_tokenizer(["a b c d hello there"] * 50, 280, str(tmp_path / "other"))
    ids, _ = encode_conversation(["hello", "there", "b", "c"], tok)
    expected, _ = encode_conversation(["hello", "there", "b", "c"], other)
    assert retokenize(ids, tok, other).tolist() == expected
    assert retokenize(ids[:-1], tok, other).tolist() == expected[:-1]
