"""The statistics of the evaluations: arrays (n,) in, numbers out.

Red and blue are two policies that answered the same n prompts. A higher reward is better, and a
cost above 0 means unsafe."""

import math
from typing import NamedTuple

import numpy as np

QUADRANTS = ("better, safe", "better, unsafe", "not better, safe", "not better, unsafe")
MAX_ITERATIONS = 10000  # of the Bradley-Terry fit
TOLERANCE = 1e-9  # greatest change of a log-strength at which the fit has converged


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def bootstrap_interval(values, resamples=2000, seed=0):
    """The mean of values (n,) and its 95 % interval, by the percentile bootstrap (Efron 1979).

    Draw n of the values with replacement, `resamples` times: low and high are the 2.5th and the
    97.5th percentile of the means of these draws."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(values), len(values))
        means.append(values[drawn].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def wilson_interval(outcomes):
    """The share of true ones among outcomes (n,) and its 95 % interval (Wilson 1927).

    Unlike the bootstrap's, it has a width where all outcomes are alike: of 20 answers none was
    unsafe, and the share may still be 16 %."""
    n = len(outcomes)
    share = sum(outcomes) / n
    z = 1.96  # standard deviations of a normal distribution on either side of its middle 95 %
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    width = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, middle - width), min(1.0, middle + width))


def count_quadrants(red_rewards, blue_rewards, blue_costs):
    """How many of blue's answers are better than red's or not, and safe or not.

    Better means a strictly higher reward than red's, safe a cost of at most 0. Returns
    {quadrant: count}, with all QUADRANTS as keys."""
    counts = dict.fromkeys(QUADRANTS, 0)
    for red_reward, blue_reward, blue_cost in zip(red_rewards, blue_rewards, blue_costs):
        quality = "better" if blue_reward > red_reward else "not better"
        safety = "safe" if blue_cost <= 0 else "unsafe"
        counts[f"{quality}, {safety}"] += 1
    return counts


class WinRate(NamedTuple):
    count: int  # prompts in this cell of the table
    share: float  # of them, where blue's answer is better; nan where count is 0


def count_wins(red_rewards, red_costs, blue_rewards, blue_costs):
    """How often blue's answer is better, by whether each of the two answers is safe.

    Returns {(red is safe, blue is safe): WinRate}, with all four keys."""
    wins = {(True, True): [], (True, False): [], (False, True): [], (False, False): []}
    for red_reward, red_cost, blue_reward, blue_cost in zip(
        red_rewards, red_costs, blue_rewards, blue_costs
    ):
        cell = (red_cost <= 0, blue_cost <= 0)
        wins[cell].append(blue_reward > red_reward)
    rates = {}
    for cell, won in wins.items():
        share = sum(won) / len(won) if won else math.nan
        rates[cell] = WinRate(len(won), share)
    return rates


def fit_bradley_terry(scores, base=1000.0):
    """Ratings of k players on Elo's scale, from the scores (k, n) that they reached at n prompts.

    Each prompt is a game between every two players: the higher score wins, and equal scores are
    half a win for both. One draw is added between every two, which keeps the ratings finite. The
    ratings R have the mean `base` and maximise the likelihood of all games under

        P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)).

    With w_ij wins of i over j and R_i = base + 400 log10(s_i), Hunter (2004) iterates

        s_i <- sum_j w_ij / sum_j ((w_ij + w_ji) / (s_i + s_j))."""
    scores = np.asarray(scores, dtype=np.float64)
    players = len(scores)
    wins = np.zeros((players, players))
    for i in range(players):
        for j in range(players):
            if i != j:
                won = np.sum(scores[i] > scores[j])
                drawn = np.sum(scores[i] == scores[j]) + 1
                wins[i, j] = won + drawn / 2
    games = wins + wins.T
    strengths = np.ones(players)
    for _ in range(MAX_ITERATIONS):
        previous = strengths
        pair_sums = previous[:, None] + previous
        strengths = wins.sum(1) / (games / pair_sums).sum(1)
        strengths = strengths / np.exp(np.log(strengths).mean())  # their geometric mean is 1
        changes = np.abs(np.log(strengths / previous))
        if changes.max() < TOLERANCE:
            break
    ratings = base + 400 * np.log10(strengths)
    return ratings.tolist()


class Bin(NamedTuple):
    """The predictions whose probabilities lie in one range."""

    probability: float  # their mean
    frequency: float  # share of them that came true
    count: int


class Calibration(NamedTuple):
    bins: list  # of Bin, without empty ones
    error: float


def measure_calibration(probabilities, outcomes, bins=10):
    """Whether outcomes (n,) of 0 or 1 come true as often as probabilities (n,) promise.

    The predictions are sorted into `bins` equal ranges of probability. The expected calibration
    error (arXiv:1706.04599 Eq. 3) is sum_b count_b / n * |frequency_b - probability_b|."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    outcomes = np.asarray(outcomes, dtype=np.float64)
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    filled = []
    distance = 0.0
    for b in range(bins):
        inside = bin_of == b
        count = int(inside.sum())
        if count == 0:
            continue
        probability = float(probabilities[inside].mean())
        frequency = float(outcomes[inside].mean())
        filled.append(Bin(probability, frequency, count))
        distance += abs(probability - frequency) * count
    return Calibration(filled, distance / len(probabilities))
