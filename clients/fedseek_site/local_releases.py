"""What the daemon answers its own people about releases.

A release goes out as what the site would sign: whoever approves it works the digest out from what is shown, and signs
that.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from fedseek.errors import Malformed
from fedseek_site.local_api import ReleaseAsked, ReleaseWithdrawal
from fedseek_site.people import PlanDigest, ReleaseApproval
from fedseek_site.release_approvals import AnnouncedRelease, release_digest
from fedseek_site.release_permission import ReleasePermission


class ReleaseShown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A release as the daemon shows it to somebody who may approve it."""

    site: str
    run: str
    plan: PlanDigest
    digests: dict[str, bytes]
    statement: bytes
    at: str
    status: str
    rule: str
    approved_by: list[str]

    @property
    def digest(self) -> str:
        """Of what is shown, worked out here."""
        return release_digest(self.run, self.digests, self.statement)


def local_releases(permission: ReleasePermission) -> dict[str, Any]:
    """Every release drafted here, the newest first: a line each."""
    return {"releases": [_line(permission, release) for release in permission.approvals.announced()]}


def local_release(permission: ReleasePermission, asked: ReleaseAsked) -> dict[str, Any]:
    """One release whole.

    Raises:
        Malformed: no release drafted here begins so, or several do.
    """
    release = permission.approvals.get(asked.release)
    status, rule = permission.verdict(release)
    shown = ReleaseShown(
        site=permission.site,
        run=release.run,
        plan=release.plan,
        digests=dict(release.digests),
        statement=release.statement,
        at=as_time(release.at),
        status=status,
        rule=rule,
        approved_by=list(permission.approved_by(release)),
    )
    return msgspec.structs.asdict(shown)


def local_approve_release(permission: ReleasePermission, approval: ReleaseApproval) -> dict[str, Any]:
    """Take an approval, and say where the release stands now.

    Raises:
        FedseekError: it does not count: see :meth:`fedseek_site.release_approvals.ReleaseApprovals.approve`.
    """
    permission.approve(approval)
    return _line(permission, permission.approvals.get(approval.release))


def local_withdraw_release(permission: ReleasePermission, asked: ReleaseWithdrawal) -> dict[str, Any]:
    """Take an approval back.

    Raises:
        ReleaseRefused: too late.
    """
    withdrawn = permission.withdraw(asked.release, asked.person)
    return {"release": asked.release, "person": asked.person, "withdrawn": withdrawn}


def read_shown(document: object, prefix: str) -> ReleaseShown:
    """What a daemon showed when it was asked for the release whose digest begins with ``prefix``.

    Raises:
        Malformed: it is another one, or in another form.
    """
    try:
        shown = msgspec.convert(document, ReleaseShown)
    except msgspec.ValidationError as error:
        raise Malformed(
            f"the daemon shows a release in another form: {error}", hint="install the same release"
        ) from None
    if not shown.digest.startswith(prefix):
        raise Malformed(f"asked the daemon for release {prefix}, it shows {shown.digest}")
    return shown


def _line(permission: ReleasePermission, release: AnnouncedRelease) -> dict[str, Any]:
    status, rule = permission.verdict(release)
    return {
        "digest": release.digest,
        "run": release.run,
        "plan": release.plan,
        "at": as_time(release.at),
        "status": status,
        "rule": rule,
        "approved_by": list(permission.approved_by(release)),
    }


def as_time(at: float) -> str:
    """Unix seconds as people read them, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
