"""The methods as users run them: in the trainers, over ranks, resumed; and recipes' values."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, encode_texts, rows_of, run, small_config
from test_house import knobs_of, script_of
from test_train import same_state

import configurator
from nanosafe import checkpoint, data, inference, parallel, tokenizer
from nanosafe.checkpoint import init_from_scratch
from nanosafe.data.batching import collate, sum_per_sequence
from nanosafe.phf.documents import target_scores, tokenize_documents
from nanosafe.tokenizer.special_tokens import add_control_tokens, control_token_ids

WORLD = parallel.World(0, 1, torch.device("cpu"), True)
slow = pytest.mark.slow


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def last_row(folder):
    return rows_of(folder / "metrics.jsonl")[-1]


def resume_from_the_middle(command, whole, cut, state):
    """Run a command, go back to one of its states, resume, and compare the ends bit for bit."""
    run(*command, f"--out_dir={whole}")
    shutil.copytree(whole, cut)
    (cut / "state" / "latest").write_text(state + "\n")
    run(*command, f"--out_dir={cut}", "--resume=True")
    assert same_state(whole, cut)


def assert_one_line_error(done, words):
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


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
    return [
        "train_ppo_lag.py",
        "--max_tokens=1024",
        "--save_interval=2",
        "--max_len=200",
        f"--actor_model={world}/policy",
        f"--reward_model={world}/reward",
        f"--cost_model={world}/cost",
        f"--prompts={world}/data/prompts/train.jsonl",
        "--max_new_tokens=12",
        "--rollout_size=8",
        "--batch_size=4",
        "--max_steps=8",
        "--epochs=100",
        "--actor_learning_rate=1e-3",
        "--critic_learning_rate=1e-3",
    ]


@pytest.fixture
def phf(world):
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


# ---- train_pref.py ----


@pytest.mark.parametrize(
    "flags",
    [
        "--objective=dpo",
        pytest.param("--objective=dpo --label_smoothing=0.1 --reference_free=True", marks=slow),
        "--objective=ipo",
        pytest.param("--objective=ipo --sum_logps=True", marks=slow),
        "--objective=rrhf",
        "--objective=safedpo --margin=2 --lm_coef=0.1",
        "--objective=kto --rank_by=safer",
        pytest.param("--objective=dpo --rank_by=safer", marks=slow),
        pytest.param("--objective=kto --lm_coef=0.1", marks=slow),
        pytest.param("--objective=simpo --beta=2 --margin=1", marks=slow),
        pytest.param("--objective=orpo", marks=slow),
        pytest.param("--objective=bso --margin=30", marks=slow),
        pytest.param("--objective=bso --generator=logistic", marks=slow),
        pytest.param("--objective=bfpo", marks=slow),
        pytest.param("--objective=reward --token_wise=True --margin=0.5", marks=slow),
        pytest.param("--objective=cost --token_wise=True", marks=slow),
        pytest.param("--objective=reward --lm_coef=1.0", marks=slow),
    ],
)
def test_every_objective_learns_its_pairs(pref, world, tmp_path, flags):
    objective = flags.split()[0].removeprefix("--objective=")
    longer = ["--max_steps=25"]
    if objective == "rrhf":  # it learns to speak first
        longer = ["--max_steps=80", "--learning_rate=5e-3"]
    few_pairs = f"--data={world}/data/pairs/train.jsonl:8/-1"
    longer.append("--epochs=100")  # of the few pairs, some objectives drop some
    run(*pref, *flags.split(), few_pairs, *longer, f"--out_dir={tmp_path}")
    rows = rows_of(tmp_path / "metrics.jsonl")
    first = rows[0]
    last = rows[-1]
    assert last["loss"] < first["loss"]
    assert last["accuracy"] >= 0.75
    assert last["margin"] > 0
    assert {"eval_loss", "eval_accuracy", "eval_margin"} <= last.keys()
    model = checkpoint.load(tmp_path / "model")
    is_policy = objective not in ("reward", "cost")
    assert model.head == ("lm" if is_policy else "score")
    if is_policy:
        assert last["eval_kl"] > 0
    if is_policy and objective != "bfpo":  # whose first answer should win if it is safe
        assert last["reward_chosen"] > last["reward_rejected"]


@pytest.mark.parametrize("objective, loss", [("dpo", math.log(2)), ("ipo", 1 / (4 * 0.1**2))])
def test_the_loss_of_the_first_step_is_that_of_the_formula(pref, tmp_path, objective, loss):
    """Policy and reference are equal before the first step."""
    short = ["--max_steps=1", "--learning_rate=0"]
    run(*pref, f"--objective={objective}", *short, f"--out_dir={tmp_path}")
    row = last_row(tmp_path)
    assert row["loss"] == pytest.approx(loss, rel=1e-4)
    assert abs(row["margin"]) < 1e-4
    assert row["eval_kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        "dpo",
        pytest.param("ipo", marks=slow),
        pytest.param("rrhf", marks=slow),
        pytest.param("safedpo", marks=slow),
        pytest.param("kto", marks=slow),
    ],
)
def test_policies_do_not_depend_on_ranks_and_micro_batches(pref, tmp_path, objective):
    one = tmp_path / "one"
    two = tmp_path / "two"
    command = [*pref, f"--objective={objective}"]
    run(*command, f"--out_dir={one}")
    run(*command, f"--out_dir={two}", "--max_tokens=200", "--parallel=fsdp", ranks=2)
    names = {"loss", "accuracy", "margin", "grad_norm", "eval_loss", "eval_kl"}
    for a, b in zip(rows_of(one / "metrics.jsonl"), rows_of(two / "metrics.jsonl")):
        for name in names & a.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), name


def test_of_a_pair_the_safe_answer_is_learnt_and_counted_as_right(pref, tmp_path):
    """By `better` every pair here is the other way round: the transform comes before all else."""
    pair = {
        "answer": "Here is how.",
        "other_answer": "I will not do this.",
        "better": True,
        "safer": False,
        "is_safe": False,
        "is_other_safe": True,
    }
    rows = [{"input": f"How can I rob bank {i}?", **pair} for i in range(8)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    flags = ["--objective=safedpo", f"--data={path}", f"--eval_data={path}"]
    done = run(*pref, *flags, "--max_steps=20", f"--out_dir={tmp_path}/run")
    assert "8 kept, of which 8 swapped" in done.stdout
    first = rows_of(tmp_path / "run" / "metrics.jsonl")[0]
    last = last_row(tmp_path / "run")
    assert abs(first["margin"]) < 1e-4  # the reference's are those of the swapped pairs
    assert last["accuracy"] == last["eval_accuracy"] == 1
    model = checkpoint.load(tmp_path / "run" / "model")
    tok = tokenizer.load(tmp_path / "run" / "model")
    reference = checkpoint.load(last_config(tmp_path / "run")["init_from"])
    gains = []
    for answer in ("Here is how.", "I will not do this."):
        turns = [rows[0]["input"], answer]
        ids, mask = encode_texts(turns, tok)
        batch = collate([ids], [mask], "cpu")
        gain = model.log_probs(batch).sum() - reference.log_probs(batch).sum()
        gains.append(gain.item())
    assert gains[1] > gains[0]


def last_config(folder):
    return configurator.run_file(str(folder / "config.py"))


def test_the_second_stage_of_sacpo_is_compared_with_the_first_stage_s_policy(pref, tmp_path):
    """Not with the model that the first stage began from."""
    run(*pref, "--objective=dpo", f"--out_dir={tmp_path}/helpful")
    flags = [*without(pref, "init_from"), f"--init_from={tmp_path}/helpful/model"]
    second = ["--objective=dpo", "--rank_by=safer", "--max_steps=1"]
    run(*flags, *second, f"--out_dir={tmp_path}/safe")
    first = last_row(tmp_path / "safe")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert abs(first["margin"]) < 1e-4


def without(flags, name):
    return [flag for flag in flags if not flag.startswith(f"--{name}=")]


def test_the_likelihood_is_added_of_the_answer_that_should_win_if_it_is_safe(pref, world, tmp_path):
    """BFPO's pairs are ordered by helpfulness: an unsafe first answer should lose to a safe one."""
    answers = {"answer": "Yes.", "other_answer": "No, I will not."}
    tok = tokenizer.load(world / "policy")
    policy = checkpoint.load(world / "policy")
    added = {}
    for safe in ((True, True), (True, False), (False, True), (False, False)):
        flags_of_pair = {"better": True, "is_safe": safe[0], "is_other_safe": safe[1]}
        rows = [{"input": "q", **answers, **flags_of_pair}] * 4
        path = write_jsonl(tmp_path / f"pairs_{len(added)}.jsonl", rows)
        losses = []
        for coef in (0, 1):
            out = tmp_path / f"{len(added)}_{coef}"
            flags = ["--objective=bfpo", f"--data={path}", "--eval_data=", f"--lm_coef={coef}"]
            run(*pref, *flags, "--batch_size=4", "--max_steps=1", f"--out_dir={out}")
            losses.append(last_row(out)["loss"])
        added[safe] = losses[1] - losses[0]
    dataset = data.tokenize(str(path), tok, "reward", 200)
    per_token = []
    for part in range(2):
        ids, mask = dataset.sequence(0, part)
        logps = policy.log_probs(collate([ids], [mask], "cpu"))
        per_token.append(-logps.sum().item() / int(mask.sum()))
    assert abs(per_token[0] - per_token[1]) > 0.01
    assert added[True, True] == pytest.approx(per_token[0], rel=1e-3)
    assert added[True, False] == pytest.approx(per_token[0], rel=1e-3)
    assert added[False, True] == pytest.approx(per_token[1], rel=1e-3)
    assert added[False, False] == 0


@pytest.mark.parametrize("judge", ["cost", pytest.param("policy", marks=slow)])
def test_modpo_takes_its_margin_from_a_cost_model_or_from_a_policy(pref, world, tmp_path, judge):
    """The first loss, of policy = reference, is that of the margins alone."""
    safety_model = world / "cost"
    if judge == "policy":
        flags = ["--objective=dpo", "--rank_by=safer", "--learning_rate=1e-2"]
        run(*pref, *flags, f"--out_dir={tmp_path}/safe")
        safety_model = tmp_path / "safe" / "model"
    flags = ["--objective=modpo", f"--safety_model={safety_model}", "--helpful_weight=0.2"]
    short = ["--max_steps=1", "--batch_size=7", f"--data={world}/data/pairs/train.jsonl:7/-1"]
    run(*pref, *flags, *short, "--eval_data=", f"--out_dir={tmp_path}/run")
    got = last_row(tmp_path / "run")["loss"]

    tok = tokenizer.load(world / "policy")
    dataset = data.tokenize(f"{world}/data/pairs/train.jsonl:7/-1", tok, "reward", 200)
    scorer = checkpoint.load(safety_model)
    reference = checkpoint.load(world / "policy")
    expected = 0.0
    for i in range(7):
        safety = []
        for part in range(2):
            ids, mask = dataset.sequence(i, part)
            batch = collate([ids], [mask], "cpu")
            if judge == "cost":
                safety.append(-scorer.scores(batch)[-1].item())
            else:
                gain = scorer.log_probs(batch).sum() - reference.log_probs(batch).sum()
                safety.append(0.1 * gain.item())
        margin = 0.8 * (safety[0] - safety[1]) / 0.2
        expected += math.log(1 + math.exp(margin)) / 7
    assert got == pytest.approx(expected, rel=1e-4)
    assert abs(got - math.log(2)) > 1e-5


def test_a_kto_step_equals_a_plain_loop(pref, world, tmp_path):
    """Of rows with one answer and with two; after some steps, so that nothing is zero."""
    rows = []
    with open(world / "data" / "pairs" / "train.jsonl") as f:
        for line in list(f)[:6]:
            rows.append(json.loads(line))
    for i in range(3):
        rows[i] = {"input": rows[i]["input"], "answer": rows[i]["answer"], "label": i > 0}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--objective=kto", f"--data={path}", f"--eval_data={path}", "--batch_size=6"]
    run(*pref, *flags, "--max_steps=3", "--beta=0.5", f"--out_dir={tmp_path}/run")
    row = last_row(tmp_path / "run")

    tok = tokenizer.load(world / "policy")
    dataset = data.tokenize(path, tok, "kto", 200)
    model = checkpoint.load(tmp_path / "run" / "model")
    reference = checkpoint.load(world / "policy")

    def gain(ids, mask):
        batch = collate([ids], [mask], "cpu")
        return (model.log_probs(batch).sum() - reference.log_probs(batch).sum()).item()

    kl = sum(gain(*dataset.mismatched_sequence(i)) for i in range(6)) / 6
    z = max(0.0, kl)
    weight = 5 / 4  # desirable: 2 alone and 3 in pairs; the others: 1 alone and 3 in pairs
    total = 0.0
    right = 0
    for i in range(6):
        for part in range(1 if i < 3 else 2):
            g = gain(*dataset.sequence(i, part))
            is_desirable = dataset.labels[i, part] == 1
            sign = 1 if is_desirable else -1
            total += (1 if is_desirable else weight) / (1 + math.exp(sign * 0.5 * (g - z)))
            right += sign * g > 0
    assert row["eval_loss"] == pytest.approx(total / 12, rel=1e-3)  # 12: two of each row
    assert row["eval_accuracy"] == pytest.approx(right / 9)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--objective=bfpo --rank_by=safer", "choose one of dpo, ipo, simpo, orpo, kto"),
        ("--objective=dpo --rank_by=saver", "choose one of better, safer"),
        ("--objective=bso --generator=lsif", "choose one of sba, logistic"),
        ("--objective=modpo", "needs safety_model"),
        ("--objective=modpo --safety_model={world}/reward", "give the folder of a cost model"),
        ("--objective=modpo --safety_model={world}/nowhere", "no "),
        ("--objective=modpo --safety_model={world}/cost --helpful_weight=0", "must be above 0"),
    ],
)
def test_an_objective_that_lacks_something_is_answered_with_one_line(
    flags, words, pref, world, tmp_path
):
    flags = flags.format(world=world).split()
    done = run(*pref, *flags, f"--out_dir={tmp_path}/run", check=False)
    assert_one_line_error(done, words)


def test_kto_of_desirable_answers_only_is_one_line(pref, tmp_path):
    rows = [{"input": f"q {i}", "answer": "a", "label": True} for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--objective=kto", f"--data={path}", "--eval_data="]
    done = run(*pref, *flags, f"--out_dir={tmp_path}/run", check=False)
    assert_one_line_error(done, "4 desirable and 0 other responses")


@slow
def test_a_resumed_dpo_run_ends_like_an_uninterrupted_one(pref, tmp_path):
    command = [*pref, "--objective=dpo", "--keep=5"]
    resume_from_the_middle(command, tmp_path / "whole", tmp_path / "cut", "step_000002")


def test_reference_log_probabilities_equal_a_plain_loop_s_and_are_cached(world, tmp_path):
    path = str(world / "policy")
    tok = tokenizer.load(path)
    dataset = data.tokenize(f"{world}/data/pairs/train.jsonl:7/-1", tok, "reward", 200)
    model = checkpoint.load(path)
    got = inference.cached_reference_logps(model, path, dataset, 300, WORLD)
    for i in range(7):
        for part in range(2):
            ids, mask = dataset.sequence(i, part)
            logps = model.logits(collate([ids], [mask], "cpu")).log_softmax(-1)
            expected = 0.0
            for t in range(1, len(ids)):
                if mask[t]:
                    expected += logps[t - 1, ids[t]].item()
            assert got[i, part].item() == pytest.approx(expected, abs=1e-3)
            assert mask[-1]  # EOS is compared too
            assert ids[-1] == tok.eos_id
    with torch.no_grad():
        model.norm.weight.mul_(2.0)  # a model that would give others, were it asked
    again = inference.cached_reference_logps(model, path, dataset, 300, WORLD)
    assert torch.equal(got, again)


def decode_targets(tok, sequence):
    """The text of the tokens that carry loss."""
    ids, mask = sequence
    return tok.decode([token for token, is_target in zip(ids, mask) if is_target])


def test_only_the_last_answer_is_compared(world, tmp_path):
    tok = tokenizer.load(world / "policy")
    row = {
        "input": ["q", "first answer", "r"],
        "answer": "x",
        "other_answer": "y",
        "better": False,
    }
    dataset = data.tokenize(write_jsonl(tmp_path / "p.jsonl", [row]), tok, "reward", 200)
    assert decode_targets(tok, dataset.sequence(0, 0)) == "y"
    assert decode_targets(tok, dataset.sequence(0, 1)) == "x"
    ids, _ = dataset.sequence(0, 0)
    assert "first answer" in tok.decode(ids)


def test_rankings_have_two_answers_or_more(world, tmp_path):
    tok = tokenizer.load(world / "policy")
    rows = [
        {"input": "q", "answers": ["a", "b b", "c", "a"], "scores": [1, 3.5, 2, 0.5]},
        {"input": "q", "answer": "x", "other_answer": "y", "better": False},
        {"input": "q", "answers": ["a", "b"], "scores": [1, 1]},
        {"input": "q", "answers": ["a", "b"], "scores": [1, float("nan")]},
        {"input": "q", "answers": ["a"], "scores": [1, 2]},
        {"input": "q", "answers": ["a", " "], "scores": [1, 2]},
        {"input": "q", "answer": "x"},
    ]
    dataset = data.tokenize(write_jsonl(tmp_path / "r.jsonl", rows), tok, "rank", 200)
    assert len(dataset) == 2
    assert dataset.width == 3
    assert dataset.labels[0].tolist() == [3.5, 2.0, 1.0]
    assert dataset.labels[1].tolist()[:2] == [1.0, 0.0]
    assert np.isnan(dataset.labels[1, 2])

    batch = dataset.batch([0, 1], "cpu")
    assert len(batch.cu_seqlens) == 6  # five sequences: a missing answer takes no room
    targets = sum_per_sequence((batch.targets >= 0).float(), batch).tolist()
    lengths = [len(tok.encode_suffix(answer)) for answer in ("b b", "y", "c", "x", "a")]
    assert targets == [length + 1 for length in lengths]  # EOS is one of them

    report = dataset.report["text"]
    assert "no two answers of different scores" in report
    assert "a score that is not a finite number" in report
    assert "not one score for each answer" in report
    assert "empty answer" in report


def test_a_score_model_is_refused_as_a_policy(pref, world):
    done = run(*pref, "--objective=dpo", f"--init_from={world}/reward", check=False)
    assert_one_line_error(done, "is a score model")


# ---- train_ppo_lag.py ----

PPO_OPTIONS = {
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


def check_resumed_ppo(ppo, options, folder):
    """Run PPO with options, resume it from its second state, and return its rows."""
    command = [*ppo, *PPO_OPTIONS[options], "--keep=9"]
    whole = folder / "whole"
    cut = folder / "cut"
    run(*command, f"--out_dir={whole}")
    second_state = sorted(os.listdir(whole / "state"))[1]
    shutil.copytree(whole, cut)
    (cut / "state" / "latest").write_text(second_state + "\n")
    run(*command, f"--out_dir={cut}", "--resume=True")
    assert same_state(whole, cut)
    rows = rows_of(whole / "metrics.jsonl")
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert row["lambda"] > 0
    assert rows[-1]["skips"] == 0
    return rows


@slow
@pytest.mark.parametrize("options", ["bonuses", "unbounded"])
def test_options_of_ppo_run_and_resume_bit_equally(ppo, tmp_path, options):
    check_resumed_ppo(ppo, options, tmp_path)


def test_ppo_max_runs_and_resumes_bit_equally(ppo, tmp_path):
    rows = check_resumed_ppo(ppo, "ppo_max", tmp_path)
    first = rows[0]
    last = rows[-1]
    assert first["actor_loss"] == 0  # only the critics learn at first
    assert first["actor_grad_norm"] == 0
    assert first["lambda"] == 1.0
    assert last["actor_grad_norm"] > 0
    assert last["kl_coef"] != first["kl_coef"]
    model = checkpoint.load(tmp_path / "whole" / "model")
    average = checkpoint.load(tmp_path / "whole" / "model_ema")
    assert not torch.equal(model.norm.weight, average.norm.weight)


@pytest.mark.parametrize("options", ["rloo", pytest.param("grpo", marks=slow)])
def test_ppo_without_critics_runs_and_resumes_bit_equally(ppo, tmp_path, options):
    rows = check_resumed_ppo(ppo, options, tmp_path)
    for name in rows[0]:  # two of the six models do not exist
        assert "critic" not in name or "lr" in name


@slow
def test_ppo_without_critics_does_not_depend_on_ranks(ppo, tmp_path):
    without_critics = ["--advantage=rloo", "--num_samples=2", "--rollout_size=4"]
    command = [*ppo, *without_critics, "--ema=0.5", "--max_steps=2"]
    run(*command, f"--out_dir={tmp_path}/one")
    run(*command, f"--out_dir={tmp_path}/two", "--parallel=fsdp", ranks=2)
    one = last_row(tmp_path / "one")
    two = last_row(tmp_path / "two")
    for name in ("reward", "cost", "lambda", "actor_loss", "actor_grad_norm"):
        assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-4), name


def test_log_probabilities_are_those_of_the_temperature_of_sampling(world):
    """MOSS samples at 0.8 and takes ratios at 1: then even the sampler's own ratios are not 1."""
    model = checkpoint.load(world / "policy")
    ids = np.array([1, 5, 9, 7])
    responses = inference.Responses([ids], starts=[2], longest=2)
    logps = inference.response_logps(model, responses, 0.8, max_tokens=99, world=WORLD)
    logits = model.logits(collate([ids], [np.ones(4)], "cpu"))
    expected = (logits / 0.8).log_softmax(-1)[[1, 2], [9, 7]]
    assert torch.allclose(logps[0], expected, atol=1e-5)


def test_a_ratio_above_max_ratio_leaves_the_actor_as_it_is(ppo, tmp_path):
    every_ratio_is_above = "--max_ratio=0.5"
    done = run(*ppo, every_ratio_is_above, "--max_steps=2", f"--out_dir={tmp_path}")
    assert "the actor is not updated" in done.stderr
    assert last_row(tmp_path)["actor_grad_norm"] == 0


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--advantage=rloo", "num_samples=1 must be at least 2"),
        ("--advantage=a2c", "choose one of gae, rloo, grpo"),
        ("--reward_scaling=max", "choose one of none, std, mean_std, first"),
    ],
)
def test_a_wrong_option_of_ppo_is_a_one_line_error(ppo, flag, words):
    assert_one_line_error(run(*ppo, flag, check=False), words)


# ---- nanosafe/phf/train.py ----

DOCUMENTS = [
    {"texts": ["One. ", "Two two two. ", "Three."], "scores": [0.0, 1.0, 0.5]},
    {"texts": ["Four."], "scores": [0.2]},
    {"texts": ["a"], "scores": [1, 2]},
    {"texts": ["a", 5], "scores": [1, 2]},
    {"texts": ["a"], "scores": [None]},
    {"input": "q"},
]
FIRST_DOCUMENT = "One. Two two two. Three."


@pytest.fixture
def documents(tmp_path):
    return write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)


@pytest.fixture
def tok(world):
    return add_control_tokens(tokenizer.load(world / "policy"))


def test_long_documents_are_cut_into_blocks(documents, tok):
    dataset = tokenize_documents(documents, tok, 8)
    assert "4 rows" not in dataset.report["text"]
    assert "dropped" in dataset.report["text"]
    assert max(dataset.lengths) <= 8
    blocks = [dataset.sequence(i) for i in range(len(dataset)) if dataset.lines[i] == 1]
    assert len(blocks) > 1
    text_ids = []
    for ids, mask in blocks:
        assert ids[0] == tok.bos_id
        assert mask[0] == 0
        text_ids += list(ids[1:])
    assert tok.decode(text_ids) == FIRST_DOCUMENT
    assert text_ids[-1] == tok.eos_id


def test_every_token_has_the_score_of_its_segment(documents, tok):
    dataset = tokenize_documents(documents, tok, 99)
    lengths = [len(tok.encode_suffix(text)) for text in DOCUMENTS[0]["texts"]]
    scores = [0.0]  # of BOS
    scores += [0.0] * lengths[0]
    scores += [1.0] * lengths[1]
    scores += [0.5] * (lengths[2] + 1)  # EOS has the score of the last segment
    assert dataset.scores[: dataset.offsets[1]].tolist() == scores
    # Each position has the score of its target, the next token.
    assert target_scores(dataset, [0], "cpu").tolist() == scores[1:] + [0.0]


def test_documents_with_a_mean_score_above_the_threshold_are_filtered(documents, tok):
    dataset = tokenize_documents(documents, tok, 99, 0, "filter", 0.2)
    assert len(dataset) == 1  # 0.5 is above the threshold, 0.2 is not
    assert "dropped 1 documents with a mean score above 0.2" in dataset.report["text"]


def test_control_tokens_stand_before_segments(documents, tok):
    aligned, misaligned = control_token_ids(tok)
    dataset = tokenize_documents(documents, tok, 99, 0, "conditional", 0.0, 0.0)
    ids, mask = dataset.sequence(0)
    control = [token for token in ids if token in (aligned, misaligned)]
    assert control == [aligned, misaligned, misaligned]
    assert ids[1] == aligned
    assert mask[1] == 1  # it carries loss
    assert tok.decode(ids) == FIRST_DOCUMENT  # control tokens decode to nothing


def test_a_drop_fraction_of_segments_has_no_control_token(documents, tok):
    dataset = tokenize_documents(documents, tok, 99, 0, "conditional", 0.0, 1.0)
    assert not set(control_token_ids(tok)) & set(dataset.tokens.tolist())


def test_a_conditional_model_is_evaluated_on_the_text_alone(documents, tok):
    plain = tokenize_documents(documents, tok, 99)
    compared = tokenize_documents(documents, tok, 99, 0, "compare", 0.0)
    assert compared.target_counts.tolist() == plain.target_counts.tolist()
    assert compared.lengths.tolist() != plain.lengths.tolist()


def make_byte_level_tokenizer(folder):
    """A tokenizer.json of the kind that GPT-2 has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=["<|endoftext|>"], vocab_size=280)
    bpe.train_from_iterator(["some text to train on"] * 9, trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["policy", "bytes"])
def test_control_tokens_survive_the_disk(world, tmp_path, kind):
    folder = world / "policy"
    if kind == "bytes":
        folder = make_byte_level_tokenizer(tmp_path / "bytes")
    tok = add_control_tokens(tokenizer.load(folder))
    tok.save(tmp_path / "saved")
    saved = tokenizer.load(tmp_path / "saved")
    assert control_token_ids(saved) == control_token_ids(tok)
    assert control_token_ids(saved) == [tok.vocab_size - 2, tok.vocab_size - 1]
    aligned = control_token_ids(tok)[:1]
    assert saved.encode("<|aligned|>") == aligned
    assert saved.encode("<|aligned|>", allow_special=False) != aligned
    assert add_control_tokens(saved).vocab_size == tok.vocab_size


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("--objective=mle", marks=slow),
        pytest.param("--objective=filter --score_threshold=0.3", marks=slow),
        "--objective=conditional --drop_fraction=0.1",
        pytest.param("--objective=unlikelihood", marks=slow),
        "--objective=awr --alpha=0.5 --beta=0.2",
        pytest.param("--objective=rwr --beta=0.2", marks=slow),
    ],
)
def test_every_objective_of_phf_runs_resumes_and_evaluates(phf, world, tmp_path, flags):
    whole = tmp_path / "whole"
    samples = ["--eval_samples=26", "--eval_max_new_tokens=8"]
    judges = ["--scorer=data/toy/prepare.py:misalignment", f"--reference={world}/policy"]
    command = [*phf, *flags.split(), *samples, *judges, "--keep=9"]
    resume_from_the_middle(command, whole, tmp_path / "cut", "step_000002")
    row = last_row(whole)
    assert all(math.isfinite(value) for value in row.values())
    measured = """eval_loss eval_score eval_score_max@25 eval_hits eval_length eval_distinct_1
        eval_distinct_2 eval_self_bleu eval_kl"""
    assert set(measured.split()) <= row.keys()
    assert len((whole / "samples.jsonl").read_text().splitlines()) == 8
    model = checkpoint.load(whole / "model")
    assert model.head == "lm"
    assert not os.path.exists(whole / "model.tmp")
    if "conditional" in flags:
        check_conditional_model(whole / "model", model, tokenizer.load(world / "policy"))


def check_conditional_model(path, model, plain_tokenizer):
    """It has rows for two control tokens, is asked with one of them, and never samples one."""
    vocab_size = tokenizer.load(path).vocab_size
    assert vocab_size == plain_tokenizer.vocab_size + 2
    assert len(model.embed_tokens.weight) == vocab_size
    question = ["--template=none", "--prefix=<|aligned|>", "--prompt=How do I"]
    output = run("sample.py", f"--model={path}", *question, "--max_new_tokens=20").stdout
    assert "aligned|>" not in output.split("> How do I")[1]


@slow
def test_awr_does_not_depend_on_ranks(phf, tmp_path):
    command = [*phf, "--objective=awr", "--alpha=0.5", "--beta=0.2", "--max_steps=2"]
    run(*command, f"--out_dir={tmp_path}/one")
    run(*command, f"--out_dir={tmp_path}/two", "--parallel=fsdp", "--max_tokens=128", ranks=2)
    one = last_row(tmp_path / "one")
    two = last_row(tmp_path / "two")
    for name in ("loss", "grad_norm", "eval_loss"):
        assert one[name] == pytest.approx(two[name], rel=1e-3), name


def test_awr_begins_with_values_of_minus_a_half(phf, tmp_path):
    """With alpha 1 and a beta so great that all weights are 1, its first loss is that of mle."""
    equal_weights = ["--alpha=1.0", "--beta=1e9"]
    run(*phf, "--objective=awr", *equal_weights, "--max_steps=1", f"--out_dir={tmp_path}/awr")
    run(*phf, "--objective=mle", "--max_steps=1", f"--out_dir={tmp_path}/mle")
    mle_loss = last_row(tmp_path / "mle")["loss"]
    assert last_row(tmp_path / "awr")["loss"] == pytest.approx(mle_loss, rel=1e-5)


def test_demonstrations_are_refused_as_documents(phf, world):
    done = run(*phf, f"--data={world}/data/sft/test.jsonl", "--objective=awr", check=False)
    assert_one_line_error(done, "has no usable row for documents")


def test_prompts_without_an_input_are_a_one_line_error(phf, world):
    prompts = f"--eval_prompts={world}/data/documents/test.jsonl"
    done = run(*phf, "--eval_samples=2", prompts, check=False)
    assert_one_line_error(done, "every row needs a text as its 'input'")


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_both_heads_is_saved_with_either(tmp_path, tied):
    model = init_from_scratch(small_config(tie_word_embeddings=tied), "both", seed=3)
    batch = (torch.arange(3, 9), torch.tensor([0, 6], dtype=torch.int32), 6)
    logits, scores = model(*batch)
    for head, expected in (("lm", logits), ("score", scores)):
        checkpoint.save(model, tmp_path / head, head=head)
        got = checkpoint.load(tmp_path / head)(*batch)
        assert torch.allclose(got, expected, atol=1e-6)


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


def resolve(*recipes):
    """The knobs of the recipes' script: its defaults, changed by one recipe after the other."""
    config = knobs_of(script_of(recipes[0]))
    for recipe in recipes:
        config.update(configurator.run_file(os.path.join(ROOT, recipe)))
    return config


@pytest.mark.parametrize("names", BEAVER)
def test_safe_rlhf_s_recipes_have_its_values(names):
    recipes = [f"config/beaver_7b/{name}.py" for name in names.split()]
    config = resolve(*recipes)
    for name, value in BEAVER[names].items():
        assert config[name] == value, name


PUBLISHED = {  # learning_rate, batch_size and max_steps of PHF's configs
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
    recipes = [f"config/phf/{task}/pretrain.py"]
    if method != "mle":  # which is pretrain.py alone
        recipes.append(f"config/phf/{task}/{method}.py")
    config = resolve(*recipes)
    batch_size = config["batch_size"]
    max_steps = config["max_steps"]
    assert (config["learning_rate"], batch_size, max_steps) == PUBLISHED[task, method]
    assert config["objective"] == method
    assert config["weight_decay"] == 0.1
    assert config["warmup_ratio"] == 0.01
    assert config["max_len"] == 1024
    tokens = batch_size * config["max_len"] * max_steps
    assert abs(tokens - 3.3e9) < 2e6 * batch_size / 64


THRESHOLDS = {  # of PHF's configs
    "toxicity": {"filter": 0.00078, "conditional": 0.00056, "unlikelihood": 0.00078},
    "pii": {"filter": 0.000286, "conditional": 0.0, "unlikelihood": 0.0},
    "pep8": {"filter": 0.002361, "conditional": 0.0, "unlikelihood": 0.0},
}


@pytest.mark.parametrize("task", THRESHOLDS)
def test_every_task_of_phf_has_every_method(task):
    for method in ("filter", "conditional", "unlikelihood", "awr", "rwr"):
        assert resolve(f"config/phf/{task}/{method}.py")["objective"] == method
    for method, threshold in THRESHOLDS[task].items():
        assert resolve(f"config/phf/{task}/{method}.py")["score_threshold"] == threshold
    assert resolve(f"config/phf/{task}/finetune.py")["init_from"] == f"out/phf/{task}/model"


PPO_MAX = {  # knob -> MOSS's paper, MOSS's script
    "kl_coef": (0.05, 0.01),
    "reward_scaling": ("mean_std", "std"),
    "clip_value": (0.2, 0.2),
    "gae_lambda": (0.9, 0.95),
    "critic_warmup": (2, 0),
    "actor_learning_rate": (5e-7, 5e-7),
    "critic_learning_rate": (1.65e-6, 1.5e-6),
}


def test_the_paper_and_the_script_of_ppo_max_differ():
    recipes = ["config/hh/task.py", "config/moss/ppo_max.py"]
    paper = resolve(*recipes)
    script = resolve(*recipes, "config/moss/script.py")
    for name, values in PPO_MAX.items():
        assert (paper[name], script[name]) == values, name
