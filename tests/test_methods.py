"""The field's methods as users run them: in the trainers, over ranks, resumed; recipes with published values."""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, rows_of, run, small_config
from test_house import knobs_of, script_of
from test_train import same_state

import configurator
from nanosafe import checkpoint, data, inference, parallel, tokenizer
from nanosafe.tokenizer.special_tokens import control_token_ids, add_control_tokens
from nanosafe.phf.documents import target_scores
from nanosafe.data.batching import sum_per_sequence
from nanosafe.checkpoint import init_from_scratch

WORLD = parallel.World(0, 1, torch.device("cpu"), True)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pref(world):
    d = world / "data"
    return [
        "train_pref.py",
        f"--init_from={world}/policy",
        f"--data={d}/pairs/train.jsonl:200/-1",
        f"--eval_data={d}/reward/test.jsonl:9/-1",
        "--batch_size=8",
        "--max_steps=6",
        "--max_tokens=1024",
        "--max_len=200",
        "--learning_rate=1e-3",
        "--save_interval=2",
        "--max_new_tokens=8",
    ]


@pytest.fixture
def ppo(world):
    d = world / "data"
    return [
        "train_ppo_lag.py",
        "--max_tokens=1024",
        "--save_interval=2",
        "--max_len=200",
        f"--actor_model={world}/policy",
        f"--reward_model={world}/reward",
        f"--cost_model={world}/cost",
        f"--prompts={d}/prompts/train.jsonl",
        "--max_new_tokens=12",
        "--rollout_size=8",
        "--batch_size=4",
        "--max_steps=8",
        "--epochs=100",
        "--actor_learning_rate=1e-3",
        "--critic_learning_rate=1e-3",
    ]


@pytest.fixture
def phf(world, tmp_path):
    d = world / "data"
    return [
        "-m",
        "nanosafe.phf.train",
        f"--tokenizer={world}/tokenizer",
        f"--data={d}/documents/train.jsonl:120/-1",
        f"--eval_data={d}/documents/test.jsonl:9/-1",
        "--hidden_size=32",
        "--intermediate_size=48",
        "--num_hidden_layers=2",
        "--batch_size=8",
        "--max_steps=6",
        "--max_tokens=1024",
        "--max_len=64",
        "--save_interval=2",
        "--learning_rate=1e-3",
    ]


def last(folder):
    return rows_of(folder / "metrics.jsonl")[-1]


# ---- train_pref.py ----


@pytest.mark.parametrize(
    "flags",
    [
        ("--objective=dpo",),
        ("--objective=dpo", "--label_smoothing=0.1", "--reference_free=True"),
        ("--objective=ipo",),
        ("--objective=ipo", "--sum_logps=True"),
        ("--objective=rrhf",),
        ("--objective=reward", "--token_wise=True", "--margin=0.5"),
        ("--objective=cost", "--token_wise=True"),
        ("--objective=reward", "--lm_coef=1.0"),
    ],
    ids=" ".join,
)
def test_every_objective_learns_its_pairs(pref, tmp_path, flags):
    longer = (
        ["--max_steps=80", "--learning_rate=5e-3"] if "rrhf" in flags[0] else ["--max_steps=25"]
    )  # it learns to speak first
    run(
        *pref,
        *flags,
        f"--out_dir={tmp_path}",
        "--data=" + pref[2][7:].split(":")[0] + ":8/-1",
        *longer,
    )
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert (
        rows[-1]["loss"] < rows[0]["loss"]
        and rows[-1]["accuracy"] >= 0.75
        and rows[-1]["margin"] > 0
    )
    model = checkpoint.load(tmp_path / "model")
    assert model.head == ("lm" if flags[0][12:] in ("dpo", "ipo", "rrhf") else "score")
    if model.head == "lm":
        assert rows[-1]["reward_chosen"] > rows[-1]["reward_rejected"] and rows[-1]["eval_kl"] > 0
    assert {"eval_loss", "eval_accuracy", "eval_margin"} <= rows[-1].keys()


def test_the_first_step_is_where_the_formulas_say(pref, tmp_path):
    for objective, loss in (("dpo", math.log(2)), ("ipo", 1 / (4 * 0.1**2))):
        run(
            *pref,
            f"--objective={objective}",
            "--max_steps=1",
            "--learning_rate=0",
            f"--out_dir={tmp_path}/{objective}",
        )
        row = last(tmp_path / objective)
        assert row["loss"] == pytest.approx(loss, rel=1e-4) and abs(row["margin"]) < 1e-4
        assert row["eval_kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "rrhf"])
def test_policies_do_not_depend_on_ranks_and_micro_batches(pref, tmp_path, objective):
    whole, two = tmp_path / "whole", tmp_path / "two"
    run(*pref, f"--objective={objective}", f"--out_dir={whole}")
    run(
        *pref,
        f"--objective={objective}",
        f"--out_dir={two}",
        "--max_tokens=200",
        "--parallel=fsdp",
        ranks=2,
    )
    for a, b in zip(rows_of(whole / "metrics.jsonl"), rows_of(two / "metrics.jsonl")):
        for name in {"loss", "accuracy", "margin", "grad_norm", "eval_loss", "eval_kl"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), name


def test_a_killed_dpo_run_goes_on_as_if_nothing_had_happened(pref, tmp_path):
    import shutil

    command = [*pref, "--objective=dpo", "--keep=5"]
    run(*command, f"--out_dir={tmp_path}/whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "state" / "latest").write_text("step_000002\n")
    run(*command, f"--out_dir={tmp_path}/cut", "--resume=True")
    same_state(tmp_path / "whole", tmp_path / "cut")


def test_reference_log_probabilities_are_what_a_plain_loop_gives_and_are_kept(world, tmp_path):
    tok = tokenizer.load(world / "policy")
    dataset = data.tokenize(f"{world}/data/pairs/train.jsonl:7/-1", tok, "reward", 200)
    model = checkpoint.load(world / "policy")
    got = inference.cached_reference_logps(model, str(world / "policy"), dataset, 300, WORLD)
    for i in range(7):
        for part in range(2):
            ids, mask = dataset.sequence(i, part)
            logits = model(
                torch.tensor(np.array(ids), dtype=torch.int64),
                torch.tensor([0, len(ids)], dtype=torch.int32),
                len(ids),
            )
            logps = logits.log_softmax(-1)
            want = sum(logps[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])
            assert got[i, part].item() == pytest.approx(want, abs=1e-3)
            assert mask[-1] and ids[-1] == tok.eos_id  # EOS is compared too
    with torch.no_grad():
        model.norm.weight.mul_(2.0)
    assert torch.equal(
        got, inference.cached_reference_logps(model, str(world / "policy"), dataset, 300, WORLD)
    )


def test_only_the_last_answer_is_compared(world, tmp_path):
    tok = tokenizer.load(world / "policy")
    path = write(
        tmp_path / "p.jsonl",
        [
            {
                "input": ["q", "first answer", "r"],
                "answer": "x",
                "other_answer": "y",
                "better": False,
            }
        ],
    )
    dataset = data.tokenize(str(path), tok, "reward", 200)
    (a, mask_a), (b, mask_b) = dataset.sequence(0, 0), dataset.sequence(0, 1)
    assert (
        tok.decode([t for t, m in zip(a, mask_a) if m]) == "y"
        and tok.decode([t for t, m in zip(b, mask_b) if m]) == "x"
    )
    assert "first answer" in tok.decode(a)


def test_rankings_of_two_to_k(world, tmp_path):
    tok = tokenizer.load(world / "policy")
    path = write(
        tmp_path / "r.jsonl",
        [
            {"input": "q", "answers": ["a", "b b", "c", "a"], "scores": [1, 3.5, 2, 0.5]},
            {"input": "q", "answer": "x", "other_answer": "y", "better": False},
            {"input": "q", "answers": ["a", "b"], "scores": [1, 1]},
            {"input": "q", "answers": ["a", "b"], "scores": [1, float("nan")]},
            {"input": "q", "answers": ["a"], "scores": [1, 2]},
            {"input": "q", "answers": ["a", " "], "scores": [1, 2]},
            {"input": "q", "answer": "x"},
        ],
    )
    dataset = data.tokenize(str(path), tok, "rank", 200)
    assert len(dataset) == 2 and dataset.width == 3
    assert (
        dataset.labels[0].tolist() == [3.5, 2.0, 1.0]
        and dataset.labels[1].tolist()[:2] == [1.0, 0.0]
        and np.isnan(dataset.labels[1, 2])
    )
    batch = dataset.batch([0, 1], "cpu")
    assert len(batch.cu_seqlens) == 6  # five sequences: the missing one takes no room
    tokens = sum_per_sequence((batch.targets >= 0).float(), batch).tolist()
    assert [t - 1 for t in tokens] == [
        len(tok.encode_suffix(x)) for x in ("b b", "y", "c", "x", "a")
    ]
    for reason in (
        "no two answers of different scores",
        "a score that is no number",
        "not one score for each answer",
        "empty answer",
    ):
        assert reason in dataset.report["text"]


def test_a_score_model_is_no_policy_to_prefer_with(pref, world):
    done = run(*pref, "--objective=dpo", f"--init_from={world}/reward", check=False)
    assert (
        done.returncode == 1
        and "is a score model" in done.stderr
        and "Traceback" not in done.stderr
    )


# ---- train_ppo_lag.py ----

METHODS = {
    "ppo_max": [
        "--reward_scaling=mean_std",
        "--reward_clip=5",
        "--critic_warmup=1",
        "--clip_value=0.2",
        "--kl_target=0.1",
        "--ema=0.9",
    ],
    "bonuses": [
        "--normalize_advantage=True",
        "--entropy_coef=0.01",
        "--reward_scaling=first",
        "--max_ratio=20",
        "--temperature=0.7",
    ],
    "unbounded": ["--clip_ratio=0", "--clip_score=0", "--clip_value=0", "--ppo_epochs=2"],
    "rloo": ["--advantage=rloo", "--num_samples=2", "--rollout_size=4"],
    "grpo": ["--advantage=grpo", "--num_samples=4", "--rollout_size=2", "--kl_target=1"],
}


@pytest.mark.parametrize("method", METHODS)
def test_ppo_s_options_run_and_resume_bit_equally(ppo, tmp_path, method):
    import shutil

    command = [*ppo, *METHODS[method], "--keep=9"]
    run(*command, f"--out_dir={tmp_path}/whole")
    rows = rows_of(tmp_path / "whole" / "metrics.jsonl")
    assert all(math.isfinite(v) for row in rows for v in row.values()) and rows[-1]["skips"] == 0
    assert all(row["lambda"] > 0 for row in rows)
    states = sorted(os.listdir(tmp_path / "whole" / "state"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "state" / "latest").write_text(states[1] + "\n")
    run(*command, f"--out_dir={tmp_path}/cut", "--resume=True")
    same_state(tmp_path / "whole", tmp_path / "cut")
    if method in ("rloo", "grpo"):  # two of the six models are not there
        assert not any("critic" in name and "lr" not in name for name in rows[0])
    if method == "ppo_max":
        assert (
            rows[0]["actor_loss"] == 0
            and rows[0]["actor_grad_norm"] == 0
            and rows[-1]["actor_grad_norm"] > 0
        )
        assert rows[0]["lambda"] == 1.0 and rows[-1]["kl_coef"] != rows[0]["kl_coef"]
        a, b = (
            checkpoint.load(tmp_path / "whole" / name).norm.weight
            for name in ("model", "model_ema")
        )
        assert not torch.equal(a, b)


def test_without_critics_over_two_ranks(ppo, tmp_path):
    command = [
        *ppo,
        "--advantage=rloo",
        "--num_samples=2",
        "--rollout_size=4",
        "--ema=0.5",
        "--max_steps=2",
    ]
    run(*command, f"--out_dir={tmp_path}/one")
    run(*command, f"--out_dir={tmp_path}/two", "--parallel=fsdp", ranks=2)
    a, b = last(tmp_path / "one"), last(tmp_path / "two")
    for name in ("reward", "cost", "lambda", "actor_loss", "actor_grad_norm"):
        assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name


def test_responses_are_scored_at_the_temperature_they_were_sampled_at(world):
    """MOSS samples at 0.8 and takes ratios at 1: then even the sampler's own policy has a ratio other than 1."""
    model = checkpoint.load(world / "policy")
    ids = torch.tensor([1, 5, 9, 7])
    batch = (ids, torch.tensor([0, 4], dtype=torch.int32), 4)
    targets = torch.tensor([5, 9, 7, -100])
    want = (model(*batch) / 0.8).log_softmax(-1)[torch.arange(3), targets[:3]]
    assert torch.allclose(model(*batch, targets, 0.8)[:3], want, atol=1e-5)
    with open(os.path.join(ROOT, "train_ppo_lag.py")) as f:
        assert 'model(*batch, log_temperature) if model.head == "lm"' in f.read()


def test_a_ratio_guard_keeps_the_actor_where_it_is(ppo, tmp_path):
    done = run(
        *ppo, "--max_ratio=0.5", "--max_steps=2", f"--out_dir={tmp_path}"
    )  # every ratio is above it
    assert "the actor is not moved" in done.stderr and last(tmp_path)["actor_grad_norm"] == 0


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--advantage=rloo", "num_samples=1 must be at least 2"),
        ("--advantage=a2c", "choose one of gae, rloo, grpo"),
        ("--reward_scaling=max", "choose one of none, std, mean_std, first"),
    ],
)
def test_mistakes_are_one_line(ppo, flag, words):
    done = run(*ppo, flag, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


# ---- train_sft.py: documents ----


def test_documents_are_cut_and_scored(world, tmp_path):
    tok = add_control_tokens(tokenizer.load(world / "policy"))
    rows = [
        {"texts": ["One. ", "Two two two. ", "Three."], "scores": [0.0, 1.0, 0.5]},
        {"texts": ["Four."], "scores": [0.2]},
        {"texts": ["a"], "scores": [1, 2]},
        {"texts": ["a", 5], "scores": [1, 2]},
        {"texts": ["a"], "scores": [None]},
        {"input": "q"},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    plain = data.tokenize(str(path), tok, "documents", 8)
    assert "4 rows" not in plain.report["text"] and "dropped" in plain.report["text"]
    first = [i for i in range(len(plain)) if plain.lines[i] == 1]
    ids = [t for i in first for t in plain.sequence(i)[0][1:]]
    assert (
        len(first) > 1 and max(plain.lengths) <= 8 and tok.decode(ids) == "One. Two two two. Three."
    )
    assert ids[-1] == tok.eos_id and all(
        plain.sequence(i)[0][0] == tok.bos_id and plain.sequence(i)[1][0] == 0 for i in first
    )
    whole = data.tokenize(str(path), tok, "documents", 99)
    sizes = [len(tok.encode_suffix(text)) for text in rows[0]["texts"]]
    want = (
        [0.0] + [0.0] * sizes[0] + [1.0] * sizes[1] + [0.5] * (sizes[2] + 1)
    )  # EOS has the last segment's
    assert whole.scores[: whole.offsets[1]].tolist() == want
    assert target_scores(whole, [0], "cpu").tolist() == want[1:] + [
        0.0
    ]  # of each position's target
    filtered = data.tokenize(str(path), tok, "documents", 99, method=("filter", 0.2))
    assert (
        len(filtered) == 1
        and "dropped 1 documents with a mean score above 0.2" in filtered.report["text"]
    )  # 0.5 is above, 0.2 is not
    good, bad = control_token_ids(tok)
    marked = data.tokenize(str(path), tok, "documents", 99, method=("conditional", 0.0, 0.0))
    ids, mask = marked.sequence(0)
    assert (
        [t for t in ids if t in (good, bad)] == [good, bad, bad] and ids[1] == good and mask[1] == 1
    )
    unmarked = data.tokenize(str(path), tok, "documents", 99, method=("conditional", 0.0, 1.0))
    assert not {good, bad} & set(map(int, unmarked.tokens))
    compared = data.tokenize(str(path), tok, "documents", 99, method=("compare", 0.0))
    assert compared.targets.tolist() == whole.targets.tolist()  # text counts, marks do not
    assert tok.decode(ids) == "One. Two two two. Three."  # control tokens are nobody's text


@pytest.mark.parametrize("kind", ["policy", "bytes"])
def test_control_tokens_survive_the_disk(world, tmp_path, kind):
    if kind == "bytes":
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.train_from_iterator(
            ["some text to train on"] * 9,
            trainers.BpeTrainer(special_tokens=["<|endoftext|>"], vocab_size=280),
        )
        (tmp_path / "t").mkdir()
        bpe.save(str(tmp_path / "t" / "tokenizer.json"))
    tok = add_control_tokens(
        tokenizer.load(world / "policy" if kind == "policy" else tmp_path / "t")
    )
    tok.save(tmp_path / "saved")
    again = tokenizer.load(tmp_path / "saved")
    assert (
        control_token_ids(again)
        == control_token_ids(tok)
        == [tok.vocab_size - 2, tok.vocab_size - 1]
    )
    assert (
        again.encode("<|aligned|>") == control_token_ids(tok)[:1]
        and again.encode("<|aligned|>", allow_special=False) != control_token_ids(tok)[:1]
    )
    assert add_control_tokens(again).vocab_size == tok.vocab_size


@pytest.mark.parametrize(
    "flags",
    [
        ("--objective=mle",),
        ("--objective=filter", "--score_threshold=0.3"),
        ("--objective=conditional", "--drop_fraction=0.1"),
        ("--objective=unlikelihood",),
        ("--objective=awr", "--alpha=0.5", "--beta=0.2"),
        ("--objective=rwr", "--beta=0.2"),
    ],
    ids=lambda f: f[0][12:],
)
def test_every_objective_of_phf_runs_resumes_and_evaluates(phf, world, tmp_path, flags):
    import shutil

    command = [
        *phf,
        *flags,
        "--keep=9",
        "--eval_samples=26",
        "--eval_max_new_tokens=8",
        "--scorer=data/toy/prepare.py:misalignment",
        f"--reference={world}/policy",
    ]
    run(*command, f"--out_dir={tmp_path}/whole")
    row = last(tmp_path / "whole")
    assert all(math.isfinite(v) for v in row.values())
    assert {
        "eval_loss",
        "eval_score",
        "eval_score_max@25",
        "eval_hits",
        "eval_length",
        "eval_distinct_1",
        "eval_distinct_2",
        "eval_self_bleu",
        "eval_kl",
    } <= row.keys()
    assert len((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()) == 8
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "state" / "latest").write_text("step_000002\n")
    run(*command, f"--out_dir={tmp_path}/cut", "--resume=True")
    same_state(tmp_path / "whole", tmp_path / "cut")
    model = checkpoint.load(tmp_path / "whole" / "model")
    assert model.head == "lm" and not os.path.exists(tmp_path / "whole" / "model.tmp")
    if flags[0] == "--objective=conditional":
        tok = tokenizer.load(tmp_path / "whole" / "model")
        assert (
            len(model.embed_tokens.weight)
            == tok.vocab_size
            == tokenizer.load(world / "policy").vocab_size + 2
        )
        out = run(
            "sample.py",
            f"--model={tmp_path}/whole/model",
            "--template=False",
            "--prefix=<|aligned|>",
            "--prompt=How do I",
            "--max_new_tokens=20",
        ).stdout
        assert "aligned|>" not in out.split("> How do I")[1]


def test_awr_over_two_ranks_is_awr(phf, tmp_path):
    command = [*phf, "--objective=awr", "--alpha=0.5", "--beta=0.2", "--max_steps=2"]
    run(*command, f"--out_dir={tmp_path}/one")
    run(*command, f"--out_dir={tmp_path}/two", "--parallel=fsdp", "--max_tokens=128", ranks=2)
    a, b = last(tmp_path / "one"), last(tmp_path / "two")
    for name in ("loss", "grad_norm", "eval_loss"):
        assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_awr_begins_with_values_of_minus_a_half(phf, world, tmp_path):
    """So the first loss is mean w * nll with w = exp((0.5 - s) / beta), and half the squared error beside it."""
    run(
        *phf,
        "--objective=awr",
        "--alpha=1.0",
        "--beta=1e9",
        "--max_steps=1",
        f"--out_dir={tmp_path}/awr",
    )
    run(*phf, "--objective=mle", "--max_steps=1", f"--out_dir={tmp_path}/mle")
    assert last(tmp_path / "awr")["loss"] == pytest.approx(last(tmp_path / "mle")["loss"], rel=1e-5)


def test_other_objectives_need_documents(world):
    done = run("train_sft.py", "--objective=awr", f"--tokenizer={world}/tokenizer", check=False)
    assert done.returncode == 1 and "needs documents with scores" in done.stderr


def test_prompts_for_samples_without_an_input_are_one_line(phf, world):
    done = run(
        *phf, "--eval_samples=2", f"--eval_prompts={world}/data/documents/test.jsonl", check=False
    )
    assert (
        done.returncode == 1 and "cannot be read" in done.stderr and "Traceback" not in done.stderr
    )


def test_both_heads_and_what_is_written_of_them(tmp_path):
    for tied in (False, True):
        model = init_from_scratch(small_config(tie_word_embeddings=tied), "both", seed=3)
        ids = torch.arange(3, 9)
        batch = (ids, torch.tensor([0, 6], dtype=torch.int32), 6)
        logits, scores = model(*batch)
        for head, want in (("lm", logits), ("score", scores)):
            checkpoint.save(model, tmp_path / f"{head}{tied}", head=head)
            assert torch.allclose(
                checkpoint.load(tmp_path / f"{head}{tied}")(*batch), want, atol=1e-6
            )


# ---- recipes ----

BEAVER = {  # scripts/*.sh of Safe-RLHF, and the constants in its code
    "sft": dict(
        max_len=512,
        epochs=3.0,
        batch_size=256,
        learning_rate=2e-5,
        lr_schedule="cosine",
        warmup_ratio=0.03,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.95,
        grad_clip=1.0,
        seed=42,
    ),
    "reward": dict(
        objective="reward",
        max_len=512,
        epochs=2.0,
        batch_size=128,
        learning_rate=2e-5,
        lr_schedule="cosine",
        warmup_ratio=0.03,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        grad_clip=1.0,
        regularization=0.001,
        normalizer="ema",
        normalizer_momentum=0.9,
        seed=42,
        token_wise=False,
    ),
    "ppo_lag": dict(
        max_len=512,
        max_new_tokens=512,
        rollout_size=128,
        num_samples=1,
        temperature=1.0,
        top_p=1.0,
        epochs=1.0,
        ppo_epochs=1,
        batch_size=128,
        actor_learning_rate=1e-5,
        actor_lr_schedule="cosine",
        actor_warmup_ratio=0.03,
        actor_weight_decay=0.01,
        critic_learning_rate=5e-6,
        critic_lr_schedule="constant",
        critic_warmup_ratio=0.0,
        critic_weight_decay=0.0,
        beta1=0.9,
        beta2=0.95,
        grad_clip=1.0,
        kl_coef=0.01,
        clip_ratio=0.2,
        clip_score=50.0,
        clip_value=5.0,
        gamma=1.0,
        gae_lambda=0.95,
        ptx_coef=16.0,
        cost_limit=0.0,
        lambda_init=1.0,
        lambda_lr=0.1,
        lambda_max=5.0,
        lambda_delay=0,
        cost_window=1024,
        seed=42,
    ),
}
BEAVER["reward cost"] = {**BEAVER["reward"], "objective": "cost"}
BEAVER["ppo_lag ppo"] = {**BEAVER["ppo_lag"], "kl_coef": 0.02, "cost_model": ""}
BEAVER["ppo_lag shaping"] = {
    **BEAVER["ppo_lag"],
    "kl_coef": 0.02,
    "lambda_lr": 0.0,
    "cost_model": "out/beaver_7b/cost/model",
}


def resolved(*recipes):
    """The knobs of the recipes' script, with these in turn."""
    config = knobs_of(script_of(recipes[0]))
    for recipe in recipes:
        config.update(configurator.run_file(os.path.join(ROOT, recipe)))
    return config


@pytest.mark.parametrize("names", BEAVER)
def test_safe_rlhf_s_recipes_have_its_values(names):
    config = resolved(*(f"config/beaver_7b/{name}.py" for name in names.split()))
    assert {name: config[name] for name in BEAVER[names]} == BEAVER[names]


PUBLISHED = {  # other_methods: lr, batch, steps of PHF's methods
    ("toxicity", "mle"): (5e-4, 64, 50354),
    ("toxicity", "awr"): (1e-3, 1024, 3147),
    ("toxicity", "rwr"): (5e-4, 1024, 3147),
    ("pii", "awr"): (5e-4, 64, 50354),
    ("pii", "rwr"): (5e-4, 64, 50354),
    ("pii", "unlikelihood"): (5e-4, 64, 50354),
    ("pep8", "mle"): (8e-4, 64, 50354),
    ("pep8", "awr"): (1e-3, 256, 12588),
    ("pep8", "rwr"): (1e-3, 64, 50354),
    ("pep8", "conditional"): (8e-4, 64, 50354),
}


@pytest.mark.parametrize("task, method", PUBLISHED)
def test_phf_s_recipes_have_its_values(task, method):
    c = resolved(f"config/phf/{task}/pretrain.py", f"config/phf/{task}/{method}.py")
    assert (c["learning_rate"], c["batch_size"], c["max_steps"]) == PUBLISHED[task, method]
    assert (
        c["objective"] == method
        and c["documents"]
        and c["weight_decay"] == 0.1
        and c["warmup_ratio"] == 0.01
        and c["max_len"] == 1024
    )
    assert abs(c["batch_size"] * c["max_len"] * c["max_steps"] - 3.3e9) < 2e6 * c["batch_size"] / 64


def test_every_task_of_phf_has_every_method():
    thresholds = {
        "toxicity": (0.00078, 0.00056, 0.00078),
        "pii": (0.000286, 0.0, 0.0),
        "pep8": (0.002361, 0.0, 0.0),
    }
    for task, values in thresholds.items():
        for method, value in zip(("filter", "conditional", "unlikelihood"), values):
            assert resolved(f"config/phf/{task}/{method}.py")["score_threshold"] == value
        assert resolved(f"config/phf/{task}/finetune.py")["init_from"] == f"out/phf/{task}/model"


def test_ppo_max_and_their_script_are_two_things():
    paper = resolved("config/hh/task.py", "config/moss/ppo_max.py")
    script = resolved("config/hh/task.py", "config/moss/ppo_max.py", "config/moss/script.py")
    names = (
        "kl_coef",
        "reward_scaling",
        "clip_value",
        "gae_lambda",
        "critic_warmup",
        "actor_learning_rate",
        "critic_learning_rate",
    )
    assert [paper[n] for n in names] == [0.05, "mean_std", 0.2, 0.9, 2, 5e-7, 1.65e-6]
    assert [script[n] for n in names] == [0.01, "std", 0.2, 0.95, 0, 5e-7, 1.5e-6]
