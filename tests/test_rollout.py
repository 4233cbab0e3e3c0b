"""Sampling: greedy is argmax, nothing but seed and uid matters, filters, ends, uniform numbers."""

import pytest
import torch
from conftest import small_config

from nanosafe import rollout
from nanosafe.rollout import filter_probs, generate, inverse_cdf, uniforms
from nanosafe.checkpoint import init_from_scratch


@pytest.fixture(scope="module")
def model():
    net = init_from_scratch(small_config(), seed=4)
    with torch.no_grad():
        net.lm_head.weight.mul_(10)  # sharper than a fresh model: no near ties
    return net


PROMPTS = [[1, 5, 9], [1], [1, *range(3, 40)], [1, 7], [1, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8]]


def test_greedy_equals_the_argmax_of_the_full_forward(model):
    for prompt, response in zip(
        PROMPTS, generate(model, PROMPTS, 25, temperature=0, eos_ids=[2], seed=0)
    ):
        ids = torch.tensor(prompt + response)
        logits = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == response


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 1.7}])
def test_slots_batch_order_and_ranks_change_nothing(model, options):
    eos = list(range(2, 20))  # ends at all lengths
    ask = lambda prompts, uids, slots=0: generate(
        model, prompts, 30, eos_ids=eos, seed=7, uids=uids, slots=slots, **options
    )
    uids = [(i, 0) for i in range(12)]
    prompts = PROMPTS * 2
    whole = ask(prompts, uids)
    assert len({len(r) for r in whole}) > 3
    for slots in (1, 3, 5):
        assert ask(prompts, uids, slots) == whole
    assert ask(prompts[::-1], uids[::-1], 4) == whole[::-1]
    assert [ask([p], [u])[0] for p, u in zip(prompts, uids)] == whole  # each alone
    assert ask(prompts[0::2], uids[0::2]) == whole[0::2]  # one of two ranks


def test_seed_and_uid_change_the_response(model):
    a, b, c = (
        generate(model, [[1, 5]] * 8, 20, eos_ids=[2], seed=s, uids=u)
        for s, u in ((0, None), (1, None), (0, [(0, j) for j in range(8)]))
    )
    assert a != b and a != c and len(set(map(tuple, a))) > 4


def test_responses_end_with_an_eos_or_at_their_limit(model):
    limits = [1, 4, 9, 9, 2, 3]
    ends, tokens = [], []
    responses = generate(
        model,
        PROMPTS,
        limits,
        eos_ids=[4, 8],
        seed=1,
        on_finish=lambda: ends.append(1),
        on_token=lambda i, token: tokens.append((i, token)),
    )
    for i, (response, limit) in enumerate(zip(responses, limits)):
        assert len(response) == limit or response[-1] in (4, 8)
        assert not set(response[:-1]) & {4, 8}
        assert [token for j, token in tokens if j == i] == response
    assert len(ends) == 6 and generate(model, [], 5, eos_ids=[2], seed=0) == []


def test_tokens_are_drawn_with_their_probabilities():
    probs = torch.tensor([0.1, 0.0, 0.4, 0.3, 0.0, 0.2, 0.0]).repeat(1, 40)
    probs = probs / probs.sum()
    n = 40000
    u = (torch.arange(n).double() + 0.5) / n
    tokens = inverse_cdf(probs.expand(n, -1), u)
    share = torch.bincount(tokens, minlength=280) / n
    assert (share - probs[0]).abs().max() < 2e-3 and (share[probs[0] == 0] == 0).all()


def test_the_edges_of_the_distribution_never_draw_the_impossible():
    probs = torch.zeros(2, 300)
    probs[0, 7] = probs[1, 299] = 1.0
    for u in (0.0, 0.5, 1 - 2**-53):
        assert inverse_cdf(probs, torch.full((2,), u, dtype=torch.float64)).tolist() == [7, 299]


def test_top_k_and_top_p():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert torch.allclose(filter_probs(probs, 2, 1.0), torch.tensor([[4 / 7, 3 / 7, 0, 0]]))
    assert (filter_probs(probs, 0, 0.6) > 0).tolist() == [[True, True, False, False]]
    assert (filter_probs(probs, 0, 1e-9) > 0).tolist() == [[True, False, False, False]]
    assert torch.equal(filter_probs(probs, 0, 1.0), probs)


def test_uniforms_are_uniform_and_equal_the_host_s_hash():
    keys = torch.tensor([rollout.hash64(3, i) for i in range(500)], dtype=torch.uint64).view(
        torch.int64
    )
    u = torch.stack([uniforms(keys, torch.full((500,), t)) for t in range(100)])
    assert (
        0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 5e-3 and abs(u.var() - 1 / 12) < 2e-3
    )
    assert torch.corrcoef(u[:2])[0, 1].abs() < 0.15 and len(u.unique()) == 50000
    mask = 2**64 - 1
    for i in (0, 17):
        h = (rollout.hash64(3, i) + 5 * 0x9E3779B97F4A7C15) & mask
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
        assert u[4, i].item() == ((h ^ (h >> 31)) >> 11) * 2.0**-53


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_equal_the_cpu(model):
    net = init_from_scratch(small_config(), seed=4).cuda()
    with torch.no_grad():
        net.lm_head.weight.mul_(10)
    ask = lambda m, slots: generate(m, PROMPTS, 25, eos_ids=[2, 3, 4], seed=5, slots=slots)
    assert ask(net, 4) == ask(net, 0) == ask(model, 0)
