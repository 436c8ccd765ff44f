"""Exact draws of the discrete Gaussian N_Z(0, sigma^2): integers k with probability proportional to exp(-k^2 / 2 sigma^2).

A Gaussian in floating point that is rounded, or summed with others, is none that a proof is about (Mironov 2012). So the
shares of noise that sites add are integers from the start, drawn as in C. Canonne, G. Kamath, T. Steinke, "The discrete
Gaussian for differential privacy", NeurIPS 2020, arXiv:2004.00010, Algorithms 2 and 3: only integers, fair dice and coins
that fall heads with probability exp(-x) for a rational x.

The coins are where speed comes from. The paper builds each of many; here one is a uniform number below exp(-x), whose
first 53 bits are compared in float64 for all coins at once. Where those bits lie so close to exp(-x) that the error of
float64 could matter, more bits are drawn and compared in decimal arithmetic of as many digits as it takes.

Guarantee: exact, given uniform bits, and given that numpy's float64 ``exp`` of x <= 0 errs by less than 2^-42: it errs by
less than 2^-50.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Int64Vector = NDArray[np.int64]
Coins = NDArray[np.bool_]

MAX_VARIANCE = 1 << 40
"""With it every product below stays within 63 bits, unless a coin of chance exp(-1) falls heads a million times on end."""

_BITS = 53
# Allowed for the error of float64 in x (x exp(-x) times some 2^-52) and in exp, and for the bits not yet drawn.
_UNSURE = 2.0**-40
# Proposals a pass: what they need stays in a core's cache.
_CHUNK = 1 << 15


def discrete_gaussian(size: int, variance: int, generator: np.random.Generator) -> Int64Vector:
    """Independent draws of N_Z(0, variance).

    Args:
        size: how many.
        variance: sigma^2, an integer of 1 to ``MAX_VARIANCE``. The variance of the draws is at most that (section 3
            there), and less by under one part in a million.
        generator: where the bits come from; ``fedseek.dp.randomness.secret_generator`` for noise.

    Returns:
        int64, shape (size,).

    Raises:
        ValueError: an argument is out of its range.

    Cost: about 0.2 microseconds a draw, whatever the variance.
    """
    if size < 0 or not 1 <= variance <= MAX_VARIANCE:
        raise ValueError(f"discrete_gaussian: got size {size}, variance {variance}; wanted 0, and 1 to {MAX_VARIANCE}")
    drawn = np.empty(size, np.int64)
    filled = 0
    while filled < size:
        accepted = _some_draws(min(_CHUNK, 3 * (size - filled) + 64), variance, generator)[: size - filled]
        drawn[filled : filled + accepted.size] = accepted
        filled += accepted.size
    return drawn


def _some_draws(proposals: int, variance: int, generator: np.random.Generator) -> Int64Vector:
    """Algorithm 3: a discrete Laplace Y of scale t = floor(sigma) + 1, kept with chance exp(-(|Y| - sigma^2/t)^2 / 2 sigma^2)."""
    scale = math.isqrt(variance) + 1
    proposed = _discrete_laplace(proposals, scale, generator)
    distance = np.abs(proposed) * scale - variance  # t |Y| - sigma^2, exactly
    kept = _coins(
        np.square(distance / scale) / (2 * variance),
        lambda index: Fraction(int(distance[index]) ** 2, 2 * variance * scale**2),
        generator,
    )
    return proposed[kept]


def _discrete_laplace(proposals: int, scale: int, generator: np.random.Generator) -> Int64Vector:
    """Algorithm 2 with s = 1: at most ``proposals`` integers, k with probability proportional to exp(-|k| / scale)."""
    low = generator.integers(0, scale, proposals, dtype=np.int64)
    low = low[_coins(low / scale, lambda index: Fraction(int(low[index]), scale), generator)]
    magnitude = low + scale * _heads_before_tails(low.size, generator)
    negative = generator.integers(0, 2, magnitude.size, dtype=np.int64) == 1
    signed = np.where(negative, -magnitude, magnitude)
    wanted: Int64Vector = signed[~(negative & (magnitude == 0))]  # else zero would come up twice as often
    return wanted


def _heads_before_tails(size: int, generator: np.random.Generator) -> Int64Vector:
    """How often a coin of chance exp(-1) falls heads before its first tails."""
    heads = np.zeros(size, np.int64)
    still = np.arange(size)
    while still.size:
        still = still[_coins(np.ones(still.size), lambda _: Fraction(1), generator)]
        heads[still] += 1
    return heads


def _coins(exponents: NDArray[np.float64], exact: Callable[[int], Fraction], generator: np.random.Generator) -> Coins:
    """One coin for each x >= 0 of ``exponents``, heads with probability exp(-x).

    Args:
        exponents: x in float64, shape (n,).
        exact: gives x itself at an index.
        generator: where the bits come from.
    """
    first_bits = generator.integers(0, 1 << _BITS, exponents.size, dtype=np.int64)
    chances, uniform = np.exp(-exponents), first_bits * 2.0**-_BITS
    heads: Coins = uniform < chances
    for index in np.flatnonzero(np.abs(uniform - chances) <= _UNSURE):
        heads[index] = _is_below(int(first_bits[index]), exact(int(index)), generator)
    return heads


def _is_below(first_bits: int, exponent: Fraction, generator: np.random.Generator) -> bool:
    """Whether a uniform number in [0, 1) that begins with these 53 bits is below exp(-exponent); draws bits until it is sure."""
    bits, drawn = _BITS, first_bits
    while True:
        with decimal.localcontext(prec=bits // 3 + 40):  # python's exp is correctly rounded: 35 digits to spare
            chance = (decimal.Decimal(-exponent.numerator) / exponent.denominator).exp()
            threshold = int(chance * (1 << bits))
        if drawn + 1 < threshold:  # the number is below (drawn + 1) / 2^bits; the threshold errs by at most 1
            return True
        if drawn > threshold + 1:
            return False
        drawn = drawn << 64 | int(generator.integers(0, 1 << 64, dtype=np.uint64))
        bits += 64
