"""Chinese end to end, as a user types it: MOSS-style and Firefly-style data with a Baichuan and an
InternLM2 folder of random weights, through data/firefly/prepare.py, train_sft.py and sample.py."""

import json

import pytest
from conftest import run
from test_formats import fuse, make_internlm2_state, make_theirs, remove_rope, stack, write
from test_tokenizer import sentencepiece_folder

from nanosafe import checkpoint, tokenizer

TALKS = [
    ("你好，请介绍一下自己。", "你好！我是一个小助手。"),
    ("今天天气怎么样？", "今天天气很好，阳光明媚。"),
    ("请写一首短诗。", "春风拂面，花开满园。"),
    ("怎样学习中文？", "多听，多说，多读，多写。"),
]


def write_tokenizer(path, is_internlm2):
    """Write a tokenizer with the family's settings; returns its vocabulary's size."""
    sentencepiece_folder(
        path,
        {"add_bos_token": is_internlm2},
        [question + answer for question, answer in TALKS],
        vocab_size=500,
        add_dummy_prefix=is_internlm2,
        character_coverage=1.0,
    )
    return tokenizer.load(path).vocab_size


@pytest.fixture
def baichuan(tmp_path):
    path = tmp_path / "baichuan"
    vocab_size = write_tokenizer(path, is_internlm2=False)
    model = make_theirs(num_key_value_heads=6, vocab_size=vocab_size)
    remove_rope(model)
    state = model.state_dict()
    write(
        path,
        fuse(state, "W_pack", stack),
        model_type="baichuan",
        vocab_size=vocab_size,
        model_max_length=256,
        norm_head=True,
        removed=("max_position_embeddings",),
    )
    return path


@pytest.fixture
def internlm2(tmp_path):
    path = tmp_path / "internlm2"
    vocab_size = write_tokenizer(path, is_internlm2=True)
    state = make_internlm2_state(make_theirs(vocab_size=vocab_size))
    write(
        path,
        state,
        model_type="internlm2",
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=256,
    )
    return path


@pytest.fixture(scope="module")
def prepared_data(tmp_path_factory):
    """The jsonl file that data/firefly/prepare.py makes of a raw file."""
    raw = tmp_path_factory.mktemp("raw")
    out = tmp_path_factory.mktemp("firefly")
    with open(raw / "firefly-train-1.1M.jsonl", "w", encoding="utf-8") as f:
        for question, answer in TALKS:
            row = {"kind": "x", "input": question, "target": answer}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    run("data/firefly/prepare.py", f"--raw={raw}", f"--out={out}")
    return out / "train.jsonl"


@pytest.mark.parametrize("family", ["baichuan", "internlm2"])
def test_from_raw_files_to_an_answer(family, prepared_data, request, tmp_path):
    folder = request.getfixturevalue(family)
    out = tmp_path / "sft"
    run(
        "train_sft.py",
        f"--init_from={folder}",
        f"--data={prepared_data}",
        f"--out_dir={out}",
        "--batch_size=4",
        "--max_steps=60",
        "--learning_rate=3e-3",
        "--max_len=200",
        "--epochs=100",
        "--eval_data=",
        "--max_tokens=1024",
    )
    with open(out / "metrics.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert checkpoint.load(out / "model").config.alibi == (family == "baichuan")

    question, answer = TALKS[1]
    done = run(
        "sample.py",
        f"--model={out}/model",
        f"--prompt={question}",
        "--temperature=0",
        "--max_new_tokens=60",
    )
    assert answer in done.stdout
