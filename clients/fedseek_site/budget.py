"""What the privacy ledger says, in figures for the site's own people: spent, set aside, left, and what a plan would cost.

None of this leaves the site. A figure that is None has no bound: a run without privacy was trained on the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from fedseek.plan import Plan
from fedseek_site.ledger_entries import (
    Account,
    DataTaken,
    Limit,
    Mechanism,
    Noted,
    Part,
    RunName,
    epsilon_of,
    epsilon_rdp_of,
    parts_of,
)

MOST_RUNS: Final = 50  # the newest, one by one; the others count in the sums

Digest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{12,64})?\Z")]


class PlannedStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """As much of a stage as its cost depends on."""

    mechanism: Mechanism | None
    steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class Planned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """As much of a plan as its cost depends on."""

    name: Annotated[str, msgspec.Meta(max_length=63)]
    digest: Digest
    stages: Annotated[tuple[PlannedStage, ...], msgspec.Meta(min_length=1, max_length=8)]

    @classmethod
    def of(cls, plan: Plan) -> Planned:
        """Of this plan."""
        stages = tuple(PlannedStage(mechanism=mechanism, steps=steps) for mechanism, steps in parts_of(plan))
        return cls(name=plan.spec.name, digest=plan.digest, stages=stages)


class BudgetAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """For which plan the cost is asked: the first 12 or more digits of one announced here, or a plan of one's own.

    Neither: the newest plan announced that no run has used yet.
    """

    plan: Digest = ""
    planned: Planned | None = None


class RunEnded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which run trains no more at this site."""

    run: RunName


@dataclass(frozen=True, slots=True)
class MechanismCost:
    """Of one mechanism of a run, which has one for each stage that differs in it; None without privacy."""

    noise_multiplier: float | None
    sampling_probability: float | None
    steps: int
    set_aside_steps: int


@dataclass(frozen=True, slots=True)
class RunCost:
    """One run. ``unit`` is empty where the run was not admitted by a policy, as in a simulation.

    ``epsilon`` is of all that was trained in it.
    """

    run: str
    state: Literal["open", "ended"]
    unit: str
    rounds: int
    steps: int
    set_aside_steps: int
    mechanisms: list[MechanismCost]
    epsilon: float | None


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What a plan would cost beside all the rest, were it played to its end."""

    name: str
    digest: str
    epsilon: float | None
    total_after: float | None
    fits: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """Everything at ``delta``, the account's; ``total`` is what was spent and what admitted runs may still spend."""

    dataset: str
    fingerprint: str
    data_sets: int
    units: list[str]
    delta: float
    limit: float
    spent: float | None
    spent_rdp: float | None
    total: float | None
    left: float
    runs: list[RunCost]
    planned: PlanCost | None


def budget_of(entries: Sequence[Noted], data: int, limit: Limit, planned: Planned | None) -> Budget:
    """The figures of one account.

    Args:
        entries: of the ledger.
        data: number of the data entry in use.
        limit: of the policy.
        planned: what else is asked about.
    """
    account = Account(entries, data)
    taken = entries[data - 1].entry
    assert isinstance(taken, DataTaken)  # noqa: S101 -- the caller found it by its kind
    spent, reserved = account.spent(), account.reserved()
    total = epsilon_of(spent + reserved, limit.delta)
    return Budget(
        dataset=taken.name,
        fingerprint=taken.fingerprint,
        data_sets=len(account.data_sets),
        units=sorted({each.unit for each in account.reservations()}),
        delta=limit.delta,
        limit=limit.epsilon,
        spent=_bounded(epsilon_of(spent, limit.delta)),
        spent_rdp=_bounded(epsilon_rdp_of(spent, limit.delta)),
        total=_bounded(total),
        left=max(0.0, limit.epsilon - total),
        runs=_runs(account, limit.delta),
        planned=None if planned is None else _cost(planned, spent + reserved, limit),
    )


def data_named(entries: Sequence[Noted], dataset: str) -> int:
    """Number of the newest data entry of this name; 0 if there is none. All of one name are one account."""
    named = (noted for noted in entries if isinstance(noted.entry, DataTaken) and noted.entry.name == dataset)
    return max((noted.number for noted in named), default=0)


def describe_budget(budget: Budget) -> list[tuple[str, str]]:
    """The same in words: what, and how much."""
    at = f"at delta {budget.delta:g}"
    rows = [
        (
            "data set",
            f"{budget.dataset} (fingerprint {budget.fingerprint[:16]}, {budget.data_sets} states of it known)",
        ),
        ("spent", f"epsilon {_figure(budget.spent)} {at} (by Renyi accounting {_figure(budget.spent_rdp)})"),
        ("with runs admitted", f"epsilon {_figure(budget.total)}"),
        ("limit", f"epsilon {budget.limit:g} over the life of the data"),
        ("left", f"epsilon {budget.left:.3f}"),
    ]
    if len(budget.units) > 1:
        rows.append(
            ("note", f"plans protected different units ({', '.join(budget.units)}): the sum is for what each protected")
        )
    rows += [(f"run {each.run}", _run_words(each)) for each in budget.runs]
    if (plan := budget.planned) is not None:
        fits = "fits" if plan.fits else "does not fit"
        rows.append((f"plan {plan.name}", f"epsilon {_figure(plan.epsilon)} by itself"))
        rows.append(("after it", f"epsilon {_figure(plan.total_after)} in all: {fits}"))
    return rows


def as_document(budget: Budget) -> dict[str, Any]:
    """For JSON."""
    document: dict[str, Any] = msgspec.to_builtins(budget)
    return document


def _runs(account: Account, delta: float) -> list[RunCost]:
    units = {each.run: each.unit for each in account.reservations()}
    parts: dict[str, list[Part]] = {run: [] for run in units}
    for spent in account.spends():
        parts.setdefault(spent.run, []).append((spent.mechanism, spent.steps))
    found = []
    for run, trained in list(parts.items())[-MOST_RUNS:]:
        mechanisms = _mechanisms(account, run, trained)
        found.append(
            RunCost(
                run=run,
                state="open" if account.reserved_by(run) else "ended",
                unit=units.get(run, ""),
                rounds=len(trained),
                steps=sum(each.steps for each in mechanisms),
                set_aside_steps=sum(each.set_aside_steps for each in mechanisms),
                mechanisms=mechanisms,
                epsilon=_bounded(epsilon_of(trained, delta)),
            )
        )
    return found


def _mechanisms(account: Account, run: str, trained: Sequence[Part]) -> list[MechanismCost]:
    """In the order of the plan's stages."""
    set_aside = {each.mechanism: each.steps for each in account.reserved_by(run)}
    found = []
    for mechanism in dict.fromkeys([*set_aside, *(each for each, _ in trained)]):
        steps = sum(count for each, count in trained if each == mechanism)
        found.append(
            MechanismCost(
                noise_multiplier=mechanism.noise_multiplier if mechanism else None,
                sampling_probability=mechanism.sampling_probability if mechanism else None,
                steps=steps,
                set_aside_steps=max(0, set_aside.get(mechanism, 0) - steps),
            )
        )
    return found


def _cost(planned: Planned, before: list[Part], limit: Limit) -> PlanCost:
    own = [(stage.mechanism, stage.steps) for stage in planned.stages]
    after = epsilon_of([*before, *own], limit.delta)
    return PlanCost(
        name=planned.name,
        digest=planned.digest,
        epsilon=_bounded(epsilon_of(own, limit.delta)),
        total_after=_bounded(after),
        fits=limit.allows(after),
    )


def _bounded(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _figure(epsilon: float | None) -> str:
    return "without bound (a run without privacy)" if epsilon is None else f"{epsilon:.3f}"


def _run_words(run: RunCost) -> str:
    steps = f"{run.rounds} rounds, {run.steps} steps" + (
        f", {run.set_aside_steps} set aside" if run.set_aside_steps else ""
    )
    return f"epsilon {_figure(run.epsilon)}, {run.state}: {steps}" + (f", per {run.unit}" if run.unit else "")
