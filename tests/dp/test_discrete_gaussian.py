import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedseek.dp import discrete_gaussian as module
from fedseek.dp.discrete_gaussian import MAX_VARIANCE, discrete_gaussian
from fedseek.dp.randomness import secret_generator


def chances(variance, reach):
    """P(X = k) for k = -reach to reach, from the definition."""
    weights = np.array([math.exp(-k * k / (2 * variance)) for k in range(-reach, reach + 1)])
    return weights / weights.sum()


def chi_square(drawn, variance, reach):
    """Pearson's statistic over single integers up to ``reach`` and one cell for both tails, and its degrees of freedom."""
    wide = chances(variance, 40 * math.isqrt(variance) + 40)
    middle = len(wide) // 2
    inside = wide[middle - reach : middle + reach + 1]
    expected = np.append(inside, 1 - inside.sum()) * drawn.size
    counts = np.bincount(np.clip(drawn, -reach - 1, reach + 1) + reach + 1, minlength=2 * reach + 3)
    observed = np.append(counts[1:-1], counts[0] + counts[-1])
    assert expected.min() > 20
    return float((np.square(observed - expected) / expected).sum()), len(expected) - 1


def is_plausible(statistic, freedom):
    """Within what chance allows once in a billion: Laurent and Massart 2000, lemma 1."""
    log = math.log(1e9)
    return statistic <= freedom + 2 * math.sqrt(freedom * log) + 2 * log


@pytest.mark.parametrize(("variance", "reach"), [(1, 3), (2, 4), (16, 12), (900, 90)])
def test_each_integer_comes_up_as_often_as_the_definition_says(variance, reach):
    drawn = discrete_gaussian(300_000, variance, secret_generator())
    assert is_plausible(*chi_square(drawn, variance, reach))


def test_the_same_with_every_coin_decided_in_decimal_arithmetic(monkeypatch):
    monkeypatch.setattr(module, "_UNSURE", 1.0)
    assert is_plausible(*chi_square(discrete_gaussian(2_500, 4, secret_generator()), 4, 4))


def test_the_test_would_see_a_rounded_gaussian_of_a_slightly_other_width():
    rounded = np.rint(np.random.default_rng(1).normal(0, 4.1, 300_000)).astype(np.int64)
    assert not is_plausible(*chi_square(rounded, 16, 12))


@pytest.mark.parametrize("variance", [1, 9, 12_345, 10**9 + 7, MAX_VARIANCE])
def test_moments_and_tails(variance):
    size = 200_000
    scaled = discrete_gaussian(size, variance, secret_generator()) / math.sqrt(variance)
    assert abs(scaled.mean()) < 6 / math.sqrt(size)
    assert scaled.var() == pytest.approx(1, abs=6 * math.sqrt(2 / size))
    assert (scaled**4).mean() == pytest.approx(3, abs=6 * math.sqrt(96 / size))
    assert np.abs(scaled).max() < math.sqrt(2 * math.log(2e9 * size))  # sub-Gaussian, and a union bound
    assert (np.abs(scaled) > 3).mean() == pytest.approx(0.0027, abs=0.0027 if variance < 10 else 0.0008)


@given(bits=st.integers(0, 2**53 - 1), numerator=st.integers(0, 10**9), denominator=st.integers(1, 10**9))
def test_a_coin_decided_in_float64_falls_as_in_exact_arithmetic(bits, numerator, denominator):
    exponent = Fraction(numerator, denominator)
    chance, uniform = float(np.exp(-float(exponent))), bits * 2.0**-53
    if abs(uniform - chance) > module._UNSURE:
        assert module._is_below(bits, exponent, secret_generator()) == (uniform < chance)


class Bits:
    """Gives these 64-bit words, then fails: more bits were drawn than needed."""

    def __init__(self, *words):
        self.words = list(words)

    def integers(self, *_, **__):
        return self.words.pop(0)


@pytest.mark.parametrize("beyond", [-2, 2])
def test_where_53_bits_do_not_tell_more_are_drawn_until_they_do(beyond):
    # exp(-1) = 0.36787944117144232159552377016146086744581113103176783450783680169746149574...
    digits = 36787944117144232159552377016146086744581113103176783450783680169746149574
    first_181 = digits * 2**181 // 10**74
    close = first_181 + beyond * 2
    words = [close >> 128, close >> 64 & (2**64 - 1), close & (2**64 - 1)]
    generator = Bits(*words[1:])
    assert module._is_below(words[0], Fraction(1), generator) == (beyond < 0)
    assert generator.words == []


@pytest.mark.parametrize("exponent", [Fraction(0), Fraction(10**6), Fraction(1, 10**12)])
def test_coins_at_the_edges(exponent):
    exponents = np.full(2_000, float(exponent))
    heads = module._coins(exponents, lambda _: exponent, secret_generator())
    assert heads.all() == (exponent < 1)
    assert heads.any() == (exponent < 1)


def test_sites_that_share_every_seed_draw_noise_of_their_own():
    draws = []
    for _ in range(2):
        random.seed(7), np.random.seed(7), torch.manual_seed(7)
        draws.append(discrete_gaussian(50_000, 400, secret_generator()) / 20)
    assert abs(np.corrcoef(*draws)[0, 1]) < 6 / math.sqrt(50_000)
    # the shares add up: no part of one cancels the other
    assert (draws[0] + draws[1]).var() == pytest.approx(2, rel=0.05)
    assert (draws[0] - draws[1]).var() == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("size", "variance"), [(-1, 4), (10, 0), (10, -3), (10, MAX_VARIANCE + 1)])
def test_arguments_out_of_range_are_refused(size, variance):
    with pytest.raises(ValueError, match="wanted"):
        discrete_gaussian(size, variance, secret_generator())


@pytest.mark.parametrize("size", [0, 1, 70_001])
def test_as_many_as_asked_for(size):
    drawn = discrete_gaussian(size, 100, secret_generator())
    assert (drawn.shape, drawn.dtype) == ((size,), np.int64)
