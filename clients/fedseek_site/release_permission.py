"""May this release leave the building? The word of the site's people on what it would sign.

    coordinator asks    permit     drafted for this request before, and approvals missing? NotNow, nothing computed
                                   draft -> announced on the disk -> enough approvals? -> it may be signed; else NotNow
    people              approve, withdraw, until it is let go

Until enough have approved nothing is signed and nothing is sent. An approval holds for the very bytes that were shown: a
draft that comes out otherwise is another release, and is approved anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar

from fedseek.daemon.audit_lines import COORDINATOR, Recorder
from fedseek.errors import NotNow
from fedseek_site.people import ReleaseApproval
from fedseek_site.policy import Policy, policy_in_force
from fedseek_site.release_approvals import AnnouncedRelease, ReleaseApprovals

Status = Literal["ready", "waiting", "released"]


class Draft(Protocol):
    """What a site would sign."""

    @property
    def run(self) -> str:
        """Of what."""

    @property
    def digests(self) -> Mapping[str, bytes]:
        """Of the tensors of the shared scopes."""

    @property
    def statement(self) -> bytes:
        """The privacy statement."""


_D = TypeVar("_D", bound=Draft)


class ReleasePermission:
    """One site's word on its releases.

    Args:
        site: this site's name.
        policy: the policy as it is on the disk now; raises InvalidConfig if it cannot be used.
        approvals: announced releases and approvals.
        record: writes to the audit chain; where it raises, nothing is permitted.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        *,
        site: str,
        policy: Callable[[], Policy],
        approvals: ReleaseApprovals,
        record: Recorder,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.site = site
        self.approvals = approvals
        self._policy_now = policy
        self._record = record
        self._clock = clock
        self._turn = threading.RLock()
        self._told: tuple[str, str, str] | None = None  # the last decision, written down once

    def permit(self, plan: str, request: bytes, draft: Callable[[], _D]) -> _D:
        """Draft a release and return it if it may be signed. Asked again, the same comes out.

        Args:
            plan: digest of the plan.
            request: that it is drafted for.
            draft: computes what would be signed. Not called while approvals of what it gave for this very request are
                missing; run by run it gives the same bytes.

        Raises:
            NotNow: people have to approve first, or the policy cannot be read; the rule says how many have.
            FedseekError: whatever ``draft`` raises.
        """
        with self._turn:
            before = self.approvals.drafted_for(request)
            if before is not None:
                self._check(before, self.approvals.standing)
            drafted = draft()
            release = AnnouncedRelease.of(drafted.run, plan, drafted.digests, drafted.statement, at=self._clock())
            if before is None or before.digest != release.digest:
                self.approvals.announce(release, request)
                self._record("release-announced", run=release.run, plan=plan, release=release.digest)
            self._check(release, self._let_go)
            self._tell("release-permitted", release, rule="")
            return drafted

    def verdict(self, release: AnnouncedRelease) -> tuple[Status, str]:
        """Where a release stands now, and by which rule; changes and writes nothing."""
        if release.let_go_at is not None:
            return "released", ""
        try:
            policy = policy_in_force(self._policy_now, site=self.site)
        except NotNow as error:
            return "waiting", error.rule
        missing = self._missing(policy, self.approvals.standing(release.digest, policy, site=self.site))
        return ("waiting", missing) if missing else ("ready", "")

    def approved_by(self, release: AnnouncedRelease) -> tuple[str, ...]:
        """Whose approvals count now."""
        try:
            return self.approvals.standing(
                release.digest, policy_in_force(self._policy_now, site=self.site), site=self.site
            )
        except NotNow:
            return ()

    def approve(self, approval: ReleaseApproval) -> None:
        """Take a privacy officer's approval.

        Raises:
            FedseekError: it does not count: see :meth:`ReleaseApprovals.approve`.
        """
        self.approvals.approve(approval, self._policy_now(), site=self.site, now=self._clock())
        facts = {"release": approval.release, "person": approval.person}
        self._record("release-approved", **facts, signed_at=approval.at, signature=approval.signature.hex())

    def withdraw(self, release: str, person: str) -> int:
        """Take back a person's approval of a release that was not let go. Returns how many approvals that were.

        Raises:
            ReleaseRefused: too late.
        """
        withdrawn = self.approvals.withdraw(release, person, self._clock())
        self._record("release-withdrawn", release=release, person=person, approvals=withdrawn)
        return withdrawn

    def _check(self, release: AnnouncedRelease, count: Callable[..., tuple[str, ...]]) -> None:
        policy = policy_in_force(self._policy_now, site=self.site)
        if missing := self._missing(policy, count(release.digest, policy, site=self.site)):
            self._tell("release-put-off", release, rule=missing)
            raise NotNow(self.site, missing, hint=f"fedseek-site approve {release.digest[:12]}")

    def _let_go(self, release: str, policy: Policy, *, site: str) -> tuple[str, ...]:
        return self.approvals.let_go(release, policy, site=site, at=self._clock())

    def _missing(self, policy: Policy, standing: tuple[str, ...]) -> str:
        """The rule that is not met; empty if enough have approved."""
        wanted = policy.approval.releases
        return "" if len(standing) >= wanted else f"approval.releases: {len(standing)} of {wanted} people have approved"

    def _tell(self, kind: str, release: AnnouncedRelease, *, rule: str) -> None:
        """To the audit chain. A coordinator that asks the same again and again does not fill it."""
        if (told := (kind, release.digest, rule)) != self._told:
            facts: dict[str, Any] = {"run": release.run, "release": release.digest, "rule": rule}
            self._record(kind, asked_by=COORDINATOR, **facts)
            self._told = told
