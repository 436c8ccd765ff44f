"""The stages of a plan: rounds that are trained alike, each with its own task, pace, learning rates and noise.

    [domain]     first, if there is one: every kind goes on with the next token of its own texts
    [training]   then each kind's own task

The noise of both is sized together: what they cost in privacy is their composition, not a sum (ADR 25).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedseek.dp.accounting import PrivacyParams
from fedseek.dp.composition import StageShape, calibrate_stages
from fedseek.plan_spec import DomainSpec, PlanSpec, TrainingSpec


@dataclass(frozen=True, slots=True)
class Stage:
    """Rounds that are trained alike.

    Attributes:
        index: from 0.
        task: of all kinds, as in a domain stage; None: each kind's own.
        first_round: number of its first round; the run's first is 1.
        rounds: of this stage.
        steps_per_round, sampling_probability, learning_rate, head_learning_rate, warmup_steps: as in the plan.
        privacy: DP-SGD parameters of its steps, or None when the plan promises nothing.
    """

    index: int
    task: Literal["continue"] | None
    first_round: int
    rounds: int
    steps_per_round: int
    sampling_probability: float
    learning_rate: float
    head_learning_rate: float
    warmup_steps: int
    privacy: PrivacyParams | None

    @property
    def num_steps(self) -> int:
        """Of the stage."""
        return self.rounds * self.steps_per_round

    def rounds_until(self, number: int) -> int:
        """How many of its rounds there are up to round ``number`` of the run."""
        return min(max(number - self.first_round + 1, 0), self.rounds)


def sections(spec: PlanSpec) -> dict[str, DomainSpec | TrainingSpec]:
    """The table of each stage, by its name in the plan, in the order of training."""
    domain: dict[str, DomainSpec | TrainingSpec] = {} if spec.domain is None else {"domain": spec.domain}
    return {**domain, "training": spec.training}


def stages_of(spec: PlanSpec) -> tuple[Stage, ...]:
    """The stages, with the noise that keeps all of them together within the plan's epsilon.

    Raises:
        UnsupportedMechanism: there is none.

    Cost:
        About 1 s with one stage and dp-sgd, 3 to 6 s with two; then cached.
    """
    found: list[Stage] = []
    for section, privacy in zip(sections(spec).values(), _privacy_params(spec), strict=True):
        own = isinstance(section, TrainingSpec)
        head_rate = section.head_learning_rate if isinstance(section, TrainingSpec) else None
        found.append(
            Stage(
                index=len(found),
                task=None if own else "continue",
                first_round=1 + sum(before.rounds for before in found),
                rounds=section.rounds,
                steps_per_round=section.steps_per_round,
                sampling_probability=section.sampling_probability,
                learning_rate=section.learning_rate,
                head_learning_rate=head_rate or section.learning_rate,
                warmup_steps=section.warmup_steps,
                privacy=privacy,
            )
        )
    return tuple(found)


def stage_shapes(spec: PlanSpec) -> tuple[StageShape, ...]:
    """What of each stage fixes its noise."""
    share = 0.0 if spec.domain is None else spec.domain.budget_share
    return tuple(
        StageShape(
            share=1 - share if isinstance(section, TrainingSpec) else share,
            sampling_probability=section.sampling_probability,
            num_steps=section.rounds * section.steps_per_round,
        )
        for section in sections(spec).values()
    )


def _privacy_params(spec: PlanSpec) -> tuple[PrivacyParams | None, ...]:
    privacy, shapes = spec.privacy, stage_shapes(spec)
    if privacy.epsilon is None or privacy.delta is None:
        return (None,) * len(shapes)
    return tuple(
        PrivacyParams(
            noise_multiplier=noise_multiplier,
            sampling_probability=shape.sampling_probability,
            delta=privacy.delta,
            l2_clip_norm=privacy.l2_clip_norm,
        )
        for noise_multiplier, shape in zip(
            calibrate_stages(privacy.epsilon, privacy.delta, shapes), shapes, strict=True
        )
    )
