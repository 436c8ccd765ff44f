import math

import pytest

from fedseek.dp.accounting import PrivacyParams, PrivacySpend, calibrate_noise_multiplier
from fedseek.dp.composition import RunSpend, StageShape, calibrate_stages, composed_epsilon, composed_epsilon_rdp
from fedseek.errors import UnsupportedMechanism

DELTA = 1e-5


def spend(sigma: float, q: float, steps: int, *, delta: float = DELTA) -> PrivacySpend:
    return PrivacySpend(PrivacyParams(sigma, q, delta, 1.0), steps)


def exact_gaussian_epsilon(mu: float, delta: float) -> float:
    """Of a Gaussian mechanism with sensitivity over deviation ``mu``: Balle and Wang 2018 (arXiv:1805.06530), theorem 8."""

    def cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        too_small = cdf(mu / 2 - middle / mu) - math.exp(middle) * cdf(-mu / 2 - middle / mu) > delta
        low, high = (middle, high) if too_small else (low, middle)
    return high


MIXES = [
    [spend(1.1, 0.15, 67), spend(2.5, 0.1, 100)],
    [spend(1.1, 0.15, 67), spend(0.8, 0.01, 300), spend(4.0, 1.0, 3)],
    [spend(3.0, 0.2, 50, delta=1e-6), spend(3.0, 0.1, 50, delta=1e-3)],
]


@pytest.mark.parametrize("sigmas", [(4.0, 6.0), (2.0, 3.0, 8.0), (1.0, 20.0)])
def test_without_sampling_it_is_one_gaussian_of_the_squares(sigmas):
    steps = range(1, len(sigmas) + 1)
    mu = math.sqrt(sum(count / sigma**2 for sigma, count in zip(sigmas, steps, strict=True)))
    ours = composed_epsilon([spend(sigma, 1.0, count) for sigma, count in zip(sigmas, steps, strict=True)], DELTA)
    exact = exact_gaussian_epsilon(mu, DELTA)
    assert exact <= ours <= exact * 1.01


@pytest.mark.parametrize("spends", MIXES, ids=range(len(MIXES)))
def test_it_is_below_the_sum_and_above_each_part_and_the_second_opinion_is_looser(spends):
    whole, parts = composed_epsilon(spends, DELTA), [composed_epsilon([each], DELTA) for each in spends]
    basic = sum(composed_epsilon([each], DELTA / len(spends)) for each in spends)  # basic composition adds deltas, too
    assert max(parts) < whole < basic
    assert whole <= composed_epsilon_rdp(spends, DELTA) < 2 * whole


def test_one_mechanism_is_accounted_as_a_run_is_however_it_was_cut():
    run = spend(1.1, 0.15, 67)
    assert composed_epsilon([run], DELTA) == run.epsilon()
    assert composed_epsilon([spend(1.1, 0.15, 40), spend(1.1, 0.15, 27)], DELTA) == run.epsilon()
    assert composed_epsilon_rdp([spend(1.1, 0.15, 40), spend(1.1, 0.15, 27)], DELTA) == run.epsilon_rdp()


def test_the_order_does_not_enter_nor_what_trained_nothing():
    first, second = MIXES[0]
    nothing = spend(0.5, 1.0, 0)
    assert composed_epsilon([second, nothing, first], DELTA) == composed_epsilon([first, second], DELTA)
    assert composed_epsilon([nothing], DELTA) == composed_epsilon([], DELTA) == composed_epsilon_rdp([], DELTA) == 0.0


@pytest.mark.parametrize("more", [spend(1.5, 0.05, 1), spend(4.0, 0.2, 30), spend(30.0, 0.001, 100)])
def test_more_training_never_costs_less(more):
    before = [spend(2.0, 0.1, 50)]
    assert composed_epsilon([*before, more], DELTA) >= composed_epsilon(before, DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_without_a_guarantee_is_refused(delta):
    with pytest.raises(UnsupportedMechanism):
        composed_epsilon([spend(1.0, 0.1, 1)], delta)


# --- stages of one run

SHAPES = (StageShape(0.25, 1.0, 6), StageShape(0.75, 0.5, 4))


def spends_of(noises, shapes=SHAPES) -> tuple[PrivacySpend, ...]:
    pairs = zip(noises, shapes, strict=True)
    return tuple(spend(noise, shape.sampling_probability, shape.num_steps) for noise, shape in pairs)


def test_a_run_of_stages_costs_their_composition_and_of_one_stage_what_that_costs():
    first, second = MIXES[0]
    whole = RunSpend((first, second))
    assert (whole.epsilon(), whole.epsilon_rdp()) == (
        composed_epsilon([first, second], DELTA),
        composed_epsilon_rdp([first, second], DELTA),
    )
    assert (whole.steps, whole.num_steps, whole.delta) == ((67, 100), 167, DELTA)
    assert whole.params == (first.params, second.params)
    alone = RunSpend((first,))
    assert (alone.epsilon(), alone.epsilon_rdp()) == (first.epsilon(), first.epsilon_rdp())
    assert RunSpend((first, spend(2.5, 0.1, 0))).epsilon() == first.epsilon(), "a stage not begun costs nothing"


@pytest.mark.parametrize(
    "stages", [(), (spend(1.0, 0.5, 1), spend(1.0, 0.5, 1, delta=1e-6))], ids=["none", "two-deltas"]
)
def test_a_run_without_one_delta_is_refused(stages):
    with pytest.raises(UnsupportedMechanism, match="wanted one and the same"):
        RunSpend(stages)


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_the_noise_of_stages_keeps_their_composition_just_within_the_target(target):
    noises = calibrate_stages(target, DELTA, SHAPES)
    assert 0.99 * target <= composed_epsilon(spends_of(noises), DELTA) <= target
    assert all(noise == round(noise, 4) for noise in noises)


def test_each_stage_takes_its_share_of_epsilon_by_itself():
    first, second = (each.epsilon() for each in spends_of(calibrate_stages(8.0, DELTA, SHAPES)))
    assert second / first == pytest.approx(0.75 / 0.25, rel=0.01)
    assert first + second > 8.0, "epsilons composed are less than their sum: what that leaves is used"


def test_one_stage_alone_gets_the_noise_it_always_got():
    (alone,) = calibrate_stages(8.0, DELTA, (StageShape(1.0, 0.25, 8),))
    assert alone == calibrate_noise_multiplier(8.0, DELTA, sampling_probability=0.25, num_steps=8)
    assert calibrate_stages(8.0, DELTA, (StageShape(0.3, 0.25, 8),)) == (alone,), "whatever its share"


def test_shares_are_relative_and_each_is_above_nothing():
    doubled = tuple(StageShape(2 * shape.share, shape.sampling_probability, shape.num_steps) for shape in SHAPES)
    assert calibrate_stages(8.0, DELTA, doubled) == calibrate_stages(8.0, DELTA, SHAPES)
    for share in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UnsupportedMechanism, match="shares"):
            calibrate_stages(8.0, DELTA, (StageShape(share, 1.0, 6), SHAPES[1]))


@pytest.mark.slow
def test_stages_of_unlike_length_are_held_to_the_target_too():
    shapes = (StageShape(0.02, 0.001, 20), StageShape(0.98, 1.0, 50))
    noises = calibrate_stages(2.0, DELTA, shapes)
    assert 0.99 * 2.0 <= composed_epsilon(spends_of(noises, shapes), DELTA) <= 2.0


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_nothing_reaches_is_refused(target):
    with pytest.raises(UnsupportedMechanism):
        calibrate_stages(target, DELTA, SHAPES)
