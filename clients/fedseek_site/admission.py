"""Will this site run this plan? Every rule is checked and every refusal names its rule.

A rule's text may go to the coordinator, so it names nothing of the data: not a count, not a label, not a path.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedseek.errors import InvalidPlan, PlanRefused, UnsupportedMechanism, WrongModel
from fedseek.identity.roster import Roster, RosterEntry
from fedseek.lora.source import check_family, check_model, locate_model
from fedseek.plan import Plan
from fedseek.plan_spec import Task
from fedseek.records import NEEDED, Records, cap_records
from fedseek_site.journal import MAX_KEPT_BYTES

ROOM_BESIDE_WEIGHTS = 50_000_000  # bytes of a state for plan, keys and shares


@dataclass(frozen=True, slots=True)
class SiteData:
    """What a site brings: rows to train on and rows held back to evaluate on."""

    train: Records
    held_back: Records


def check_roster(roster: Roster, trusted: Roster | None, *, me: RosterEntry) -> None:
    """Run by a site on the roster it is offered: is it the one whose fingerprints people compared?

    A coordinator that swaps in keys of its own stands between the sites and reads everything. Nothing in a roster can
    show that; so what is offered must be, to the byte, what this site was told by its own people.

    Raises:
        PlanRefused: it is another roster, or none was compared yet.
    """
    if trusted is None:
        raise PlanRefused(
            me.name,
            "no roster is trusted at this site yet",
            hint="compare the fingerprint of each site with its people over another channel, then trust the roster",
        )
    if roster != trusted:
        raise PlanRefused(
            me.name,
            "the roster offered is not the one that is trusted at this site",
            hint=f"offered: digest {roster.digest().hex()}; trusted: {trusted.digest().hex()}; a coordinator that swaps "
            "keys would show up just so",
        )
    if me not in roster.entries:
        raise PlanRefused(me.name, "the roster does not list this site with its own keys")


def check_admission(plan: Plan, roster: Roster, *, me: RosterEntry, data: SiteData) -> None:
    """Run by a site on a plan it is offered.

    Raises:
        PlanRefused: naming the first rule that says no.
    """
    task = plan.spec.kinds.get(me.kind)
    if task is None:
        raise PlanRefused(me.name, f"the plan has no task for sites of kind {me.kind!r}")
    if not plan.spec.cohort.min_sites <= len(roster.entries) <= plan.spec.cohort.max_sites:
        raise PlanRefused(
            me.name,
            f"the roster has {len(roster.entries)} sites, "
            f"the plan wants {plan.spec.cohort.min_sites} to {plan.spec.cohort.max_sites}",
        )
    if task.unit != "record" and data.train.unit_column is None:
        raise PlanRefused(me.name, f"the plan protects a {task.unit}, this site's data names no unit column")
    if plan.privacy is not None and plan.privacy.delta >= 1.0 / units_for(plan, me.kind, data.train).num_units:
        raise PlanRefused(
            me.name,
            f"delta {plan.privacy.delta:g} is not below 1 / number of units of this site",
            hint="a delta of 1/n permits publishing one unit outright; agree on a smaller delta",
        )
    for wanted in tasks_of(plan, me.kind):
        if not all(records.of_task(wanted) for records in (data.train, data.held_back)):
            raise PlanRefused(
                me.name,
                f"the plan has a task {wanted}, this site's data has no record for it",
                hint=f"wanted {NEEDED[wanted]}, to train on and held back; name the columns in site.toml, [data]",
            )
    if task.metric == "auc" and len(set(data.held_back.of_task("classify").labels)) < 2:
        raise PlanRefused(me.name, "the plan asks for an AUC, the rows held back here have one label only")
    try:
        folder = locate_model(plan.spec.model.source)
        check_model(folder, plan.spec.model.sha256, plan.spec.model.files_sha256)
        check_family(folder, plan.spec.model.family)
    except WrongModel as error:
        raise PlanRefused(me.name, "the base model here is not the one the plan names", hint=error.message) from error


def check_labels(plan: Plan, kind: str, data: SiteData) -> None:
    """A plan whose labels are not those the site's files were read with is another task.

    Raises:
        InvalidPlan: a label in the data is not in the plan.
    """
    task = plan.spec.kinds[kind]
    if task.task != "classify":  # whatever labels are there are not looked at
        return
    unknown = (set(data.train.labels) | set(data.held_back.labels)) - {*task.labels, ""}
    if unknown:
        raise InvalidPlan([f"kinds.{kind}: {len(unknown)} label(s) of this site's data are not in the plan"])


def check_room(plan: Plan, num_values: int, *, me: str) -> None:
    """A run whose state the journal could not keep would fail after its first round, when privacy was spent for it.

    Raises:
        PlanRefused: the adapter has too many values.
    """
    each = (
        2 * (4 + 8) if plan.spec.training.server_momentum else 2 * 4
    )  # bytes: the weights now, and before the last sum
    most = (MAX_KEPT_BYTES - ROOM_BESIDE_WEIGHTS) // each
    if num_values > most:
        raise PlanRefused(
            me,
            f"the adapter has {num_values} values, a site keeps at most {most} of this plan",
            hint="a smaller rank or fewer layers"
            + ("; or no server momentum" if plan.spec.training.server_momentum else ""),
        )


def check_site_level(plan: Plan, num_values: int, *, me: str) -> None:
    """Does the adapter fit the grid on which the guarantee for whole sites was sized? Else a round would be for nothing.

    Raises:
        PlanRefused: rounding would take more than half of the clip norm.
    """
    if plan.site_level is None:
        return
    try:
        plan.site_level.largest_norm(num_values)
    except UnsupportedMechanism as error:
        raise PlanRefused(me, error.message, hint=error.hint) from error


def tasks_of(plan: Plan, kind: str) -> tuple[Task, ...]:
    """What sites of ``kind`` train on over the plan's stages, each task once."""
    return tuple(dict.fromkeys(plan.task_in(kind, stage.first_round) for stage in plan.stages))


def units_for(plan: Plan, kind: str, records: Records) -> Records:
    """The records to train on, with the privacy unit of the plan: as the unit column says, or each on its own.

    Of a customer or patient with more records than the plan's ``max_records_per_unit``, so many.
    """
    if plan.spec.kinds[kind].unit == "record":
        return records.as_single_records()
    cap = plan.spec.privacy.max_records_per_unit
    return records if cap is None else cap_records(records, cap, seed=plan.seed_for("max_records_per_unit"))
