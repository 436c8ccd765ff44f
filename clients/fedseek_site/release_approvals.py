"""Releases that wait for this site's people, and who approved them: on the disk before anybody is told.

    announce    what the site would sign: the privacy statement as bytes, digests of the weights. Nothing is signed yet
    approve     a privacy officer's signature over the release's digest
    let_go      enough have approved: from here on it may leave the building, and no approval can be taken back

One SQLite file of mode 0600, written as ``approvals.sqlite3`` is. An approval in it proves nothing by being there:
signatures are verified again, against the policy of the day, each time approvals are counted.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from fedseek.daemon.database import SharedDatabase, begin_or_check, check_whole
from fedseek.errors import Malformed, NotNow, ReleaseRefused
from fedseek.messages import release_message
from fedseek_site.people import MIN_PREFIX, ReleaseApproval, check_approval, check_clock, counts
from fedseek_site.policy import Policy

MAX_ANNOUNCED: Final = 16  # releases of one run that nobody has approved; the oldest make room

_APPLICATION_ID: Final = 0x46535031  # "FSP1": tells this file from any other SQLite database
_WHAT: Final = "approvals of releases"
_SCHEMA: Final = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    # digests: MessagePack, by scope. let_go_at: NULL until the site may sign
    "CREATE TABLE releases (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, run TEXT NOT NULL, plan TEXT NOT NULL,"
    " digests BLOB NOT NULL, statement BLOB NOT NULL, at REAL NOT NULL, let_go_at REAL)",
    # request: SHA-256 of the request that the release was drafted for
    "CREATE TABLE requests (request BLOB PRIMARY KEY, release TEXT NOT NULL)",
    "CREATE TABLE approvals (release TEXT NOT NULL, person TEXT NOT NULL, at INTEGER NOT NULL, signature BLOB NOT NULL,"
    " withdrawn_at REAL, PRIMARY KEY (release, person))",
)
_FIELDS: Final = "SELECT digest, run, plan, digests, statement, at, let_go_at FROM releases"
_DIGESTS: Final[msgspec.msgpack.Decoder[dict[str, bytes]]] = msgspec.msgpack.Decoder(dict[str, bytes])


@dataclass(frozen=True, slots=True)
class AnnouncedRelease:
    """What the site would sign, for people to look at.

    Attributes:
        digest: see :func:`release_digest`.
        run: its name.
        plan: digest of the plan, 64 hexadecimal digits.
        digests: of the tensors of the shared scopes.
        statement: the privacy statement, the very bytes.
        at: when it was first drafted, Unix seconds.
        let_go_at: since when it may have left the building; None: it has not.
    """

    digest: str
    run: str
    plan: str
    digests: Mapping[str, bytes] = field(repr=False)
    statement: bytes = field(repr=False)
    at: float
    let_go_at: float | None = None

    @classmethod
    def of(cls, run: str, plan: str, digests: Mapping[str, bytes], statement: bytes, *, at: float) -> AnnouncedRelease:
        """One that is announced now."""
        return cls(release_digest(run, digests, statement), run, plan, dict(digests), statement, at)


def release_digest(run: str, digests: Mapping[str, bytes], statement: bytes) -> str:
    """What a person approves: hex SHA-256 of the message that the site would sign (``fedseek.messages.release_message``)."""
    return sha256(release_message(run, dict(digests), statement)).hexdigest()


class ReleaseApprovals:
    """The file. Its methods may be called from several threads; each is one transaction.

    Args:
        path: of the file, in a folder on a local disk; made if it is missing.

    Raises:
        CustodyError: the file is open to group or others, or cannot be opened.
        JournalUnusable: it is damaged, in use for too long, or something else.
    """

    def __init__(self, path: Path) -> None:
        def begin(db: sqlite3.Connection) -> None:
            begin_or_check(db, path, _APPLICATION_ID, _SCHEMA, what="a site's approvals of releases of version 1")
            check_whole(db)

        self._file = SharedDatabase(path, begin, what=_WHAT)

    def close(self) -> None:
        """Close the file; closing twice does nothing more."""
        self._file.close()

    # --- releases ---

    def announce(self, release: AnnouncedRelease, request: bytes) -> None:
        """Remember what would be signed, and the request that it was drafted for; the same again changes nothing.

        A coordinator that asks in ever new ways fills nothing: beyond ``MAX_ANNOUNCED`` of a run, the oldest are
        forgotten that nobody approved.
        """
        with self._file.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO releases (digest, run, plan, digests, statement, at) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    release.digest,
                    release.run,
                    release.plan,
                    msgspec.msgpack.encode(release.digests),
                    release.statement,
                    release.at,
                ),
            )
            unused = (
                "SELECT number FROM releases WHERE run = ? AND let_go_at IS NULL AND NOT EXISTS (SELECT 1 FROM approvals"
                " WHERE approvals.release = releases.digest) ORDER BY number DESC LIMIT -1 OFFSET ?"
            )
            db.execute(f"DELETE FROM releases WHERE number IN ({unused})", (release.run, MAX_ANNOUNCED))  # noqa: S608 -- fixed text
            db.execute("REPLACE INTO requests VALUES (?, ?)", (sha256(request).digest(), release.digest))
            db.execute("DELETE FROM requests WHERE release NOT IN (SELECT digest FROM releases)")

    def drafted_for(self, request: bytes) -> AnnouncedRelease | None:
        """What was drafted for this very request; None if nothing was."""
        query = _FIELDS + " JOIN requests ON requests.release = releases.digest WHERE requests.request = ?"
        with self._file.transaction() as db:
            row = db.execute(query, (sha256(request).digest(),)).fetchone()
        return None if row is None else _announced(row)

    def announced(self) -> tuple[AnnouncedRelease, ...]:
        """Every release remembered, the newest first."""
        with self._file.transaction() as db:
            rows = db.execute(_FIELDS + " ORDER BY number DESC").fetchall()
        return tuple(_announced(row) for row in rows)

    def get(self, prefix: str) -> AnnouncedRelease:
        """The release whose digest begins so.

        Raises:
            Malformed: the prefix is too short, or fits no release or several.
        """
        if len(prefix) < MIN_PREFIX or set(prefix) - set("0123456789abcdef"):
            raise Malformed(f"release digest: got {prefix!r}, wanted at least {MIN_PREFIX} hexadecimal digits")
        with self._file.transaction() as db:
            rows = db.execute(_FIELDS + " WHERE substr(digest, 1, ?) = ?", (len(prefix), prefix)).fetchall()
        if len(rows) != 1:
            found = "several releases begin" if rows else "no release announced here begins"
            raise Malformed(f"release digest: {found} with {prefix}", hint="fedseek-site releases lists them")
        return _announced(rows[0])

    # --- approvals ---

    def approve(self, approval: ReleaseApproval, policy: Policy, *, site: str, now: float) -> None:
        """Take an approval; the same one again changes nothing.

        Raises:
            Malformed: no such release was announced.
            WrongKey: it does not count: see :func:`fedseek_site.people.check_approval`.
            NotNow: it was withdrawn, and this one is not newer; or it is signed in the future.
        """
        check_approval(approval, policy, site=site)
        check_clock(approval, site=site, now=now)
        key = (approval.release, approval.person)
        with self._file.transaction() as db:
            if not db.execute("SELECT 1 FROM releases WHERE digest = ?", key[:1]).fetchone():
                raise Malformed(
                    f"release {approval.release[:MIN_PREFIX]} was not announced here",
                    hint="fedseek-site releases lists those that were",
                )
            row = db.execute("SELECT withdrawn_at FROM approvals WHERE (release, person) = (?, ?)", key).fetchone()
            if row is not None and row[0] is not None and approval.at <= row[0]:
                raise NotNow(site, "approval: it was withdrawn since it was signed", hint="approve the release anew")
            db.execute("REPLACE INTO approvals VALUES (?, ?, ?, ?, NULL)", (*key, approval.at, approval.signature))

    def withdraw(self, release: str, person: str, at: float) -> int:
        """Take back a person's approval. Returns how many that were, one or none. No signature is asked for.

        Raises:
            ReleaseRefused: too late, the release may have left the building.
        """
        with self._file.transaction() as db:
            gone = db.execute(
                "SELECT 1 FROM releases WHERE digest = ? AND let_go_at IS NOT NULL", (release,)
            ).fetchone()
            if gone:
                raise ReleaseRefused(
                    f"release {release[:MIN_PREFIX]} is signed by this site, and may have been sent",
                    hint="an approval can be taken back until enough people have approved",
                )
            return db.execute(
                "UPDATE approvals SET withdrawn_at = ? WHERE (release, person) = (?, ?) AND withdrawn_at IS NULL",
                (at, release, person),
            ).rowcount

    def standing(self, release: str, policy: Policy, *, site: str) -> tuple[str, ...]:
        """Whose approvals of this release count now: different people, signatures verified."""
        with self._file.transaction() as db:
            return _standing(db, release, policy, site)

    def let_go(self, release: str, policy: Policy, *, site: str, at: float) -> tuple[str, ...]:
        """Count, and if it is enough, write down that the release may leave: in one transaction, so that a withdrawal is
        either counted or refused.

        Returns:
            Whose approvals count; whether they are enough is ``policy.approval.releases``.
        """
        with self._file.transaction() as db:
            names = _standing(db, release, policy, site)
            if len(names) >= policy.approval.releases:
                db.execute("UPDATE releases SET let_go_at = coalesce(let_go_at, ?) WHERE digest = ?", (at, release))
        return names


def _announced(row: tuple[str, str, str, bytes, bytes, float, float | None]) -> AnnouncedRelease:
    digest, run, plan, digests, statement, at, let_go_at = row
    return AnnouncedRelease(digest, run, plan, _DIGESTS.decode(digests), statement, at, let_go_at)


def _standing(db: sqlite3.Connection, release: str, policy: Policy, site: str) -> tuple[str, ...]:
    rows = db.execute(
        "SELECT person, at, signature FROM approvals WHERE release = ? AND withdrawn_at IS NULL ORDER BY person",
        (release,),
    ).fetchall()
    found = (ReleaseApproval(release=release, person=who, at=at, signature=mark) for who, at, mark in rows)
    return tuple(approval.person for approval in found if counts(approval, policy, site=site))
