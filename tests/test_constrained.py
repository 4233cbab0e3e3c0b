"""Multipliers, indicator costs and the dual: golden numbers of the authors' code, plain loops, and
what goes wrong elsewhere.

constrained_golden.json has numbers that authors' functions gave for small inputs, in float64."""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from in_process import run_in_process
from torch import tensor

from nanosafe import losses, rl
from nanosafe.eval import dual
from nanosafe.rl import (
    BoundedMultiplier,
    LagrangeMultiplier,
    OptimisticMultiplier,
    PIDMultiplier,
)
from nanosafe.storage import write_jsonl

with open(os.path.join(ROOT, "tests", "constrained_golden.json")) as f:
    GOLDEN = json.load(f)


def golden_cases(name):
    """Parameters of a test: (inputs, outputs) of each of a function's cases."""
    return [(case["inputs"], case["outputs"]) for case in GOLDEN[name]]


def near(expected):
    return pytest.approx(expected, rel=1e-9, abs=1e-9)


def doubles(values):
    return tensor(values, dtype=torch.float64)


def follow(multiplier, costs, cost_limit):
    """The values of lambda after one update for each of these mean costs."""
    values = []
    for cost in costs:
        multiplier.observe([cost])
        values.append(multiplier.update(cost_limit))
    return values


# ---- multipliers ----


@pytest.mark.parametrize("given, expected", golden_cases("pid"))
def test_the_pid_multiplier_has_the_numbers_of_its_authors(given, expected):
    multiplier = PIDMultiplier(
        given["init"],
        given["ki"],
        0,
        1,
        0,
        given["kp"],
        given["kd"],
        given["p_ema"],
        given["d_ema"],
        given["delay"],
    )
    rows = zip(given["costs"], expected["lambda"], expected["p_i_d"])
    for cost, lambda_, (proportional, integral, rise) in rows:
        multiplier.observe([cost])
        assert multiplier.update(given["cost_limit"]) == near(lambda_)
        assert multiplier.proportional == near(proportional)
        assert multiplier.integral == near(integral)
        if given["kd"]:
            felt = lambda_ - given["kp"] * proportional - integral
            assert felt == near(given["kd"] * rise)


def test_pid_without_gains_of_distance_and_rise_is_plain_ascent_on_lambda():
    for given, expected in golden_cases("optimistic"):
        multiplier = PIDMultiplier(given["init"], given["lr"], 0, 1, 0, 0, 0, 0.9, 0.9, 10)
        assert follow(multiplier, given["costs"], given["cost_limit"]) == near(expected["plain"])


def make_pid(max=0, lr=0.0, kp=0.0, kd=0.0, ema=0.0, lookback=1):
    return PIDMultiplier(1.0, lr, max, 1, 0, kp, kd, ema, ema, lookback)


def test_only_a_rising_cost_adds_to_lambda():
    assert follow(make_pid(kd=1.0), [-5.0, -4.0, -2.0, -3.0], 0.0) == near([1.0, 2.0, 3.0, 1.0])


def test_a_positive_cost_looks_like_a_rise_at_first_and_a_negative_one_like_none():
    """The authors' buffer begins with a 0, which stays in it for `lookback` updates."""
    assert follow(make_pid(kd=1.0, lookback=3), [4.0] * 5, 0.0) == near([5.0] * 3 + [1.0] * 2)
    rising_below_zero = [-5.0, -4.0, -3.0, -2.0, -1.0]
    values = follow(make_pid(kd=1.0, lookback=3), rising_below_zero, 0.0)
    assert values == near([1.0, 1.0, 1.0, 4.0, 4.0])


def test_the_integral_of_pid_does_not_wind_up_beyond_the_greatest_lambda():
    """An integral that went on growing at the cap would need as long to come back."""
    multiplier = make_pid(max=2.0, lr=0.5)
    assert follow(multiplier, [10.0] * 20, 0.0)[-1] == 2.0
    assert follow(multiplier, [-1.0], 0.0) == [1.5]


@pytest.mark.parametrize("given, expected", golden_cases("optimistic"))
def test_the_optimistic_multiplier_has_its_golden_numbers(given, expected):
    multiplier = OptimisticMultiplier(given["init"], given["lr"], 0, 1, 0)
    values = follow(multiplier, given["costs"], given["cost_limit"])
    assert values == near(expected["optimistic"])


def play_bilinear_game(multiplier, is_optimistic):
    """The distance from the saddle point (0, 1) of x (lambda - 1) after 600 steps of both players.

    x, which stands for the policy, descends and is also the cost above its limit."""
    x = 1.0
    last_gradient = 0.0
    for _ in range(600):
        gradient = multiplier.value - 1.0
        multiplier.observe([x])
        multiplier.update(0.0)
        step = 2 * gradient - last_gradient if is_optimistic else gradient
        x -= 0.1 * step
        last_gradient = gradient
    return math.hypot(x, multiplier.value - 1.0)


def test_two_optimistic_players_converge_where_plain_ones_circle():
    plain = PIDMultiplier(1.5, 0.1, 0, 1, 0, 0, 0, 0, 0, 1)  # plain ascent, as shown above
    assert play_bilinear_game(plain, False) > 1.0
    assert play_bilinear_game(OptimisticMultiplier(1.5, 0.1, 0, 1, 0), True) < 0.1


def step_size_of_all(given, costs, shares):
    """By how much the authors' norm clip, over all constraints, shortens each one's step."""
    total = 0.0
    for cost, limit, share in zip(costs, given["cost_limits"], shares):
        total += (share * (1 - share) * (cost - limit)) ** 2
    return min(1.0, given["max_grad_norm"] / (math.sqrt(total) + 1e-6))


@pytest.mark.parametrize("given, expected", golden_cases("bounded"))
def test_bounded_multipliers_have_the_numbers_of_their_authors(given, expected):
    """One multiplier for each constraint. The authors clip the norm over all of them."""
    multipliers = []
    for raw in given["raw"]:
        multipliers.append(BoundedMultiplier(math.exp(raw), given["lr"], 0, 1, 0))
    shares = [m.value / (1 + m.value) for m in multipliers]
    assert shares == near(expected["multipliers"])
    for costs, path in zip(given["mean_costs"], expected["path"]):
        scale = step_size_of_all(given, costs, shares)
        for multiplier, cost, limit in zip(multipliers, costs, given["cost_limits"]):
            multiplier.observe([limit + scale * (cost - limit)])
            multiplier.update(limit)
        shares = [m.value / (1 + m.value) for m in multipliers]
        assert shares == near(path)


def test_a_bounded_multiplier_weighs_reward_and_cost_by_one_minus_s_and_s():
    share = 0.3
    multiplier = BoundedMultiplier(share / (1 - share), 0.1, 0, 1, 0)
    mixed = rl.mix_advantages(tensor([2.0]), tensor([-1.0]), multiplier.value)
    assert mixed.item() == pytest.approx(0.7 * 2.0 - 0.3 * -1.0)


def test_a_bounded_multiplier_comes_back_from_a_long_time_below_the_limit():
    """Without an end l would be at about -10 after these updates, where s does not move."""
    multiplier = BoundedMultiplier(1.0, 1.0, 0, 1, 0)
    follow(multiplier, [-500.0] * 1000, 0.0)
    assert multiplier.logit == -5.0
    assert follow(multiplier, [10.0] * 60, 0.0)[-1] > 1.0


MULTIPLIERS = {
    "lagrange": LagrangeMultiplier,
    "pid": PIDMultiplier,
    "optimistic": OptimisticMultiplier,
    "bounded": BoundedMultiplier,
}


def make(kind, lr=0.1, max=5.0, window=4, delay=0):
    return rl.make_multiplier(kind, 1.0, lr, max, window, delay, 0.1, 0.5, 0.5, 2)


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_a_name_chooses_the_multiplier(kind):
    assert type(make(kind)) is MULTIPLIERS[kind]
    assert make(kind).value == 1.0


@pytest.mark.parametrize("cost, cost_limit, rises", [(1, 0, True), (-1, 0, False)])
@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_every_multiplier_rises_above_the_limit_and_falls_below(kind, cost, cost_limit, rises):
    multiplier = make(kind)
    assert (follow(multiplier, [cost] * 3, cost_limit)[-1] > 1.0) == rises


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_every_multiplier_waits_for_the_delay_and_for_a_finite_cost(kind):
    multiplier = make(kind, delay=1)
    assert follow(multiplier, [3.0], 0.0) == [1.0]
    assert follow(multiplier, [3.0], 0.0)[0] > 1.0
    multiplier = make(kind)
    assert follow(multiplier, [math.nan], 0.0) == [1.0]
    assert math.isnan(multiplier.mean_cost)


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_every_multiplier_stays_between_0_and_its_greatest_value(kind):
    multiplier = make(kind, max=2.0)
    assert follow(multiplier, [9.0] * 99, 0.0)[-1] == pytest.approx(2.0)
    lowest = follow(multiplier, [-9.0] * 99, 0.0)[-1]
    assert 0 <= lowest < 1
    assert follow(multiplier, [9.0] * 99, 0.0)[-1] > lowest


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_the_state_of_every_multiplier_continues_exactly(kind):
    """Through JSON, as a run's state is."""
    original = make(kind, window=3, delay=1)
    follow(original, [0.3, 0.7, -1.5, 2.0], 0.1)
    resumed = make(kind, window=3, delay=1)
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict())))
    costs = [1.5, -0.2, 0.4]
    assert follow(resumed, costs, 0.1) == follow(original, costs, 0.1)
    assert resumed.state_dict() == original.state_dict()


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_the_state_of_every_multiplier_does_not_change_with_later_updates(kind):
    multiplier = make(kind)
    follow(multiplier, [0.5, 0.7], 0.0)
    state = multiplier.state_dict()
    before = json.dumps(state)
    follow(multiplier, [5.0, 9.0], 0.0)
    assert json.dumps(state) == before


def test_an_unknown_multiplier_is_refused():
    with pytest.raises(ValueError, match="adam"):
        make("adam")


# ---- indicator costs ----


@pytest.mark.parametrize("given, expected", golden_cases("indicator"))
def test_indicator_costs_bound_the_share_of_unsafe_answers(given, expected):
    multiplier = LagrangeMultiplier(given["init"], given["lr"], given["max"], given["window"], 0)
    for i, scores in enumerate(given["costs"]):
        costs = rl.constrained_costs(doubles(scores), "unsafe")
        assert costs.tolist() == expected["indicators"][i]
        multiplier.observe(costs)
        assert multiplier.update(given["limit"]) == near(expected["lambda"][i])
        assert multiplier.mean_cost == near(expected["violation_rate_in_window"][i])


def test_scores_are_constrained_as_they_are():
    scores = tensor([1.0, math.nan, -2.0])
    assert rl.constrained_costs(scores, "score") is scores


def test_a_cost_of_nan_is_no_safe_answer():
    """nan > 0 is False, so a cost model that fails would look perfectly safe."""
    costs = rl.constrained_costs(tensor([math.nan, math.inf, 0.0, 1e-9]), "unsafe")
    assert costs[0].isnan()
    assert costs[1:].tolist() == [1.0, 0.0, 1.0]


# ---- several constraints ----


def test_the_mixture_of_one_constraint_is_bit_equal_to_the_equation():
    generator = torch.Generator().manual_seed(0)
    reward, cost = torch.randn(2, 5, 7, generator=generator)
    expected = (reward - 0.3 * cost) / (1 + 0.3)
    assert torch.equal(rl.mix_advantages(reward, cost, 0.3), expected)
    assert torch.equal(rl.mix_advantages(reward, [cost], [0.3]), expected)


def test_several_constraints_each_have_their_own_weight():
    generator = torch.Generator().manual_seed(1)
    reward, first, second = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    mixed = rl.mix_advantages(reward, [first, second], [0.5, 2.0])
    for b in range(2):
        for t in range(3):
            above = reward[b, t] - 0.5 * first[b, t] - 2.0 * second[b, t]
            assert mixed[b, t].item() == near(above.item() / (1 + 0.5 + 2.0))


def test_a_constraint_whose_multiplier_is_0_changes_nothing():
    reward, first, second = doubles([[1.0, -2.0], [0.5, 3.0], [7.0, -9.0]])
    mixed = rl.mix_advantages(reward, [first, second], [0.8, 0.0])
    assert torch.equal(mixed, rl.mix_advantages(reward, first, 0.8))


def test_as_many_multipliers_as_constraints_are_needed():
    ones = torch.ones(2)
    with pytest.raises(ValueError):
        rl.mix_advantages(ones, [ones, ones], [1.0])


@pytest.mark.parametrize("given, expected", golden_cases("bounded"))
def test_the_mixture_of_moskovitz_is_ours_with_other_multipliers(given, expected):
    """Theirs is (N - sum s) A_r - sum s_i A_i: ours, times N, with lambda_i = s_i / (N - sum s)."""
    shares = expected["multipliers"]
    for_the_reward = len(shares) - sum(shares)
    lambdas = [share / for_the_reward for share in shares]
    costs = doubles(given["cost_advantages"]).unbind(1)
    mixed = rl.mix_advantages(doubles(given["reward_advantage"]), costs, lambdas)
    assert (mixed * len(shares)).tolist() == near(expected["mixed"])


# ---- a limit for every answer ----


@pytest.mark.parametrize("given, expected", golden_cases("repo"))
def test_the_excess_of_every_answer_has_its_golden_numbers(given, expected):
    """lambda steps on the mean excess, whose limit is 0: the answers' own is in it already."""
    lambda_ = given["lambda"]
    costs = rl.excess_costs(doubles(given["costs"]), given["cost_limit"])
    assert (costs > 0).tolist() == expected["unsafe"]
    mixed = rl.mix_advantages(doubles(given["rewards"]), costs, lambda_)
    assert (mixed * (1 + lambda_)).tolist() == near(expected["penalised_return"])
    window = len(costs)
    multiplier = PIDMultiplier(lambda_, given["lr"], 0, window, 0, 0, 0, 0, 0, 1)  # plain ascent
    multiplier.observe(costs)
    assert multiplier.update(0.0) == near(expected["lambda_after"])
    assert multiplier.mean_cost == near(expected["mean_violation"])


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_a_multiplier_of_excess_costs_never_falls(kind):
    """Not even where all answers are far below their limit: lambda_max is the only brake."""
    multiplier = make(kind, max=0)
    values = [multiplier.value]
    for costs in ([-9.0, -2.0], [-9.0, 1.0], [-9.0, -9.0]):
        multiplier.observe(rl.excess_costs(tensor(costs), -1.0))
        values.append(multiplier.update(0.0))
    assert values == sorted(values)
    assert values[0] == values[1] < values[2]


def test_an_answer_safer_than_the_limit_makes_up_for_no_other():
    costs = tensor([-100.0, -5.0, 1.0])
    assert costs.mean() < 0
    assert rl.excess_costs(costs, 0.0).mean() > 0
    assert rl.excess_costs(costs, -6.0).tolist() == [0.0, 1.0, 7.0]


def test_an_excess_of_nan_is_no_kept_limit():
    costs = rl.excess_costs(tensor([math.nan, math.inf, -math.inf]), 0.0)
    assert costs[0].isnan()
    assert costs[1:].tolist() == [math.inf, 0.0]


# ---- a bound on the mean cost ----


@pytest.mark.parametrize("given, expected", golden_cases("t_quantiles"))
def test_students_quantiles_are_exact(given, expected):
    assert rl.student_quantile(given["p"], given["df"]) == near(expected["t"])
    assert rl.student_quantile(1 - given["p"], given["df"]) == near(-expected["t"])


@pytest.mark.parametrize("p", [0.5, 0.50000001, 0.9, 0.999, 1 - 1e-9])
def test_students_quantiles_of_1_and_2_degrees_of_freedom_have_closed_forms(p):
    cauchy = math.tan(math.pi * (p - 0.5))
    assert rl.student_quantile(p, 1) == pytest.approx(cauchy, rel=1e-7, abs=1e-12)
    closed = (2 * p - 1) * math.sqrt(2 / (1 - (2 * p - 1) ** 2))
    assert rl.student_quantile(p, 2) == pytest.approx(closed, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("df", [99_999, 1_000_000])
def test_students_quantiles_approach_those_of_the_normal_distribution(df):
    """By Cornish and Fisher's expansion, whose next term is below 1e-9 here."""
    z = 1.2815515655446004  # the normal distribution's 0.9
    expansion = z + (z**3 + z) / (4 * df)
    assert rl.student_quantile(0.9, df) == pytest.approx(expansion, abs=1e-9)


@pytest.mark.parametrize(
    "p, df", [(0.0, 5), (1.0, 5), (-0.1, 5), (math.nan, 5), (0.9, 0), (0.9, -3)]
)
def test_what_has_no_quantile_is_refused(p, df):
    with pytest.raises(ValueError, match="no quantile"):
        rl.student_quantile(p, df)


def golden_factor(given, n):
    """k with the case's own C1 and C2, which nanosafe has as 1."""
    delta, m = given["fail_prob"], given["n_test"]
    of_window = rl.pessimism_factor(delta, n)
    of_test = rl.pessimism_factor(delta, n, m) - of_window
    return given["c1"] * of_window + given["c2"] * of_test


@pytest.mark.parametrize("given, expected", golden_cases("hc"))
def test_the_bound_on_the_cost_has_the_numbers_of_its_authors(given, expected):
    n, mean, variance = rl.batch_moments(given["costs"])
    k = golden_factor(given, n)
    assert k == near(expected["coefficient"])
    assert mean + k * math.sqrt(variance) - given["cost_limit"] == near(
        expected["pessimistic_cost"] - given["cost_limit"]
    )
    test_factor = rl.pessimism_factor(given["fail_prob"], n)
    assert mean + test_factor * math.sqrt(variance) == near(expected["test_ucb_of_these"])


@pytest.mark.parametrize("given, expected", golden_cases("hc"))
def test_pessimistic_costs_are_those_of_their_authors_up_to_a_constant(given, expected):
    costs = doubles(given["costs"])
    k = golden_factor(given, given["n_batch"])
    assert k == near(expected["policy_coefficient"])
    constant = k * costs.mean() ** 2 / (2 * costs.std())
    found = rl.pessimistic_costs(costs, k) - constant
    assert found.tolist() == near(expected["policy_costs"])


def test_pessimistic_costs_have_the_gradient_of_mean_plus_k_std():
    """By the score function, over all actions of a policy that starts uniform.

    Their std is unbiased, so that k is one of sqrt(1 - 1/n) smaller standard deviations."""
    costs = doubles([-2.0, 0.3, 1.5, 4.0, -0.7])
    n, k = len(costs), 0.8
    logits = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(0)
    mean = (probs * costs).sum()
    std = (probs * (costs - mean) ** 2).sum().sqrt()
    objective = mean + k * math.sqrt(1 - 1 / n) * std
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)
    surrogate = (probs.detach() * rl.pessimistic_costs(costs, k) * logits.log_softmax(0)).sum()
    (estimated,) = torch.autograd.grad(surrogate, logits)
    assert torch.allclose(estimated, exact, atol=1e-12)


def test_nearly_equal_costs_do_not_become_large():
    """The authors' form is off by k mean^2 / (2 std): with these costs by 125000."""
    costs = tensor([-5.0, -5.0001, -4.9999])
    assert torch.allclose(rl.pessimistic_costs(costs, 1.0), costs, atol=1e-3)


@pytest.mark.parametrize("costs", [[0.0, 0.0, 0.0], [3.0], [math.nan, 3.0], [math.nan]])
def test_costs_without_a_deviation_stay_as_they_are(costs):
    costs = tensor(costs)
    assert torch.equal(rl.pessimistic_costs(costs, 1.0).nan_to_num(9.0), costs.nan_to_num(9.0))


def test_a_cost_of_nan_does_not_spoil_the_others():
    clean = rl.pessimistic_costs(doubles([1.0, 2.0, 4.0]), 0.5)
    costs = rl.pessimistic_costs(doubles([1.0, math.nan, 2.0, 4.0]), 0.5)
    assert costs[1].isnan()
    assert torch.equal(costs[[0, 2, 3]], clean)


def make_pessimistic(kind, delta, m, window=8):
    return rl.make_multiplier(kind, 1.0, 0.1, 5.0, window, 0, 0.1, 0.5, 0.5, 2, delta, m)


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_a_pessimistic_multiplier_steps_on_the_mean_and_k_deviations(kind):
    """As a plain one does whose limit is k deviations lower."""
    costs = [-1.0, 0.5, 2.0, -0.5]
    pessimistic = make_pessimistic(kind, 0.1, 300)
    plain = make(kind, window=8)
    k = 1.6377443536962102 / 2 + rl.student_quantile(0.9, 299) / math.sqrt(300)
    deviation = np.std(costs, ddof=1)
    for multiplier in (pessimistic, plain):
        multiplier.observe(costs)
    assert pessimistic.pessimistic_cost == near(0.25 + k * deviation)
    assert pessimistic.update(0.0) == near(plain.update(-k * deviation))
    assert pessimistic.mean_cost == plain.mean_cost == 0.25


WITH_NANOSAFES_CONSTANTS = [case for case in golden_cases("hc") if case[0]["c1"] == 1]


@pytest.mark.parametrize("given, expected", WITH_NANOSAFES_CONSTANTS)
def test_the_pessimistic_multiplier_has_the_step_of_its_authors(given, expected):
    """Where their C1 and C2 are 1. The gradient is by log lambda, so that lambda is in it."""
    window = len(given["costs"])
    multiplier = make_pessimistic("lagrange", given["fail_prob"], given["n_test"], window)
    multiplier.log_lambda = math.log(given["lambda"])
    multiplier.observe(given["costs"])
    before = multiplier.log_lambda
    multiplier.update(given["cost_limit"])
    assert (multiplier.log_lambda - before) / 0.1 == near(-expected["grad_log_lambda"])


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_one_cost_alone_has_no_deviation_to_be_pessimistic_about(kind):
    multiplier = make_pessimistic(kind, 0.1, 0)
    assert multiplier.update(0.0) == 1.0
    multiplier.observe([3.0])
    assert multiplier.pessimistic_cost == 3.0
    plain = make(kind, window=8)
    plain.observe([3.0])
    assert multiplier.update(0.0) == plain.update(0.0)


def test_with_more_and_more_costs_pessimism_vanishes():
    factors = [rl.pessimism_factor(0.1, n, n) for n in (2, 10, 1000, 100_000)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] < 0.01


@pytest.mark.parametrize("kind", rl.MULTIPLIERS)
def test_the_state_of_a_run_without_pessimism_goes_on_with_it(kind):
    """Both are knobs, not state: what older runs have kept is all that is needed."""
    plain = make(kind)
    follow(plain, [0.5, 0.7], 0.0)
    state = plain.state_dict()
    assert "pessimism" not in str(state)
    pessimistic = make_pessimistic(kind, 0.1, 0, window=4)
    pessimistic.load_state_dict(json.loads(json.dumps(state)))
    assert pessimistic.value == plain.value
    assert pessimistic.pessimistic_cost > pessimistic.mean_cost == plain.mean_cost


# ---- groups ----


def group_returns(values):
    """(P, S) numbers as returns (P * S,) in float64, and their mask of one token each."""
    returns = doubles(values).flatten()
    return returns, torch.ones(len(returns), 1, dtype=torch.float64)


def standardise_groups(values, deviations, eps):
    """group_advantages() of (P, S) numbers, with another eps than its own 1e-6."""
    returns, mask = group_returns(values)
    advantages = rl.group_advantages(returns, mask, len(values[0]), "grpo").view(-1, len(values[0]))
    deviations = doubles(deviations)[:, None]
    return advantages * (deviations + 1e-6) / (deviations + eps)


@pytest.mark.parametrize("given, expected", golden_cases("cgrpo"))
def test_both_orders_of_mixing_and_normalising_have_their_golden_numbers(given, expected):
    lambda_, eps = given["lambda"], given["eps"]
    mixed = doubles(given["rewards"]) - lambda_ * doubles(given["costs"])
    first_mixed = standardise_groups(mixed.tolist(), expected["std_mixed"], eps)
    assert torch.allclose(first_mixed, doubles(expected["mix_then_normalise"]), atol=1e-9, rtol=0)
    reward = standardise_groups(given["rewards"], expected["std_reward"], eps)
    cost = standardise_groups(given["costs"], expected["std_cost"], eps)
    last_mixed = rl.mix_advantages(reward, cost, lambda_)
    golden = doubles(expected["normalise_then_mix_over_1_plus_lambda"])
    assert torch.allclose(last_mixed, golden, atol=1e-9, rtol=0)


@pytest.mark.parametrize("given, expected", golden_cases("gdpo"))
def test_whitening_has_the_numbers_of_gdpos_authors(given, expected):
    mixed = doubles(expected["before_whitening"])
    lengths = tensor(given["lengths"])
    mask = (torch.arange(6) < lengths[:, None]).double()
    advantages = rl.whiten(mixed[:, None] * mask, mask)
    for row, length, golden in zip(advantages.tolist(), given["lengths"], expected["advantages"]):
        assert row[:length] == near([golden] * length)
        assert row[length:] == [0.0] * (6 - length)


@pytest.mark.parametrize("given, expected", golden_cases("gdpo"))
def test_gdpo_standardises_in_groups_mixes_and_whitens(given, expected):
    """As the trainer does it. Its 1 + lambda is gone after whitening, up to the authors' 1e-4."""
    lambda_, eps = given["lambda"], given["eps"]
    standardised = {}
    for name in ("rewards", "costs"):
        deviations = np.std(given[name], axis=1, ddof=1).tolist()
        standardised[name] = standardise_groups(given[name], deviations, eps).view(-1, 1)
    mixed = rl.mix_advantages(standardised["rewards"], standardised["costs"], lambda_)
    before = (mixed * (1 + lambda_)).flatten().tolist()
    assert before == near(expected["before_whitening"])
    advantages = rl.whiten(mixed, torch.ones_like(mixed))
    assert torch.allclose(advantages.flatten(), doubles(expected["advantages"]), atol=1e-3)


@pytest.mark.parametrize("given, expected", golden_cases("gdpo"))
def test_normalize_is_the_whitening_of_verls_gdpo(given, expected):
    """Over tokens, so that long answers count more.

    verl's deviation is unbiased, that of normalize() is not. Its eps in groups is nanosafe's."""
    samples = len(given["rewards"][0])
    lengths = tensor(given["lengths"])
    mask = (torch.arange(6) < lengths[:, None]).double()
    advantages = []
    for name in ("rewards", "costs"):
        returns, _ = group_returns(given[name])
        advantages.append(rl.group_advantages(returns, mask, samples, "grpo"))
    mixed = advantages[0] - given["lambda"] * advantages[1]
    tokens = int(lengths.sum())
    found = rl.normalize(mixed, mask)[:, 0] * math.sqrt((tokens - 1) / tokens)
    golden = doubles(expected["advantages_token_whitened"])
    assert torch.allclose(found, golden, atol=1e-6, rtol=0)


def test_whitened_advantages_weigh_long_and_short_responses_alike():
    mask = doubles([[1, 1, 1], [1, 0, 0]])
    advantages = rl.whiten(doubles([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), mask)
    half_root = 1 / math.sqrt(2)
    expected = doubles([[-half_root] * 3, [half_root, 0.0, 0.0]])
    assert torch.allclose(advantages, expected, atol=1e-4)


def test_whitening_advantages_that_are_all_equal_gives_0_and_not_nan():
    assert (rl.whiten(torch.ones(4, 3), torch.ones(4, 3)) == 0).all()


def test_a_group_without_a_violation_learns_nothing_from_its_indicator_costs():
    returns, mask = group_returns([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert (rl.group_advantages(returns, mask, 3, "grpo") == 0).all()


def test_the_kl_in_a_cost_would_be_all_that_a_safe_group_learns_from():
    """Which is why normalize_groups="each" standardises costs without it."""
    kl_penalty = doubles([0.01, 0.02, 0.03])
    advantages = rl.group_advantages(kl_penalty, torch.ones(3, 1), 3, "grpo")
    assert advantages.flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-3)


def test_flat_groups_are_those_whose_scores_are_all_equal():
    scores = tensor([1.0, 1.0, 2.0, 2.1, 0.0, 0.0, math.nan, math.nan])
    assert rl.share_of_flat_groups(scores, 2) == 0.5


# ---- the actor's loss ----

TOKENS = ("logps", "old_logps", "mask")


def golden_actor_loss(given, clip_low, clip_high, advantages=None, mask=None, **options):
    """The loss of a golden case, and its gradient by logps."""
    logps, old_logps, own_mask = (doubles(given[name]) for name in TOKENS)
    logps.requires_grad_()
    mask = own_mask if mask is None else mask
    advantages = given["advantages"] if advantages is None else advantages
    if not isinstance(advantages, torch.Tensor):
        advantages = doubles(advantages)
    if advantages.dim() == 1:  # of responses
        advantages = advantages[:, None].expand_as(logps)
    loss = losses.actor_loss(logps, old_logps, advantages, mask, clip_low, clip_high, **options)
    loss.backward()
    return loss.item(), logps.grad


def assert_loss(found, expected):
    loss, gradient = found
    assert loss == near(expected["loss"])
    assert torch.allclose(gradient, doubles(expected["grad_logps"]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("given, expected", golden_cases("dapo_loss"))
def test_the_loss_of_dapo_has_its_golden_numbers(given, expected):
    """Cut answers are outside the mask."""
    mask = doubles(given["mask"]) * (1 - doubles(given["truncated"]))[:, None]
    clips = given["clip_low"], given["clip_high"]
    assert_loss(golden_actor_loss(given, *clips, mask=mask, loss_mean="token"), expected)


@pytest.mark.parametrize("given, expected", golden_cases("dr_grpo"))
def test_the_loss_of_dr_grpo_has_its_golden_numbers(given, expected):
    """Its length is a constant, not that of the longest response."""
    assert_loss(
        golden_actor_loss(
            given,
            given["clip"],
            None,
            expected["advantages"],
            loss_mean="constant",
            length=given["max_len"],
        ),
        expected,
    )


@pytest.mark.parametrize("given, expected", golden_cases("gspo_loss"))
def test_the_loss_of_gspo_has_its_golden_numbers(given, expected):
    """verl adds constants, so its numbers are 2.5e-9 off; these are the definition's."""
    clips = given["clip_low"], given["clip_high"]
    assert_loss(golden_actor_loss(given, *clips, surrogate="gspo"), expected)
    ratio = losses.policy_ratio(*(doubles(given[name]) for name in TOKENS), "gspo")
    assert ratio[:, 0].tolist() == near(expected["sequence_ratio"])


@pytest.mark.parametrize("given, expected", golden_cases("cispo_loss"))
def test_the_loss_of_cispo_has_its_golden_numbers(given, expected):
    clips = given["clip_low"], given["clip_high"]
    found = golden_actor_loss(given, *clips, surrogate="cispo", loss_mean="token")
    assert_loss(found, expected)


@pytest.mark.parametrize("given, expected", golden_cases("tis"))
def test_truncated_importance_sampling_has_its_golden_numbers(given, expected):
    """As the trainer does it: the advantages are multiplied by the weights."""
    old_logps, sampled_logps, mask = (
        doubles(given[name]) for name in ("old_logps", "sampler_logps", "mask")
    )
    weights = losses.importance_weights(old_logps, sampled_logps, mask, given["max"])
    assert torch.allclose(weights, doubles(expected["weights"]), atol=1e-9, rtol=0)
    advantages = doubles(given["advantages"])[:, None] * weights
    found = golden_actor_loss(given, given["clip"], None, advantages)
    assert_loss(found, expected)


def test_importance_weights_are_1_where_sampler_and_trainer_agree():
    logps, _, _, mask = random_batch()
    logps.requires_grad_()
    weights = losses.importance_weights(logps, logps.detach(), mask, cap=2.0)
    assert torch.equal(weights, mask)
    assert not weights.requires_grad


def random_batch(seed=0):
    """logps, old_logps, advantages and mask of three responses (3, 4), of 4, 2 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, 3, 4, dtype=torch.float64, generator=generator)
    mask = doubles([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    return *drawn, mask


def test_the_mean_over_tokens_weighs_long_responses_more():
    logps, old_logps, advantages, mask = random_batch()
    total = 0.0
    for b, length in enumerate((4, 2, 1)):
        for t in range(length):
            ratio = math.exp(logps[b, t] - old_logps[b, t])
            advantage = advantages[b, t].item()
            total -= min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
    for loss_mean, count in (("token", 7), ("constant", 3 * 9)):
        loss = losses.actor_loss(
            logps, old_logps, advantages, mask, 0.2, 0.3, loss_mean=loss_mean, length=9
        )
        assert loss.item() == near(total / count)


def test_cispo_keeps_the_gradient_of_a_token_that_ppo_clips_away():
    for surrogate, learns in (("ppo", False), ("cispo", True)):
        logps = torch.zeros(1, 1, requires_grad=True)
        old_logps = torch.full((1, 1), -1.0)  # the ratio is 2.7
        one = torch.ones(1, 1)
        losses.actor_loss(logps, old_logps, one, one, 0.2, surrogate=surrogate).backward()
        assert (logps.grad.item() != 0) == learns


@pytest.mark.parametrize("surrogate", losses.SURROGATES)
@pytest.mark.parametrize("loss_mean", losses.LOSS_MEANS)
def test_micro_batches_add_up_to_the_minibatch(surrogate, loss_mean):
    logps, old_logps, advantages, mask = random_batch()
    minibatch = [2, 0, 1]
    total = 0.0
    for rows in ([2], [0, 1], []):
        loss = losses.actor_loss(
            logps[rows],
            old_logps[rows],
            advantages[rows],
            mask[rows],
            0.2,
            None,
            surrogate,
            loss_mean,
            7,
        )
        total += loss * losses.batch_share(mask, rows, minibatch, loss_mean)
    whole = losses.actor_loss(
        logps, old_logps, advantages, mask, 0.2, None, surrogate, loss_mean, 7
    )
    assert total.item() == near(whole.item())


@pytest.mark.parametrize("surrogate", losses.SURROGATES)
@pytest.mark.parametrize("loss_mean", losses.LOSS_MEANS)
def test_what_is_outside_the_mask_reaches_neither_loss_nor_gradient(surrogate, loss_mean):
    found = []
    for outside in (0.0, math.nan):
        batch = random_batch()
        mask = batch[3].bool()
        logps, old_logps, advantages = (torch.where(mask, x, outside) for x in batch[:3])
        logps.requires_grad_()
        loss = losses.actor_loss(
            logps, old_logps, advantages, batch[3], 0.2, None, surrogate, loss_mean, 7
        )
        loss.backward()
        found.append((loss.item(), logps.grad.tolist()))
    assert found[0] == found[1]
    assert (torch.tensor(found[0][1])[~mask] == 0).all()


@pytest.mark.parametrize("surrogate", ["ppo", "gspo"])
@pytest.mark.parametrize("loss_mean", losses.LOSS_MEANS)
def test_gradients_of_the_actor_loss_equal_finite_differences(surrogate, loss_mean):
    """Not of cispo, whose ratio is a weight without gradient."""
    logps, old_logps, advantages, mask = random_batch(1)

    def loss_of(logps):
        return losses.actor_loss(
            logps, old_logps, advantages, mask, 0.2, 0.3, surrogate, loss_mean, 7
        )

    assert torch.autograd.gradcheck(loss_of, logps.requires_grad_())


# ---- the dual ----


def make_asked(rewards, costs):
    """A list of Asked with these numbers (P, S)."""
    asked = []
    for of_prompt, costs_of_prompt in zip(rewards, costs):
        answers = [f"answer {i}" for i in range(len(of_prompt))]
        asked.append(
            dual.Asked({"input": "?"}, answers, np.array(of_prompt), np.array(costs_of_prompt))
        )
    return asked


DUAL_NAMES = {
    "dual": "value",
    "grad": "slope",
    "curvature": "curvature",
    "cost": "cost",
    "reward": "reward",
    "kl": "kl",
    "ess": "effective_samples",
}


def assert_dual(found, expected):
    for name, number in expected.items():
        assert getattr(found, DUAL_NAMES[name]) == near(number), name


@pytest.mark.parametrize("given, expected", golden_cases("can_dual"))
def test_the_dual_has_the_numbers_of_can(given, expected):
    asked = make_asked(given["rewards"], given["costs"])
    beta, cost_limit = given["beta"], given["cost_limit"]
    for lambda_, at in zip(given["lambdas"], expected["at"]):
        assert_dual(dual.evaluate_dual(asked, lambda_, beta, cost_limit), at)
    for of_prompt, weights in zip(asked, expected["weights_at_lambda_1"]):
        weighed = dual.weigh_answers(of_prompt.rewards, of_prompt.costs, 1.0, beta)
        assert weighed.weights.tolist() == near(weights)
    lambda_ = given["lambda_init"]
    for after in expected["path"]:  # plain descent on the dual function
        slope = dual.evaluate_dual(asked, lambda_, beta, cost_limit).slope
        lambda_ = max(0.0, lambda_ - given["lr"] * slope)
        assert lambda_ == near(after)
    lambda_star = dual.find_lambda(asked, beta, cost_limit)
    assert lambda_star == near(expected["lambda_star"])
    assert_dual(dual.evaluate_dual(asked, lambda_star, beta, cost_limit), expected["at_star"])
    assert dual.measure_reference(asked).least_cost == near(expected["least_cost_in_samples"])


REWARDS = [[0.5, -1.0, 2.0], [1.0, 3.0, 0.0]]
COSTS = [[-1.0, -2.0, 3.0], [0.5, 4.0, -3.0]]


def test_the_dual_equals_a_plain_loop():
    total = cost = kl = 0.0
    for rewards, costs in zip(REWARDS, COSTS):
        sizes = []
        for r, c in zip(rewards, costs):
            sizes.append(math.exp((r + 0.7 * (-0.5 - c)) / 0.4))
        total += 0.4 * math.log(sum(sizes) / 3) / 2
        for size, c in zip(sizes, costs):
            weight = size / sum(sizes)
            cost += weight * c / 2
            kl += weight * math.log(weight * 3) / 2
    found = dual.evaluate_dual(make_asked(REWARDS, COSTS), 0.7, 0.4, -0.5)
    assert found.value == near(total)
    assert found.cost == near(cost)
    assert found.kl == near(kl)


def test_the_slope_and_the_curvature_of_the_dual_equal_finite_differences():
    asked = make_asked(REWARDS, COSTS)
    here, below, above = (dual.evaluate_dual(asked, x, 0.4, -0.5) for x in (0.7, 0.69999, 0.70001))
    assert here.slope == pytest.approx((above.value - below.value) / 2e-5, rel=1e-6)
    assert here.curvature == pytest.approx((above.slope - below.slope) / 2e-5, rel=1e-6)


def test_a_lower_limit_never_has_a_smaller_multiplier_and_is_met():
    asked = make_asked(REWARDS, COSTS)
    last = 0.0
    for cost_limit in (3.0, 1.0, 0.0, -1.0, -2.0, -2.4):
        lambda_star = dual.find_lambda(asked, 0.4, cost_limit)
        assert lambda_star >= last
        if lambda_star > 0:
            found = dual.evaluate_dual(asked, lambda_star, 0.4, cost_limit)
            assert found.cost == pytest.approx(cost_limit, abs=1e-6)
        last = lambda_star
    assert dual.find_lambda(asked, 0.4, 3.6) == 0.0
    assert math.isinf(dual.find_lambda(asked, 0.4, -2.6))  # the least is (-2 - 3) / 2


def test_rewards_that_are_large_for_beta_do_not_overflow():
    asked = make_asked([[1e6, 1e6 - 1, -1e6]], [[0.0, 0.0, -1.0]])
    found = dual.evaluate_dual(asked, 0.0, 1e-3, 0.0)
    assert found.reward == pytest.approx(1e6)
    assert math.isfinite(found.value)
    assert found.effective_samples == pytest.approx(1.0)


def test_labels_have_the_probabilities_of_mocan():
    for given, expected in golden_cases("can_labels"):
        rows = zip(given["reward"], given["other_reward"], given["cost"], given["other_cost"])
        found = [dual.prefer_probability(*row, given["lambda"]) for row in rows]
        assert found == near(expected["p_answer_chosen"])


def test_the_dpo_loss_with_a_noise_for_each_pair_is_that_of_the_labels_in_expectation():
    for given, expected in golden_cases("can_labels"):
        logps = []
        for name in ("answer_logp", "other_logp", "ref_answer_logp", "ref_other_logp"):
            logps.append(doubles(given[name]).requires_grad_())
        noise = 1 - doubles(expected["p_answer_chosen"])
        loss = losses.dpo_loss(*logps, 0.1, label_smoothing=noise)
        pair_losses = expected["soft_dpo_losses_beta_0.1"]
        assert loss.item() == near(sum(pair_losses) / len(pair_losses))
        loss.backward()
        assert logps[0].grad.tolist() == near(expected["soft_dpo_grad_h"])


def test_labels_are_drawn_and_not_the_likelier_one():
    """reward - lambda * cost differs by log 3, so that the better answer wins three times in 4."""
    better, worse = math.log(3) + 2.0 * 0.5, 0.0
    asked = make_asked([[better, worse]] * 4000, [[0.5, 0.0]] * 4000)
    rows = dual.label_pairs(asked, 2.0, seed=0)
    share = sum(row["better"] for row in rows) / len(rows)
    assert share == pytest.approx(0.75, abs=0.03)
    assert dual.label_pairs(asked, 2.0, seed=0) == rows
    assert dual.label_pairs(asked, 2.0, seed=1) != rows


def test_pairs_are_consecutive_answers_that_differ_with_their_safety():
    asked = dual.Asked(
        {"input": "How?", "system": "Be brief."},
        ["a", "b", "c", "c", "left over"],
        np.array([99.0, -99.0, 0.0, 0.0, 0.0]),
        np.array([1.0, -1.0, 0.0, 0.0, 0.0]),
    )
    assert dual.label_pairs([asked], 0.0, seed=0) == [
        {
            "input": "How?",
            "system": "Be brief.",
            "answer": "a",
            "other_answer": "b",
            "better": True,
            "safer": False,
            "is_safe": False,
            "is_other_safe": True,
        }
    ]


def write_answers(path, prompts=3, answers=40):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(prompts):
        row = {"input": f"How do I fix clock {i}?"}
        row["answers"] = [f"Answer {k}." for k in range(answers)]
        row["scores"] = rng.normal(size=answers).tolist()
        row["costs"] = rng.normal(size=answers).tolist()
        rows.append(row)
    write_jsonl(rows, path)
    return rows


def run_dual(monkeypatch, capsys, *flags, check=True):
    script = "nanosafe/eval/dual.py"
    return run_in_process(script, *flags, monkeypatch=monkeypatch, capsys=capsys, check=check)


def test_the_command_writes_the_curve_the_summary_and_pairs(monkeypatch, capsys, tmp_path):
    write_answers(tmp_path / "answers.jsonl")
    with open(tmp_path / "answers.jsonl", "a") as f:
        f.write('{"input": "Why?", "answers": ["a"], "scores": [1.0]}\n')
    flags = [f"--samples={tmp_path}/answers.jsonl", f"--out_dir={tmp_path}/out"]
    outcome = run_dual(monkeypatch, capsys, *flags, "--cost_limit=-0.5", "--beta=2")
    assert "3 prompts, 40.0 answers to each; left out 1" in outcome.printed
    assert "warning: only 3 prompts" in outcome.printed
    assert "carry the weight" not in outcome.printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["best"]["cost"] == pytest.approx(-0.5)
    assert summary["best"]["lambda_"] > 0
    lines = (tmp_path / "out" / "curve.jsonl").read_text().splitlines()
    lambdas = [json.loads(line)["lambda_"] for line in lines]
    assert lambdas[0] == 0 < summary["best"]["lambda_"] < lambdas[-1]
    assert len((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()) == 3 * 20


def test_too_few_answers_that_carry_the_weight_are_said(monkeypatch, capsys, tmp_path):
    write_answers(tmp_path / "answers.jsonl", answers=4)
    flags = [f"--samples={tmp_path}/answers.jsonl", f"--out_dir={tmp_path}/out"]
    outcome = run_dual(monkeypatch, capsys, *flags)
    assert "of 4.0 answers to a prompt carry the weight" in outcome.printed


@pytest.mark.parametrize(
    "row, flags, words",
    [
        ({"input": "?", "answers": ["a"], "scores": [1.0]}, [], "has no row with answers, scores"),
        ({"input": "?", "answers": [], "scores": [], "costs": []}, [], "no answers"),
        (None, [], "not a JSON object"),
        (
            {"input": "?", "answers": ["a"], "scores": [1.0], "costs": ["x"]},
            [],
            "not a finite number",
        ),
        (
            {"input": "?", "answers": ["a", "b"], "scores": [1, 2], "costs": [1, 2]},
            ["--cost_limit=0.5"],
            "cost_limit=0.5 cannot be met",
        ),
        ({"input": "?", "answers": ["a"], "scores": [1], "costs": [1]}, ["--beta=0"], "above 0"),
    ],
)
def test_what_the_dual_cannot_use_is_answered_with_one_line(
    row, flags, words, monkeypatch, capsys, tmp_path
):
    write_jsonl([row], tmp_path / "answers.jsonl")
    flags = [f"--samples={tmp_path}/answers.jsonl", f"--out_dir={tmp_path}/out", *flags]
    outcome = run_dual(monkeypatch, capsys, *flags, check=False)
    assert words in outcome.error
    assert not (tmp_path / "out").exists()
