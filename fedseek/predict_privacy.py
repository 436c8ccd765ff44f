"""Predict what a plan costs in privacy: the noise for an epsilon, the epsilon for a noise, and how epsilon grows by round.

All of it follows from the plan's sampling probability, steps and delta: no model, no data, no tensors. Each epsilon is
given by both accountants, PLD (the one that is stated) and RDP (a second opinion, looser).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedseek.dp.accounting import PrivacyParams, PrivacySpend, calibrate_noise_multiplier
from fedseek.dp.site_level import MECHANISM
from fedseek.errors import UnsupportedMechanism
from fedseek.plan import Plan

TARGET_EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
AROUND_THE_PLANS = (0.8, 1.25, 2.0)
"""Noise multipliers to look at, in units of the plan's."""
MIN_NOISE_MULTIPLIER = 0.3  # below it epsilon is in the hundreds, and takes gigabytes to find
MAX_ROUNDS_SHOWN = 6

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """A noise multiplier and what the whole run costs with it.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by the clip norm.
        epsilon: by PLD, what would be stated; None where no bound is found.
        epsilon_rdp: by RDP; None where no bound is found.
        target_epsilon: the noise is the least for this; None where the noise was given.
    """

    noise_multiplier: float
    epsilon: float | None
    epsilon_rdp: float | None
    target_epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class RoundCost:
    """What is spent when a round is over."""

    round: int
    steps: int
    epsilon: float | None
    epsilon_rdp: float | None
    site_level_epsilon: float | None


@dataclass(frozen=True, slots=True)
class SiteLevelCost:
    """The guarantee for a whole site, stated apart."""

    epsilon: float
    delta: float
    mechanism: str


@dataclass(frozen=True, slots=True)
class PrivacyPrediction:
    """What :func:`predict_privacy` found.

    Attributes:
        sampling_probability: of a unit in a step.
        num_steps: of the run.
        delta: the delta of (epsilon, delta).
        plan: the plan's own noise.
        noise_for_epsilon: the least noise for each epsilon asked for.
        epsilon_for_noise: the epsilon of each noise asked for.
        by_round: some rounds, the first and the last among them.
        site_level: None when the plan has no guarantee for whole sites.
    """

    sampling_probability: float
    num_steps: int
    delta: float
    plan: NoiseLevel
    noise_for_epsilon: tuple[NoiseLevel, ...]
    epsilon_for_noise: tuple[NoiseLevel, ...]
    by_round: tuple[RoundCost, ...]
    site_level: SiteLevelCost | None

    @property
    def levels(self) -> tuple[NoiseLevel, ...]:
        """All noise levels, from the least noise to the most; of equal ones the first."""
        found = {each.noise_multiplier: each for each in (*self.epsilon_for_noise, *self.noise_for_epsilon, self.plan)}
        return tuple(found[noise] for noise in sorted(found))


def predict_privacy(
    plan: Plan, *, epsilons: Sequence[float] = (), noises: Sequence[float] = (), on_progress: OnProgress | None = None
) -> PrivacyPrediction | None:
    """Predict the privacy of ``plan`` and of plans that differ in their noise only.

    Args:
        plan: its sampling probability, steps and delta.
        epsilons: find the least noise for each.
        noises: find the epsilon of each noise multiplier. When both are empty, some of each around the plan's.
        on_progress: told how many of how many figures are found.

    Returns:
        None when the plan promises nothing.

    Raises:
        UnsupportedMechanism: figures were asked for of a plan that promises nothing; or one is out of reach.

    Cost:
        About a second for each figure, more with thousands of steps.
    """
    if plan.privacy is None:
        if epsilons or noises:
            raise UnsupportedMechanism(
                'the plan\'s mechanism is "none": it has no delta, and no epsilon belongs to any noise',
                hint='give it privacy.mechanism = "dp-sgd", an epsilon and a delta',
            )
        return None
    own, steps = plan.privacy, plan.total_steps
    if not epsilons and not noises:
        epsilons = TARGET_EPSILONS
        around = (round(own.noise_multiplier * factor, 2) for factor in AROUND_THE_PLANS)
        noises = tuple(noise for noise in around if noise >= MIN_NOISE_MULTIPLIER)
    rounds = _some_rounds(plan.spec.training.rounds)
    count = _counter(on_progress, 1 + len(epsilons) + len(noises) + len(rounds))
    return PrivacyPrediction(
        sampling_probability=own.sampling_probability,
        num_steps=steps,
        delta=own.delta,
        plan=count(_level(own, own.noise_multiplier, steps, target=plan.spec.privacy.epsilon)),
        by_round=tuple(count(_round_cost(plan, own, number)) for number in rounds),
        noise_for_epsilon=tuple(count(_noise_for(own, epsilon, steps)) for epsilon in epsilons),
        epsilon_for_noise=tuple(count(_level(own, noise, steps)) for noise in noises),
        site_level=_site_level(plan),
    )


def privacy_document(prediction: PrivacyPrediction | None) -> dict[str, Any] | None:
    """The prediction as plain values, for JSON."""
    return None if prediction is None else asdict(prediction)


def _noise_for(own: PrivacyParams, target: float, steps: int) -> NoiseLevel:
    found = calibrate_noise_multiplier(
        target, own.delta, sampling_probability=own.sampling_probability, num_steps=steps
    )
    return _level(own, found, steps, target=target)


def _level(own: PrivacyParams, noise_multiplier: float, steps: int, *, target: float | None = None) -> NoiseLevel:
    if noise_multiplier < MIN_NOISE_MULTIPLIER and target is None:
        raise UnsupportedMechanism(
            f"noise multiplier {noise_multiplier:g}, wanted {MIN_NOISE_MULTIPLIER:g} or more",
            hint="with less noise epsilon is in the hundreds and promises nothing",
        )
    spend = PrivacySpend(replace(own, noise_multiplier=noise_multiplier), steps)
    return NoiseLevel(noise_multiplier, _finite(spend.epsilon()), _finite(spend.epsilon_rdp()), target)


def _round_cost(plan: Plan, own: PrivacyParams, number: int) -> RoundCost:
    spend = PrivacySpend(own, number * plan.spec.training.steps_per_round)
    site = plan.site_level.epsilon(number) if plan.site_level else None
    return RoundCost(number, spend.num_steps, _finite(spend.epsilon()), _finite(spend.epsilon_rdp()), site)


def _site_level(plan: Plan) -> SiteLevelCost | None:
    site = plan.site_level
    return SiteLevelCost(site.epsilon(plan.spec.training.rounds), site.delta, MECHANISM) if site else None


def _some_rounds(rounds: int) -> list[int]:
    """At most ``MAX_ROUNDS_SHOWN`` rounds, evenly spread, the first and the last among them.

    >>> _some_rounds(3), _some_rounds(20)
    ([1, 2, 3], [1, 5, 9, 12, 16, 20])
    """
    shown = min(rounds, MAX_ROUNDS_SHOWN)
    return sorted({round(1 + index * (rounds - 1) / max(shown - 1, 1)) for index in range(shown)})


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _counter(on_progress: OnProgress | None, total: int) -> Callable[[Any], Any]:
    """A function that hands its argument on, and tells that one more is found."""
    done = 0

    def count(found: Any) -> Any:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)
        return found

    return count
