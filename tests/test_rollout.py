"""Sampling: greedy is the argmax, only seed and uid matter, filters, ends, uniform numbers."""

import json

import numpy as np
import pytest
import torch
from conftest import run, small_config
from torch import tensor

from nanosafe.checkpoint import init_from_scratch
from nanosafe.data.batching import collate
from nanosafe.rollout import (
    as_signed,
    filter_probs,
    generate,
    hash64,
    inverse_cdf,
    sample_tokens,
    uniforms,
)

PROMPTS = [[1, 5, 9], [1], [1, *range(3, 40)], [1, 7], [1, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8]]


def make_model():
    """A random policy that is sharper than a fresh one, so that no two tokens nearly tie."""
    net = init_from_scratch(small_config(), seed=4)
    with torch.no_grad():
        net.lm_head.weight.mul_(10)
    return net


@pytest.fixture(scope="module")
def model():
    return make_model()


# ---- responses ----


def test_greedy_equals_the_argmax_of_the_full_forward(model):
    responses = generate(model, PROMPTS, 25, temperature=0, eos_ids=[2], seed=0)
    for prompt, response in zip(PROMPTS, responses):
        ids = np.array(prompt + response)
        batch = collate([ids], [np.zeros(len(ids))], "cpu")
        likeliest = model.logits(batch).argmax(-1).tolist()
        # Position t predicts token t + 1, and the last position predicts none of them.
        assert likeliest[len(prompt) - 1 : -1] == response


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 1.7}])
def test_slots_order_and_ranks_change_no_response(model, options):
    prompts = PROMPTS * 2
    uids = [(i, 0) for i in range(12)]
    eos_ids = list(range(2, 20))  # so many that responses end at all lengths

    def sample(prompts, uids, slots=0):
        return generate(
            model, prompts, 30, eos_ids=eos_ids, seed=7, uids=uids, slots=slots, **options
        )

    expected = sample(prompts, uids)
    lengths = {len(response) for response in expected}
    assert len(lengths) > 3
    for slots in (1, 3, 5):
        assert sample(prompts, uids, slots) == expected
    assert sample(prompts[::-1], uids[::-1], slots=4) == expected[::-1]
    first_of_two_ranks = slice(0, None, 2)
    assert sample(prompts[first_of_two_ranks], uids[first_of_two_ranks]) == expected[::2]
    for prompt, uid, response in zip(prompts, uids, expected):
        assert sample([prompt], [uid]) == [response]


def test_seed_and_uid_change_the_response(model):
    prompts = [[1, 5]] * 8
    other_uids = [(0, j) for j in range(8)]
    responses = generate(model, prompts, 20, eos_ids=[2], seed=0)
    with_other_seed = generate(model, prompts, 20, eos_ids=[2], seed=1)
    with_other_uids = generate(model, prompts, 20, eos_ids=[2], seed=0, uids=other_uids)
    assert responses != with_other_seed
    assert responses != with_other_uids
    distinct = {tuple(response) for response in responses}
    assert len(distinct) > 4


def test_responses_end_with_an_eos_or_at_their_limit(model):
    limits = [1, 4, 9, 9, 2, 3]
    responses = generate(model, PROMPTS, limits, eos_ids=[4, 8], seed=1)
    for response, limit in zip(responses, limits):
        assert len(response) == limit or response[-1] in (4, 8)
        assert not set(response[:-1]) & {4, 8}


def test_every_token_and_every_end_is_reported(model):
    reported = [[] for _ in PROMPTS]
    ends = []

    def on_token(i, token):
        reported[i].append(token)

    def on_finish():
        ends.append(1)

    limits = [1, 4, 9, 9, 2, 3]
    callbacks = {"on_token": on_token, "on_finish": on_finish}
    responses = generate(model, PROMPTS, limits, eos_ids=[4, 8], seed=1, **callbacks)
    assert reported == responses
    assert len(ends) == 6


def test_no_prompts_give_no_responses(model):
    assert generate(model, [], 5, eos_ids=[2], seed=0) == []


# ---- log-probabilities of what was drawn ----


def trainer_logps(net, prompt, response, temperature):
    """Log-probabilities of a response's tokens as a training forward computes them."""
    ids = np.array(prompt + response)
    mask = np.arange(len(ids)) >= len(prompt)
    logps = net.log_probs(collate([ids], [mask], "cpu"), temperature)
    return logps[len(prompt) - 1 : len(ids) - 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"banned": list(range(3, 60))},
    ],
)
def test_log_probabilities_of_samples_are_those_of_the_trainer(options, model):
    """They are of the whole distribution, whatever top_k, top_p and banned leave out of it."""
    expected = generate(model, PROMPTS, 25, eos_ids=[2], seed=3, **options)
    samples = generate(model, PROMPTS, 25, eos_ids=[2], seed=3, with_logps=True, **options)
    assert samples.responses == expected
    temperature = options.get("temperature", 1.0) or 1.0
    for prompt, response, logps in zip(PROMPTS, samples.responses, samples.logps):
        ours = trainer_logps(model, prompt, response, temperature)
        assert len(logps) == len(response)
        assert (tensor(logps) - ours).abs().max() < 1e-4


def test_log_probabilities_stay_finite_where_what_is_banned_is_far_likelier():
    logits = tensor([[0.0, 500.0, 1.0]])
    drawn = sample_tokens(logits, tensor([0.5]).double(), 1.0, 0, 1.0, tensor([1]), with_logps=True)
    assert drawn.tokens.tolist() == [2]
    assert drawn.logps.tolist() == [-499.0]


def test_no_prompts_give_no_log_probabilities(model):
    assert generate(model, [], 5, eos_ids=[2], seed=0, with_logps=True) == ([], [])


# ---- whole rollouts ----


def test_a_prompt_twice_in_a_rollout_gets_two_different_responses(trainers, tmp_path):
    """The rollout is larger than the data. The first occurrence gets what it gets in a rollout that
    holds each prompt once."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input": "How do I fix the lamp?"}\n')

    def roll_out(name, rollout_size):
        """The (prompt, response) pairs of one rollout, which samples each of its prompts twice."""
        run(
            *trainers["ppo"],
            f"--prompts={prompts}",
            f"--rollout_size={rollout_size}",
            f"--batch_size={2 * rollout_size}",
            "--num_samples=2",
            "--max_steps=1",
            f"--out_dir={tmp_path}/{name}",
        )
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [(row["prompt"], row["response"]) for row in rows]

    twice = roll_out("twice", 2)
    assert len({prompt for prompt, _ in twice}) == 1
    assert len(set(twice)) == 4
    assert roll_out("once", 1) == twice[:2]


# ---- a model whose logits are not finite ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.7}])
def test_logits_that_are_not_finite_stop_sampling_with_one_line(value, options):
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight[50] = value
    with pytest.raises(SystemExit, match="'p' gives logits that are not finite") as end:
        generate(broken, PROMPTS, 9, eos_ids=[2], seed=0, slots=3, name="'p'", **options)
    assert "\n" not in end.value.code


def test_logits_that_become_nan_while_decoding_stop_sampling():
    broken = make_model()
    with torch.no_grad():
        broken.embed_tokens.weight[60:] = torch.nan  # no prompt has such a token
    with pytest.raises(SystemExit, match="logits that are not finite"):
        generate(broken, PROMPTS, 200, eos_ids=[2], seed=0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_banned_tokens_are_no_fault(temperature, model):
    banned = list(range(3, 90))
    options = {"temperature": temperature, "banned": banned}
    responses = generate(model, PROMPTS, 25, eos_ids=[2], seed=0, **options)
    for response in responses:
        assert not set(response) & set(banned)


# ---- from probabilities to tokens ----


def test_tokens_are_drawn_with_their_probabilities():
    probs = tensor([0.1, 0.0, 0.4, 0.3, 0.0, 0.2, 0.0]).repeat(40)
    probs = probs / probs.sum()
    n = 40000
    u = (torch.arange(n).double() + 0.5) / n  # evenly spaced, so the shares are nearly exact
    tokens = inverse_cdf(probs.expand(n, -1), u)
    shares = torch.bincount(tokens, minlength=280) / n
    assert (shares - probs).abs().max() < 2e-3
    assert (shares[probs == 0] == 0).all()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_probability_is_never_drawn(u):
    """Also where u is the least or the greatest number of [0, 1)."""
    probs = torch.zeros(2, 300)
    probs[0, 7] = 1.0
    probs[1, 299] = 1.0
    tokens = inverse_cdf(probs, tensor([u, u], dtype=torch.float64))
    assert tokens.tolist() == [7, 299]


DESCENDING = tensor([[0.4, 0.3, 0.2, 0.1]])


def test_top_k_keeps_the_k_likeliest():
    filtered = filter_probs(DESCENDING, 2, 1.0)
    assert torch.allclose(filtered, tensor([[4 / 7, 3 / 7, 0, 0]]))


def test_top_p_keeps_the_fewest_that_hold_p_and_at_least_one():
    kept = filter_probs(DESCENDING, 0, 0.6) > 0
    assert kept.tolist() == [[True, True, False, False]]
    kept = filter_probs(DESCENDING, 0, 1e-9) > 0
    assert kept.tolist() == [[True, False, False, False]]


def test_top_k_0_and_top_p_1_keep_everything():
    assert torch.equal(filter_probs(DESCENDING, 0, 1.0), DESCENDING)


# ---- uniform numbers ----


@pytest.fixture(scope="module")
def draws():
    """Uniform numbers (100, 500): a hundred draws of five hundred keys."""
    keys = tensor([as_signed(hash64(3, i)) for i in range(500)])
    rows = []
    for t in range(100):
        rows.append(uniforms(keys, torch.full((500,), t)))
    return torch.stack(rows)


def test_uniform_numbers_are_uniform(draws):
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5e-3
    assert abs(draws.var() - 1 / 12) < 2e-3


def test_uniform_numbers_are_independent(draws):
    assert torch.corrcoef(draws[:2])[0, 1].abs() < 0.15
    assert len(draws.unique()) == 50000


@pytest.mark.parametrize("i", [0, 17])
def test_uniform_numbers_equal_splitmix64_of_unsigned_integers(i, draws):
    mask = 2**64 - 1
    h = (hash64(3, i) + 5 * 0x9E3779B97F4A7C15) & mask
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
    h = h ^ (h >> 31)
    assert draws[4, i].item() == (h >> 11) * 2.0**-53


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("slots", [4, 0])
def test_cuda_graphs_sample_what_the_cpu_samples(slots, model):
    on_gpu = make_model().cuda()
    expected = generate(model, PROMPTS, 25, eos_ids=[2, 3, 4], seed=5)
    responses = generate(on_gpu, PROMPTS, 25, eos_ids=[2, 3, 4], seed=5, slots=slots)
    assert responses == expected
