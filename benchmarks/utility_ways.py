"""Four ways to train under one plan: federated, centralised, each site alone, and the head alone (federated).

Each is the product's own code: `fedseek.train.train_round` with the plan's noise, and between rounds the site's own
encoding and the sum's own decoding (`encode_update`, `decode_sum`, `apply_sums`). Left out is what is exact and so cannot
change a figure: masks and encryption, which give back the integer sum. Every site pays its own full noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from frozen_layers import HeadOnFeatures, TrainedPart

from fedseek.apply import ScopeState, apply_sums
from fedseek.dp.accounting import PrivacySpend
from fedseek.encode import Slots, UpdateLayout, decode_sum, encode_update
from fedseek.evaluate import Evaluation, evaluate
from fedseek.lora.model import AdapterModel, adapter_shapes, head_shapes
from fedseek.plan import GLOBAL_SCOPE, Plan, head_scope
from fedseek.prepare import prepare_settings
from fedseek.records import TokenisedRecords
from fedseek.train import train_round
from fedseek_site.weights import load_weights, model_vectors, start_scopes

Model = AdapterModel | TrainedPart | HeadOnFeatures


@dataclass(frozen=True, slots=True)
class SiteRecords:
    """A site's rows, as the model reads them."""

    train: TokenisedRecords = field(repr=False)
    held_back: TokenisedRecords = field(repr=False)


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of one way.

    Attributes:
        utility: over the held-back rows of all sites (for an AUC, over their pairs), as a release gate sees it.
        by_site: the same at each site.
        epsilon: that a unit paid at most.
    """

    utility: float
    by_site: tuple[float, ...]
    epsilon: float


def federated(model: Model, plan: Plan, kind: str, sites: Sequence[SiteRecords]) -> Figures:
    """The plan's rounds: every site trains under its own noise, then the quantised updates are summed and applied."""
    layouts = layouts_of(kind, model)
    scopes = start_scopes(plan, layouts, model)
    spends: list[PrivacySpend | None] = [None] * len(sites)
    steps = plan.spec.training.steps_per_round
    for done in range(plan.spec.training.rounds):
        summed: dict[str, Slots] = {}
        for number, site in enumerate(sites):
            load_weights(model, scopes)
            spends[number] = train_round(
                model,
                site.train,
                settings=prepare_settings(plan, 1),
                privacy=plan.privacy,
                spend=spends[number],
                steps_before=done * steps,
            ).spend
            for scope, slots in _encoded(plan, model, scopes, num_records=len(site.train)).items():
                summed[scope] = summed[scope] + slots if scope in summed else slots
        scopes = _applied(plan, scopes, summed)
    load_weights(model, scopes)
    return _figures(_evaluations(model, plan, kind, sites), spends)


def centralised(model: Model, plan: Plan, kind: str, sites: Sequence[SiteRecords]) -> Figures:
    """One party that everybody gave all records to: one noise for all of them."""
    spend = _train_through(model, plan, pooled([site.train for site in sites]))
    return _figures(_evaluations(model, plan, kind, sites), [spend])


def local_only(model: Model, plan: Plan, kind: str, sites: Sequence[SiteRecords]) -> Figures:
    """Every site by itself, from the same first weights."""
    first = start_scopes(plan, layouts_of(kind, model), model)
    evaluations: list[Evaluation] = []
    spends: list[PrivacySpend | None] = []
    for site in sites:
        load_weights(model, first)
        spends.append(_train_through(model, plan, site.train))
        evaluations += _evaluations(model, plan, kind, [site])
    return _figures(evaluations, spends)


def layouts_of(kind: str, model: Model) -> dict[str, UpdateLayout]:
    """Layouts without metrics, which are not summed here; a probe has no adapter and so no global scope."""
    shapes = {GLOBAL_SCOPE: adapter_shapes(model), head_scope(kind): head_shapes(model)}  # type: ignore[arg-type]
    return {scope: UpdateLayout(scope, tensors) for scope, tensors in shapes.items() if tensors}


def pooled(sites: Sequence[TokenisedRecords]) -> TokenisedRecords:
    """Everybody's records; no unit of one site is a unit of another."""
    firsts = np.cumsum([0, *(site.num_units for site in sites)])
    return TokenisedRecords(
        input_ids=[ids for site in sites for ids in site.input_ids],
        labels=np.concatenate([site.labels for site in sites]),
        units=np.concatenate([site.units + first for site, first in zip(sites, firsts, strict=False)]),
    )


def _train_through(model: Model, plan: Plan, records: TokenisedRecords) -> PrivacySpend | None:
    """All steps of the plan in one go: without sums between them, nothing makes the optimiser start over."""
    settings = replace(prepare_settings(plan, 1), num_steps=plan.total_steps)
    return train_round(model, records, settings=settings, privacy=plan.privacy).spend


def _encoded(plan: Plan, model: Model, before: dict[str, ScopeState], *, num_records: int) -> dict[str, Slots]:
    """What a site would encrypt: its update of each scope, weighted, rounded and packed as the plan says."""
    trained = model_vectors(model, {scope: held.layout for scope, held in before.items()})  # type: ignore[arg-type]
    weight = num_records if plan.spec.cohort.weighting == "records" else 1
    return {
        scope: encode_update(
            trained[scope] - held.weights,
            held.layout,
            packing=plan.packing,
            value_range=held.value_range,
            weight=min(weight, plan.weight_cap),
            weight_cap=plan.weight_cap,
            metrics={},
        )
        for scope, held in before.items()
    }


def _applied(plan: Plan, before: dict[str, ScopeState], summed: dict[str, Slots]) -> dict[str, ScopeState]:
    opened = {
        scope: decode_sum(
            slots,
            before[scope].layout,
            packing=plan.packing,
            value_range=before[scope].value_range,
            weight_cap=plan.weight_cap,
        )
        for scope, slots in summed.items()
    }
    return apply_sums(before, opened, plan)


def _evaluations(model: Model, plan: Plan, kind: str, sites: Sequence[SiteRecords]) -> list[Evaluation]:
    """On each site's held-back rows; rows that several sites share are looked at once."""
    metric = plan.spec.kinds[kind].metric
    by_rows = {id(site.held_back): site.held_back for site in sites}
    found = {key: evaluate(model, rows, metric=metric, batch_size=128) for key, rows in by_rows.items()}
    return [found[id(site.held_back)] for site in sites]


def _figures(evaluations: Sequence[Evaluation], spends: Sequence[PrivacySpend | None]) -> Figures:
    return Figures(
        utility=sum(each.score for each in evaluations) / sum(each.weight for each in evaluations),
        by_site=tuple(each.utility for each in evaluations),
        epsilon=max(spend.epsilon() if spend else 0.0 for spend in spends),
    )
