"""Chinese end to end: MOSS-style and Firefly-style data with a Baichuan and an InternLM2 folder of random weights,
through prepare.py, SFT and sample.py, as a user types it."""

import json
import os

import pytest
import torch
from conftest import run
from test_formats import fused, grouped, short_names, theirs_with, without_rope, write
from test_tokenizer import sentencepiece_folder

from nanosafe import checkpoint, tokenizer

TALKS = [
    ("你好，请介绍一下自己。", "你好！我是一个小助手。"),
    ("今天天气怎么样？", "今天天气很好，阳光明媚。"),
    ("请写一首短诗。", "春风拂面，花开满园。"),
    ("怎样学习中文？", "多听，多说，多读，多写。"),
]


@pytest.fixture(params=["baichuan", "internlm2"])
def folder(request, tmp_path):
    path = tmp_path / request.param
    sentencepiece_folder(
        path,
        {"add_bos_token": request.param == "internlm2"},
        [q + a for q, a in TALKS],
        vocab_size=500,
        add_dummy_prefix=request.param == "internlm2",
        character_coverage=1.0,
    )
    vocab = tokenizer.load(path).vocab_size
    if request.param == "baichuan":
        state = without_rope(theirs_with(num_key_value_heads=6, vocab_size=vocab)).state_dict()
        write(
            path,
            fused(state, "W_pack", lambda *qkv: torch.cat(qkv)),
            model_type="baichuan",
            vocab_size=vocab,
            max_position_embeddings=...,
            model_max_length=256,
            norm_head=True,
        )
    else:
        state = fused(theirs_with(vocab_size=vocab).state_dict(), "wqkv", grouped)
        write(
            path,
            short_names(state),
            model_type="internlm2",
            num_key_value_heads=2,
            vocab_size=vocab,
            max_position_embeddings=256,
        )
    return path


def test_from_raw_files_to_an_answer(folder, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    text = "".join(
        json.dumps({"kind": "x", "input": q, "target": a}, ensure_ascii=False) + "\n"
        for q, a in TALKS
    )
    (raw / "firefly-train-1.1M.jsonl").write_text(text, encoding="utf-8")
    run("data/firefly/prepare.py", f"--raw={raw}", f"--out={tmp_path}/firefly")
    out = tmp_path / "sft"
    run(
        "train_sft.py",
        f"--init_from={folder}",
        f"--data={tmp_path}/firefly/train.jsonl",
        f"--out_dir={out}",
        "--batch_size=4",
        "--max_steps=60",
        "--learning_rate=3e-3",
        "--max_len=200",
        "--epochs=100",
        "--eval_data=",
        "--max_tokens=1024",
    )
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    done = run(
        "sample.py",
        f"--model={out}/model",
        f"--prompt={TALKS[1][0]}",
        "--temperature=0",
        "--max_new_tokens=60",
    )
    assert TALKS[1][1] in done.stdout
    assert checkpoint.load(out / "model").config.alibi == (os.path.basename(folder) == "baichuan")
