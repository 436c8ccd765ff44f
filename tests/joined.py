"""Sites that have joined a consortium, each at its desk, in one process; their services are stand-ins unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import CONSORTIUM, NOW, public_bytes

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_check import checked_lines
from fedseek.daemon.audit_lines import AuditLine
from fedseek.daemon.parcels import ParcelDown, ParcelUp, decode_parcel_up, encode_parcel
from fedseek.identity.authority import create_authority
from fedseek.identity.enrolment import make_join_file
from fedseek.identity.forms import DAY_SECONDS
from fedseek.identity.roster import Roster, RosterEntry
from fedseek.identity.signed_roster import Member, SignedRoster, make_signed_roster
from fedseek.identity.signing import sign, sign_with
from fedseek.records import Records
from fedseek_site.approvals import Approvals
from fedseek_site.desk import Desk
from fedseek_site.enrol import create_site, join, open_site
from fedseek_site.ledger_opening import open_ledger
from fedseek_site.permission import Permission
from fedseek_site.release_approvals import ReleaseApprovals

COORDINATOR = "coordinator"
SITES = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("第三银行", "bank"))
DAYS = 90
REFUSAL = b"no roster is trusted"
OPEN_POLICY = """
version = 1
[limits]
max_epsilon = 8
max_delta = 1e-3
max_epsilon_total = 100
allow_without_privacy = true
[required]
min_sites = 2
min_contributors = 2
min_colluders = 0
[models]
allowed = ["any"]
[tasks]
kinds = ["any"]
labels = ["any"]
units = ["record", "customer", "patient"]
metrics = ["accuracy", "auc"]
[approval]
required = 0
releases = 0
"""


@dataclass
class Service:
    """Stands for the site's service: says who it is, and keeps what it was asked and told."""

    name: str
    trusted: Roster | None
    asked: list[bytes] = field(default_factory=list)

    def handle(self, data: bytes) -> bytes:
        self.asked.append(data)
        return REFUSAL if self.trusted is None else f"{self.name} answers ".encode() + data

    def trust(self, roster: Roster | None) -> None:
        self.trusted = roster

    def standing(self) -> None:
        return None

    def close(self) -> None:
        pass


@dataclass
class Seat:
    """One site: its folder, its desk, and how often it was told to start over."""

    folder: Path
    desk: Desk
    changed: list[str]

    def send(self, parcel: ParcelDown) -> ParcelUp:
        return decode_parcel_up(self.desk.handle(encode_parcel(parcel)))

    def close(self) -> None:
        self.desk.service.close()
        self.desk.permission.approvals.close()
        self.desk.permission.releases.approvals.close()
        self.desk.permission.ledger.close()
        self.desk.audit.close()

    def lines(self, kind: str | None = None) -> list[AuditLine]:
        """The site's record, every line checked."""
        identity = self.desk.site.identity
        lines = checked_lines(self.folder / "audit", public_key=identity.public().signing_key, name=identity.name)
        return [line for line in lines if kind in (None, line.kind)]

    def write_policy(self, text: str) -> None:
        path = self.folder / "policy.toml"
        path.write_text(text, "utf-8")
        path.chmod(0o600)


@dataclass
class Joined:
    """The authority, the coordinator's own record, and the sites by name. Time stands still at ``now``."""

    folder: Path
    key: Ed25519PrivateKey
    coordinator_key: Ed25519PrivateKey
    roster: SignedRoster
    audit: AuditChain
    open_desk: Callable[..., Desk]
    now: float = NOW
    seats: dict[str, Seat] = field(default_factory=dict)

    def sit(self, name: str) -> Seat:
        """Open the folder of a site, as its daemon does when it starts."""
        folder = self.folder / name
        site, told = open_site(folder), []
        audit = AuditChain(
            folder / "audit",
            name=name,
            sign=partial(sign, site.identity),
            public_key=site.identity.public().signing_key,
            clock=lambda: self.now,
        )
        ledger = open_ledger(
            folder / "ledger.sqlite3",
            site.storage_key,
            dataset="账户",
            site=name,
            policy_path=folder / "policy.toml",
            audit=audit,
            audit_folder=folder / "audit",
        )
        ledger.take_data(Records(("转账",), ("欺诈",), ("客1",)))  # stand-ins have no service that would
        permission = Permission(
            site=name,
            policy_path=folder / "policy.toml",
            approvals=Approvals(folder / "approvals.sqlite3"),
            release_approvals=ReleaseApprovals(folder / "releases.sqlite3"),
            ledger=ledger,
            dataset="账户",
            record=audit.record,
            clock=lambda: self.now,
        )
        desk = self.open_desk(site, permission, audit, partial(told.append, name))
        desk.clock = lambda: self.now
        self.seats[name] = Seat(folder, desk, told)
        return self.seats[name]

    def next_roster(
        self, *entries: RosterEntry, key: Ed25519PrivateKey | None = None, at: int | None = None, number: int = 1
    ) -> SignedRoster:
        """One that follows the roster in force; not in force by that."""
        return signed(key or self.key, entries, after=self.roster, at=self.now if at is None else at, step=number)

    def entries(self, *without: str) -> list[RosterEntry]:
        return [member.entry for member in self.roster.members if member.entry.name not in without]

    def close(self) -> None:
        for seat in self.seats.values():
            seat.close()
        self.audit.close()


def signed(
    key: Ed25519PrivateKey, entries: Sequence[RosterEntry], *, after: SignedRoster | None, at: float, step: int = 1
) -> SignedRoster:
    return make_signed_roster(
        key,
        consortium=CONSORTIUM,
        number=1 if after is None else after.number + step,
        members=[Member(entry, int(at), int(at) + DAYS * DAY_SECONDS) for entry in entries],
        issued_at=int(at),
        previous=bytes(32) if after is None else after.digest(),
    )


@cache
def ca() -> bytes:
    with TemporaryDirectory() as folder:
        return create_authority(Path(folder) / "authority", name=CONSORTIUM, now=NOW).ca


def with_stand_in(site: Any, permission: Permission, audit: AuditChain, changed: Callable[[], None]) -> Desk:
    return Desk(site, Service(site.identity.name, site.trusted), audit, permission, changed)


def join_all(
    folder: Path, sites: Sequence[tuple[str, str]] = SITES, *, open_desk: Callable[..., Desk] = with_stand_in
) -> Joined:
    """Make the sites, have them join, and seat each."""
    key, coordinator_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    entries = [create_site(folder / name, name=name, kind=kind) for name, kind in sites]
    roster = signed(key, entries, after=None, at=NOW)
    file = make_join_file(
        key, coordinator="localhost:9443", ca=ca(), coordinator_key=public_bytes(coordinator_key), roster=roster
    ).to_bytes()
    audit = AuditChain(
        folder / "coordinator-audit",
        name=COORDINATOR,
        sign=partial(sign_with, coordinator_key),
        public_key=public_bytes(coordinator_key),
        clock=lambda: NOW,
    )
    joined = Joined(folder, key, coordinator_key, roster, audit, open_desk)
    for name, _ in sites:
        join(folder / name, file, now=NOW)
        joined.sit(name).write_policy(OPEN_POLICY)
    return joined
