"""What the daemon answers its own people about plans: from the policy, the approvals and the pause.

The plan and roster go out whole, as their canonical bytes: whoever approves works out both digests from what is shown,
and signs those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from fedseek.errors import InvalidConfig
from fedseek.identity.roster import Roster, parse_roster
from fedseek.plan import Plan, plan_from_canonical
from fedseek_site.approvals import Approvals, Noticed
from fedseek_site.budget import BudgetAsked, Planned, RunEnded, as_document, budget_of
from fedseek_site.ledger_opening import limit_of
from fedseek_site.local_api import Json, LocalApi, PlanAsked, RecordAccepted, Withdrawal
from fedseek_site.local_releases import (
    as_time,
    local_approve_release,
    local_release,
    local_releases,
    local_withdraw_release,
)
from fedseek_site.people import PlanApproval
from fedseek_site.permission import Permission

NAMES_LISTED: Final = 20  # of the sites of a roster, in a list of plans


class PlanShown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plan as the daemon shows it to somebody who may approve it."""

    site: str
    plan: bytes
    roster: bytes
    at: str
    status: str
    rule: str
    approved_by: list[str]

    def open(self) -> tuple[Plan, Roster]:
        """The plan and the roster, checked as any that come from outside.

        Raises:
            InvalidPlan, Malformed, WrongKey: one of them is not what it should be.
        """
        return plan_from_canonical(self.plan), parse_roster(self.roster)


def answer_from(
    permission: Permission,
    *,
    more_status: Callable[[], Json],
    data: Callable[[], Json],
    reload_data: Callable[[], Json],
    audit_head: Callable[[], Json],
    accept_record: Callable[[RecordAccepted], Json],
) -> LocalApi:
    """The local API of a site: what concerns plans from here, the rest from its daemon.

    Args:
        permission: of the site.
        more_status: what the daemon adds to the status, such as the run it is in.
        data: name, counts and fingerprint of the data set.
        reload_data: reads the data again and returns the same.
        audit_head: where the site's audit chain is.
        accept_record: lets another party's audit record begin anew.
    """
    return LocalApi(
        status=lambda: {**local_status(permission), **more_status()},
        plans=lambda: local_plans(permission),
        plan=lambda asked: local_plan(permission, asked),
        approve=lambda approval: local_approve(permission, approval),
        withdraw=lambda asked: local_withdraw(permission, asked),
        budget=lambda asked: local_budget(permission, asked),
        end_run=lambda asked: local_end_run(permission, asked),
        releases=lambda: local_releases(permission.releases),
        release=lambda asked: local_release(permission.releases, asked),
        approve_release=lambda approval: local_approve_release(permission.releases, approval),
        withdraw_release=lambda asked: local_withdraw_release(permission.releases, asked),
        pause=lambda: local_pause(permission),
        resume=lambda: local_resume(permission),
        data=data,
        reload_data=reload_data,
        audit_head=audit_head,
        accept_record=accept_record,
    )


def local_status(permission: Permission) -> dict[str, Any]:
    """Whether this site takes part now, and if not, why."""
    paused = permission.approvals.paused_at()
    told: dict[str, Any] = {"site": permission.site, "paused_since": None if paused is None else as_time(paused)}
    try:
        policy = permission.policy()
    except InvalidConfig as error:
        return {**told, "policy": "unusable", "problems": list(error.problems)}
    return {
        **told,
        "policy": policy.digest(),
        "problems": [],
        "approvals_required": policy.approval.required,
        "release_approvals_required": policy.approval.releases,
    }


def local_plans(permission: Permission) -> dict[str, Any]:
    """Every plan announced here, the newest first: a line each."""
    return {"plans": [_line(permission, noticed) for noticed in permission.approvals.noticed()]}


def local_plan(permission: Permission, asked: PlanAsked) -> dict[str, Any]:
    """One plan whole.

    Raises:
        InvalidPlan: no plan announced here begins so, or several do.
    """
    noticed = permission.approvals.get(asked.plan)
    status, rule = permission.verdict(noticed.plan, noticed.roster)
    shown = PlanShown(
        site=permission.site,
        plan=noticed.plan.canonical(),
        roster=noticed.roster.canonical_bytes(),
        at=as_time(noticed.at),
        status=status,
        rule=rule,
        approved_by=_approved_by(permission, noticed),
    )
    return msgspec.structs.asdict(shown)


def local_approve(permission: Permission, approval: PlanApproval) -> dict[str, Any]:
    """Take an approval, and say where the plan stands now.

    Raises:
        FedseekError: it does not count: see :meth:`fedseek_site.approvals.Approvals.approve`.
    """
    permission.approve(approval)
    return _line(permission, permission.approvals.get(approval.plan))


def local_withdraw(permission: Permission, asked: Withdrawal) -> dict[str, Any]:
    """Take approvals back."""
    return {"plan": asked.plan, "person": asked.person, "withdrawn": permission.withdraw(asked.plan, asked.person)}


def local_pause(permission: Permission) -> dict[str, Any]:
    """Take part in nothing new."""
    permission.pause()
    return {"paused": True}


def local_resume(permission: Permission) -> dict[str, Any]:
    """Take part again."""
    permission.resume()
    return {"paused": False}


def local_budget(permission: Permission, asked: BudgetAsked) -> dict[str, Any]:
    """What the site's data has cost, and what a plan would cost.

    Raises:
        InvalidPlan: no plan announced here begins so, or several do.
        InvalidConfig: the policy cannot be used, so there is no limit to measure by.
    """
    entries, data = permission.ledger.entries()
    planned = planned_of(permission.approvals, asked)
    return as_document(budget_of(entries, data, limit_of(permission.policy()), planned))


def planned_of(approvals: Approvals, asked: BudgetAsked) -> Planned | None:
    """The plan whose cost is asked: as given, as announced, or the newest announced that no run has used.

    Raises:
        InvalidPlan: no plan announced here begins so, or several do.
    """
    if asked.planned is not None:
        return asked.planned
    if asked.plan:
        return Planned.of(approvals.get(asked.plan).plan)
    unused = (
        noticed.plan
        for noticed in approvals.noticed()
        if not approvals.runs_of(noticed.plan.digest, noticed.roster.digest().hex())
    )
    return next(map(Planned.of, unused), None)


def local_end_run(permission: Permission, asked: RunEnded) -> dict[str, Any]:
    """A run trains no more here; what it had set aside is free."""
    return {"run": asked.run, "ended": permission.end_run(asked.run)}


def _line(permission: Permission, noticed: Noticed) -> dict[str, Any]:
    status, rule = permission.verdict(noticed.plan, noticed.roster)
    names = noticed.roster.names
    return {
        "digest": noticed.plan.digest,
        "name": noticed.plan.spec.name,
        "roster": noticed.roster.digest().hex(),
        "num_sites": len(names),
        "sites": list(names[:NAMES_LISTED]),
        "at": as_time(noticed.at),
        "status": status,
        "rule": rule,
        "approved_by": _approved_by(permission, noticed),
        "runs": list(permission.approvals.runs_of(noticed.plan.digest, noticed.roster.digest().hex())[-NAMES_LISTED:]),
    }


def _approved_by(permission: Permission, noticed: Noticed) -> list[str]:
    try:
        policy = permission.policy()
    except InvalidConfig:
        return []
    digest = noticed.roster.digest().hex()
    return list(permission.approvals.standing(noticed.plan.digest, digest, policy, site=permission.site))
