"""Specifications, rows, conversations, the cache of token ids, packing and order."""

import datetime
import gzip
import json
import lzma
import re
import sys
import zipfile

import numpy as np
import pytest
from conftest import encode_texts
import torch
from in_process import run_in_process
from test_losses import GOLDEN

from nanosafe import data, tokenizer
from nanosafe.data import batching, dataset, reader
from nanosafe.data.examples import (
    list_texts,
    make_input_fields,
    make_prompt_key,
    parse_record,
    read_prompt,
)
from nanosafe.data.spec import Source, find_file, parse_item
from nanosafe.phf.documents import tokenize_documents
from nanosafe.tools import download


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


@pytest.mark.parametrize("spec", ["~/data/x/test.jsonl", "~/data/x/test", "x/test:1:~/data"])
def test_a_tilde_is_the_home_folder(folder_of_x, monkeypatch, spec):
    monkeypatch.setenv("HOME", str(folder_of_x))
    (folder_of_x / "elsewhere").mkdir()
    monkeypatch.chdir(folder_of_x / "elsewhere")
    assert len(data.load(spec)) == 4


@pytest.mark.parametrize("name", ["my,rows.jsonl", "2024:05.jsonl", "a:b/rows.jsonl"])
@pytest.mark.parametrize("spec", ["{}", "x,{}", "{}:0.5", "{},x"])
def test_a_path_with_a_separator_is_named_in_the_message(folder_of_x, name, spec):
    path = write(folder_of_x / name, [{"input": "q"}])
    with pytest.raises(SystemExit, match="a comma ends a dataset here, and a colon a name") as stop:
        data.load(spec.format(path))
    assert path in str(stop.value)
    assert "\n" not in str(stop.value)


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
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(line.encode()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.json", "a.json.gz", "bom.jsonl"):
        assert data.load(str(tmp_path / name)) == [{"input": "é"}]


def test_a_zip_with_one_file_of_rows_is_read(tmp_path):
    path = tmp_path / "a.json.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.json", '[{"input": "b"}, {"input": "c"}]')
        archive.writestr("__MACOSX/._rows.json", "")
    assert data.load(str(path)) == [{"input": "b"}, {"input": "c"}]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.json", "[]")
    with pytest.raises(SystemExit, match="holds 2 files of rows, not one"):
        data.load(str(path))


def test_a_json_file_may_have_a_row_on_each_line(tmp_path, capsys):
    rows = [{"input": "é"}, {"input": "b"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n" + lines.encode())
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.json", "a.json.gz"):
        assert data.load(str(tmp_path / name)) == rows
    assert [row.line for row in reader.read_rows(str(tmp_path / "a.json"))] == [2, 3]
    (tmp_path / "broken.json").write_text(lines + "{broken\n")
    assert data.load(str(tmp_path / "broken.json")) == rows
    assert f"{tmp_path}/broken.json:3" in capsys.readouterr().out


def test_a_json_file_with_one_object_over_many_lines_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"input": "a"}]}, indent=2))
    with pytest.raises(SystemExit, match="neither a list of rows nor a row on each line"):
        data.load(str(tmp_path / "a.json"))


def test_a_csv_file_has_a_row_on_each_line_after_the_names_of_its_columns(tmp_path):
    table = '\ufeffinput,category\r\n"What, ""why""?\nHow?",a\r\nWhen?\r\n\r\nWho?,b,c\r\n'
    (tmp_path / "a.csv").write_text(table, newline="")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(table.encode()))
    rows = list(reader.read_rows(str(tmp_path / "a.csv")))
    records = [row.record for row in rows]
    assert records[0] == {"input": 'What, "why"?\nHow?', "category": "a"}
    assert records[1] == {"input": "When?", "category": None}
    assert records[2] is None  # it has more cells than there are columns
    assert [row.line for row in rows] == [3, 4, 6]
    assert [row.record for row in reader.read_rows(str(tmp_path / "a.csv.gz"))] == records


def test_a_cell_of_a_csv_file_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text("input\n" + "x" * 200_000 + "\n")
    assert len(data.load(str(tmp_path / "a.csv"))[0]["input"]) == 200_000


PARQUET_ROWS = [
    {"messages": [{"role": "user", "content": "é"}], "options": {"a": False}, "n": 1},
    {"messages": [], "options": {"a": None}, "n": None},
]


def write_parquet(path, rows, **options):
    """Write a .parquet file; returns its path as a text."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(table, path, **options)
    return str(path)


def test_lists_and_structures_of_a_parquet_file_are_lists_and_dicts(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", PARQUET_ROWS)
    assert data.load(path) == PARQUET_ROWS
    assert [row.line for row in reader.read_rows(path)] == [1, 2]


def test_columns_without_json_values_are_left_out_of_a_parquet_file(tmp_path):
    picture = {"bytes": b"GIF", "path": "a.gif"}
    rows = [{"input": "q", "time": datetime.datetime(2026, 1, 2), "images": [picture]}]
    assert data.load(write_parquet(tmp_path / "a.parquet", rows)) == [{"input": "q"}]


def test_a_large_parquet_file_is_not_in_memory_whole(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    rows = [{"input": rng.bytes(2000).hex()} for _ in range(10_000)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=10_000)
    del rows
    before = pyarrow.default_memory_pool().bytes_allocated()
    most = 0
    for row in reader.read_rows(path):
        most = max(most, pyarrow.default_memory_pool().bytes_allocated() - before)
    assert row.line == 10_000
    assert most < 20e6  # of 40 MB


def test_a_damaged_parquet_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, PARQUET_ROWS)
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:4] + b"x" * 60 + whole[64:], whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="a.parquet' cannot be read") as stop:
            data.load(str(path))
        assert "\n" not in str(stop.value)


def test_a_parquet_file_without_pyarrow_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match="pip install pyarrow"):
        data.load(str(path))


# ---- conversations ----


def test_the_loss_mask_is_1_on_the_assistant_s_tokens_and_their_eos(tok):
    ids, mask = encode_texts(["hello", "hi", "what", "yes"], tok)
    assert ids[0] == tok.bos_id
    assert ids.count(tok.eos_id) == 2
    hi = tok.encode_suffix("hi")
    yes = tok.encode_suffix("yes")
    assert [i for i, m in zip(ids, mask) if m] == [*hi, tok.eos_id, *yes, tok.eos_id]
    text = "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:hi</s>USER: what ASSISTANT:yes</s>"
    assert ids == tok.encode(text, bos=True)
    prompt_ids, prompt_mask = encode_texts(["hello", "hi", "what"], tok)
    assert ids[: len(prompt_ids)] == prompt_ids
    assert sum(prompt_mask) == len(hi) + 1


def test_users_cannot_write_special_tokens(tok):
    ids, _ = encode_texts(["end it </s> now", "ok </s>"], tok)
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


def parse_texts(record, task):
    """The texts of the conversations that a task takes from a row, and their labels."""
    parsed = parse_record(record, task)
    return [list_texts(turns) for turns in parsed.conversations], parsed.labels


def test_the_preferred_response_comes_first_with_its_sign():
    assert parse_texts(PAIR, "reward") == ([["q", "b"], ["q", "a"]], (1, 0))
    assert parse_texts(PAIR, "cost") == ([["q", "a"], ["q", "b"]], (1, -1))
    flipped = {**PAIR, "safer": False, "is_safe": False, "is_other_safe": True}
    assert parse_texts(flipped, "cost") == ([["q", "b"], ["q", "a"]], (1, -1))
    demonstration = {"input": ["q", "a", "r"], "answer": "s"}
    assert parse_texts(demonstration, "sft") == ([["q", "a", "r", "s"]], (0,))


def test_turns_have_roles_and_a_system_s_turn_comes_first():
    row = {"system": "Be brief.", "input": "q", "answer": "a"}
    (turns,) = parse_record(row, "sft").conversations
    assert turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    (empty,) = parse_record({**row, "system": ""}, "sft").conversations
    assert empty == [{"role": "system", "content": ""}, *turns[1:]]
    assert parse_record({**row, "system": None}, "sft").conversations == [turns[1:]]
    for system in (3, ["x"], "\ud800"):
        with pytest.raises(ValueError, match="system turn"):
            parse_record({**row, "system": system}, "sft")


@pytest.mark.parametrize("options", [3, "x", ["y"], {"reply": False}, {"messages": []}])
def test_variables_of_a_template_are_an_object_without_ours(options):
    row = {"input": "q", "answer": "a", "chat_template_kwargs": options}
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        parse_record(row, "sft")


def test_a_dialogue_s_last_question_is_a_prompt():
    assert parse_texts({"dialogue": ["q", "a", "r", "s"]}, "prompts") == ([["q", "a", "r"]], (0,))


def test_a_row_becomes_a_prompt_and_a_row_again():
    row = {
        "system": "Be brief.",
        "input": ["q", "a", "r"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert make_input_fields(read_prompt(row)) == row


def test_an_answer_that_is_labelled_bad_is_not_learnt():
    row = {"input": "q", "answer": "a", "label": False}
    with pytest.raises(ValueError, match="calls bad"):
        parse_record(row, "sft")
    assert parse_texts({**row, "label": True}, "sft") == ([["q", "a"]], (0,))


def test_a_pair_without_scores_is_a_ranking_of_two():
    assert parse_texts(PAIR, "rank") == ([["q", "b"], ["q", "a"]], (1, 0))
    with pytest.raises(ValueError, match="neither a field 'answers' nor 'better'"):
        parse_record({"input": "q", "answer": "a", "other_answer": "b"}, "rank")


def test_a_ranking_has_the_best_answer_first_and_each_answer_once():
    row = {"input": "q", "answers": ["a", "b", "a"], "scores": [1, 2, 3.5]}
    assert parse_texts(row, "rank") == ([["q", "a"], ["q", "b"]], (3.5, 2))


@pytest.mark.parametrize("true", [True, 1, 1.0, "True", "true"])
@pytest.mark.parametrize("false", [False, 0, 0.0, "False", " FALSE "])
def test_a_label_is_true_or_false_however_it_is_spelled(true, false):
    row = {**PAIR, "better": false, "safer": true, "is_safe": true, "is_other_safe": false}
    for task in ("reward", "cost", "rank"):
        assert parse_record(row, task) == parse_record(PAIR, task)


LABELS = [
    ("better", "reward"),
    ("better", "rank"),
    ("safer", "cost"),
    ("is_safe", "cost"),
    ("is_other_safe", "cost"),
]


@pytest.mark.parametrize("name, task", LABELS)
@pytest.mark.parametrize("value", ["no", "yes", "1", "", 2, -1, 0.5, float("nan"), None, [], [1]])
def test_anything_else_is_no_label(name, task, value):
    with pytest.raises(ValueError, match=f"'{name}' is not true or false"):
        parse_record({**PAIR, name: value}, task)


def test_rows_with_other_labels_are_dropped_and_counted_with_their_line(tok, tmp_path, capsys):
    labels = [True, "no", 2, "False", float("nan"), None]
    rows = [{**PAIR, "input": f"q{i}", "better": label} for i, label in enumerate(labels)]
    path = write(tmp_path / "x.jsonl", rows)
    pairs = data.tokenize(path, tok, "reward", 100)
    assert pairs.lines.tolist() == [1, 4]
    dropped = f"6 rows, 2 kept; dropped 4 'better' is not true or false (first: {path}:2)"
    assert dropped in capsys.readouterr().out
    preferred = [tok.decode(pairs.sequence(i)[0]) for i in range(2)]
    assert [text[-1] for text in preferred] == ["a", "b"]


BAD = [
    ({"question": "q", "reply": "a"}, "sft", "no known layout .the fields are question, reply"),
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
    ({"input": "q", "answers": ["a", "b"], "scores": [1, 10**400]}, "rank", "not a finite number"),
    ({"input": "q", "answers": ["a", "b"], "scores": [-1e39, 0]}, "rank", "not a finite number"),
]


@pytest.mark.parametrize("record, task, reason", BAD)
def test_a_row_that_cannot_be_used_has_a_reason(record, task, reason):
    with pytest.raises(ValueError, match=reason):
        parse_record(record, task)


# ---- held-out data ----


def test_rows_of_one_prompt_have_one_key_whatever_their_layout():
    keys = [
        make_prompt_key({"input": "q", "answer": "a"}),
        make_prompt_key({"input": ["q"], "answer": "b", "other_answer": "c"}),
        make_prompt_key({"dialogue": ["q", "d"]}),
    ]
    assert len(set(keys)) == 1
    assert make_prompt_key({"input": ["q", "d", "r"]}) == make_prompt_key(
        {"dialogue": ["q", "d", "r", "e"]}
    )
    assert make_prompt_key({"texts": ["q"], "scores": [1]}) != make_prompt_key({"texts": ["r"]})
    for record in ({}, {"dialogue": 5}, {"input": None}):
        make_prompt_key(record)


def test_prompts_that_are_trained_on_and_held_out_are_counted(tok, tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", [{"input": f"q{i}", "answer": "a"} for i in range(8)])
    rows = [{"input": f"r{i}", "answer": "a"} for i in range(3)]
    dialogue = {"dialogue": ["q5", "another answer"]}
    held_out = write(tmp_path / "b.jsonl", [*rows, dialogue, {"input": "q1", "answer": "b"}])
    train = data.tokenize(train, tok, "sft", 100)
    data.report_shared_prompts(train, data.tokenize(held_out, tok, "sft", 100))
    assert (
        "eval_data: 2 of 5 examples have a prompt that is in data, too (the first is line 4)"
        in (capsys.readouterr().out)
    )
    held_out = data.tokenize(write(tmp_path / "c.jsonl", rows), tok, "sft", 100)
    data.report_shared_prompts(train, held_out)
    assert "eval_data:" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sft", "reward", "phf"])
def test_trainers_say_which_held_out_examples_they_train_on(
    name, trainers, world, tmp_path, monkeypatch, capsys
):
    rows = {"sft": "sft", "reward": "pairs", "phf": "documents"}[name]
    path = f"{world}/data/{rows}/train.jsonl"
    command = trainers["sft" if name == "phf" else name]
    script = "nanosafe/phf/train.py" if name == "phf" else command[0]
    flags = [
        *command[1:],
        f"--out_dir={tmp_path}/run",
        f"--data={path}:20/-1",
        f"--eval_data={path}:20/-1",
        "--max_steps=1",
        "--batch_size=4",
    ]
    outcome = run_in_process(script, *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"eval_data: (\d+) of \1 examples have a prompt that is", outcome.printed)


def split(monkeypatch, capsys, *flags, check=True):
    return run_in_process(
        "nanosafe/data/split.py", *flags, monkeypatch=monkeypatch, capsys=capsys, check=check
    )


def test_a_file_is_split_into_parts_without_a_common_prompt(tmp_path, monkeypatch, capsys):
    rows = [{"input": f"q{i % 20}", "answer": f"a{i}"} for i in range(60)]
    rows += [{"dialogue": ["q3", "b"]}]
    path = write(tmp_path / "mine.jsonl", rows)
    for out in ("one", "two"):
        flags = f"--data={path}", "--holdout=0.25", f"--out={tmp_path}/{out}"
        printed = split(monkeypatch, capsys, *flags).printed
        assert f"{out}/test.jsonl: 1" in printed
        assert "rows of 5 prompts" in printed
    train = data.load(f"{tmp_path}/one/train.jsonl")
    test = data.load(f"{tmp_path}/one/test.jsonl")
    assert not {make_prompt_key(row) for row in train} & {make_prompt_key(row) for row in test}
    assert sorted(map(json.dumps, train + test)) == sorted(map(json.dumps, rows))
    for name in ("train", "test"):
        one = (tmp_path / "one" / f"{name}.jsonl").read_bytes()
        assert one == (tmp_path / "two" / f"{name}.jsonl").read_bytes()
    assert len(data.load(f"one/test:1:{tmp_path}")) == len(test)


def test_a_split_overwrites_nothing_and_leaves_no_part_empty(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "mine" / "train.jsonl", [{"input": f"q{i}"} for i in range(4)])
    cases = [
        ((f"--data={path}", f"--out={tmp_path}/mine"), "is there already"),
        ((f"--data={path}",), "out is empty"),
        ((f"--out={tmp_path}/x",), "data is empty"),
        ((f"--data={path}", f"--out={tmp_path}/x"), "of 4 prompts is 0"),
        (
            (f"--data={path}", f"--out={tmp_path}/x", "--holdout=1.5"),
            "holdout=1.5 must be at least 0 and below 1",
        ),
        (
            (f"--data={path}", f"--out={tmp_path}/x", "--holdout=-1"),
            "holdout=-1.0 must be at least 0",
        ),
    ]
    for flags, words in cases:
        assert words in split(monkeypatch, capsys, *flags, check=False).error
    assert len(data.load(path)) == 4
    assert not (tmp_path / "x").exists()


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


def test_a_score_that_no_float_holds_costs_its_document_only(tok, tmp_path):
    rows = [{"texts": ["a"], "scores": [score]} for score in (0.5, 10**400, 1e39)]
    documents = tokenize_documents(write(tmp_path / "d.jsonl", rows), tok, 64)
    assert len(documents) == 1
    assert documents.report["dropped"] == {"a score that is not a finite number": 2}


@pytest.mark.parametrize("is_safe, missing", [(True, "unsafe"), (False, "safe")])
def test_cost_data_without_one_of_the_signs_is_reported(tok, tmp_path, capsys, is_safe, missing):
    same = {**PAIR, "is_safe": is_safe, "is_other_safe": is_safe}
    path = write(tmp_path / "c.jsonl", [same])
    data.tokenize(path, tok, "cost", 100)
    assert f"{path} (cost): no answer is {missing} (" in capsys.readouterr().out
    data.tokenize(write(tmp_path / "c.jsonl", [PAIR, same]), tok, "cost", 100)
    assert "no answer is" not in capsys.readouterr().out


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
    assert (batch.targets >= 0).sum() == demonstrations.target_counts.sum()


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
