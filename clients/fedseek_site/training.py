"""Training: the part of a round that touches records. What it gives back has been made private, where the plan says so.

evaluate on held-back rows -> train -> updates of the shared scopes, new weights of a head that stays at home
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedseek.apply import ScopeState
from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.guards import check_metrics
from fedseek.encode import Float32Vector, Slots, encode_update
from fedseek.evaluate import Evaluation, evaluate
from fedseek.prepare import HELD_BACK_METRICS, prepare_settings
from fedseek.site_noise import encode_noised
from fedseek.train import train_round
from fedseek_site.canary_audit import expected_units, training_records
from fedseek_site.run import SiteRun
from fedseek_site.state import SiteState
from fedseek_site.weights import load_weights, model_vectors


@dataclass(frozen=True, slots=True)
class LocalWork:
    """What a round of training came to.

    Attributes:
        scopes: the weights to go on from: those the round began with, but for a head at home, which has moved.
        updates: trained minus initial, by shared scope, shape (num_values,) each.
        steps_done: of the run so far, counted one by one.
        steps_accounted: of the run so far, as the accountant knows them.
        guards_passed: of the run so far, sorted.
    """

    scopes: Mapping[str, ScopeState] = field(repr=False)
    updates: Mapping[str, Float32Vector] = field(repr=False)
    steps_done: int
    steps_accounted: int
    guards_passed: tuple[str, ...]


def spend_of(run: SiteRun, steps: int) -> PrivacySpend | None:
    """What ``steps`` steps cost; None when the plan promises nothing."""
    return PrivacySpend(run.plan.privacy, steps) if run.plan.privacy else None


def evaluate_weights(run: SiteRun, scopes: Mapping[str, ScopeState], *, number: int) -> Evaluation:
    """Evaluate the weights after round ``number`` on this site's held-back rows."""
    load_weights(run.model, scopes)
    evaluation = evaluate(run.model, run.held_back, metric=run.plan.spec.kinds[run.identity.kind].metric)
    loss = evaluation.loss_sum / max(evaluation.count, 1)
    run.observe({"event": "utility", "round": number, "utility": evaluation.utility, "loss": loss})
    return evaluation


def train(run: SiteRun, state: SiteState, scopes: Mapping[str, ScopeState], *, number: int) -> LocalWork:
    """Train round ``number`` from ``scopes``, on the site's records and the canaries that are in.

    Raises:
        BudgetExceeded: the site's policy allows no such spend; nothing was trained.
        GuardTripped: the privacy guarantee does not hold, or a metric is of training rows; nothing may be sent.
    """
    load_weights(run.model, scopes)
    run.spend(number, run.plan.spec.training.steps_per_round)  # on the disk first, whatever comes of the training
    outcome = train_round(
        run.model,
        training_records(run, state),
        settings=prepare_settings(run.plan),
        privacy=run.plan.privacy,
        spend=spend_of(run, state.steps_accounted),
        steps_before=state.steps_done,
        expected_units=expected_units(run, state),
        on_step=lambda step, of: run.observe({"event": "step", "round": number, "step": step, "of": of}),
    )
    trained = model_vectors(run.model, run.layouts)
    at_home = {
        scope: ScopeState(held.layout, trained[scope], held.momentum, held.value_range)
        for scope, held in scopes.items()
        if scope not in run.shared
    }
    return LocalWork(
        scopes={**scopes, **at_home},
        updates={scope: trained[scope] - scopes[scope].weights for scope in run.shared},
        steps_done=state.steps_done + outcome.num_steps,
        steps_accounted=outcome.spend.num_steps if outcome.spend else 0,
        guards_passed=tuple(sorted({*state.guards_passed, *outcome.guards_passed, *_metric_guards(run)})),
    )


def has_steps_left(run: SiteRun, state: SiteState) -> bool:
    """Whether a round more stays within the steps that the plan's epsilon was computed for."""
    steps = state.steps_accounted + run.plan.spec.training.steps_per_round
    return run.plan.privacy is None or steps <= run.plan.total_steps


def rest(run: SiteRun, state: SiteState, held: Mapping[str, ScopeState], *, scopes: Sequence[str]) -> LocalWork:
    """Nothing is trained; the updates of ``scopes`` are zeros, for the metrics to ride on."""
    return LocalWork(
        scopes=held,
        updates={scope: np.zeros(run.layouts[scope].num_values, np.float32) for scope in scopes},
        steps_done=state.steps_done,
        steps_accounted=state.steps_accounted,
        guards_passed=tuple(sorted({*state.guards_passed, *_metric_guards(run)})),
    )


def encode(
    run: SiteRun, updates: Mapping[str, Float32Vector], scopes: Mapping[str, ScopeState], evaluation: Evaluation
) -> tuple[dict[str, Slots], tuple[str, ...]]:
    """The updates as numbers that add, with the metrics of held-back rows beside those of a head.

    Returns:
        Slots by scope, and the guards of site-level privacy that held; none where the plan has no such guarantee.

    Raises:
        GuardTripped: the update is too long, or its share of noise is missing; nothing may be sent.
    """
    cap = run.plan.weight_cap
    # units: the guarantee holds given their number, and a unit's own records must not show in how much its site counts
    weight = run.train_records.num_units if run.plan.spec.cohort.weighting == "records" else 1
    metrics = dict(
        zip(
            HELD_BACK_METRICS,
            (evaluation.score, evaluation.weight, evaluation.loss_sum, evaluation.count),
            strict=True,
        )
    )
    packing, params = run.plan.packing, run.plan.site_level
    if params is not None:
        return encode_noised(updates, run.layouts, params=params, packing=packing, metrics=metrics)
    slots = {
        scope: encode_update(
            update,
            scopes[scope].layout,
            packing=packing,
            value_range=scopes[scope].value_range,
            weight=min(weight, cap),
            weight_cap=cap,
            metrics=metrics if scopes[scope].layout.metrics else {},
        )
        for scope, update in updates.items()
    }
    return slots, ()


def _metric_guards(run: SiteRun) -> frozenset[str]:
    """Names of the checks that hold for the metrics about to be sent; none where none are sent.

    Raises:
        GuardTripped: one of them was computed on training rows.
    """
    names = {name for scope in run.shared for name in run.layouts[scope].metrics}
    return frozenset({check_metrics(names, private=True)}) if names and run.plan.privacy else frozenset()
