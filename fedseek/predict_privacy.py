"""Predict what a plan costs in privacy: the noise for an epsilon, the epsilon for a noise, and how epsilon grows by round.

All of it follows from the plan's stages (sampling probability, steps) and delta: no model, no data, no tensors. Each
epsilon is given by both accountants, PLD (the one that is stated) and RDP (a second opinion, looser).

With two stages, epsilon is that of both together. The noise for an epsilon is that of a plan that asks for it and splits it
alike. A noise that is given is that of the last stage; the other's is scaled by as much as that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.composition import RunSpend, calibrate_stages
from fedseek.dp.site_level import MECHANISM
from fedseek.errors import UnsupportedMechanism
from fedseek.plan import Plan
from fedseek.plan_stages import stage_shapes

TARGET_EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
AROUND_THE_PLANS = (0.8, 1.25, 2.0)
"""Noise multipliers to look at, in units of the plan's."""
MIN_NOISE_MULTIPLIER = 0.3  # below it epsilon is in the hundreds, and takes gigabytes to find
MAX_ROUNDS_SHOWN = 6

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class StagePace:
    """What of a stage its privacy follows from, beside its noise.

    Attributes:
        rounds, steps_per_round, num_steps: of the stage; its steps are the product of the first two.
        sampling_probability: of a unit in a step.
    """

    rounds: int
    steps_per_round: int
    num_steps: int
    sampling_probability: float


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """Noise multipliers and what the whole run costs with them.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by the clip norm; of the last stage.
        noise_multipliers: of all stages, in the order of training.
        epsilon: by PLD, what would be stated; None where no bound is found.
        epsilon_rdp: by RDP; None where no bound is found.
        target_epsilon: the noise is the least for this; None where the noise was given.
    """

    noise_multiplier: float
    noise_multipliers: tuple[float, ...]
    epsilon: float | None
    epsilon_rdp: float | None
    target_epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class RoundCost:
    """What is spent when a round is over; ``stage`` counts from 1."""

    round: int
    stage: int
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
        stages: in the order of training.
        num_steps: of the run.
        delta: the delta of (epsilon, delta).
        plan: the plan's own noise.
        noise_for_epsilon: the least noise for each epsilon asked for.
        epsilon_for_noise: the epsilon of each noise asked for.
        by_round: some rounds, the first and the last of each stage among them.
        site_level: None when the plan has no guarantee for whole sites.
    """

    stages: tuple[StagePace, ...]
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
        plan: its stages and delta.
        epsilons: find the least noise for each.
        noises: find the epsilon of each noise multiplier, of the last stage. When both are empty, some of each around the plan's.
        on_progress: told how many of how many figures are found.

    Returns:
        None when the plan promises nothing.

    Raises:
        UnsupportedMechanism: figures were asked for of a plan that promises nothing; or one is out of reach.

    Cost:
        About a second for each figure, more with thousands of steps; with two stages, 3 to 6 s for the noise of an epsilon.
    """
    if plan.privacy is None:
        if epsilons or noises:
            raise UnsupportedMechanism(
                'the plan\'s mechanism is "none": it has no delta, and no epsilon belongs to any noise',
                hint='give it privacy.mechanism = "dp-sgd", an epsilon and a delta',
            )
        return None
    own = _noise_of(plan)
    if not epsilons and not noises:
        epsilons = TARGET_EPSILONS
        around = (round(own[-1] * factor, 2) for factor in AROUND_THE_PLANS)
        noises = tuple(noise for noise in around if min(_scaled(own, noise)) >= MIN_NOISE_MULTIPLIER)
    ends = {number for stage in plan.stages for number in (stage.first_round, stage.first_round + stage.rounds - 1)}
    rounds = sorted(ends.union(_some_rounds(plan.rounds)))
    count = _counter(on_progress, 1 + len(epsilons) + len(noises) + len(rounds))
    return PrivacyPrediction(
        stages=tuple(
            StagePace(stage.rounds, stage.steps_per_round, stage.num_steps, stage.sampling_probability)
            for stage in plan.stages
        ),
        num_steps=plan.total_steps,
        delta=plan.privacy.delta,
        plan=count(_level(plan, own, target=plan.spec.privacy.epsilon)),
        by_round=tuple(count(_round_cost(plan, number)) for number in rounds),
        noise_for_epsilon=tuple(count(_noise_for(plan, epsilon, plan.privacy.delta)) for epsilon in epsilons),
        epsilon_for_noise=tuple(count(_level(plan, _scaled(own, noise))) for noise in noises),
        site_level=_site_level(plan),
    )


def privacy_document(prediction: PrivacyPrediction | None) -> dict[str, Any] | None:
    """The prediction as plain values, for JSON."""
    return None if prediction is None else asdict(prediction)


def _noise_of(plan: Plan) -> tuple[float, ...]:
    """The plan's own noise multipliers, one a stage."""
    return tuple(stage.privacy.noise_multiplier for stage in plan.stages if stage.privacy is not None)


def _scaled(own: Sequence[float], noise_multiplier: float) -> tuple[float, ...]:
    """Noise multipliers of which the last is this one, in proportion to the plan's own."""
    return tuple(each / own[-1] * noise_multiplier for each in own)


def _noise_for(plan: Plan, target: float, delta: float) -> NoiseLevel:
    return _level(plan, calibrate_stages(target, delta, stage_shapes(plan.spec)), target=target)


def _level(plan: Plan, noises: Sequence[float], *, target: float | None = None) -> NoiseLevel:
    if target is None and min(noises) < MIN_NOISE_MULTIPLIER:
        raise UnsupportedMechanism(
            f"noise multiplier {' and '.join(f'{noise:g}' for noise in noises)}, wanted {MIN_NOISE_MULTIPLIER:g} or more",
            hint="with less noise epsilon is in the hundreds and promises nothing",
        )
    spend = RunSpend(
        tuple(
            PrivacySpend(replace(stage.privacy, noise_multiplier=noise), stage.num_steps)
            for stage, noise in zip(plan.stages, noises, strict=True)
            if stage.privacy is not None
        )
    )
    return NoiseLevel(noises[-1], tuple(noises), _finite(spend.epsilon()), _finite(spend.epsilon_rdp()), target)


def _round_cost(plan: Plan, number: int) -> RoundCost:
    spend = plan.spend_after(number)
    assert spend is not None  # noqa: S101 -- the caller has looked
    site = plan.site_level.epsilon(number) if plan.site_level else None
    return RoundCost(
        round=number,
        stage=plan.stage_of(number).index + 1,
        steps=spend.num_steps,
        epsilon=_finite(spend.epsilon()),
        epsilon_rdp=_finite(spend.epsilon_rdp()),
        site_level_epsilon=site,
    )


def _site_level(plan: Plan) -> SiteLevelCost | None:
    site = plan.site_level
    return SiteLevelCost(site.epsilon(plan.rounds), site.delta, MECHANISM) if site else None


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
