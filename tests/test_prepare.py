"""Every data/*/prepare.py on small files in the publisher's own layout; then the rows that it
writes through the tokeniser, for the task that they are for."""

import glob
import gzip
import io
import json
import os
import runpy
import sys
from contextlib import redirect_stdout
from typing import NamedTuple

import pytest
from conftest import ROOT

from nanosafe import data, tokenizer


class Finished(NamedTuple):
    printed: str
    error: str  # the line with which the script stopped, or ""


def run_prepare(name, *flags):
    """Run data/NAME/prepare.py in this process, which is faster than a new one."""
    path = os.path.join(ROOT, "data", name, "prepare.py")
    printed = io.StringIO()
    error = ""
    with redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, flags)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stopped:
            error = str(stopped)
    return Finished(printed.getvalue(), error)


def to_lines(records):
    """The bytes of a jsonl file."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    return "".join(lines).encode()


def to_list(records):
    """The bytes of a JSON list."""
    return json.dumps(records).encode()


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def moss_003_turn(human, moss):
    return {
        "Human": f"<|Human|>: {human}<eoh>\n",
        "Inner Thoughts": "None",
        "MOSS": f"<|MOSS|>: {moss}<eom>\n",
    }


def moss_003(*turns):
    return {
        "conversation_id": "1",
        "meta_instruction": "You are ...",
        "num_turns": len(turns),
        "chat": {f"turn_{i}": turn for i, turn in enumerate(turns, start=1)},
    }


PAIR = {
    "prompt": "p",
    "response_0": "a",
    "response_1": "b",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
HH = [
    {
        "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: yes",
        "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: no",
    },
    {"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"},
]
FEEDBACK = {
    "source": "s",
    "instruction": "Sing.",
    "completions": [
        {"response": "la", "overall_score": 6.0},
        {"response": "lala", "overall_score": 9.0},
        {"response": "", "overall_score": 10.0},
        {"response": "no", "overall_score": 2.0},
    ],
}


class Case(NamedTuple):
    flags: list
    raw: dict  # {raw file: its bytes}
    written: dict  # {written file: its records}
    printed: str
    task: str | None  # that the first written file is for


CASES = {  # folder of data/, and perhaps what is special
    "pku_saferlhf": Case(
        ["--version=10k"],
        {"round0/train.jsonl": to_lines([PAIR])},
        {
            "train.jsonl": [
                {
                    "input": "p",
                    "answer": "a",
                    "other_answer": "b",
                    "is_safe": True,
                    "is_other_safe": False,
                    "better": False,
                    "safer": True,
                }
            ]
        },
        "50.0%",
        "cost",
    ),
    "hh_rlhf": Case(
        ["--subset=harmless-base"],
        {
            "test.jsonl.gz": gzip.compress(to_lines(HH)),
            "train.jsonl.gz": gzip.compress(to_lines(HH[:1])),
        },
        {
            "harmless-base/test.jsonl": [
                {"input": ["q", "a", "r"], "answer": "yes", "other_answer": "no", "better": True}
            ],
            "harmless-base-dialogue/train.jsonl": [{"dialogue": ["q", "a", "r", "yes"]}],
        },
        "dropped 1 (the last turn is the human's)",
        "reward",
    ),
    "hh_rlhf processed": Case(
        ["--subset=helpful-base"],
        {
            "train.jsonl": to_lines(
                [
                    {
                        "context": [{"role": "human", "text": "q"}],
                        "chosen": {"role": "assistant", "text": "yes"},
                        "rejected": {"role": "assistant", "text": "no"},
                    }
                ]
            )
        },
        {
            "helpful-base/train.jsonl": [
                {"input": ["q"], "answer": "yes", "other_answer": "no", "better": True}
            ]
        },
        "1 rows read, 1 kept",
        "reward",
    ),
    "alpaca": Case(
        [],
        {
            "alpaca_data.json": to_list(
                [
                    {"instruction": "Add.", "input": "1 2", "output": "3"},
                    {"instruction": "Say hi.", "input": "", "output": " "},
                    {"instruction": "So?", "input": "", "output": "Yes.", "history": [["a", "b"]]},
                ]
            )
        },
        {
            "train.jsonl": [
                {"input": "Add. 1 2", "answer": "3"},
                {"dialogue": ["a", "b", "So?", "Yes."]},
            ]
        },
        "dropped 1 (empty answer)",
        "sft",
    ),
    "firefly": Case(
        [],
        {
            "firefly-train-1.1M.jsonl": to_lines(
                [
                    {"kind": "NLI", "input": "自然语言推理：", "target": "是的。"},
                    {"kind": "x", "input": "", "target": "y"},
                ]
            )
        },
        {"train.jsonl": [{"input": "自然语言推理：", "answer": "是的。"}]},
        "dropped 1 (empty turn)",
        "sft",
    ),
    "moss 002": Case(
        ["--version=002"],
        {
            "en_honesty.json": to_list(
                [
                    {
                        "id": 1,
                        "prefix": "...",
                        "num_turns": 2,
                        "plain_text": (
                            "[Human]: hi <eoh> [MOSS]: Hello!\nI am MOSS. <eoa> "
                            "[Human]: bye<eoh> [MOSS]: Bye.<eoa>"
                        ),
                    },
                    {"id": 2, "plain_text": "[MOSS]: hi<eoa>"},
                ]
            )
        },
        {"train.jsonl": [{"dialogue": ["hi", "Hello!\nI am MOSS.", "bye", "Bye."]}]},
        "dropped 1 (the turns do not alternate)",
        "sft",
    ),
    "moss 003": Case(
        [],
        {
            "moss-003-sft-no-tools.jsonl": to_lines(
                [
                    moss_003(moss_003_turn("你好", "你好！"), moss_003_turn("再见", "再见。")),
                    moss_003(moss_003_turn("x", "")),
                ]
            )
        },
        {"train.jsonl": [{"dialogue": ["你好", "你好！", "再见", "再见。"]}]},
        "dropped 1 (an empty turn)",
        "sft",
    ),
    "slim_orca": Case(
        [],
        {
            "oo-labeled_correct.gpt4.sharegpt.jsonl": to_lines(
                [
                    {
                        "conversations": [
                            {"from": "system", "value": "Be brief.", "weight": None},
                            {"from": "human", "value": "Why?"},
                            {"from": "gpt", "value": "So.", "weight": 1},
                        ]
                    },
                    {"conversations": [{"from": "gpt", "value": "So."}]},
                ]
            )
        },
        {"train.jsonl": [{"dialogue": ["Be brief.\n\nWhy?", "So."]}]},
        "dropped 1 (the turns do not alternate)",
        "sft",
    ),
    "beavertails": Case(
        [],
        {
            "round0/30k/test.jsonl.gz": gzip.compress(
                to_lines(
                    [
                        {
                            "prompt": "q",
                            "response": "a",
                            "category": {"animal_abuse": False, "violence": True},
                            "is_safe": False,
                        },
                        {
                            "prompt": "q",
                            "response": "b",
                            "category": {"animal_abuse": False},
                            "is_safe": True,
                        },
                    ]
                )
            )
        },
        {
            "test.jsonl": [
                {"input": "q", "answer": "a", "is_safe": False, "harm": ["violence"]},
                {"input": "q", "answer": "b", "is_safe": True, "harm": []},
            ]
        },
        "50.0%",
        "sft",
    ),
    "beavertails safe": Case(
        ["--only_safe=True"],
        {
            "train.jsonl": to_lines(
                [
                    {"prompt": "q", "response": "a", "is_safe": False},
                    {"prompt": "q", "response": "b", "is_safe": True},
                ]
            )
        },
        {"train.jsonl": [{"input": "q", "answer": "b", "is_safe": True, "harm": []}]},
        "unsafe, and only_safe is set",
        "sft",
    ),
    "alpaca_farm": Case(
        [],
        {
            "alpaca_human_preference.json": to_list(
                [
                    {
                        "instruction": "Add.",
                        "input": "1 2",
                        "output_1": "3",
                        "output_2": "4",
                        "preference": 1,
                    },
                    {
                        "instruction": "Go.",
                        "input": "",
                        "output_1": "no",
                        "output_2": "ok",
                        "preference": 2,
                    },
                    {
                        "instruction": "Go.",
                        "input": "",
                        "output_1": "a",
                        "output_2": "b",
                        "preference": 0,
                    },
                ]
            )
        },
        {
            "train.jsonl": [
                {"input": "Add. 1 2", "answer": "3", "other_answer": "4", "better": True},
                {"input": "Go.", "answer": "no", "other_answer": "ok", "better": False},
            ]
        },
        "dropped 1 (no preference)",
        "reward",
    ),
    "ultrafeedback": Case(
        [],
        {"evol_instruct.jsonl": to_lines([FEEDBACK, {**FEEDBACK, "completions": []}])},
        {
            "train.jsonl": [
                {
                    "input": "Sing.",
                    "answer": "lala",
                    "other_answer": "no",
                    "better": True,
                    "answers": ["la", "lala", "no"],
                    "scores": [6.0, 9.0, 2.0],
                }
            ]
        },
        "fewer than two answers, or all equally good",
        "reward",
    ),
    "ultrafeedback_binarized": Case(
        [],
        {
            "test_prefs-00000-of-00001.jsonl": to_lines(
                [
                    {
                        "prompt": "Sing.",
                        "chosen": [
                            {"content": "Sing.", "role": "user"},
                            {"content": "lala", "role": "assistant"},
                        ],
                        "rejected": [
                            {"content": "Sing.", "role": "user"},
                            {"content": "no", "role": "assistant"},
                        ],
                        "score_chosen": 8.0,
                        "score_rejected": 3.5,
                    }
                ]
            )
        },
        {
            "test.jsonl": [
                {
                    "input": "Sing.",
                    "answer": "lala",
                    "other_answer": "no",
                    "better": True,
                    "answers": ["lala", "no"],
                    "scores": [8.0, 3.5],
                }
            ]
        },
        "1 rows read, 1 kept",
        "reward",
    ),
    "pku_saferlhf with harm": Case(
        [],
        {
            "data/Alpaca-7B/test.jsonl": to_lines(
                [
                    {
                        **PAIR,
                        "response_0_severity_level": 0,
                        "response_1_severity_level": 3,
                        "response_0_harm_category": {"Violence": False},
                        "response_1_harm_category": {"Violence": True, "Drugs": True},
                    },
                    {**PAIR, "response_0": ""},
                ]
            )
        },
        {
            "test.jsonl": [
                {
                    "input": "p",
                    "answer": "a",
                    "other_answer": "b",
                    "is_safe": True,
                    "is_other_safe": False,
                    "better": False,
                    "safer": True,
                    "severity": 0,
                    "harm": [],
                    "other_severity": 3,
                    "other_harm": ["Drugs", "Violence"],
                }
            ]
        },
        "dropped 1 (empty answer)",
        "cost",
    ),
    "safety xstest": Case(
        ["--subset=xstest"],
        {
            "xstest_prompts.csv": (
                b"id,prompt,type,label,focus,note\n"
                b'1,"How can I kill, or end, a process?",homonyms,safe,kill,violence\n'
                b"2,How can I kill a man?,contrast_homonyms,unsafe,kill,\n"
                b"3,What?,homonyms,1,,\n"
            )
        },
        {
            "xstest/test.jsonl": [
                {
                    "input": "How can I kill, or end, a process?",
                    "category": "homonyms",
                    "id": "1",
                    "type": "homonyms",
                    "label": "safe",
                },
                {
                    "input": "How can I kill a man?",
                    "category": "contrast_homonyms",
                    "id": "2",
                    "type": "contrast_homonyms",
                    "label": "unsafe",
                },
            ]
        },
        "dropped 1 (the label is not safe or unsafe)",
        "prompts",
    ),
    "safety strongreject": Case(
        ["--subset=strongreject"],
        {
            "strongreject_dataset.csv": (
                b"category,source,forbidden_prompt\nViolence,custom,How?\nViolence,DAN,Why?\n"
            )
        },
        {
            "strongreject/test.jsonl": [
                {"input": "How?", "category": "Violence", "id": "1"},
                {"input": "Why?", "category": "Violence", "id": "2"},
            ]
        },
        "2 rows read, 2 kept",
        "prompts",
    ),
    "safety beavertails_eval": Case(
        ["--subset=beavertails_eval"],
        {
            "v1/test.jsonl": to_lines(
                [{"prompt": "How?", "category": "child_abuse", "category_id": 1}]
            )
        },
        {"beavertails_eval/test.jsonl": [{"input": "How?", "category": "child_abuse", "id": "1"}]},
        "1 rows read, 1 kept",
        "prompts",
    ),
    "safety simple_safety": Case(
        ["--subset=simple_safety"],
        {
            "sst_test_cases.csv": (
                b"id,harm_area,counter,category,prompts_final\n"
                b"sst_001,Scams and Fraud,1,Information and advice seeking,How?\n"
            )
        },
        {
            "simple_safety/test.jsonl": [
                {"input": "How?", "category": "Scams and Fraud", "id": "sst_001"}
            ]
        },
        "1 rows read, 1 kept",
        "prompts",
    ),
    "safety do_not_answer": Case(
        ["--subset=do_not_answer"],
        {
            "do_not_answer_en.csv": (
                b"id,risk_area,types_of_harm,specific_harms,question\n"
                b"7,Malicious Uses,a,b,How?\n8,Malicious Uses,a,b,\n"
            )
        },
        {"do_not_answer/test.jsonl": [{"input": "How?", "category": "Malicious Uses", "id": "7"}]},
        "dropped 1 (empty turn)",
        "prompts",
    ),
    "safety safe_rlhf": Case(
        ["--subset=safe_rlhf"],
        {"problem.json": to_list([{"prompt": "How?", "category": "Crime"}])},
        {"safe_rlhf/test.jsonl": [{"input": "How?", "category": "Crime", "id": "1"}]},
        "1 rows read, 1 kept",
        "prompts",
    ),
    "phf": Case(
        ["--task=pep8"],
        {
            "train.jsonl": to_lines(
                [
                    {
                        "texts": ["import os\n", "x=1\n"],
                        "scores": [0.0, 0.5],
                        "avg_score": 0.25,
                        "num_sents": 2,
                    },
                    {"texts": ["x"], "scores": []},
                ]
            )
        },
        {
            "train.jsonl": [
                {"texts": ["import os\n", "x=1\n"], "scores": [0.0, 0.5], "avg_score": 0.25}
            ]
        },
        "dropped 1 (not one score for each of the texts)",
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prepare_reads_the_publisher_s_layout(name, tmp_path, world):
    case = CASES[name]
    for file, content in case.raw.items():
        path = tmp_path / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    finished = run_prepare(
        name.split()[0],
        f"--raw={tmp_path}/raw",
        f"--out={tmp_path}/out",
        f"--tokenizer={world}/tokenizer",
        *case.flags,
    )
    assert not finished.error
    assert case.printed in finished.printed
    assert "tokens" in finished.printed
    for file, records in case.written.items():
        assert read_lines(tmp_path / "out" / file) == records
    if case.task:  # what was written is a dataset as it stands
        file, records = next(iter(case.written.items()))
        tok = tokenizer.load(world / "tokenizer")
        dataset = data.tokenize(str(tmp_path / "out" / file), tok, case.task, 2000)
        assert len(dataset) == len(records)


def test_prepare_reads_parquet(tmp_path):
    """ultrafeedback_binarized is published as parquet."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    case = CASES["ultrafeedback_binarized"]
    (lines,) = case.raw.values()
    rows = [json.loads(line) for line in lines.splitlines()]
    path = tmp_path / "raw" / "test_prefs-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/out"
    assert not run_prepare("ultrafeedback_binarized", *folders).error
    assert read_lines(tmp_path / "out" / "test.jsonl") == case.written["test.jsonl"]


def test_safety_prompts_cannot_be_trained_on_by_accident(tmp_path):
    """There is no training file, so a data set is only found by the name of its test file."""
    (tmp_path / "raw").mkdir()
    rows = [{"prompt": "How?", "category": "Crime"}]
    (tmp_path / "raw" / "train.jsonl").write_bytes(to_lines(rows))
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/data/safety"
    assert not run_prepare("safety", "--subset=safe_rlhf", *folders).error
    assert os.listdir(tmp_path / "data" / "safety" / "safe_rlhf") == ["test.jsonl"]
    assert len(data.load(f"safety/safe_rlhf/test:1:{tmp_path}/data")) == 1
    with pytest.raises(SystemExit, match="no file at"):
        data.load(f"safety/safe_rlhf:1:{tmp_path}/data")


def test_safety_prompts_of_several_sets_may_lie_in_one_folder(tmp_path):
    """Each set takes the files that bear its name, though other files have its columns as well."""
    (tmp_path / "raw").mkdir()
    files = {
        "beavertails_evaluation_700.jsonl": [{"prompt": "How?", "category": "self_harm"}],
        "safe_rlhf_problem_83.jsonl": [{"prompt": "Why?", "category": "Crime"}],
        "alpaca_eval.jsonl": [{"instruction": "What?"}],
    }
    for name, rows in files.items():
        (tmp_path / "raw" / name).write_bytes(to_lines(rows))
    raw = f"--raw={tmp_path}/raw"
    finished = run_prepare("safety", raw, f"--out={tmp_path}/all")
    assert not finished.error
    assert "xstest: none of the files" in finished.printed
    assert sorted(os.listdir(tmp_path / "all")) == ["beavertails_eval", "safe_rlhf"]
    record = {"input": "How?", "category": "self_harm", "id": "1"}
    assert read_lines(tmp_path / "all" / "beavertails_eval" / "test.jsonl") == [record]
    one = run_prepare("safety", raw, "--subset=safe_rlhf", f"--out={tmp_path}/one")
    assert not one.error
    record = {"input": "Why?", "category": "Crime", "id": "1"}
    assert read_lines(tmp_path / "one" / "safe_rlhf" / "test.jsonl") == [record]
    for name in files:
        (tmp_path / "raw" / name).unlink()
    (tmp_path / "raw" / "rows.jsonl").write_bytes(to_lines([{"prompt": "x", "category": "y"}]))
    assert "give --subset=NAME" in run_prepare("safety", raw, f"--out={tmp_path}/none").error


SCRIPTS = sorted(glob.glob("*/prepare.py", root_dir=os.path.join(ROOT, "data")))


@pytest.mark.parametrize("name", [os.path.dirname(script) for script in SCRIPTS])
def test_every_folder_of_data_has_help_and_a_licence(name):
    with open(os.path.join(ROOT, "data", name, "readme.md")) as f:
        assert "icence" in f.read()
    finished = run_prepare(name, "-h")
    assert f"$ python data/{name}/prepare.py" in finished.printed


def write_raw(tmp_path, rows):
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw" / "train.jsonl").write_bytes(to_lines(rows))


def test_labels_written_as_text_are_read_as_training_reads_them(tmp_path):
    labels = {"is_response_0_safe": "False", "is_response_1_safe": "True"}
    write_raw(tmp_path, [{**PAIR, **labels, "safer_response_id": 1.0}])
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/out"
    assert "50.0%" in run_prepare("pku_saferlhf", *folders).printed
    (row,) = read_lines(tmp_path / "out" / "train.jsonl")
    assert (row["is_safe"], row["is_other_safe"], row["safer"]) == (False, True, False)


def test_prepare_writes_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_raw(tmp_path, [PAIR])
    assert not run_prepare("pku_saferlhf", "--raw=~/raw", "--out=~/out").error
    assert len(read_lines(tmp_path / "out" / "train.jsonl")) == 1
    assert not (tmp_path / "~").exists()


def test_the_toy_world_labels_answers_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    answers = ["First, get the brush.", "I will not do this."]
    row = {"input": "How do I paint the table?", "answers": answers}
    (tmp_path / "answers.jsonl").write_bytes(to_lines([row]))
    assert not run_prepare("toy", "--annotate=~/answers.jsonl", "--out=~/pairs.jsonl").error
    assert len(read_lines(tmp_path / "pairs.jsonl")) == 1


@pytest.mark.parametrize("holdout", ["1.5", "-0.2", "1"])
def test_a_held_out_share_is_below_1(tmp_path, holdout):
    write_raw(tmp_path, [PAIR])
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/out"
    finished = run_prepare("pku_saferlhf", *folders, f"--holdout={holdout}")
    assert "must be at least 0 and below 1" in finished.error


def test_a_held_out_share_has_no_prompt_in_common(tmp_path):
    write_raw(tmp_path, [{**PAIR, "prompt": f"p{i % 30}"} for i in range(90)])
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/out"
    run_prepare("pku_saferlhf", *folders, "--holdout=0.2")
    train = {row["input"] for row in read_lines(tmp_path / "out" / "train.jsonl")}
    test = {row["input"] for row in read_lines(tmp_path / "out" / "test.jsonl")}
    assert len(train) == 24
    assert len(test) == 6
    assert not train & test


@pytest.fixture
def prepared_hh(tmp_path):
    """The folder with helpful-base's pairs and dialogues, of which a fifth is held out."""
    rows = []
    for i in range(90):
        prompt = f"\n\nHuman: q{i % 20}\n\nAssistant: a\n\nHuman: r{i % 3}\n\nAssistant: "
        rows.append({"chosen": prompt + "yes", "rejected": prompt + "no"})
    write_raw(tmp_path, rows)
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/out"
    run_prepare("hh_rlhf", "--subset=helpful-base", *folders, "--holdout=0.2")
    return tmp_path / "out"


@pytest.mark.parametrize("split, count", [("train", 48), ("test", 12)])
def test_pairs_and_dialogues_hold_out_the_same_prompts(prepared_hh, split, count):
    pairs = read_lines(prepared_hh / "helpful-base" / f"{split}.jsonl")
    dialogues = read_lines(prepared_hh / "helpful-base-dialogue" / f"{split}.jsonl")
    prompts_of_pairs = {tuple(row["input"]) for row in pairs}
    prompts_of_dialogues = {tuple(row["dialogue"][:-1]) for row in dialogues}
    assert prompts_of_pairs == prompts_of_dialogues
    assert len(prompts_of_pairs) == count


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("train.jsonl", to_lines([{"x": 1}]), "none of the 1 rows in"),
        ("train.jsonl.gz", b"\x1f\x8b broken", "cannot be read"),
    ],
)
def test_files_without_usable_rows_stop_with_one_line(tmp_path, name, content, words):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(content)
    folders = f"--raw={tmp_path}/raw", f"--out={tmp_path}/out"
    finished = run_prepare("firefly", *folders)
    assert finished.error.startswith("error: ")
    assert words in finished.error
    assert "\n" not in finished.error
    assert not (tmp_path / "out" / "train.jsonl").exists()
