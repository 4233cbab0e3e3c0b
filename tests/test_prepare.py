"""Every data/*/prepare.py on small files in the publisher's own layout, compressed as the publisher has them; then the
rows through the tokeniser, for the task they are for."""

import gzip
import io
import json
import lzma
import os
import zipfile

import pytest
from conftest import ROOT, run

from nanosafe import data, tokenizer
from nanosafe.data import spec
from nanosafe.storage import read_json

lines = lambda records: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def zipped(name, content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, content)
    return out.getvalue()


def moss_003(*turns):
    chat = {
        f"turn_{i}": {
            "Human": f"<|Human|>: {q}<eoh>\n",
            "Inner Thoughts": "None",
            "MOSS": f"<|MOSS|>: {a}<eom>\n",
        }
        for i, (q, a) in enumerate(turns, start=1)
    }
    return {
        "conversation_id": "1",
        "meta_instruction": "You are ...",
        "num_turns": len(turns),
        "chat": chat,
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

CASES = {  # name -> flags, {raw file: bytes}, {written file: records}, what is said, task
    "pku_saferlhf": (
        ["--version=10k"],
        {"round0/train.jsonl.xz": lzma.compress(lines([PAIR]))},
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
    "hh_rlhf": (
        ["--subset=harmless-base"],
        {"test.jsonl.gz": gzip.compress(lines(HH)), "train.jsonl.gz": gzip.compress(lines(HH[:1]))},
        {
            "harmless-base/test.jsonl": [
                {"input": ["q", "a", "r"], "answer": "yes", "other_answer": "no", "better": True}
            ],
            "harmless-base-dialogue/train.jsonl": [{"dialogue": ["q", "a", "r", "yes"]}],
        },
        "dropped 1 (the last turn is the human's)",
        "reward",
    ),
    "hh_rlhf processed": (
        ["--subset=helpful-base"],
        {
            "train.jsonl": lines(
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
    "alpaca": (
        [],
        {
            "alpaca_data.json": json.dumps(
                [
                    {"instruction": "Add.", "input": "1 2", "output": "3"},
                    {"instruction": "Say hi.", "input": "", "output": " "},
                    {"instruction": "So?", "input": "", "output": "Yes.", "history": [["a", "b"]]},
                ]
            ).encode()
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
    "firefly": (
        [],
        {
            "firefly-train-1.1M.jsonl": lines(
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
    "moss 002": (
        ["--version=002"],
        {
            "en_honesty.json": json.dumps(
                [
                    {
                        "id": 1,
                        "prefix": "...",
                        "num_turns": 2,
                        "plain_text": "[Human]: hi <eoh> [MOSS]: Hello!\nI am MOSS. <eoa> [Human]: bye<eoh> [MOSS]: Bye.<eoa>",
                    },
                    {"id": 2, "plain_text": "[MOSS]: hi<eoa>"},
                ]
            ).encode()
        },
        {"train.jsonl": [{"dialogue": ["hi", "Hello!\nI am MOSS.", "bye", "Bye."]}]},
        "dropped 1 (the turns do not alternate)",
        "sft",
    ),
    "moss 003": (
        [],
        {
            "moss-003-sft-no-tools.jsonl.zip": zipped(
                "moss-003-sft-no-tools.jsonl",
                lines([moss_003(("你好", "你好！"), ("再见", "再见。")), moss_003(("x", ""))]),
            )
        },
        {"train.jsonl": [{"dialogue": ["你好", "你好！", "再见", "再见。"]}]},
        "dropped 1 (an empty turn)",
        "sft",
    ),
    "slim_orca": (
        [],
        {
            "oo-labeled_correct.gpt4.sharegpt.jsonl": lines(
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
    "beavertails": (
        [],
        {
            "round0/30k/test.jsonl.gz": gzip.compress(
                lines(
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
    "beavertails safe": (
        ["--only_safe=True"],
        {
            "train.jsonl": lines(
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
    "alpaca_farm": (
        [],
        {
            "alpaca_human_preference.json": json.dumps(
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
            ).encode()
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
    "ultrafeedback": (
        [],
        {"evol_instruct.jsonl": lines([FEEDBACK, {**FEEDBACK, "completions": []}])},
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
    "ultrafeedback binarized": (
        [],
        {
            "test_prefs.jsonl": lines(
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
    "phf": (
        ["--task=pep8"],
        {
            "train.jsonl": lines(
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


@pytest.mark.parametrize("case", CASES)
def test_prepare_reads_the_native_layout(case, tmp_path, world):
    flags, raw, written, said, task = CASES[case]
    for name, content in raw.items():
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(content)
    done = run(
        f"data/{case.split()[0]}/prepare.py",
        f"--raw={tmp_path}/raw",
        f"--out={tmp_path}/out",
        f"--tokenizer={world}/tokenizer",
        *flags,
    )
    assert said in done.stdout and "tokens" in done.stdout
    for name, records in written.items():
        assert [json.loads(line) for line in open(tmp_path / "out" / name)] == records
    if task:  # what was written is a dataset as it stands
        name = str(tmp_path / "out" / next(iter(written)))
        assert len(data.tokenize(name, tokenizer.load(world / "tokenizer"), task, 2000)) == len(
            written[next(iter(written))]
        )


def test_a_held_out_share_has_no_prompt_in_common(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.jsonl").write_bytes(
        lines([{**PAIR, "prompt": f"p{i % 30}"} for i in range(90)])
    )
    run(
        "data/pku_saferlhf/prepare.py",
        f"--raw={tmp_path}/raw",
        f"--out={tmp_path}/out",
        "--holdout=0.2",
    )
    sides = [
        {row["input"] for row in data.load(str(tmp_path / "out" / f"{s}.jsonl"))}
        for s in ("train", "test")
    ]
    assert len(sides[0]) == 24 and len(sides[1]) == 6 and not sides[0] & sides[1]


def test_pairs_and_dialogues_hold_out_the_same_prompts(tmp_path):
    (tmp_path / "raw").mkdir()
    turns = [
        f"\n\nHuman: q{i % 20}\n\nAssistant: a\n\nHuman: r{i % 3}\n\nAssistant: " for i in range(90)
    ]
    (tmp_path / "raw" / "train.jsonl").write_bytes(
        lines([{"chosen": t + "yes", "rejected": t + "no"} for t in turns])
    )
    run(
        "data/hh_rlhf/prepare.py",
        "--subset=helpful-base",
        f"--raw={tmp_path}/raw",
        f"--out={tmp_path}/out",
        "--holdout=0.2",
    )
    read = lambda *path: data.load(str(tmp_path.joinpath("out", *path)))
    for split in ("train", "test"):
        pairs = {tuple(row["input"]) for row in read("helpful-base", f"{split}.jsonl")}
        talks = {
            tuple(row["dialogue"][:-1]) for row in read("helpful-base-dialogue", f"{split}.jsonl")
        }
        assert pairs == talks and len(pairs) == (48 if split == "train" else 12)


def test_nothing_usable_and_what_cannot_be_read_stop_with_one_line(tmp_path):
    for content, words in (
        (lines([{"x": 1}]), "none of the 1 rows in"),
        (b"\x1f\x8b broken", "cannot be read"),
    ):
        path = tmp_path / "raw" / ("train.jsonl.gz" if words == "cannot be read" else "train.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        done = run(
            "data/firefly/prepare.py", f"--raw={tmp_path}/raw", f"--out={tmp_path}/out", check=False
        )
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out" / "train.jsonl").exists()
        path.unlink()


def test_safe_rlhf_s_names_and_the_hub_s_lead_to_folders_that_prepare_fills(tmp_path, monkeypatch):
    """Safe-RLHF's registry, as its spec lists it."""
    names = (
        "alpaca stanford-alpaca firefly moss-002-sft moss-003-sft hh-rlhf-dialogue hh-dialogue "
        "hh-rlhf-harmless-dialogue hh-rlhf-dialogue/harmless-base hh-harmless-dialogue hh-dialogue/harmless-base "
        "hh-rlhf-helpful-dialogue hh-rlhf-dialogue/helpful-base hh-helpful-dialogue hh-dialogue/helpful-base "
        "hh-rlhf-harmless-preference/train hh-rlhf-harmless-preference/test hh-rlhf-helpful-preference/train "
        "hh-rlhf-preference/harmless-base/test hh-harmless-preference/train hh-preference/helpful-base/test "
        "PKU-SafeRLHF/train PKU-SafeRLHF/test PKU-Alignment/PKU-SafeRLHF/train PKU-SafeRLHF-30K/train "
        "PKU-SafeRLHF-30K/test PKU-SafeRLHF-10K/train PKU-Alignment/PKU-SafeRLHF-10K/train"
    ).split()
    folders = {
        *read_json(os.path.join(ROOT, "nanosafe"), "aliases.json").values(),
        "alpaca",
        "firefly",
    }
    assert {folder.split("/")[0] for folder in folders} <= set(
        os.listdir(os.path.join(ROOT, "data"))
    )
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        os.makedirs(tmp_path / "data" / folder, exist_ok=True)
        for split in ("train", "test"):
            (tmp_path / "data" / folder / f"{split}.jsonl").write_text("")
    for name in names:
        split = "test" if name.endswith("/test") else "train"
        assert spec.resolve(name).endswith(f"{split}.jsonl"), name


def test_every_folder_of_data_has_a_readme_with_a_licence():
    for name in os.listdir(os.path.join(ROOT, "data")):
        if os.path.isdir(os.path.join(ROOT, "data", name)):
            with open(os.path.join(ROOT, "data", name, "readme.md")) as f:
                assert "icence" in f.read(), name
