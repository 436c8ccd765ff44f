r"""What one run shows of its own privacy: a lower bound on epsilon from canaries that were in or out by a coin.

    m candidates, a fair coin each --train on those that are in--> output --score each--> guess the coins --> epsilon >= bound

Steinke, Nasr, Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv:2305.08846). A mechanism that is
(epsilon, delta)-DP leaves each coin so uncertain that hardly more guesses are right than randomised response would get
right; who guesses better has refuted the epsilon. No epsilon is proven this way: a low bound may just mean weak guesses.

Nothing here knows of models: a score is a number for each candidate, higher for those that look trained on, computed
without the coins from what the mechanism gave out.

>>> round(epsilon_of_guesses(Guesses(made=100, right=75), num_canaries=1000, delta=1e-4, level=0.05), 3)  # appendix D
0.673
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]
Coins = NDArray[np.bool_]

# How many to guess in and how many to guess out, as shares of all: fixed before any score is seen. A canary that is
# drawn seldom, but hard to miss when it is, shows at the top alone.
_SHARES = ((1 / 2, 1 / 2), (3 / 8, 3 / 8), (1 / 8, 1 / 8), (1 / 4, 0.0), (1 / 16, 0.0), (1 / 64, 0.0))
_FEWEST_GUESSES = 8  # even if all are right, fewer show next to nothing
_PRECISION = 1e-6


@dataclass(frozen=True, slots=True)
class AuditOutcome:
    """What an audit found; goes into the signed statement.

    Attributes:
        canaries: candidates, in or out by a coin each.
        confidence: of each of the two bounds.
        released_adapter: lower bound on epsilon, at the plan's delta, from the released weights.
        every_round: the same for a curious site that saw the sum of every round.
    """

    canaries: int
    confidence: float
    released_adapter: float
    every_round: float

    @property
    def bound(self) -> float:
        """The higher one: what a claim must not be below."""
        return max(self.released_adapter, self.every_round)


@dataclass(frozen=True, slots=True)
class Guesses:
    """Guesses of coins.

    Attributes:
        made: r, the coins that were guessed.
        right: v, those of them that were guessed right.
    """

    made: int
    right: int


def epsilon_lower_bound(scores: Scores, coins: Coins, *, delta: float, confidence: float) -> float:
    """Largest epsilon that the guesses refute; 0 if they refute none.

    The candidates with the highest scores are guessed in, those with the lowest out, for a few numbers of guesses that
    are fixed beforehand. The chance of error is split over them (Bonferroni), so the best may be taken.

    Args:
        scores: shape (m,), higher for candidates that look trained on; computed without the coins.
        coins: shape (m,), true for those that were in.
        delta: of the (epsilon, delta) that is tested.
        confidence: in (0, 1).

    Guarantees:
        If the coins are fair and independent and what the scores were computed from is (epsilon, delta)-DP, the bound is
        above epsilon with probability at most ``1 - confidence``.

    Raises:
        ValueError: shapes that differ, a score that is not finite, a delta or confidence out of range.
    """
    return max((bound for _, bound in bounds_of(scores, coins, delta=delta, confidence=confidence)), default=0.0)


def bounds_of(scores: Scores, coins: Coins, *, delta: float, confidence: float) -> list[tuple[Guesses, float]]:
    """Each way to guess with the bound it gives; all of them hold together with the confidence."""
    _check(scores, coins, delta, confidence)
    ways = list(_ways(len(scores)))
    order = np.argsort(-scores, kind="stable")  # ties go by position, which knows nothing of the coins
    found = []
    for num_in, num_out in ways:
        right = int(coins[order[:num_in]].sum()) + int((~coins[order[len(order) - num_out :]]).sum())
        guesses = Guesses(made=num_in + num_out, right=right)
        level = (1 - confidence) / len(ways)
        found.append((guesses, epsilon_of_guesses(guesses, num_canaries=len(scores), delta=delta, level=level)))
    return found


def largest_refutable(num_canaries: int, *, delta: float, confidence: float) -> float:
    """The bound if every guess were right: no audit with so many canaries can refute a claim above it."""
    ways = list(_ways(num_canaries))
    level = (1 - confidence) / max(len(ways), 1)
    perfect = (Guesses(made, made) for made in {num_in + num_out for num_in, num_out in ways})
    return max(
        (epsilon_of_guesses(each, num_canaries=num_canaries, delta=delta, level=level) for each in perfect), default=0.0
    )


def epsilon_of_guesses(guesses: Guesses, *, num_canaries: int, delta: float, level: float) -> float:
    """Largest epsilon whose p-value is at most ``level``, by bisection from below; 0 if none is."""

    def refuted(epsilon: float) -> bool:
        return p_value(guesses, num_canaries=num_canaries, epsilon=epsilon, delta=delta) <= level

    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):  # ends: with epsilon the p-value goes to 1
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def p_value(guesses: Guesses, *, num_canaries: int, epsilon: float, delta: float) -> float:
    """Most that the chance of so many right guesses can be when the mechanism is (epsilon, delta)-DP.

    Steinke et al. 2023, theorem 5.2 and corollary 5.4; for delta = 0 it is randomised response (theorem 5.1).

    Args:
        guesses: r made, v of them right.
        num_canaries: m, those not guessed among them.
        epsilon: of the hypothesis.
        delta: of the hypothesis.
    """
    r, v = guesses.made, guesses.right
    if not 0 <= v <= r <= num_canaries:
        raise ValueError(f"{v} right of {r} guesses of {num_canaries} canaries")
    if v == 0:
        return 1.0
    # Randomised response is right with probability e^epsilon / (1 + e^epsilon).
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, accuracy))  # f(v) = P[Binomial(r, accuracy) >= v]
    if delta == 0.0:
        return tail
    # theorem 5.2: f(v) + 2 m delta max_i (f(v - i) - f(v)) / i; beyond i = v the numerator no longer grows
    steps = np.arange(1, v + 1)
    gained = np.cumsum(stats.binom.pmf(v - steps, r, accuracy))  # f(v - i) - f(v)
    return min(1.0, tail + 2 * num_canaries * delta * float((gained / steps).max()))


def _ways(num_canaries: int) -> Iterator[tuple[int, int]]:
    for share_in, share_out in _SHARES:
        num_in, num_out = int(num_canaries * share_in), int(num_canaries * share_out)
        if num_in + num_out >= _FEWEST_GUESSES:
            yield num_in, num_out


def _check(scores: Scores, coins: Coins, delta: float, confidence: float) -> None:
    if scores.ndim != 1 or scores.shape != coins.shape:
        raise ValueError(f"got scores of shape {scores.shape} and coins of {coins.shape}, wanted (m,) twice")
    if coins.dtype != np.bool_:
        raise ValueError(f"coins are {coins.dtype}, wanted bool: numbers would be indices")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise ValueError(f"delta is {delta}, wanted in [0, 1); confidence is {confidence}, wanted in (0, 1)")
