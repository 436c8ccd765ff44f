"""Collect what sites and coordinator reported into ``summary.json`` and ``metrics.jsonl``."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from fedseek.daemon.reports import Event, read_events
from fedseek.he.params import noise_budget_bits
from fedseek.plan import Plan
from simulations.events import coordinator_log, site_log
from simulations.scenario import Scenario
from simulations.summary import (
    AnswerScores,
    Baselines,
    CoordinatorRound,
    Encryption,
    ModelFacts,
    PeakMemory,
    PhaseTotals,
    Privacy,
    ReleaseFacts,
    Round,
    SiteAnswers,
    SiteFacts,
    SitePhases,
    SiteRound,
    StageFacts,
    StagePrivacy,
    Summary,
    Totals,
)
from simulations.verdicts import with_verdicts

VERSIONED = ("fedseek", "flwr", "torch", "transformers", "peft", "opacus", "tenseal", "cryptography")
PHASES = ("train", "encode", "tag", "mask", "encrypt", "shares", "decrypt", "apply", "evaluate")
ROUND_PHASES = ("round", "unmask")


def collect_summary(folder: Path, scenario: Scenario, baselines: Baselines) -> Summary:
    """The record of the finished run in ``folder``; also writes its ``metrics.jsonl``."""
    reports = {site.name: list(read_events(site_log(folder, site.name))) for site in scenario.spec.sites}
    coordinator = list(read_events(coordinator_log(folder)))
    rounds = collect_rounds(scenario, reports, coordinator)
    write_metrics(folder / "metrics.jsonl", rounds)
    finished = last(coordinator, "finished")
    plan = scenario.plan
    values = {site: last(events, "layout")["num_values"] for site, events in reports.items()}
    return with_verdicts(
        Summary(
            run=folder.name,
            started_at=datetime.fromtimestamp(coordinator[0]["t"], UTC),
            finished_at=datetime.fromtimestamp(finished["t"], UTC),
            plan_digest=plan.digest,
            model=ModelFacts(name=plan.spec.model.source, sha256=plan.spec.model.sha256),
            scenario=scenario.name,
            versions={"python": python_version(), **{name: version(name) for name in VERSIONED}},
            sites=tuple(_site_facts(scenario, reports)),
            encryption=_encryption(plan, reports),
            privacy=_privacy(plan),
            rounds=tuple(rounds),
            stages=_stages(plan),
            baselines=baselines,
            answers=tuple(_answers(scenario, reports)),
            totals=_totals(plan, coordinator, rounds, values),
            peak_rss_mb=PeakMemory(coordinator=finished["coordinator_rss_mb"], site_max=finished["site_rss_mb"]),
            release=_release(folder, reports, values),
        )
    )


def collect_rounds(scenario: Scenario, reports: Mapping[str, list[Event]], coordinator: list[Event]) -> list[Round]:
    """Round 0 is the state before training; round r ends when its sum has been applied at every site."""
    rounds = []
    for number in range(scenario.plan.rounds + 1):
        sites = tuple(
            _site_round(scenario, site.name, site.kind, reports[site.name], number) for site in scenario.spec.sites
        )
        rounds.append(
            Round(
                round=number,
                seconds=_round_seconds(coordinator, number),
                sites=sites,
                coordinator=_coordinator_round(coordinator, number) if number else None,
                federated_utility=_utility_by_kind(scenario, reports, number),
            )
        )
    return rounds


def write_metrics(path: Path, rounds: Iterable[Round]) -> None:
    """One line a site and round, for scripts."""
    with path.open("w", encoding="utf-8") as stream:
        for entry in rounds:
            for site in entry.sites:
                stream.write(
                    json.dumps({"round": entry.round, **site.model_dump(mode="json")}, ensure_ascii=False) + "\n"
                )


def last(events: Iterable[Event], name: str) -> Event:
    """The last event of a name."""
    return [event for event in events if event["event"] == name][-1]


def _site_round(scenario: Scenario, site: str, kind: str, events: list[Event], number: int) -> SiteRound:
    utility = next((event for event in events if event["event"] == "utility" and event["round"] == number), None)
    work = next((event for event in events if event["event"] == "round" and event["round"] == number), None)
    applied = next((event for event in events if event["event"] == "applied" and event["round"] == number), None)
    seconds = work["seconds"] if work else {}
    return SiteRound(
        site=site,
        utility=utility["utility"] if utility else None,
        metric=scenario.plan.spec.kinds[kind].metric,
        task=utility.get("task", "classify") if utility else scenario.plan.task_in(kind, number + 1),
        loss=utility["loss"] if utility else None,
        perplexity=utility.get("perplexity") if utility else None,
        epsilon=work["epsilon"] if work else (0.0 if scenario.plan.privacy else None),
        bytes_up=work["bytes_up"] if work else 0,
        bytes_down=applied["bytes_down"] if applied else 0,
        saturated_fraction=applied["saturated_fraction"] if applied else None,
        seconds=SitePhases(**{phase: seconds.get(phase, 0.0) for phase in PHASES}),
    )


def _utility_by_kind(scenario: Scenario, reports: Mapping[str, list[Event]], number: int) -> dict[str, float]:
    """Mean of a kind's sites, each weighted by its held-back records."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for site in scenario.spec.sites:
        weight = last(reports[site.name], "data")["held_back_records"]
        event = next((e for e in reports[site.name] if e["event"] == "utility" and e["round"] == number), None)
        if event is None:  # away, or the round was given up
            continue
        sums[site.kind][0] += weight * event["utility"]
        sums[site.kind][1] += weight
    return {kind: total / weight for kind, (total, weight) in sums.items()}


def _round_seconds(coordinator: list[Event], number: int) -> float:
    """Wall time of a round at the coordinator: from its requests until its sum is ready to be sent."""
    opened = [e["t"] for e in coordinator if e["event"] == "phase" and e["phase"] == "round" and e["round"] == number]
    done = [e["t"] for e in coordinator if e["event"] in ("aggregated", "unmasked") and e["round"] == number]
    return max(done[-1] - opened[0], 0.0) if opened and done else 0.0


def _seconds_of(coordinator: list[Event], name: str, number: int) -> list[float]:
    return [event["seconds"] for event in coordinator if event["event"] == name and event["round"] == number]


def _coordinator_round(coordinator: list[Event], number: int) -> CoordinatorRound:
    replies = [e for e in coordinator if e["event"] == "reply" and e["round"] == number and e["phase"] in ROUND_PHASES]
    return CoordinatorRound(
        aggregate_s=sum(_seconds_of(coordinator, "aggregated", number)),
        unmask_s=sum(_seconds_of(coordinator, "unmasked", number)),
        survivors=sum(event.get("answer") == "UpdateReply" for event in replies),
        bytes_in=sum(event["bytes_in"] for event in replies),
        bytes_out=sum(event["bytes_out"] for event in replies),
    )


def _site_facts(scenario: Scenario, reports: Mapping[str, list[Event]]) -> Iterable[SiteFacts]:
    for site in scenario.spec.sites:
        data = last(reports[site.name], "data")
        yield SiteFacts(
            name=site.name,
            kind=site.kind,
            display_name=site.display_name or site.name,
            records=data["records"],
            held_back_records=data["held_back_records"],
            units=data["units"],
            task=scenario.plan.spec.kinds[site.kind].task,
        )


def _stages(plan: Plan) -> tuple[StageFacts, ...]:
    return tuple(
        StageFacts(
            task=stage.task,
            first_round=stage.first_round,
            rounds=stage.rounds,
            steps_per_round=stage.steps_per_round,
        )
        for stage in plan.stages
    )


def _answers(scenario: Scenario, reports: Mapping[str, list[Event]]) -> Iterable[SiteAnswers]:
    """The scores of each site that answered; its answers themselves stay in its own report."""
    for site in scenario.spec.sites:
        told = [event for event in reports[site.name] if event["event"] == "answers"]
        if told:
            base = next((_scores(event) for event in told if event["round"] == 0), None)
            adapter = next((_scores(event) for event in reversed(told) if event["round"] > 0), None)
            yield SiteAnswers(site=site.name, base=base, adapter=adapter)


def _scores(event: Event) -> AnswerScores:
    return AnswerScores(**{field: event[field] for field in AnswerScores.model_fields})


def _encryption(plan: Plan, reports: Mapping[str, list[Event]]) -> Encryption:
    ciphertexts: dict[str, int] = {}
    for events in reports.values():
        ciphertexts |= last(events, "layout")["ciphertexts"]
    packing = plan.packing
    budget = noise_budget_bits(packing.params, packing.max_sites, max(ciphertexts.values()))
    return Encryption(
        value_bits=packing.value_bits,
        max_sites=packing.max_sites,
        digits_per_slot=packing.digits_per_slot,
        poly_modulus_degree=packing.params.poly_modulus_degree,
        noise_budget_bits_left=int(budget),
        ciphertexts=ciphertexts,
    )


def _privacy(plan: Plan) -> Privacy | None:
    if plan.privacy is None or plan.spec.privacy.epsilon is None:
        return None
    units = sorted({task.unit for task in plan.spec.kinds.values()})
    return Privacy(
        mechanism=plan.spec.privacy.mechanism,
        unit=" or ".join(units),
        epsilon_target=plan.spec.privacy.epsilon,
        delta=plan.privacy.delta,
        noise_multiplier=plan.privacy.noise_multiplier,
        sampling_probability=plan.privacy.sampling_probability,
        steps_per_round=plan.stages[-1].steps_per_round,
        l2_clip_norm=plan.privacy.l2_clip_norm,
        earlier_stages=tuple(
            StagePrivacy(
                rounds=stage.rounds,
                steps_per_round=stage.steps_per_round,
                sampling_probability=stage.sampling_probability,
                noise_multiplier=stage.privacy.noise_multiplier,
            )
            for stage in plan.stages[:-1]
            if stage.privacy is not None
        ),
    )


def _totals(plan: Plan, coordinator: list[Event], rounds: list[Round], values: Mapping[str, dict[str, int]]) -> Totals:
    sites = [site for entry in rounds for site in entry.sites]
    by_phase = {phase: sum(getattr(site.seconds, phase) for site in sites) for phase in PHASES}
    aggregate = sum(event["seconds"] for event in coordinator if event["event"] == "aggregated")
    unmask = sum(event["seconds"] for event in coordinator if event["event"] == "unmasked")
    # plain FedAvg sends every value up as float32, every round
    plain = 4 * plan.rounds * sum(sum(by_scope.values()) for by_scope in values.values())
    return Totals(
        seconds=coordinator[-1]["t"] - coordinator[0]["t"],
        bytes_up=sum(site.bytes_up for site in sites),
        bytes_down=sum(site.bytes_down for site in sites),
        plain_float32_bytes=plain,
        phase_seconds=PhaseTotals(aggregate=aggregate, unmask=unmask, **by_phase),
    )


def _release(folder: Path, reports: Mapping[str, list[Event]], values: Mapping[str, dict[str, int]]) -> ReleaseFacts:
    adapter = folder / "release" / "adapter_model.safetensors"
    heads: dict[str, int] = {}
    for by_scope in values.values():
        heads |= by_scope
    return ReleaseFacts(
        adapter_sha256=hashlib.sha256(adapter.read_bytes()).hexdigest(),
        path="release",
        trainable_values=sum(heads.values()),
        guards_passed={site: tuple(last(events, "released")["guards_passed"]) for site, events in reports.items()},
    )
