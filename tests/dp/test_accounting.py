import math
import subprocess
import sys
import warnings

import pytest
from opacus.accountants import PRVAccountant

from fedseek.dp.accounting import (
    PrivacyParams,
    PrivacySpend,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_rdp,
)
from fedseek.errors import UnsupportedMechanism

DELTA = 1e-5
REGIMES = [(1.054, 0.15, 67), (0.8, 0.02, 2000), (4.0, 1.0, 10), (2.0, 0.05, 300)]


def normal_cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def exact_gaussian_epsilon(sigma, delta):
    """Balle and Wang 2018 (arXiv:1805.06530), theorem 8, solved for epsilon by bisection."""
    low, high = 0.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        first = normal_cdf(1 / (2 * sigma) - middle * sigma)
        second = normal_cdf(-1 / (2 * sigma) - middle * sigma)
        low, high = (middle, high) if first - math.exp(middle) * second > delta else (low, middle)
    return high


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 10), (20.0, 50), (0.7, 3)])
def test_without_sampling_epsilon_is_that_of_one_gaussian(sigma, steps):
    exact = exact_gaussian_epsilon(sigma / math.sqrt(steps), DELTA)
    ours = epsilon(sigma, 1.0, num_steps=steps, delta=DELTA)
    assert exact <= ours + 1e-9
    assert ours == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(("sigma", "probability", "steps"), REGIMES[:3])
def test_epsilon_agrees_with_the_prv_accountant_of_opacus(sigma, probability, steps):
    other = PRVAccountant()
    other.history = [(sigma, probability, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = other.get_epsilon(DELTA)
    assert epsilon(sigma, probability, num_steps=steps, delta=DELTA) == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(("sigma", "probability", "steps"), REGIMES)
def test_the_second_opinion_is_looser_but_near(sigma, probability, steps):
    first = epsilon(sigma, probability, num_steps=steps, delta=DELTA)
    second = epsilon_rdp(sigma, probability, num_steps=steps, delta=DELTA)
    assert first < second < 1.3 * first


@pytest.mark.parametrize(
    ("target", "probability", "steps"),
    [(8.0, 0.15, 67), (2.0, 0.02, 3000), (0.5, 1.0, 10), (0.1, 0.001, 50_000), (1.0, 0.3, 1)],
)
def test_calibrated_noise_is_enough_and_not_too_much(target, probability, steps):
    noise_multiplier = calibrate_noise_multiplier(target, DELTA, sampling_probability=probability, num_steps=steps)
    reached = epsilon(noise_multiplier, probability, num_steps=steps, delta=DELTA)
    assert 0.995 * target < reached <= target


def test_calibration_reproduces_a_published_figure():
    assert calibrate_noise_multiplier(8.0, DELTA, sampling_probability=0.15, num_steps=67) == pytest.approx(
        1.054, abs=2e-3
    )


def test_calibration_rounds_to_four_decimals():
    found = calibrate_noise_multiplier(3.0, DELTA, sampling_probability=0.1, num_steps=20)
    assert found == round(found, 4)


def test_spend_composes_over_rounds():
    params = PrivacyParams(noise_multiplier=1.1, sampling_probability=0.1, delta=DELTA, l2_clip_norm=1.0)
    run = PrivacySpend(params).after(20).after(20).after(20)
    assert run == PrivacySpend(params, 60)
    assert run.epsilon() == epsilon(1.1, 0.1, num_steps=60, delta=DELTA)
    assert run.epsilon() > 1.2 * PrivacySpend(params).after(20).epsilon()
    assert run.epsilon() < run.epsilon_rdp()


def test_nothing_done_costs_nothing():
    params = PrivacyParams(noise_multiplier=1.1, sampling_probability=0.1, delta=DELTA, l2_clip_norm=1.0)
    assert PrivacySpend(params).epsilon() == 0.0
    assert PrivacySpend(params).epsilon_rdp() == 0.0


def test_what_was_spent_stays_spent():
    params = PrivacyParams(noise_multiplier=1.1, sampling_probability=0.1, delta=DELTA, l2_clip_norm=1.0)
    with pytest.raises(ValueError, match="stays spent"):
        PrivacySpend(params, 10).after(-1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"sampling_probability": 0.0},
        {"sampling_probability": 1.01},
        {"delta": 0.0},
        {"delta": 1.0},
        {"l2_clip_norm": 0.0},
        {"l2_clip_norm": math.nan},
    ],
)
def test_numbers_without_a_guarantee_are_refused(wrong):
    right = {"noise_multiplier": 1.0, "sampling_probability": 0.1, "delta": 1e-5, "l2_clip_norm": 1.0}
    with pytest.raises(UnsupportedMechanism, match=next(iter(wrong))):
        PrivacyParams(**(right | wrong))


@pytest.mark.parametrize(
    ("target", "delta", "probability", "steps"),
    [(0.0, 1e-5, 0.1, 10), (1.0, 0.0, 0.1, 10), (1.0, 1e-5, 0.0, 10), (1.0, 1e-5, 1.5, 10), (1.0, 1e-5, 0.1, 0)],
)
def test_calibration_refuses_what_no_noise_reaches(target, delta, probability, steps):
    with pytest.raises(UnsupportedMechanism):
        calibrate_noise_multiplier(target, delta, sampling_probability=probability, num_steps=steps)


def test_accounting_and_guards_load_no_torch():
    code = "import sys, fedseek.dp.accounting, fedseek.dp.guards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
