"""Training: the part of a round that touches records. What it gives back has been made private, where the plan says so.

evaluate on held-back rows -> train -> updates of the shared scopes, new weights of a head that stays at home
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedseek.apply import ScopeState
from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.guards import check_metrics
from fedseek.encode import Float32Vector, Slots, encode_update
from fedseek.errors import GuardTripped
from fedseek.evaluate import Evaluation, evaluate, token_budget, vocabulary_of
from fedseek.lora.model import set_trainable
from fedseek.plan_stages import Stage
from fedseek.prepare import prepare_settings
from fedseek.progress import take_values, trained_tensors
from fedseek.records import TokenisedRecords
from fedseek.site_noise import encode_noised
from fedseek.train import TrainingOutcome, train_round
from fedseek_site.canary_audit import expected_units, training_records
from fedseek_site.checkpoints import Beginning
from fedseek_site.run import SiteRun
from fedseek_site.state import SiteState
from fedseek_site.weights import load_weights, model_vectors


@dataclass(frozen=True, slots=True)
class LocalWork:
    """What a round of training came to.

    Attributes:
        scopes: the weights to go on from: those the round began with, but for a head at home, which has moved.
        updates: trained minus initial, by shared scope, shape (num_values,) each.
        steps_done: of the run so far, by stage, counted one by one.
        steps_accounted: of the run so far, by stage, as the accountant knows them; zeros when the plan promises nothing.
        guards_passed: of the run so far, sorted.
    """

    scopes: Mapping[str, ScopeState] = field(repr=False)
    updates: Mapping[str, Float32Vector] = field(repr=False)
    steps_done: tuple[int, ...]
    steps_accounted: tuple[int, ...]
    guards_passed: tuple[str, ...]


def evaluate_weights(run: SiteRun, scopes: Mapping[str, ScopeState], *, number: int) -> Evaluation:
    """Evaluate the weights after round ``number`` on this site's held-back rows.

    The task is that of the round to come, and after the last round the kind's own: what a domain stage made is measured on
    what it was made for.
    """
    load_weights(run.model, scopes)
    task, records = run.task_in(number + 1), run.held_back_in(number + 1)
    told: dict[str, Any] = {"event": "utility", "round": number, "task": task}
    if task == "classify":
        evaluation = evaluate(run.model, records, metric=run.plan.spec.kinds[run.identity.kind].metric)
    else:
        budget = token_budget(run.plan.packing, vocabulary_of(run.model))
        evaluation = evaluate(run.model, records, max_tokens=budget)
        told |= {"perplexity": evaluation.perplexity, "tokens": evaluation.count}
    run.observe({**told, "utility": evaluation.utility, "loss": evaluation.mean_loss})
    return evaluation


def train(run: SiteRun, state: SiteState, scopes: Mapping[str, ScopeState], *, number: int) -> LocalWork:
    """Train round ``number`` from ``scopes``, on the site's records and the canaries that are in.

    Raises:
        BudgetExceeded: the site's policy allows no such spend; nothing was trained.
        GuardTripped: the privacy guarantee does not hold, or a metric is of training rows; nothing may be sent.
    """
    stage, records = run.plan.stage_of(number), training_records(run, state, number=number)
    load_weights(run.model, scopes)
    set_trainable(run.model, method=run.plan.spec.lora.method, task=run.task_in(number), number=number)
    beginning = Beginning.of(
        run.name,
        number,
        stage.steps_per_round,
        plan=run.plan.digest,
        records=records,
        first=take_values(trained_tensors(run.model)),
    )
    run.spend(number, stage.steps_per_round)  # on the disk first, whatever comes of the training
    outcome = _train_from(run, state, records, beginning)
    trained = model_vectors(run.model, run.layouts)
    at_home = {
        scope: ScopeState(held.layout, trained[scope], held.momentum, held.value_range)
        for scope, held in scopes.items()
        if scope not in run.shared
    }
    return LocalWork(
        scopes={**scopes, **at_home},
        updates={scope: trained[scope] - scopes[scope].weights for scope in run.shared},
        steps_done=_with(state.steps_done, stage, state.steps_done[stage.index] + outcome.num_steps),
        steps_accounted=_with(state.steps_accounted, stage, outcome.spend.num_steps if outcome.spend else 0),
        guards_passed=tuple(sorted({*state.guards_passed, *outcome.guards_passed, *_metric_guards(run)})),
    )


def _train_from(run: SiteRun, state: SiteState, records: TokenisedRecords, beginning: Beginning) -> TrainingOutcome:
    """Train the round, or what a process that was killed in it has left of it; the spend of the round is one."""
    number, stage = beginning.round, run.plan.stage_of(beginning.round)
    train_here = train_round if run.several is None else run.several.train_round
    try:
        return train_here(
            run.model,
            records,
            settings=prepare_settings(run.plan, number),
            privacy=stage.privacy,
            spend=PrivacySpend(stage.privacy, state.steps_accounted[stage.index]) if stage.privacy else None,
            steps_before=state.steps_done[stage.index],
            expected_units=expected_units(run, state, number=number),
            on_step=lambda step, of: run.observe({"event": "step", "round": number, "step": step, "of": of}),
            resume=run.checkpoints.find(beginning),
            on_progress=run.checkpoints.keeper(beginning),
        )
    except GuardTripped:
        run.checkpoints.remove()  # what it holds has no guarantee
        raise


def has_steps_left(run: SiteRun, state: SiteState, *, number: int) -> bool:
    """Whether round ``number`` stays within the steps of its stage, which the plan's epsilon was computed for."""
    stage = run.plan.stage_of(number)
    return stage.privacy is None or state.steps_accounted[stage.index] + stage.steps_per_round <= stage.num_steps


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
    run: SiteRun,
    updates: Mapping[str, Float32Vector],
    scopes: Mapping[str, ScopeState],
    metrics: Mapping[str, float],
    *,
    number: int,
) -> tuple[dict[str, Slots], tuple[str, ...]]:
    """The updates as numbers that add, each with those metrics of held-back rows beside it that its layout names.

    Returns:
        Slots by scope, and the guards of site-level privacy that held; none where the plan has no such guarantee.

    Raises:
        GuardTripped: the update is too long, or its share of noise is missing; nothing may be sent.
    """
    cap = run.plan.weight_cap
    # units: the guarantee holds given their number, and a unit's own records must not show in how much its site counts
    weight = run.train_in(number).num_units if run.plan.spec.cohort.weighting == "records" else 1
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
            metrics={name: metrics[name] for name in scopes[scope].layout.metrics},
        )
        for scope, update in updates.items()
    }
    return slots, ()


def _with(steps: tuple[int, ...], stage: Stage, now: int) -> tuple[int, ...]:
    """Steps by stage, those of one of them as they are now."""
    return (*steps[: stage.index], now, *steps[stage.index + 1 :])


def _metric_guards(run: SiteRun) -> frozenset[str]:
    """Names of the checks that hold for the metrics about to be sent; none where none are sent.

    Raises:
        GuardTripped: one of them was computed on training rows.
    """
    names = {name for scope in run.shared for name in run.layouts[scope].metrics}
    return frozenset({check_metrics(names, private=True)}) if names and run.plan.privacy else frozenset()
