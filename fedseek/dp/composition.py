"""What several mechanisms cost together: (epsilon, delta) of runs, or of stages of one run, composed.

They may differ in noise, in sampling and in length.

The privacy loss distributions of the mechanisms are convolved (Sommer, Meiser and Mohammadi 2019, "Privacy Loss
Classes"; Doroshenko et al. 2022, arXiv:2207.04380). That is far below the sum of the runs' epsilons. It holds for
mechanisms whose noise, sampling and length are settled without looking at what the earlier ones gave out. Where people
choose those numbers by earlier results, the proof at hand is that of a Renyi filter (Feldman and Zrnic 2021,
arXiv:2008.11193); so the second opinion, by Renyi accounting (Mironov 2017, arXiv:1702.07476,
proposition 1), is worth more than one here.

>>> from fedseek.dp.accounting import PrivacyParams
>>> params = PrivacyParams(noise_multiplier=1.1, sampling_probability=0.15, delta=1e-5, l2_clip_norm=1.0)
>>> run = PrivacySpend(params, 67)
>>> round(run.epsilon(), 2), round(composed_epsilon([run, run], 1e-5), 2)
(7.41, 10.57)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import dp_accounting
from dp_accounting import rdp

from fedseek.dp.accounting import (
    NEIGHBORING_RELATION,
    RENYI_ORDERS,
    STATED_INTERVAL,
    PrivacyParams,
    PrivacySpend,
    calibrate_noise_multiplier,
    dp_event,
    epsilon,
    fitting_interval,
    pld_accountant,
)
from fedseek.errors import UnsupportedMechanism

_Parts = tuple[tuple[float, float, int], ...]  # noise_multiplier, sampling_probability, steps

# Calibration of several stages is done when what they cost together is within this fraction below the target.
_STAGES_SLACK: Final = 0.01
_MOST_TRIALS: Final = 8  # a plan from outside must not keep the accountant busy for long


@dataclass(frozen=True, slots=True)
class RunSpend:
    """What a run of several stages has spent so far; of one stage, the figures of :class:`PrivacySpend`.

    Attributes:
        stages: the spend of each, in the order of the plan, also of those not begun; at least one, all with one delta.

    Raises:
        UnsupportedMechanism: no stages, or of different deltas.
    """

    stages: tuple[PrivacySpend, ...]

    def __post_init__(self) -> None:
        deltas = {stage.params.delta for stage in self.stages}
        if len(deltas) != 1:
            raise UnsupportedMechanism(
                f"the stages of a run have deltas {sorted(deltas)}, wanted one and the same",
                hint="epsilon of a run is at one delta",
            )

    @property
    def params(self) -> tuple[PrivacyParams, ...]:
        """The mechanism of each stage."""
        return tuple(stage.params for stage in self.stages)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of each stage."""
        return tuple(stage.num_steps for stage in self.stages)

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(self.steps)

    @property
    def delta(self) -> float:
        """The delta of (epsilon, delta)."""
        return self.stages[0].params.delta

    def epsilon(self) -> float:
        """Epsilon of the run so far, of all stages together; an upper bound."""
        return composed_epsilon(self.stages, self.delta)

    def epsilon_rdp(self) -> float:
        """The second opinion: the same by Renyi accounting; looser."""
        return composed_epsilon_rdp(self.stages, self.delta)


@dataclass(frozen=True, slots=True)
class StageShape:
    """What of a stage fixes its noise.

    Attributes:
        share: of epsilon that the stage would take by itself, relative to the others'; above 0.
        sampling_probability: chance of each privacy unit to be in a step.
        num_steps: of the stage.
    """

    share: float
    sampling_probability: float
    num_steps: int


@lru_cache(maxsize=256)
def calibrate_stages(target_epsilon: float, delta: float, shapes: tuple[StageShape, ...]) -> tuple[float, ...]:
    """Noise multipliers, one a stage, that keep all stages together within ``(target_epsilon, delta)``.

    By itself, stage i would cost c * share_i * target_epsilon, with one c for all: the largest at which the composition is
    within the target, up to 1 % of it. c is above 1, since epsilons composed are less than their sum. Epsilon grows with c
    almost in proportion, so c is scaled by what is missing; where that leaves the bracket, the bracket is halved.

    Args:
        target_epsilon: what the whole run may cost.
        delta: of the whole run.
        shapes: of the stages; one alone gets what ``calibrate_noise_multiplier`` says.

    Returns:
        noise_multipliers, each rounded up to four decimals, with a ``composed_epsilon`` of at most the target.

    Raises:
        UnsupportedMechanism: a number for which no guarantee exists.

    Cost:
        3 to 6 s for two stages, then cached; a minute for numbers that nobody in earnest would ask for.
    """
    if len(shapes) == 1:
        return (_alone(target_epsilon, delta, shapes[0]),)
    shares = [shape.share for shape in shapes]
    if not shapes or not all(0 < share < math.inf for share in shares):
        raise UnsupportedMechanism(f"shares of epsilon are {shares}, wanted each above 0")
    relative = [share / sum(shares) for share in shares]
    too_little, too_much = 0.0, 1 / max(relative)  # there, one stage alone takes all of it
    found, factor = None, 1 / math.hypot(*relative)  # where normal losses would be
    for _ in range(_MOST_TRIALS):
        noises = tuple(
            _alone(factor * share * target_epsilon, delta, shape) for share, shape in zip(relative, shapes, strict=True)
        )
        got = _epsilon_of(noises, shapes, delta)
        if got <= target_epsilon:
            found, too_little = noises, factor
        else:
            too_much = factor
        if got <= target_epsilon and got >= (1 - _STAGES_SLACK) * target_epsilon:
            break
        scaled = factor * (1 - _STAGES_SLACK / 2) * target_epsilon / got if got > 0 else too_much
        factor = scaled if too_little < scaled < too_much else (too_little + too_much) / 2
    if found is None:
        raise UnsupportedMechanism(
            f"target_epsilon is {target_epsilon}, wanted one within reach", hint="no privacy guarantee exists otherwise"
        )
    return found


def _alone(target_epsilon: float, delta: float, shape: StageShape) -> float:
    return calibrate_noise_multiplier(
        target_epsilon, delta, sampling_probability=shape.sampling_probability, num_steps=shape.num_steps
    )


def _epsilon_of(noises: Sequence[float], shapes: Sequence[StageShape], delta: float) -> float:
    spends = [
        PrivacySpend(PrivacyParams(noise, shape.sampling_probability, delta, l2_clip_norm=1.0), shape.num_steps)
        for noise, shape in zip(noises, shapes, strict=True)
    ]
    return composed_epsilon(spends, delta)


def composed_epsilon(spends: Sequence[PrivacySpend], delta: float) -> float:
    """Epsilon at ``delta`` of all these spends together, by the privacy loss distribution.

    Args:
        spends: of whatever mechanisms, in any order; a spend of no steps counts nothing. Their own deltas do not enter.
        delta: of the whole, in (0, 1).

    Guarantees:
        An upper bound on the true epsilon under ADD_OR_REMOVE_ONE, for a unit that is in the data of each of them;
        0 for no steps; for spends of one mechanism the figure of :func:`fedseek.dp.accounting.epsilon`.

    Raises:
        UnsupportedMechanism: a delta for which no guarantee exists.

    Cost:
        About 1 s a mechanism for the first call with given numbers, then cached; more for an epsilon in the hundreds.
    """
    parts = _parts(spends, delta)
    if len(parts) == 1:
        [(noise_multiplier, sampling_probability, steps)] = parts
        return epsilon(noise_multiplier, sampling_probability, num_steps=steps, delta=delta)
    return _by_pld(parts, delta) if parts else 0.0


def composed_epsilon_rdp(spends: Sequence[PrivacySpend], delta: float) -> float:
    """The second opinion on :func:`composed_epsilon`, by Renyi accounting: looser, by another proof and other code."""
    parts = _parts(spends, delta)
    return _by_rdp(parts, delta) if parts else 0.0


def _parts(spends: Sequence[PrivacySpend], delta: float) -> _Parts:
    """One entry a mechanism: the order of steps does not enter, nor how they were cut into rounds and runs."""
    if not 0 < delta < 1:
        raise UnsupportedMechanism(f"delta is {delta}, wanted in (0, 1)", hint="no privacy guarantee exists otherwise")
    steps = Counter[tuple[float, float]]()
    for spend in spends:
        steps[spend.params.noise_multiplier, spend.params.sampling_probability] += spend.num_steps
    return tuple((*mechanism, count) for mechanism, count in sorted(steps.items()) if count)


@lru_cache(maxsize=256)
def _by_pld(parts: _Parts, delta: float) -> float:
    # One grid for all: that of the mechanism with the largest loss. It errs high for the others, by little of the whole.
    accountant = pld_accountant(max(fitting_interval(noise, chance, STATED_INTERVAL) for noise, chance, _ in parts))
    for part in parts:
        accountant.compose(dp_event(*part))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _by_rdp(parts: _Parts, delta: float) -> float:
    accountant = rdp.RdpAccountant(RENYI_ORDERS, dp_accounting.NeighboringRelation[NEIGHBORING_RELATION])
    for part in parts:
        accountant.compose(dp_event(*part))
    return float(accountant.get_epsilon(delta))
