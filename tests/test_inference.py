"""Log-probabilities, values and scores of responses, against a forward of each alone."""

import json

import numpy as np
import pytest
import torch
from conftest import run, small_config
from torch import tensor

from nanosafe import parallel
from nanosafe.checkpoint import init_from_scratch
from nanosafe.data.batching import IGNORED, collate, last_of_each
from nanosafe.inference import (
    ReferenceSamples,
    Responses,
    last_token_scores,
    response_logps,
    response_values,
    warn_beyond_positions,
)

WORLD = parallel.World(rank=0, size=1, device=torch.device("cpu"), main=True)
PROMPT_LENGTHS = [3, 1, 9, 4, 2, 6]
RESPONSE_LENGTHS = [5, 8, 1, 7, 2, 3]
MAX_TOKENS = [12, 30, 4096]  # five micro-batches, two, and one


@pytest.fixture(scope="module")
def policy():
    return init_from_scratch(small_config(), seed=3)


@pytest.fixture(scope="module")
def score_model():
    return init_from_scratch(small_config(), "score", seed=3)


@pytest.fixture(scope="module")
def responses():
    """Six prompts with responses, of random tokens."""
    generator = np.random.default_rng(0)
    ids = []
    for prompt_length, response_length in zip(PROMPT_LENGTHS, RESPONSE_LENGTHS):
        ids.append(generator.integers(3, 97, prompt_length + response_length))
    return Responses(ids, PROMPT_LENGTHS, longest=max(RESPONSE_LENGTHS))


def batch_of_one(ids):
    """A sequence alone, without padding and without targets."""
    return collate([ids], [np.zeros(len(ids))], "cpu")


# ---- what belongs to which token ----


def test_last_of_each_is_the_value_at_the_last_token_of_each_sequence():
    sequences = [np.arange(4), np.arange(1), np.arange(2)]
    masks = [np.zeros(4), np.zeros(1), np.zeros(2)]
    batch = collate(sequences, masks, "cpu")
    x = tensor([0.0, 1.0, 2.0, 3.0, 10.0, 20.0, 21.0])
    assert last_of_each(x, batch).tolist() == [3.0, 10.0, 21.0]


def test_the_targets_of_packed_responses_are_their_tokens_and_no_others(responses):
    rows = [4, 0, 2]
    batch = responses.pack(rows, "cpu")
    expected = []
    for i in rows:
        ids = responses.ids[i].tolist()
        start = responses.starts[i]
        # Position t predicts token t + 1. The last position predicts none.
        expected += [IGNORED] * (start - 1) + ids[start:] + [IGNORED]
    assert batch.targets.tolist() == expected


def test_packed_responses_are_laid_end_to_end(responses):
    batch = responses.pack([4, 0, 2], "cpu")
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 22]
    assert batch.max_seqlen == 10
    assert torch.equal(batch.tokens[4:12], torch.from_numpy(responses.ids[0]))


def test_unpacked_numbers_stand_before_the_tokens_of_their_response(responses):
    rows = [4, 0, 2]
    batch = responses.pack(rows, "cpu")
    positions = torch.arange(22)
    unpacked = responses.unpack(positions, batch, rows)
    assert unpacked.shape == (3, 8)
    # A response of prompt length p and length r: positions p - 1 .. p + r - 2 of its sequence.
    assert unpacked[0, :2].tolist() == [1, 2]  # p = 2, r = 2
    assert unpacked[1, :5].tolist() == [6, 7, 8, 9, 10]  # p = 3, r = 5, behind 4 tokens
    assert unpacked[2, :1].tolist() == [20]  # p = 9, r = 1, behind 12 tokens


# ---- numbers of all responses ----


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_response_logps_equal_a_forward_of_each_alone(max_tokens, policy, responses):
    """log softmax(logits / temperature) at each token of the response"""
    logps = response_logps(policy, responses, 0.7, max_tokens, WORLD)
    assert logps.shape == (6, 8)
    for i, ids in enumerate(responses.ids):
        logits = policy.logits(batch_of_one(ids)) / 0.7
        all_logps = logits.log_softmax(-1)
        for j in range(RESPONSE_LENGTHS[i]):
            t = responses.starts[i] + j
            assert torch.allclose(logps[i, j], all_logps[t - 1, ids[t]], atol=1e-5)


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_response_values_equal_a_forward_of_each_alone(max_tokens, score_model, responses):
    """The value that belongs to a token is that of the state before it."""
    values = response_values(score_model, responses, max_tokens, WORLD)
    assert values.shape == (6, 8)
    for i, ids in enumerate(responses.ids):
        scores = score_model.scores(batch_of_one(ids))
        start = responses.starts[i]
        expected = scores[start - 1 : -1]
        assert torch.allclose(values[i, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_last_token_scores_equal_a_forward_of_each_alone(max_tokens, score_model, responses):
    scores = last_token_scores(score_model, responses.ids, max_tokens, WORLD)
    assert scores.shape == (6,)
    for i, ids in enumerate(responses.ids):
        expected = score_model.scores(batch_of_one(ids))[-1]
        assert torch.allclose(scores[i], expected, atol=1e-5)


def sum_over_two_ranks(compute, *arguments):
    """What both ranks of a group compute, added up.

    There is no group in this process, so the collective leaves each rank's share as it is."""
    first = compute(*arguments, WORLD._replace(rank=0, size=2))
    second = compute(*arguments, WORLD._replace(rank=1, size=2))
    return first + second


def test_the_log_probs_of_two_ranks_add_up_to_all(policy, responses):
    expected = response_logps(policy, responses, 1.0, 30, WORLD)
    logps = sum_over_two_ranks(response_logps, policy, responses, 1.0, 30)
    assert torch.allclose(logps, expected, atol=1e-5)


def test_the_values_of_two_ranks_add_up_to_all(score_model, responses):
    expected = response_values(score_model, responses, 30, WORLD)
    values = sum_over_two_ranks(response_values, score_model, responses, 30)
    assert torch.allclose(values, expected, atol=1e-5)


def test_the_scores_of_two_ranks_add_up_to_all(score_model, responses):
    expected = last_token_scores(score_model, responses.ids, 30, WORLD)
    scores = sum_over_two_ranks(last_token_scores, score_model, responses.ids, 30)
    assert torch.allclose(scores, expected, atol=1e-5)


def test_a_rank_without_work_contributes_zeros(policy, score_model, responses):
    one = Responses(responses.ids[:1], responses.starts[:1], longest=5)
    idle = WORLD._replace(rank=1, size=2)
    assert (response_logps(policy, one, 1.0, 30, idle) == 0).all()
    assert (response_values(score_model, one, 30, idle) == 0).all()
    assert (last_token_scores(score_model, one.ids, 30, idle) == 0).all()


# ---- metrics over micro-batches ----


def test_metric_sums_add_up_over_micro_batches_without_gradients():
    sums = parallel.MetricSums(["loss", "kl"], "cpu")
    loss = tensor(1.5, requires_grad=True)
    sums.add("loss", loss)
    sums.add("loss", loss)
    sums.add("kl", tensor(0.25))
    totals = sums.reduce()
    assert totals == {"loss": 3.0, "kl": 0.25}


def test_a_metric_that_nothing_was_added_to_is_zero():
    sums = parallel.MetricSums(["loss", "kl"], "cpu")
    sums.add("kl", tensor(0.25))
    assert sums.reduce() == {"loss": 0.0, "kl": 0.25}


def test_all_metrics_need_one_collective():
    sums = parallel.MetricSums(["loss", "kl", "ratio"], "cpu")
    before = parallel.collectives.count
    sums.reduce()
    assert parallel.collectives.count == before + 1


def test_an_unknown_metric_is_a_mistake():
    sums = parallel.MetricSums(["loss"], "cpu")
    with pytest.raises(KeyError):
        sums.add("lost", tensor(1.0))


# ---- samples of a reference ----


def test_a_reference_answers_a_prompt_that_stands_twice_in_two_ways(policy):
    prompts = [[1, 5, 9], [1, 7], [1, 5, 9]]
    samples = ReferenceSamples(policy, prompts, WORLD, 4096, 20, eos_ids=[2], seed=0)
    assert samples.responses[0] != samples.responses[2]


# ---- positions ----


def test_texts_beyond_the_positions_of_the_smallest_model_are_said(policy, capsys):
    shorter = init_from_scratch(small_config(max_position_embeddings=64), "score", seed=3)
    models = {"actor": policy, "reward_model": shorter}
    assert not warn_beyond_positions(models, 64, "max_len=64")
    assert capsys.readouterr().err == ""
    assert warn_beyond_positions(models, 65, "max_len=65")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "max_len=65: up to 65 tokens, but reward_model was made for 64" in said


@pytest.mark.parametrize("name", ["sft", "reward", "ppo_lag"])
def test_a_trainer_says_once_that_max_len_is_beyond_the_positions(name, trainers, world, tmp_path):
    flags = ["--max_len=300", "--max_steps=1", f"--out_dir={tmp_path}/run"]
    if name == "sft":
        flags.append(f"--init_from={world}/policy")
    if name == "ppo_lag":
        flags += ["--rollout_size=4", "--ptx_data="]
    done = run(*trainers[name], *flags)
    words = "was made for 256 (max_position_embeddings)"
    assert (done.stdout + done.stderr).count(words) == 1
    assert "max_len=300: up to 300 tokens" in done.stderr


def test_a_model_from_scratch_has_as_many_positions_as_max_len(trainers, tmp_path):
    run(*trainers["sft"], "--max_len=3000", "--max_tokens=3000", f"--out_dir={tmp_path}/run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == 3000
