"""What a run costs in privacy: (epsilon, delta) of DP-SGD, known before training begins.

The mechanism is the Gaussian mechanism on a Poisson sample of the privacy units, composed over every step of the
run (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1). Neighbouring data sets differ by adding or removing one unit.
The stated epsilon is computed from the privacy loss distribution, discretised so that it never errs low (Doroshenko et
al. 2022, arXiv:2207.04380); Renyi accounting (Mironov et al. 2019, arXiv:1908.10530) is a second opinion, looser,
by another proof and other code.

Nothing here knows of tensors or data, so that a coordinator can check a plan's numbers by itself.

>>> params = PrivacyParams(noise_multiplier=1.1, sampling_probability=0.15, delta=1e-5, l2_clip_norm=1.0)
>>> spend = PrivacySpend(params).after(40).after(27)  # two rounds of one run
>>> spend.num_steps, round(spend.epsilon(), 2)
(67, 7.41)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting import pld, rdp
from dp_accounting.mechanism_calibration import NoBracketIntervalFoundError

from fedseek.errors import UnsupportedMechanism

NEIGHBORING_RELATION = "ADD_OR_REMOVE_ONE"
ACCOUNTANT = "PLD"

# Spacing of the grid the privacy loss is put on. Any spacing errs high; a coarse one is faster. Spacings are powers of
# ten, so the points of a coarse grid are points of a finer one too: a multiplier calibrated on the coarse grid can only
# look better on the grid that epsilon is stated on.
STATED_INTERVAL = 1e-4
_CALIBRATION_INTERVAL = 1e-3
_FINEST_INTERVAL = 1e-6

# Multipliers are rounded up to this, so that the last bits of one machine's FFT do not end up in a plan's digest.
_MULTIPLIER_STEP = 1e-4

# Calibration is done when epsilon is within this fraction of the target.
_SLACK = 2e-3

# Whole orders only: the fractional ones of the library's default do not converge at large q and warn on stderr.
RENYI_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024)


@dataclass(frozen=True, slots=True)
class PrivacyParams:
    """The numbers of the plan that fix the guarantee; equal at every site.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by ``l2_clip_norm``.
        sampling_probability: chance of each privacy unit to be in a step, from the plan and never from a loader.
        delta: the delta of (epsilon, delta).
        l2_clip_norm: bound on one unit's gradient in a step; does not enter epsilon.

    Raises:
        UnsupportedMechanism: a number for which no guarantee exists.
    """

    noise_multiplier: float
    sampling_probability: float
    delta: float
    l2_clip_norm: float

    def __post_init__(self) -> None:
        _require(0 < self.noise_multiplier < math.inf, "noise_multiplier", self.noise_multiplier, "above 0")
        _require(0 < self.sampling_probability <= 1, "sampling_probability", self.sampling_probability, "in (0, 1]")
        _require(0 < self.delta < 1, "delta", self.delta, "in (0, 1)")
        _require(0 < self.l2_clip_norm < math.inf, "l2_clip_norm", self.l2_clip_norm, "above 0")


@dataclass(frozen=True, slots=True)
class PrivacySpend:
    """Steps of the run so far. One value goes through all rounds: a fresh one would hide the earlier ones.

    Attributes:
        params: the mechanism; the same in every round of a run.
        num_steps: steps so far, over all rounds.
    """

    params: PrivacyParams
    num_steps: int = 0

    def after(self, steps: int) -> PrivacySpend:
        """The spend after ``steps`` more steps of the same mechanism.

        Raises:
            ValueError: ``steps`` is negative: privacy is never given back.
        """
        if steps < 0:
            raise ValueError(f"steps is {steps}, wanted 0 or more: what was spent stays spent")
        return PrivacySpend(self.params, self.num_steps + steps)

    def epsilon(self) -> float:
        """Epsilon of the run so far at ``params.delta``; an upper bound."""
        p = self.params
        return epsilon(p.noise_multiplier, p.sampling_probability, num_steps=self.num_steps, delta=p.delta)

    def epsilon_rdp(self) -> float:
        """The second opinion: the same by Renyi accounting; looser."""
        p = self.params
        return epsilon_rdp(p.noise_multiplier, p.sampling_probability, num_steps=self.num_steps, delta=p.delta)


def epsilon(noise_multiplier: float, sampling_probability: float, *, num_steps: int, delta: float) -> float:
    """Epsilon of ``num_steps`` steps by the privacy loss distribution.

    Guarantees:
        An upper bound on the true epsilon under ADD_OR_REMOVE_ONE; 0 for no steps.

    Cost:
        About 0.5 s for the first call with given numbers, then cached.
    """
    if num_steps == 0:
        return 0.0
    return _epsilon_pld(noise_multiplier, sampling_probability, num_steps, delta)


def epsilon_rdp(noise_multiplier: float, sampling_probability: float, *, num_steps: int, delta: float) -> float:
    """Epsilon of ``num_steps`` steps by Renyi accounting: looser than `epsilon`, by another proof and other code."""
    if num_steps == 0:
        return 0.0
    return _epsilon_rdp(noise_multiplier, sampling_probability, num_steps, delta)


@lru_cache(maxsize=256)
def calibrate_noise_multiplier(
    target_epsilon: float, delta: float, *, sampling_probability: float, num_steps: int
) -> float:
    """The least noise that keeps ``num_steps`` steps within ``(target_epsilon, delta)``, rounded up to four decimals.

    Args:
        target_epsilon: what the whole run may cost.
        delta: the delta of (epsilon, delta).
        sampling_probability: chance of each privacy unit to be in a step.
        num_steps: steps of the whole run: rounds times steps per round.

    Returns:
        noise_multiplier, with ``epsilon(noise_multiplier, ...) <= target_epsilon``.

    Raises:
        UnsupportedMechanism: a number for which no guarantee exists.

    Cost:
        About 1 s for the first call with given numbers, then cached; some 10 s above 10,000 steps.
    """
    _require(0 < target_epsilon < math.inf, "target_epsilon", target_epsilon, "above 0")
    _require(0 < delta < 1, "delta", delta, "in (0, 1)")
    _require(0 < sampling_probability <= 1, "sampling_probability", sampling_probability, "in (0, 1]")
    _require(num_steps >= 1, "num_steps", num_steps, "1 or more")

    def event(candidate: float) -> Any:
        return dp_event(candidate, sampling_probability, num_steps)

    def stated(candidate: float) -> float:
        return epsilon(candidate, sampling_probability, num_steps=num_steps, delta=delta)

    try:
        enough = dp_accounting.calibrate_dp_mechanism(
            lambda: pld_accountant(_CALIBRATION_INTERVAL), event, target_epsilon, delta, tol=_MULTIPLIER_STEP
        )
    except NoBracketIntervalFoundError:
        enough = math.inf
    found = _round_up(_tighten(_round_up(float(enough)), target_epsilon, stated)) if enough < math.inf else enough
    # A delta near the accountant's own rounding makes the stated epsilon infinite, whatever the noise.
    _require(found < math.inf and stated(found) <= target_epsilon, "target_epsilon", target_epsilon, "one within reach")
    return found


def _tighten(enough: float, target_epsilon: float, stated: Callable[[float], float]) -> float:
    """Less noise than ``enough`` where the coarse grid asked for too much (many steps, tiny probability): bisection."""
    too_little = 0.0
    while stated(enough) < (1 - _SLACK) * target_epsilon and enough - too_little > _MULTIPLIER_STEP:
        candidate = (enough + too_little) / 2
        if stated(candidate) <= target_epsilon:
            enough = candidate
        else:
            too_little = candidate
    return enough


def _round_up(noise_multiplier: float) -> float:
    return round(math.ceil(noise_multiplier / _MULTIPLIER_STEP) * _MULTIPLIER_STEP, 4)


@lru_cache(maxsize=256)
def _epsilon_pld(noise_multiplier: float, sampling_probability: float, num_steps: int, delta: float) -> float:
    accountant = pld_accountant(fitting_interval(noise_multiplier, sampling_probability, STATED_INTERVAL))
    accountant.compose(dp_event(noise_multiplier, sampling_probability, num_steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _epsilon_rdp(noise_multiplier: float, sampling_probability: float, num_steps: int, delta: float) -> float:
    accountant = rdp.RdpAccountant(RENYI_ORDERS, dp_accounting.NeighboringRelation[NEIGHBORING_RELATION])
    accountant.compose(dp_event(noise_multiplier, sampling_probability, num_steps))
    return float(accountant.get_epsilon(delta))


def fitting_interval(noise_multiplier: float, sampling_probability: float, coarsest: float) -> float:
    """A grid at least ten times finer than one step's privacy loss, about q / sigma; coarser ones overstate epsilon."""
    wanted = sampling_probability / noise_multiplier / 10
    power = math.floor(math.log10(wanted))
    return float(max(_FINEST_INTERVAL, min(coarsest, 10.0**power)))


def pld_accountant(interval: float) -> Any:
    """An accountant of privacy loss distributions on a grid of this spacing."""
    return pld.PLDAccountant(
        dp_accounting.NeighboringRelation[NEIGHBORING_RELATION], value_discretization_interval=interval
    )


def dp_event(noise_multiplier: float, sampling_probability: float, num_steps: int) -> Any:
    """DP-SGD as an event: Gaussian mechanism on a Poisson sample, composed with itself."""
    step = dp_accounting.PoissonSampledDpEvent(sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier))
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


def _require(holds: bool, name: str, got: float, wanted: str) -> None:
    if not holds:
        raise UnsupportedMechanism(f"{name} is {got}, wanted {wanted}", hint="no privacy guarantee exists otherwise")
