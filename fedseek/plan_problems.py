"""What speaks against a plan although each of its fields is right by itself. Every problem is told, as one line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from fedseek.lora.methods import method_problems
from fedseek.lora.targets import FAMILIES
from fedseek.plan_spec import PlanSpec
from fedseek.plan_stages import sections

MAX_STEPS: Final = 100_000  # of a run; a plan from outside must not keep a site's accountant busy for hours
MAX_ROUNDS: Final = 10_000  # of a run; what messages have room for
ENCODERS: Final = frozenset({"bert"})
"""Families of models that see a text whole, and so predict no next token of it."""


def problems_between(spec: PlanSpec) -> list[str]:
    """Every way in which the parts of a plan do not fit each other; none for a plan that can be run."""
    return [
        *_kind_problems(spec),
        *_model_problems(spec),
        *_training_problems(spec),
        *_cohort_problems(spec),
        *_privacy_problems(spec),
        *site_problems(spec),
        *_release_problems(spec),
    ]


def _kind_problems(spec: PlanSpec) -> Iterator[str]:
    """What speaks against the kinds' tasks."""
    for kind, given in spec.kinds.items():
        if given.task == "classify":
            if given.metric == "auc" and len(given.labels) != 2:
                yield f"kinds.{kind}: metric auc wants exactly 2 labels, got {len(given.labels)}"
        else:
            if given.labels:
                yield f"kinds.{kind}.labels: given, but task {given.task} has none; remove them"
            if given.metric == "auc":
                yield f"kinds.{kind}: metric auc is of labels; wanted accuracy (of the next token) with task {given.task}"


def _model_problems(spec: PlanSpec) -> Iterator[str]:
    """What speaks against the adapter, as far as that can be said without the model."""
    lora, family = spec.lora, spec.model.family
    for problem in method_problems(lora.method, private=spec.privacy.mechanism != "none"):
        yield f"lora.method: got {lora.method!r}: {problem}"
    if lora.target_modules == "auto" and family not in FAMILIES:
        yield (
            f'lora.target_modules: "auto" wants model.family, one of {", ".join(sorted(FAMILIES))}; got {family!r}; or name '
            "the modules"
        )
    if family in ENCODERS:
        reason = f'and model.family "{family}" sees a text whole and predicts no next token; wanted a causal model'
        if spec.domain is not None:
            yield f"domain: its task is continue, {reason}"
        for kind, given in spec.kinds.items():
            if given.task != "classify":
                yield f"kinds.{kind}: its task is {given.task}, {reason}"


def _training_problems(spec: PlanSpec) -> Iterator[str]:
    """What speaks against rounds and steps."""
    found = sections(spec)
    steps = sum(section.rounds * section.steps_per_round for section in found.values())
    rounds = sum(section.rounds for section in found.values())
    named = ", ".join(found)
    if steps > MAX_STEPS:
        yield f"{named}: rounds x steps_per_round is {steps}, wanted at most {MAX_STEPS}"
    if rounds > MAX_ROUNDS:
        yield f"{named}: {rounds} rounds in all, wanted at most {MAX_ROUNDS}"
    for name, section in found.items():
        if section.warmup_steps > section.rounds * section.steps_per_round:
            yield (
                f"{name}.warmup_steps: {section.warmup_steps}, wanted at most the stage's "
                f"{section.rounds * section.steps_per_round} steps, or its learning rate is never reached"
            )
    if spec.training.max_gradient_norm is not None and spec.privacy.mechanism != "none":
        yield (
            "training.max_gradient_norm: given, but dp-sgd clips the gradient of each unit by itself, to "
            "privacy.l2_clip_norm, and a second clip would scale its noise; remove it"
        )
    if spec.training.early_stopping is not None and spec.privacy.site is not None:
        yield (
            "training.early_stopping: given, but a site's vote travels as a count without noise, which privacy.site does "
            "not cover; remove one of them"
        )


def _cohort_problems(spec: PlanSpec) -> Iterator[str]:
    cohort = spec.cohort
    if cohort.min_sites > cohort.max_sites:
        yield f"cohort: min_sites {cohort.min_sites} is above max_sites {cohort.max_sites}"
    if cohort.min_sites < cohort.colluders + 2:
        yield (
            f"cohort: min_sites {cohort.min_sites} with {cohort.colluders} colluders leaves fewer than 2 honest "
            f"sites in a sum; wanted min_sites of at least colluders + 2"
        )


def _privacy_problems(spec: PlanSpec) -> Iterator[str]:
    privacy = spec.privacy
    private = privacy.mechanism != "none"
    for field in ("epsilon", "delta"):
        given = getattr(privacy, field) is not None
        if private and not given:
            yield f"privacy.{field}: missing, but mechanism {privacy.mechanism} needs it"
        if given and not private:
            yield f'privacy.{field}: given, but mechanism "none" earns no guarantee; remove it'
    if privacy.max_records_per_unit is not None and all(task.unit == "record" for task in spec.kinds.values()):
        yield (
            'privacy.max_records_per_unit: given, but every kind\'s unit is "record", which has one; remove it, or protect '
            "a customer or patient"
        )
    if not private or privacy.delta is None:
        return
    for name, section in sections(spec).items():
        # With this delta, publishing whatever was drawn would do: no noise is called for, and none would be added.
        steps = section.rounds * section.steps_per_round
        drawn = -math.expm1(steps * math.log1p(-min(section.sampling_probability, 1 - 2**-53)))
        if privacy.delta >= drawn:
            yield (
                f"privacy.delta: {privacy.delta:g} is not below the chance {drawn:.3g} that a unit is drawn at all "
                f"in the steps of {name}; such a plan asks for no noise"
            )


def site_problems(spec: PlanSpec) -> Iterator[str]:
    """What speaks against the guarantee for whole sites, besides its noise."""
    site, cohort = spec.privacy.site, spec.cohort
    if site is None:
        return
    if spec.privacy.mechanism == "none":
        yield 'privacy.site: given, but mechanism "none" protects no record; wanted mechanism "dp-sgd" beside it'
    if cohort.weighting != "equal":
        yield (
            f'cohort.weighting: "{cohort.weighting}" sends what each site weighs, without noise; wanted "equal" with '
            "privacy.site"
        )
    if cohort.min_contributors <= cohort.colluders:
        yield (
            f"cohort.min_contributors: {cohort.min_contributors} with {cohort.colluders} colluders leaves a head without "
            "noise that nobody knows; wanted at least colluders + 1 with privacy.site"
        )
    if site.delta * cohort.max_sites >= 1:
        yield f"privacy.site.delta: {site.delta:g} is not below 1 / max_sites, which would permit publishing one site outright"


def _release_problems(spec: PlanSpec) -> Iterator[str]:
    approvals, cohort = spec.release.min_approvals, spec.cohort
    if approvals is not None and not cohort.min_sites <= approvals <= cohort.max_sites:
        yield f"release.min_approvals: {approvals}, wanted min_sites {cohort.min_sites} to max_sites {cohort.max_sites}"
