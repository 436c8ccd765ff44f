import math
from dataclasses import replace
from fractions import Fraction

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.dp import site_level
from fedseek.dp.site_level import (
    MAX_VALUES,
    concentrated_epsilon,
    concentration,
    divergence_from_gaussian,
    site_level_params,
)
from fedseek.errors import UnsupportedMechanism

DELTA = 1e-5


def params(epsilon=8.0, delta=DELTA, *, bits=16, clip=0.1, rounds=10, max_sites=16, honest=(12, 3)):
    levels = 2 ** (bits - 1) - 1
    return site_level_params(
        epsilon,
        delta,
        l2_clip_norm=clip,
        rounds=rounds,
        levels=levels,
        max_sites=max_sites,
        honest=honest,
        tolerated=1,
    )


def gaussian_epsilon(multiplier, rounds, delta, accountant):
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(multiplier), rounds)
    return accountant.compose(event).get_epsilon(delta)


def multiplier_of(chosen, scope=0):
    """Standard deviation of the noise of the fewest honest sites over the clip norm, in the adapter (0) or a head (1)."""
    variance = (chosen.adapter_variance, chosen.head_variance)[scope]
    return math.sqrt(chosen.honest[scope] * variance) / chosen.norm_bound


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("rounds", [1, 10, 500])
def test_epsilon_is_reached_and_not_exceeded(epsilon, rounds):
    chosen = params(epsilon, rounds=rounds, bits=24)
    assert 0.995 * epsilon < chosen.epsilon(rounds) <= epsilon
    assert (chosen.epsilon(0), chosen.delta, chosen.tolerated) == (0.0, DELTA, 1)


@pytest.mark.parametrize(("epsilon", "rounds"), [(0.5, 1), (2.0, 20), (8.0, 10), (8.0, 100)])
def test_epsilon_is_that_of_a_central_gaussian_and_no_less(epsilon, rounds):
    chosen = params(epsilon, rounds=rounds, bits=20)
    multiplier, delta = multiplier_of(chosen), DELTA * (1 - 1e-3)
    orders = [1 + 10 ** (x / 40) for x in range(-80, 200)]
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    renyi = gaussian_epsilon(multiplier, rounds, delta, rdp.RdpAccountant(orders, relation))
    assert chosen.epsilon(rounds) == pytest.approx(renyi, rel=1e-3)
    assert chosen.epsilon(rounds) <= renyi * (1 + 1e-9)  # the same conversion, over all orders
    exact = gaussian_epsilon(multiplier, rounds, DELTA, pld.PLDAccountant(relation))
    assert exact < chosen.epsilon(rounds) < 1.25 * exact


def test_the_shares_of_the_fewest_honest_sites_make_the_noise_of_each_scope():
    chosen = params(honest=(12, 3))
    assert multiplier_of(chosen, 0) == pytest.approx(multiplier_of(chosen, 1), rel=1e-4)
    assert chosen.head_variance == pytest.approx(4 * chosen.adapter_variance, rel=1e-4)
    one_less = replace(chosen, honest=(11, 3))
    assert one_less.epsilon(10) > 8.0 > chosen.epsilon(10)
    assert replace(chosen, honest=(12, 2)).epsilon(10) > 8.0


def test_epsilon_grows_with_rounds_and_stops_at_the_plans():
    chosen = params(rounds=10)
    spent = [chosen.epsilon(rounds) for rounds in range(11)]
    assert spent == sorted(spent)
    assert len(set(spent)) == 11
    for rounds in (-1, 11):
        with pytest.raises(UnsupportedMechanism, match="wanted 0 to the plan's 10"):
            chosen.epsilon(rounds)


def test_a_chance_that_does_not_depend_on_data_is_taken_from_delta():
    chosen = params()
    assert replace(chosen, graph_chance=1e-8).epsilon(10) > chosen.epsilon(10)
    with pytest.raises(UnsupportedMechanism, match="does not bear"):
        replace(chosen, graph_chance=1e-6).epsilon(10)


def test_the_divergence_is_that_of_the_paper_and_negligible_as_used():
    assert divergence_from_gaussian(1, 16) == 0
    by_hand = 10 * (math.exp(-(math.pi**2)) + math.exp(-4 * math.pi**2 / 3))  # sigma 1, three shares
    assert divergence_from_gaussian(3, 1) == pytest.approx(by_hand, rel=1e-12)
    assert divergence_from_gaussian(1024, 16) * math.sqrt(MAX_VALUES) < 1e-58
    with pytest.raises(UnsupportedMechanism, match="1/4"):
        divergence_from_gaussian(3, 0.2)


def test_noise_of_few_steps_is_paid_for():
    chosen = params()
    coarse = replace(chosen, norm_bound=4, adapter_variance=1, head_variance=1, honest=(3, 3))
    assert concentration(coarse) == pytest.approx(4 / math.sqrt(3) + divergence_from_gaussian(16, 1) * 2**16)
    plenty = params(50.0, rounds=1, bits=10, honest=(900, 900), max_sites=1024)
    assert (plenty.adapter_variance, plenty.head_variance) == (16, 16)


def test_conversion_against_the_exact_gaussian():
    rho = 0.5
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    exact = gaussian_epsilon(1 / math.sqrt(2 * rho), 1, 1e-6, pld.PLDAccountant(relation))
    assert exact < concentrated_epsilon(rho, 1e-6) < 1.1 * exact
    assert concentrated_epsilon(rho, 1e-6) < rho + 2 * math.sqrt(rho * math.log(1e6))  # Bun and Steinke's, looser
    assert concentrated_epsilon(1e-12, 0.5) == 0


@settings(max_examples=50)
@given(
    epsilon=st.floats(0.05, 50),
    bits=st.integers(8, 24),
    rounds=st.integers(1, 1000),
    honest=st.tuples(st.integers(2, 500), st.integers(1, 500)),
)
def test_update_and_noise_fit_the_digits_but_for_their_part_of_delta(epsilon, bits, rounds, honest):
    try:
        chosen = params(epsilon, bits=bits, rounds=rounds, honest=honest, max_sites=512)
    except UnsupportedMechanism as error:
        assert "value_bits" in error.hint  # noqa: PT017
        return
    std = math.sqrt(max(chosen.adapter_variance, chosen.head_variance))
    room = (chosen.levels - chosen.norm_bound) / std
    log_beta = math.log(2 * 512 * rounds * MAX_VALUES) - room**2 / 2
    assert log_beta + math.log1p(math.exp(epsilon)) <= math.log(DELTA * 1e-3) + 1e-6
    assert chosen.epsilon(rounds) <= epsilon
    assert chosen.value_range == pytest.approx(chosen.l2_clip_norm * chosen.levels / chosen.norm_bound)


@settings(max_examples=50)
@given(num_values=st.integers(1, 3_000_000), bits=st.integers(10, 24))
def test_what_is_clipped_to_leaves_room_for_rounding(num_values, bits):
    try:
        chosen = params(bits=bits)
        norm = chosen.largest_norm(num_values)
    except UnsupportedMechanism:
        return
    root, log = math.sqrt(num_values), math.log(1e6)
    always = norm + root
    likely = math.sqrt(norm**2 + num_values / 4 + math.sqrt(2 * log) * (norm + root / 2))
    assert min(always, likely) <= chosen.norm_bound * (1 + 1e-12)
    assert min(always, likely) >= chosen.norm_bound * (1 - 1e-9)
    assert norm >= chosen.norm_bound / 2


def test_an_adapter_too_large_for_the_grid_is_refused_with_what_would_do():
    chosen = params(bits=13)
    with pytest.raises(UnsupportedMechanism, match="rounding takes more than half") as caught:
        chosen.largest_norm(2_000_000)
    assert "encryption.value_bits" in caught.value.hint
    wanted = int(caught.value.message.split("about ")[1].split()[0])
    assert replace(chosen, norm_bound=wanted + 5).largest_norm(2_000_000) > wanted / 2
    with pytest.raises(UnsupportedMechanism):
        replace(chosen, norm_bound=2**40).largest_norm(MAX_VALUES + 1)


@pytest.mark.parametrize(
    "changed",
    [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"delta": 1.0}, {"clip": 0.0}, {"rounds": 0}]
    + [{"honest": honest} for honest in ((0, 3), (3, 0))],
    ids=str,
)
def test_numbers_without_a_guarantee_are_refused(changed):
    with pytest.raises(UnsupportedMechanism, match="wanted all above 0"):
        params(**changed)


def test_parameters_do_not_hang_on_the_last_bits_of_a_logarithm():
    for number in (site_level._tail(8.0, 1e-8, rounds=10, max_sites=16), site_level._noise_multiplier(8.0, 1e-5, 10)):
        assert abs(Fraction(number) * 10_000 - round(number * 10_000)) < 1e-9
