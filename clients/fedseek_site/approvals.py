"""Plans announced to this site, who approved them, what was admitted: on the disk before anybody is told.

One SQLite file of mode 0600. Nothing in it is secret, and an approval in it proves nothing by being there: signatures
are verified again, against the policy of the day, each time approvals are counted. What the file alone knows is what
was withdrawn, what was admitted, and whether the site is paused; so it belongs in the site's backups, and an older
copy is not to be put back. What was spent is elsewhere, in ``fedseek_site.ledger``.

Durability is that of ``fedseek.daemon.database``.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final

from fedseek.daemon.database import SharedDatabase, begin_or_check, check_whole
from fedseek.errors import InvalidPlan, NotNow, WrongRound
from fedseek.identity.roster import Roster, parse_roster
from fedseek.plan import Plan, plan_from_canonical
from fedseek_site.people import MIN_PREFIX, PlanApproval, check_approval, check_clock, counts
from fedseek_site.policy import Policy

MAX_NOTICED: Final = 64  # plans kept that nobody has approved and no run has used; the oldest make room

_APPLICATION_ID: Final = 0x46534131  # "FSA1": tells this file from any other SQLite database
_WHAT: Final = "approvals"
_SCHEMA: Final = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    "CREATE TABLE rosters (digest TEXT PRIMARY KEY, canonical BLOB NOT NULL)",
    "CREATE TABLE plans (number INTEGER PRIMARY KEY, digest TEXT NOT NULL, roster TEXT NOT NULL,"
    " canonical BLOB NOT NULL, at REAL NOT NULL, UNIQUE (digest, roster))",
    "CREATE TABLE approvals (plan TEXT NOT NULL, roster TEXT NOT NULL, person TEXT NOT NULL, at INTEGER NOT NULL,"
    " signature BLOB NOT NULL, withdrawn_at REAL, PRIMARY KEY (plan, roster, person))",
    # epsilon as its plan states it, for people to read; NULL for a run that promised nothing
    "CREATE TABLE runs (run TEXT PRIMARY KEY, plan TEXT NOT NULL, roster TEXT NOT NULL, dataset TEXT NOT NULL,"
    " epsilon REAL, delta REAL, at REAL NOT NULL)",
    "CREATE TABLE pauses (at REAL NOT NULL)",
)


@dataclass(frozen=True, slots=True)
class Noticed:
    """A plan that was announced here, with the sites it would run among.

    Attributes:
        plan: checked.
        roster: of the announcement.
        at: when it was first heard of, Unix seconds.
    """

    plan: Plan = field(repr=False)
    roster: Roster = field(repr=False)
    at: float


@dataclass(frozen=True, slots=True)
class Begun:
    """What a run was admitted with: digests of plan and roster, 64 hexadecimal digits each."""

    plan: str
    roster: str


class Approvals:
    """The file. Its methods may be called from several threads; each is one transaction.

    Args:
        path: of the file, in a folder on a local disk; made if it is missing.

    Raises:
        CustodyError: the file is open to group or others, or cannot be opened.
        JournalUnusable: it is damaged, in use for too long, or something else.
    """

    def __init__(self, path: Path) -> None:
        def begin(db: sqlite3.Connection) -> None:
            begin_or_check(db, path, _APPLICATION_ID, _SCHEMA, what="a site's approvals of version 1")
            check_whole(db)

        self._file = SharedDatabase(path, begin, what=_WHAT)

    def close(self) -> None:
        """Close the file; closing twice does nothing more."""
        self._file.close()

    # --- plans ---

    def notice(self, plan: Plan, roster: Roster, at: float) -> None:
        """Remember a plan that was announced, so that people can look at it. Known ones stay as they are.

        A coordinator that announces without end fills nothing: beyond ``MAX_NOTICED`` the oldest are forgotten that
        nobody approved and no run has used.
        """
        digest = roster.digest().hex()
        with self._file.transaction() as db:
            db.execute("INSERT OR IGNORE INTO rosters VALUES (?, ?)", (digest, roster.canonical_bytes()))
            db.execute(
                "INSERT OR IGNORE INTO plans (digest, roster, canonical, at) VALUES (?, ?, ?, ?)",
                (plan.digest, digest, plan.canonical(), at),
            )
            unused = (
                "SELECT number FROM plans WHERE NOT EXISTS (SELECT 1 FROM approvals a WHERE (a.plan, a.roster) ="
                " (plans.digest, plans.roster)) AND NOT EXISTS (SELECT 1 FROM runs r WHERE (r.plan, r.roster) ="
                " (plans.digest, plans.roster)) ORDER BY number DESC LIMIT -1 OFFSET ?"
            )
            db.execute(f"DELETE FROM plans WHERE number IN ({unused})", (MAX_NOTICED,))  # noqa: S608 -- fixed text
            db.execute("DELETE FROM rosters WHERE digest NOT IN (SELECT roster FROM plans)")

    def noticed(self) -> tuple[Noticed, ...]:
        """Every plan remembered, the newest first."""
        with self._file.transaction() as db:
            rows = db.execute(_PLANS + " ORDER BY number DESC").fetchall()
        return tuple(_noticed(row) for row in rows)

    def get(self, prefix: str) -> Noticed:
        """The plan whose digest begins so; of several announcements with other rosters, the newest.

        Raises:
            InvalidPlan: the prefix is too short, or fits no plan or several.
        """
        if len(prefix) < MIN_PREFIX or set(prefix) - set("0123456789abcdef"):
            raise InvalidPlan(
                [f"got {prefix!r}, wanted at least {MIN_PREFIX} hexadecimal digits"], source="plan digest"
            )
        with self._file.transaction() as db:
            rows = db.execute(
                _PLANS + " WHERE substr(plans.digest, 1, ?) = ? ORDER BY number DESC", (len(prefix), prefix)
            ).fetchall()
        if len({row[0] for row in rows}) != 1:
            found = "several plans begin" if rows else "no plan announced here begins"
            raise InvalidPlan([f"{found} with {prefix}"], source="plan digest", hint="fedseek-site plans lists them")
        return _noticed(rows[0])

    # --- approvals ---

    def approve(self, approval: PlanApproval, policy: Policy, *, site: str, now: float) -> None:
        """Take an approval; the same one again changes nothing.

        Raises:
            InvalidPlan: no such plan was announced among these sites.
            WrongKey: it does not count: see :func:`fedseek_site.people.check_approval`.
            NotNow: it was withdrawn, and this one is not newer; or it is signed in the future.
        """
        check_approval(approval, policy, site=site)
        check_clock(approval, site=site, now=now)
        key = (approval.plan, approval.roster, approval.person)
        with self._file.transaction() as db:
            if not db.execute("SELECT 1 FROM plans WHERE (digest, roster) = (?, ?)", key[:2]).fetchone():
                raise InvalidPlan(
                    ["no such plan was announced here among these sites"],
                    source=f"plan {approval.plan[:MIN_PREFIX]}",
                    hint="fedseek-site plans lists them; the roster may have changed since",
                )
            row = db.execute(
                "SELECT withdrawn_at FROM approvals WHERE (plan, roster, person) = (?, ?, ?)", key
            ).fetchone()
            if row is not None and row[0] is not None and approval.at <= row[0]:
                raise NotNow(site, "approval: it was withdrawn since it was signed", hint="approve the plan anew")
            db.execute("REPLACE INTO approvals VALUES (?, ?, ?, ?, ?, NULL)", (*key, approval.at, approval.signature))

    def withdraw(self, plan: str, person: str, at: float) -> int:
        """Take back a person's approvals of a plan, among whatever sites. Returns how many that were.

        No signature is asked for: saying no must be easy.
        """
        with self._file.transaction() as db:
            return db.execute(
                "UPDATE approvals SET withdrawn_at = ? WHERE plan = ? AND person = ? AND withdrawn_at IS NULL",
                (at, plan, person),
            ).rowcount

    def standing(self, plan: str, roster: str, policy: Policy, *, site: str) -> tuple[str, ...]:
        """Whose approvals of this plan among these sites count now: different people, signatures verified."""
        with self._file.transaction() as db:
            rows = db.execute(
                "SELECT person, at, signature FROM approvals WHERE (plan, roster) = (?, ?) AND withdrawn_at IS NULL"
                " ORDER BY person",
                (plan, roster),
            ).fetchall()
        found = (PlanApproval(plan=plan, roster=roster, person=who, at=at, signature=mark) for who, at, mark in rows)
        return tuple(approval.person for approval in found if counts(approval, policy, site=site))

    # --- runs ---

    def admit(self, run: str, plan: Plan, roster: Roster, *, dataset: str, at: float) -> None:
        """Write down that this run begins; the same again changes nothing.

        Raises:
            WrongRound: it began with another plan or roster.
        """
        now = Begun(plan.digest, roster.digest().hex())
        privacy = plan.spec.privacy
        with self._file.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)",
                (run, now.plan, now.roster, dataset, privacy.epsilon, privacy.delta, at),
            )
            began = _begun(db, run)
        if began != now:
            raise WrongRound(f"run {run!r} began at this site with another plan or roster")

    def begun(self, run: str) -> Begun | None:
        """What a run was admitted with; None if it was not."""
        with self._file.transaction() as db:
            return _begun(db, run)

    def runs_of(self, plan: str, roster: str) -> tuple[str, ...]:
        """The runs of a plan among these sites that were admitted here, in that order."""
        with self._file.transaction() as db:
            rows = db.execute("SELECT run FROM runs WHERE (plan, roster) = (?, ?) ORDER BY rowid", (plan, roster))
            return tuple(run for (run,) in rows)

    def knows_roster(self, roster: str) -> bool:
        """Was a run admitted here among these very sites?"""
        with self._file.transaction() as db:
            return db.execute("SELECT 1 FROM runs WHERE roster = ?", (roster,)).fetchone() is not None

    # --- pause ---

    def pause(self, at: float) -> None:
        """Take part in nothing new until ``resume``, also after a restart."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM pauses")
            db.execute("INSERT INTO pauses VALUES (?)", (at,))

    def resume(self) -> None:
        """Take part again."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM pauses")

    def paused_at(self) -> float | None:
        """Since when the site is paused; None if it is not."""
        with self._file.transaction() as db:
            row = db.execute("SELECT at FROM pauses").fetchone()
        return None if row is None else float(row[0])


_PLANS: Final = (
    "SELECT plans.digest, plans.canonical, rosters.canonical, plans.at FROM plans"
    " JOIN rosters ON rosters.digest = plans.roster"
)


def _noticed(row: tuple[str, bytes, bytes, float]) -> Noticed:
    return Noticed(_plan(row[1]), parse_roster(row[2]), row[3])


@lru_cache(maxsize=MAX_NOTICED)
def _plan(canonical: bytes) -> Plan:
    return plan_from_canonical(canonical)  # works out the noise, which takes time


def _begun(db: sqlite3.Connection, run: str) -> Begun | None:
    row = db.execute("SELECT plan, roster FROM runs WHERE run = ?", (run,)).fetchone()
    return None if row is None else Begun(*row)
