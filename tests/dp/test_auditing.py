"""One-run auditing: against values worked out by hand and in the paper, and on mechanisms whose epsilon is known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq

from fedseek.dp.auditing import (
    AuditOutcome,
    Guesses,
    bounds_of,
    epsilon_lower_bound,
    epsilon_of_guesses,
    largest_refutable,
    p_value,
)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Exact, for sensitivity 1: Balle and Wang 2018 (arXiv:1805.06530), theorem 8."""
    mu = 1 / noise_multiplier

    def excess(epsilon: float) -> float:
        above = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(above - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(brentq(excess, 0.0, 60.0))


def coins_and_scores(rng: np.random.Generator, count: int, sampled: float = 1.0, noise: float = 1.0):
    coins = rng.random(count) < 0.5
    seen = coins & (rng.random(count) < sampled)
    return coins, seen + noise * rng.standard_normal(count)


# p-values


def test_the_paper_s_own_example():
    # Steinke et al. 2023, appendix D: 1000 canaries, 100 guesses, 75 right, delta 1e-4, 95 %
    found = epsilon_of_guesses(Guesses(100, 75), num_canaries=1000, delta=1e-4, level=0.05)
    assert found == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize(
    ("made", "right", "epsilon", "delta", "wanted"),
    [
        (1, 1, 0.0, 0.0, 0.5),
        (2, 2, math.log(3), 0.0, 9 / 16),
        (3, 2, 0.0, 0.0, 1 / 2),
        (5, 0, 0.0, 0.0, 1.0),
        # r = 2, v = 2, fair: f = 1/4, 3/4, 1; max((3/4 - 1/4) / 1, (1 - 1/4) / 2) = 1/2; 2 m delta = 1/5
        (2, 2, 0.0, 0.01, 1 / 4 + 1 / 5 / 2),
        # r = 3, v = 3, accuracy 3/4: f = 27/64, 54/64, ...; best is i = 1: 27/64
        (3, 3, math.log(3), 0.01, 27 / 64 + 27 / 64 / 5),
    ],
)
def test_p_values_worked_out_by_hand(made, right, epsilon, delta, wanted):
    assert p_value(Guesses(made, right), num_canaries=10, epsilon=epsilon, delta=delta) == pytest.approx(wanted)


def test_the_bound_of_perfect_guesses_without_delta():
    # all 64 right: accuracy^64 = 0.05
    wanted = math.log(0.05 ** (1 / 64) / (1 - 0.05 ** (1 / 64)))
    assert epsilon_of_guesses(Guesses(64, 64), num_canaries=64, delta=0.0, level=0.05) == pytest.approx(
        wanted, abs=1e-5
    )


counts = st.integers(1, 200)


@given(st.data(), counts, st.floats(0, 8), st.floats(0, 1e-2))
def test_the_p_value_falls_with_right_guesses_and_grows_with_epsilon_and_delta(data, made, epsilon, delta):
    right = data.draw(st.integers(0, made))
    told = {"num_canaries": 300, "epsilon": epsilon, "delta": delta}
    base = p_value(Guesses(made, right), **told)
    assert 0 <= base <= 1
    if right < made:
        assert p_value(Guesses(made, right + 1), **told) <= base + 1e-12
    assert p_value(Guesses(made, right), **{**told, "epsilon": epsilon + 0.5}) >= base - 1e-12
    assert p_value(Guesses(made, right), **{**told, "delta": delta + 1e-3}) >= base - 1e-12


@given(st.data(), counts, st.sampled_from([0.0, 1e-5, 1e-3]))
def test_what_is_returned_is_refuted_and_a_little_more_is_not(data, made, delta):
    guesses = Guesses(made, data.draw(st.integers(made // 2, made)))
    found = epsilon_of_guesses(guesses, num_canaries=made, delta=delta, level=0.05)
    if found:
        assert p_value(guesses, num_canaries=made, epsilon=found, delta=delta) <= 0.05
    assert p_value(guesses, num_canaries=made, epsilon=found + 1e-5, delta=delta) > 0.05


@pytest.mark.parametrize("guesses", [Guesses(3, 4), Guesses(11, 2), Guesses(2, -1)])
def test_impossible_counts_are_refused(guesses):
    with pytest.raises(ValueError, match="right of"):
        p_value(guesses, num_canaries=10, epsilon=1.0, delta=0.0)


# bounds


def test_more_right_guesses_never_lower_the_bound():
    coins = np.arange(200) % 2 == 0
    bounds = []
    for wrong in range(0, 100, 10):
        scores = coins.astype(float)
        scores[:wrong] = 1 - scores[:wrong]
        bounds.append(epsilon_lower_bound(scores, coins, delta=1e-5, confidence=0.95))
    assert all(more >= less for more, less in itertools.pairwise(bounds))
    assert bounds[0] > 3 > 1 > bounds[-1]


def test_the_bound_is_the_best_way_to_guess_and_each_pays_for_all():
    rng = np.random.default_rng(3)
    coins, scores = coins_and_scores(rng, 640, noise=0.5)
    ways = bounds_of(scores, coins, delta=1e-5, confidence=0.9)
    assert len(ways) == 6
    assert epsilon_lower_bound(scores, coins, delta=1e-5, confidence=0.9) == max(bound for _, bound in ways)
    for guesses, bound in ways:
        alone = epsilon_of_guesses(guesses, num_canaries=640, delta=1e-5, level=0.1 / len(ways))
        assert bound == alone


def test_a_mechanism_without_privacy_is_found_and_pure_noise_is_not():
    rng = np.random.default_rng(0)
    coins, scores = coins_and_scores(rng, 64, noise=1e-3)
    most = largest_refutable(64, delta=1e-5, confidence=0.95)
    assert 2 < most < 3.2
    # short of the most: not exactly half of the coins are heads
    assert 2 < epsilon_lower_bound(scores, coins, delta=1e-5, confidence=0.95) < most
    even = np.arange(64) % 2 == 0
    assert epsilon_lower_bound(even * 1.0, even, delta=1e-5, confidence=0.95) == pytest.approx(most, abs=1e-5)
    assert epsilon_lower_bound(-scores, coins, delta=1e-5, confidence=0.95) == 0.0


def test_few_canaries_say_nothing():
    assert epsilon_lower_bound(np.empty(0), np.empty(0, bool), delta=1e-5, confidence=0.95) == 0.0
    assert epsilon_lower_bound(np.ones(6), np.ones(6, bool), delta=1e-5, confidence=0.95) == 0.0
    assert largest_refutable(0, delta=1e-5, confidence=0.95) == 0.0


def test_equal_scores_are_guessed_without_the_coins():
    coins = np.arange(100) < 50  # sorted; a tie broken by the coins would be right every time or never
    rng = np.random.default_rng(1)
    assert epsilon_lower_bound(np.zeros(100), rng.permutation(coins), delta=0.0, confidence=0.95) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_stays_within_its_epsilon(epsilon):
    # Warner's mechanism is where theorem 5.1 is tight: the bound must hold, and may not be far off
    rng = np.random.default_rng(7)
    truth = 1 / (1 + math.exp(-epsilon))
    bounds = []
    for _ in range(400):
        coins = rng.random(400) < 0.5
        told = np.where(rng.random(400) < truth, coins, ~coins)
        bounds.append(epsilon_lower_bound(told + 1e-6 * rng.random(400), coins, delta=0.0, confidence=0.9))
    exceeded = sum(bound > epsilon for bound in bounds)
    # 40 expected at most; 60 is over three standard deviations away
    assert exceeded <= 60
    assert np.median(bounds) > 0.4 * epsilon


@pytest.mark.parametrize("sampled", [1.0, 0.1])
def test_the_gaussian_mechanism_stays_within_its_epsilon(sampled):
    rng = np.random.default_rng(11)
    noise, delta = 0.8, 1e-3
    epsilon = gaussian_epsilon(noise, delta)  # with sampling it is lower still, never higher
    bounds = []
    for _ in range(300):
        coins, scores = coins_and_scores(rng, 500, sampled, noise)
        bounds.append(epsilon_lower_bound(scores, coins, delta=delta, confidence=0.9))
    assert sum(bound > epsilon for bound in bounds) <= 30


def test_an_epsilon_that_is_claimed_for_too_little_noise_is_refuted():
    rng = np.random.default_rng(5)
    claimed = gaussian_epsilon(2.0, 1e-5)
    coins, scores = coins_and_scores(rng, 4000, noise=0.5)
    assert epsilon_lower_bound(scores, coins, delta=1e-5, confidence=0.95) > claimed


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": np.zeros(9)}, "shape"),
        ({"scores": np.full(10, np.nan)}, "finite"),
        ({"coins": np.ones(10, int)}, "bool"),
        ({"delta": 1.0}, "delta"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_what_cannot_be_audited_is_refused(changes, match):
    arguments = {"scores": np.zeros(10), "coins": np.ones(10, bool), "delta": 0.0, "confidence": 0.95, **changes}
    with pytest.raises(ValueError, match=match):
        epsilon_lower_bound(**arguments)


def test_the_outcome_is_as_bad_as_its_worse_bound():
    assert AuditOutcome(canaries=64, confidence=0.95, released_adapter=0.5, every_round=1.5).bound == 1.5
