"""A site's part in the guarantee for whole sites: its update is clipped, rounded to integers, and gets its share of noise.

KLS (see ``fedseek.dp.site_level``), Algorithm 1, without rotation. Float arithmetic ends before the guarantee begins: the
norm is checked, and the noise added, in integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedseek.dp.discrete_gaussian import Int64Vector, discrete_gaussian
from fedseek.dp.randomness import secret_generator
from fedseek.dp.site_guards import check_site_noise_added, check_site_update_clipped
from fedseek.dp.site_level import SiteLevelParams

Float32Vector = NDArray[np.float32]

_MOST_ROUNDINGS = 20


@dataclass(frozen=True, slots=True, eq=False)
class NoisedUpdate:
    """One site's update of a round, in steps of the grid.

    Attributes:
        numbers: by scope, clipped, rounded and noised; int64, shape (num_values,).
        guards_passed: names of the checks that held.
    """

    numbers: Mapping[str, Int64Vector] = field(repr=False)
    guards_passed: tuple[str, ...]


def noise_update(
    updates: Mapping[str, Float32Vector], params: SiteLevelParams, *, variances: Mapping[str, int]
) -> NoisedUpdate:
    """Clip an update over all its scopes together, round it at random, and add this site's share of noise.

    Guarantee: the sum of such updates over the survivors of a round is ``concentration(params)``-concentrated DP for one
    site, ZERO_OUT_ONE, given the noise of at most ``params.tolerated`` of the others.

    Args:
        updates: by scope, float32, shape (num_values,); every scope that this site sends in the round.
        params: of the plan.
        variances: of a share of noise, by scope.

    Raises:
        GuardTripped: the clip did not hold, or the noise is not there; nothing may be sent.
        UnsupportedMechanism: the update has too many values for the plan's grid.
        ValueError: a value is not finite.
    """
    rounded = clip_and_round(updates, params)
    passed = {check_site_update_clipped(sum(map(_sum_of_squares, rounded.values())), norm_bound=params.norm_bound)}
    noised = {}
    for scope, numbers in rounded.items():
        noised[scope] = numbers + discrete_gaussian(numbers.size, variances[scope], secret_generator())
        added = _sum_of_squares(noised[scope] - numbers)
        passed.add(check_site_noise_added(added, numbers.size, variance=variances[scope]))
    return NoisedUpdate(noised, tuple(sorted(passed)))


def clip_and_round(updates: Mapping[str, Float32Vector], params: SiteLevelParams) -> dict[str, Int64Vector]:
    """Integers in steps of the grid whose joint norm is at most ``params.norm_bound``, whatever the update.

    An update whose norm leaves room for rounding keeps its mean: each value is rounded to one of its neighbours without
    bias, but for the one update in a million that is rounded again. A longer one is scaled down first.

    Raises:
        ValueError, UnsupportedMechanism: as ``noise_update``.
    """
    allowed = params.largest_norm(sum(vector.size for vector in updates.values()))
    vectors = {scope: vector.astype(np.float64) for scope, vector in updates.items()}
    norm = math.sqrt(sum(float(vector @ vector) for vector in vectors.values()))
    if not math.isfinite(norm):
        raise ValueError("update: a value is not finite, or the norm overflows; nothing is sent")
    for vector in vectors.values():
        vector *= min(1 / params.grid, allowed / norm) if norm > 0 else 0.0
    generator = secret_generator()
    for _ in range(_MOST_ROUNDINGS):
        rounded = {scope: _round(vector, generator) for scope, vector in vectors.items()}
        if sum(map(_sum_of_squares, rounded.values())) <= params.norm_bound**2:
            break
    return rounded  # if none of these was short enough, the guard says so


def _round(vector: NDArray[np.float64], generator: np.random.Generator) -> Int64Vector:
    """floor(x) + Bernoulli(x - floor(x)), which has mean x."""
    low = np.floor(vector)
    return (low + (generator.random(vector.size) < vector - low)).astype(np.int64)


def _sum_of_squares(numbers: Int64Vector) -> int:
    """Exact below 2^53, where every norm bound lies; above that it is rounded, but never to below it."""
    values = numbers.astype(np.float64)
    return int(values @ values)
