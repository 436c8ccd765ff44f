"""Ways to fine-tune a small language model on the sites of a scenario: federated, each site alone, LoRA and all weights.

Each is the product's own code: the plan's stages and noise, `fedseek.train.train_round`, and between rounds the site's
own encoding and the sum's own decoding. Left out is what is exact and so cannot change a figure: masks and encryption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedseek.apply import ScopeState, apply_sums, enter_stage
from fedseek.dp.accounting import PrivacySpend
from fedseek.dp.composition import composed_epsilon
from fedseek.encode import UpdateLayout, decode_sum, encode_update
from fedseek.evaluate import evaluate, token_budget, vocabulary_of
from fedseek.lora.load import load_base
from fedseek.lora.model import AdapterModel, LoraParams, adapter_shapes, build_model, set_trainable
from fedseek.lora.source import locate_model
from fedseek.plan import GLOBAL_SCOPE, Plan, check_plan, parse_spec
from fedseek.prepare import prepare_model, prepare_settings
from fedseek.records import TokenisedRecords
from fedseek.tokenise import tokenise
from fedseek.train import train_round
from fedseek_site.weights import load_weights, model_vectors, start_scopes
from simulations.baselines import together
from simulations.scenario import Scenario, read_site_data


@dataclass(frozen=True, slots=True)
class SiteTexts:
    """A site's rows as the model reads them: for each task to train on, and held back for its own task."""

    name: str
    train: Mapping[str, TokenisedRecords] = field(repr=False)
    held_back: TokenisedRecords = field(repr=False)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one way.

    Attributes:
        before, after: by site, nats a counted token of its held-back rows, before training and after.
        lowest: the same after the round that was best for the site; known only where rounds were looked at.
        accuracy: by site, of those tokens, after.
        epsilon_paid: by a record at most, 0 without privacy.
        trained, values: tensors' values that were trained, and those of the base model.
    """

    before: dict[str, float]
    after: dict[str, float]
    lowest: dict[str, float]
    accuracy: dict[str, float]
    epsilon_paid: float
    trained: int
    values: int


def plan_with(scenario: Scenario, **changes: Mapping[str, Any]) -> Plan:
    """The scenario's plan with fields of its tables replaced; a table of None is left out."""
    table = scenario.plan.spec.model_dump(mode="json", exclude_none=True)
    for name, fields in changes.items():
        table[name] = {**table.get(name, {}), **fields}
    return check_plan(parse_spec(table, source="benchmark"))


def read_sites(scenario: Scenario, plan: Plan) -> list[SiteTexts]:
    """The rows of the scenario's sites."""
    folder, cut = locate_model(plan.spec.model.source), plan.spec.model.max_tokens
    sites = []
    for spec in scenario.spec.sites:
        data = read_site_data(scenario, spec)
        own = plan.spec.kinds[spec.kind].task
        train = {task: tokenise(data.train, folder, task=task, max_tokens=cut) for task in {own, "continue"}}
        held_back = tokenise(data.held_back, folder, task=own, max_tokens=cut)
        sites.append(SiteTexts(spec.name, {**train, "own": train[own]}, held_back))
    return sites


def federated(plan: Plan, sites: Sequence[SiteTexts], *, seed: int) -> Found:
    """The plan's rounds: every site trains under its own noise, then the quantised updates are summed and applied."""
    model = _adapter(plan)
    before = _losses(plan, model, sites)
    layout = UpdateLayout(GLOBAL_SCOPE, adapter_shapes(model))
    scopes = start_scopes(plan, {GLOBAL_SCOPE: layout}, model)
    spends: dict[str, list[PrivacySpend]] = {site.name: [] for site in sites}
    for number in range(1, plan.rounds + 1):
        scopes = enter_stage(scopes, plan, number)
        slots = []
        for site in sites:
            load_weights(model, scopes)
            _train(plan, model, site, number, spends[site.name], seed)
            slots.append(_encoded(plan, model, scopes[GLOBAL_SCOPE]))
        held = scopes[GLOBAL_SCOPE]
        opened = decode_sum(
            sum(slots[1:], start=slots[0]), layout, packing=plan.packing, value_range=held.value_range, weight_cap=1
        )
        scopes = apply_sums(scopes, {GLOBAL_SCOPE: opened}, plan)
    load_weights(model, scopes)
    return _found(plan, model, sites, before, list(spends.values()))


def local_only(plan: Plan, sites: Sequence[SiteTexts], *, seed: int) -> Found:
    """Every site by itself from the same first weights, for the same stages, rounds and steps."""
    parts = []
    for site in sites:
        model, spends = _adapter(plan), list[PrivacySpend]()
        losses = []
        for number in range(1, plan.rounds + 1):
            losses.append(_losses(plan, model, [site]))
            _train(plan, model, site, number, spends, seed)
        found = _found(plan, model, [site], losses[0], [spends])
        lowest = min(each[site.name] for each in [*losses, found.after])
        parts.append(replace(found, lowest={site.name: lowest}))
    return Found(
        before={name: loss for part in parts for name, loss in part.before.items()},
        after={name: loss for part in parts for name, loss in part.after.items()},
        lowest={name: loss for part in parts for name, loss in part.lowest.items()},
        accuracy={name: share for part in parts for name, share in part.accuracy.items()},
        epsilon_paid=max(part.epsilon_paid for part in parts),
        trained=parts[0].trained,
        values=parts[0].values,
    )


def pooled(plan: Plan, sites: Sequence[SiteTexts], *, seed: int, full: bool = False) -> Found:
    """All sites' answers in one place, in one go: the adapter, or with ``full`` all weights of the model.

    A plan may not ask for full fine-tuning, as nothing could be released; it is here to be compared with.
    """
    model = _whole(plan) if full else _adapter(plan)
    before = _losses(plan, model, sites)
    stage = plan.stages[-1]
    set_trainable(model, method="full" if full else plan.spec.lora.method, task="continue", number=1)
    rate = len(sites)  # as many records a step as one site takes, not as all of them
    settings = prepare_settings(plan, stage.first_round)
    settings = replace(settings, num_steps=stage.num_steps, sampling_probability=settings.sampling_probability / rate)
    records = together([site.train["own"] for site in sites])
    train_round(model, records, settings=settings, privacy=None, seed=seed)
    return _found(plan, model, sites, before, [])


def _adapter(plan: Plan) -> AdapterModel:
    kind = next(iter(plan.spec.kinds))
    return prepare_model(plan, kind, load_base(_folder(plan), words=True))


def _whole(plan: Plan) -> AdapterModel:
    params = LoraParams("full", rank=1, alpha=1.0, target_modules=plan.target_modules, layers=None, seed=0)
    return build_model(load_base(_folder(plan), words=True), params, num_labels=None, head_seed=0)


def _folder(plan: Plan) -> Path:
    return locate_model(plan.spec.model.source)


def _train(
    plan: Plan, model: AdapterModel, site: SiteTexts, number: int, spends: list[PrivacySpend], seed: int
) -> None:
    """One round at one site; ``spends`` has one entry a stage, and gets this round's."""
    stage = plan.stage_of(number)
    set_trainable(model, method=plan.spec.lora.method, task="continue", number=number)
    if stage.privacy is not None and len(spends) == stage.index:
        spends.append(PrivacySpend(stage.privacy))
    outcome = train_round(
        model,
        site.train[stage.task or "own"],
        settings=prepare_settings(plan, number),
        privacy=stage.privacy,
        spend=spends[stage.index] if stage.privacy else None,
        steps_before=(number - stage.first_round) * stage.steps_per_round,
        seed=None if stage.privacy else _seed_of(seed, site.name, number),
    )
    if outcome.spend is not None:
        spends[stage.index] = outcome.spend


def _seed_of(seed: int, site: str, number: int) -> int:
    return int(np.random.default_rng([seed, number, *site.encode()]).integers(2**31))


def _encoded(plan: Plan, model: AdapterModel, held: ScopeState) -> Any:
    trained = model_vectors(model, {GLOBAL_SCOPE: held.layout})[GLOBAL_SCOPE]
    return encode_update(
        trained - held.weights,
        held.layout,
        packing=plan.packing,
        value_range=held.value_range,
        weight=1,
        weight_cap=1,
        metrics={},
    )


def _losses(plan: Plan, model: AdapterModel, sites: Sequence[SiteTexts]) -> dict[str, float]:
    budget = token_budget(plan.packing, vocabulary_of(model))
    return {site.name: evaluate(model, site.held_back, max_tokens=budget).mean_loss for site in sites}


def _found(
    plan: Plan,
    model: AdapterModel,
    sites: Sequence[SiteTexts],
    before: dict[str, float],
    spends: Sequence[Sequence[PrivacySpend]],
) -> Found:
    budget = token_budget(plan.packing, vocabulary_of(model))
    results = {site.name: evaluate(model, site.held_back, max_tokens=budget) for site in sites}
    delta = plan.spec.privacy.delta
    paid = [composed_epsilon(each, delta) for each in spends if each and delta is not None]
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    return Found(
        before=before,
        after={name: result.mean_loss for name, result in results.items()},
        lowest={},
        accuracy={name: result.utility for name, result in results.items()},
        epsilon_paid=max(paid, default=0.0),
        trained=sum(count for name, count in sizes.items() if name in model.trained),
        values=sum(count for name, count in sizes.items() if ".lora_" not in name),
    )
