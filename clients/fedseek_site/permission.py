"""May this run here, and now? The site's policy, its hours, its people's approvals and its pause, in one question.

    plan announced   notice    remembered for people to look at; ready, waiting or refused, and by which rule
    run begins       permit    policy -> pause, hours -> approvals -> written down as admitted, with what it may spend
    each round       permit    pause, hours, and approvals still stand
    release          permit    the same; what would be signed is a question of its own (``release_permission``)

The policy file is read anew for each question, so what its owner changes holds from the next step on. One that cannot
be read permits nothing; what it said before does not count. A run that was admitted is not judged again by limits that
were lowered since: it is put off, or ended by withdrawing its approval.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fedseek.daemon.audit_lines import COORDINATOR, Recorder
from fedseek.errors import InvalidConfig, NotNow, PlanRefused
from fedseek.identity.roster import Roster
from fedseek.plan import Plan
from fedseek_site.approvals import Approvals, Begun
from fedseek_site.ledger import Ledger
from fedseek_site.ledger_entries import parts_of
from fedseek_site.people import PlanApproval
from fedseek_site.policy import Policy, check_hours, check_policy, load_policy, policy_in_force
from fedseek_site.release_approvals import ReleaseApprovals
from fedseek_site.release_permission import ReleasePermission

Status = Literal["ready", "waiting", "refused"]


class Permission:
    """The word "no" of one site, apart from what only its data can tell (``fedseek_site.admission``).

    Args:
        site: this site's name.
        policy_path: of ``policy.toml``.
        approvals: announced plans, approvals and admitted runs.
        release_approvals: the same for releases; asked through ``releases``.
        ledger: what the site's data has cost already; a run is permitted only if its whole plan still fits.
        dataset: what the site's people call the data set, for the record.
        record: writes a decision to the audit chain; where it raises, nothing is permitted.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        *,
        site: str,
        policy_path: Path,
        approvals: Approvals,
        release_approvals: ReleaseApprovals,
        ledger: Ledger,
        dataset: str,
        record: Recorder,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.site = site
        self.dataset = dataset
        self.approvals = approvals
        self.ledger = ledger
        self._policy_path = policy_path
        self._record = record
        self._clock = clock
        self._turn = threading.RLock()
        self.releases = ReleasePermission(
            site=site, policy=self.policy, approvals=release_approvals, record=record, clock=clock
        )
        self._told: tuple[str, ...] = ()  # the last decision, which is not written down again when it is only repeated

    def permit(self, run: str, phase: str, plan: Plan, roster: Roster) -> None:
        """Say nothing, or no. ``phase`` is ``"plan"`` when a run begins, ``"round"`` before each update, or ``"release"``.

        Guarantee: when a run is permitted to begin, what it may spend is set aside in the ledger, on the disk, first.

        Raises:
            PlanRefused: this run will not happen here; names the rule.
            NotNow: it may, later; names the rule.
        """
        with self._turn:
            try:
                if phase == "plan":
                    self._begin(run, plan, roster)
                else:
                    self._go_on(plan, roster)
            except (PlanRefused, NotNow) as error:
                kind = "refused-by-policy" if isinstance(error, PlanRefused) else "put-off"
                self._tell(kind, run, phase, plan, roster, rule=error.rule)
                raise
            self._tell("permitted", run, phase, plan, roster, rule="")

    def notice(self, plan: Plan, roster: Roster, *, run: str = "") -> tuple[Status, str]:
        """Remember a plan announced ahead of its run, for people to look at, unless it is refused. As ``verdict``."""
        status, rule = self.verdict(plan, roster, run=run)
        if status != "refused":
            self.approvals.notice(plan, roster, self._clock())
        return status, rule

    def verdict(self, plan: Plan, roster: Roster, *, run: str = "") -> tuple[Status, str]:
        """What this site would say to the plan now, and by which rule; changes and writes nothing.

        Args:
            plan: what is asked.
            roster: who takes part.
            run: its name, where it has one: a run that began here is not judged again by what it spends itself.
        """
        try:
            policy = policy_in_force(self.policy, site=self.site, refusal=PlanRefused)
            if self.approvals.begun(run) != Begun(plan.digest, roster.digest().hex()):
                self._check_plan(policy, plan, roster, run=run)
            self._check_time(policy)
            self._check_approved(policy, plan, roster)
        except PlanRefused as error:
            return "refused", error.rule
        except NotNow as error:
            return "waiting", error.rule
        return "ready", ""

    def policy(self) -> Policy:
        """The policy as it is on the disk now.

        Raises:
            InvalidConfig: it cannot be used.
        """
        return load_policy(self._policy_path)

    def approve(self, approval: PlanApproval) -> None:
        """Take a privacy officer's approval.

        Raises:
            FedseekError: it does not count: see :meth:`fedseek_site.approvals.Approvals.approve`.
        """
        self.approvals.approve(approval, self.policy(), site=self.site, now=self._clock())
        facts = {"plan": approval.plan, "roster": approval.roster, "person": approval.person}
        self._record("approved", **facts, signed_at=approval.at, signature=approval.signature.hex())

    def withdraw(self, plan: str, person: str) -> int:
        """Take back a person's approvals of a plan; runs of it are put off. Returns how many approvals that were."""
        withdrawn = self.approvals.withdraw(plan, person, self._clock())
        self._record("withdrawn", plan=plan, person=person, approvals=withdrawn)
        return withdrawn

    def pause(self) -> None:
        """Take part in nothing new until ``resume``, also after a restart."""
        self.approvals.pause(self._clock())
        self._record("paused")

    def resume(self) -> None:
        """Take part again."""
        self.approvals.resume()
        self._record("resumed")

    def end_run(self, run: str) -> bool:
        """At a privacy officer's word a run trains no more here, for good. Whether there was such a run to end."""
        ended = self.ledger.end(run)
        self._record("run-ended", run=run, ended=ended)
        return ended

    def approvals_needed(self, policy: Policy, roster: Roster) -> int:
        """How many people have to agree to a plan among these sites."""
        if policy.roster.changes == "approve" and not self.approvals.knows_roster(roster.digest().hex()):
            return max(policy.approval.required, 1)
        return policy.approval.required

    def _begin(self, run: str, plan: Plan, roster: Roster) -> None:
        began = self.approvals.begun(run)
        if began == Begun(plan.digest, roster.digest().hex()):
            self._go_on(plan, roster)  # killed between writing this down and answering
            return
        if began is not None:
            raise PlanRefused(self.site, "the run began at this site with another plan or roster")
        policy = policy_in_force(self.policy, site=self.site, refusal=PlanRefused)
        self._check_plan(policy, plan, roster, run=run)
        self.approvals.notice(plan, roster, self._clock())
        self._check_time(policy)
        self._check_approved(policy, plan, roster)
        unit = plan.spec.kinds[next(entry.kind for entry in roster.entries if entry.name == self.site)].unit
        self.ledger.reserve(run, parts_of(plan), plan=plan.digest, unit=unit)
        self.approvals.admit(run, plan, roster, dataset=self.dataset, at=self._clock())

    def _go_on(self, plan: Plan, roster: Roster) -> None:
        policy = policy_in_force(self.policy, site=self.site)
        self._check_time(policy)
        self._check_approved(policy, plan, roster)

    def _check_plan(self, policy: Policy, plan: Plan, roster: Roster, *, run: str) -> None:
        delta = policy.limits.max_delta
        total = self.ledger.total_after(run, parts_of(plan), plan=plan.digest, delta=delta)
        check_policy(policy, plan, roster, site=self.site, total_epsilon_after=total)

    def _check_time(self, policy: Policy) -> None:
        if self.approvals.paused_at() is not None:
            raise NotNow(self.site, "paused by the operator")
        check_hours(policy, site=self.site, now=self._clock())

    def _check_approved(self, policy: Policy, plan: Plan, roster: Roster) -> None:
        needed = self.approvals_needed(policy, roster)
        standing = len(self.approvals.standing(plan.digest, roster.digest().hex(), policy, site=self.site))
        if standing < needed:
            key = "approval.required" if policy.approval.required else "roster.changes"
            raise NotNow(
                self.site,
                f"{key}: {standing} of {needed} people have approved",
                hint=f"fedseek-site approve {plan.digest[:12]}",
            )

    def _tell(self, kind: str, run: str, phase: str, plan: Plan, roster: Roster, *, rule: str) -> None:
        """To the audit chain. A coordinator that asks the same again and again does not fill it."""
        told = (kind, run, phase, plan.digest, rule)
        if told == self._told:
            return
        privacy = plan.spec.privacy
        facts: dict[str, Any] = {
            "asked_by": COORDINATOR,
            "run": run,
            "phase": phase,
            "plan": plan.digest,
            "roster": roster.digest().hex(),
            "rule": rule,
            "policy": self._policy_digest(),
        }
        if kind == "permitted" and privacy.epsilon is not None and privacy.delta is not None:
            facts |= {"dataset": self.dataset, "epsilon": privacy.epsilon, "delta": privacy.delta}
        self._record(kind, **facts)
        self._told = told

    def _policy_digest(self) -> str:
        try:
            return self.policy().digest()
        except InvalidConfig:
            return "unusable"
