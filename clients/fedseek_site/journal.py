"""Exactly once, on disk: what a site has answered, and what it must remember to go on.

    asked:     recall(step, request)  ->  None: not done yet             -> do it, record it, then answer
                                      ->  bytes: done, the same request  -> answer the same bytes again
                                      ->  WrongRound: done, and another request now: refused, and written down

The answer and the state that belongs to it go to the disk in one transaction, before the answer leaves. So after a
crash at any moment a site has either not answered, or can repeat its answer to the byte; a second update, mask or share
for the same step does not come into being.

Durability is that of ``fedseek.daemon.database``. An open journal is not to be used in a forked child.

What this cannot know: an older copy of the file, put back from a backup or a snapshot, has forgotten the steps since,
and the site would do them a second time. While a run is on, never restore the file and never delete it.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Final, Self

from fedseek.daemon.database import begin_or_check, check_whole, connect, take_folder, told_as_ours, transaction
from fedseek.errors import JournalUnusable, TooLarge, WrongRound
from fedseek.identity.vault import StorageKey, open_at_rest, seal_at_rest, seal_in_parts

JOURNAL_FILE: Final = "site.sqlite3"
LOCK_FILE: Final = "site.lock"
MAX_KEPT_BYTES: Final = 900_000_000  # SQLite as usually built takes rows of 10**9 bytes (SQLITE_MAX_LENGTH)
ROUNDS_KEPT: Final = 2  # answers older than this many rounds before the newest of their phase are dropped
MAX_REFUSALS_KEPT: Final = 1000  # a run; more are refused all the same, but a coordinator cannot fill the disk

_PIECE: Final = 1 << 20  # bytes written at once
_MAX_RUN_CHARS, _MAX_ROUND = 128, 2**31 - 1
_PHASE = re.compile(r"[a-z][a-z-]{0,31}")
_APPLICATION_ID: Final = 0x46534A31  # "FSJ1": tells this file from any other SQLite database
_KEY_CHECK: Final = "site-journal"
_SCHEMA: Final = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    "CREATE TABLE key_check (sealed BLOB NOT NULL)",
    # number: in the order of recording, rows are never deleted; request: SHA-256; reply: sealed, NULL if no longer kept
    "CREATE TABLE steps (number INTEGER PRIMARY KEY, run TEXT NOT NULL, phase TEXT NOT NULL, round INTEGER NOT NULL,"
    " request BLOB NOT NULL, reply BLOB, UNIQUE (run, phase, round))",
    "CREATE TABLE states (run TEXT PRIMARY KEY, sealed BLOB NOT NULL)",
    "CREATE TABLE forgotten (run TEXT PRIMARY KEY)",
    "CREATE TABLE refusals (run TEXT NOT NULL, phase TEXT NOT NULL, round INTEGER NOT NULL,"
    " request BLOB NOT NULL, at REAL NOT NULL)",
)


@dataclass(frozen=True, slots=True)
class Step:
    """What a site does once.

    Attributes:
        run: 1 to 128 characters.
        phase: lower-case letters and hyphens, 1 to 32 of them, such as ``"round"`` or ``"unmask"``.
        round: from 0 up, or what the phase counts instead, such as epochs. Old answers are dropped phase by phase:
            what one phase counts says nothing of how new another's are.
    """

    run: str
    phase: str
    round: int

    def __post_init__(self) -> None:
        fits = 1 <= len(self.run) <= _MAX_RUN_CHARS and 0 <= self.round <= _MAX_ROUND
        if not fits or not _PHASE.fullmatch(self.phase):
            raise ValueError(f"{self!r} is out of bounds")

    def __str__(self) -> str:
        return f"{self.phase!r} of round {self.round} of run {self.run!r}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request for a step that had been done on another request.

    Attributes:
        step: the step.
        request_digest: SHA-256 of the request refused, 32 bytes.
        at: when, in seconds since 1970 (UTC).
    """

    step: Step
    request_digest: bytes
    at: float


class Journal:
    """The journal of one site, in ``site.sqlite3`` of the site's state folder; used by one process at a time.

    Replies and states are sealed under the storage key. In the clear are runs, phases, rounds, times and the SHA-256 of
    requests. Methods may be called from several threads. ``recall`` followed by ``record`` is not one action: of two
    threads that do the same step, the second to record is refused, and its answer must not leave.

    Args:
        folder: the state folder; made with mode 0700 if it is missing, its parent is not.
        key: the storage key of the site.

    Raises:
        WrongKey: the journal was begun under another storage key.
        CustodyError: the file is open to group or others, or cannot be opened.
        JournalUnusable: another process has it open, it is damaged, or it is no journal.
    """

    def __init__(self, folder: Path, key: StorageKey) -> None:
        self._path = folder / JOURNAL_FILE
        self._key = key
        self._turn = Lock()
        with ExitStack() as opened:
            take_folder(folder, LOCK_FILE, JOURNAL_FILE, opened, what="journal", whose="process of this site")
            with _told_as_ours(self._path):
                # states hold the mask keys of their round: zeros in place of old ones
                self._db = connect(self._path, opened, overwrites=True)
            self._begin_or_check()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other processes have it; closing twice does nothing more."""
        with self._turn:
            self._opened.close()

    def recall(self, step: Step, request: bytes) -> bytes | None:
        """Whether the step was done: to be asked before doing it.

        Returns:
            The reply as recorded if it was done on this very request; None if it was not done.

        Raises:
            WrongRound: done on another request (written down durably before this is raised), done so long ago that its
                reply is no longer kept, or of a run that was forgotten.
            WrongKey: the reply on the disk was altered.
            JournalUnusable: the disk is full or fails, or the file is damaged.
        """
        digest = hashlib.sha256(request).digest()
        with self._transaction() as db:
            row = db.execute(
                "SELECT request, reply FROM steps WHERE (run, phase, round) = (?, ?, ?)", _columns(step)
            ).fetchone()
            differs = row is not None and row[0] != digest
            if differs:
                _note_refusal(db, step, digest)
            forgotten = _is_forgotten(db, step.run)
        if differs:
            raise WrongRound(
                f"{step} was done here on another request; this one is refused and written down",
                hint="a coordinator that asks twice, differently, is at fault or hostile: see the site's refusals",
            )
        if forgotten:
            raise WrongRound(f"{step}: the run was forgotten here at its operator's word")
        if row is None:
            return None
        if row[1] is None:
            raise WrongRound(f"{step} is done, its answer is no longer kept")
        return open_at_rest(self._key, row[1], purpose=_reply_purpose(step, digest))

    def record(self, step: Step, request: bytes, reply: bytes, state: bytes | None) -> None:
        """Keep the reply and the state together, durably, before the reply leaves the site.

        Guarantee: once this has returned, both survive a crash of the process and of the machine; if it raises, or the
        process dies within it, either both are kept or neither.

        Args:
            step: the step that was done.
            request: what asked for it; only its SHA-256 is kept.
            reply: what will be answered, at most ``MAX_KEPT_BYTES``.
            state: what the site needs to go on with the run, at most ``MAX_KEPT_BYTES``; it replaces the run's last one.
                None leaves that as it is.

        Raises:
            WrongRound: the step is recorded already, or the run was forgotten. The reply must not leave.
            TooLarge: the reply or the state is. The reply must not leave.
            JournalUnusable: the disk is full or fails, or the file is damaged. The reply must not leave.
        """
        _check_size(f"reply of {step}", reply)
        _check_size(f"state after {step}", state or b"")
        digest = hashlib.sha256(request).digest()
        sealed_reply = seal_in_parts(self._key, reply, purpose=_reply_purpose(step, digest))
        sealed_state = None if state is None else seal_in_parts(self._key, state, purpose=_state_purpose(step.run))
        with self._transaction() as db:
            _refuse_repetition(db, step)
            row = db.execute(
                "INSERT INTO steps (run, phase, round, request, reply) VALUES (?, ?, ?, ?, zeroblob(?))",
                (*_columns(step), digest, sum(map(len, sealed_reply))),
            ).lastrowid
            _fill(db, "steps", "reply", row, sealed_reply)
            if sealed_state is not None:
                size = sum(map(len, sealed_state))
                row = db.execute(
                    "REPLACE INTO states (run, sealed) VALUES (?, zeroblob(?))", (step.run, size)
                ).lastrowid
                _fill(db, "states", "sealed", row, sealed_state)
            db.execute(
                "UPDATE steps SET reply = NULL WHERE run = ? AND phase = ? AND round < ? AND reply IS NOT NULL",
                (step.run, step.phase, step.round - ROUNDS_KEPT),
            )

    def state(self, run: str) -> bytes | None:
        """The newest state recorded for the run; None if there is none, or the run was forgotten.

        Raises:
            WrongKey: the state on the disk was altered.
            JournalUnusable: the disk fails, or the file is damaged.
        """
        with self._transaction() as db:
            row = db.execute("SELECT sealed FROM states WHERE run = ?", (run,)).fetchone()
        return None if row is None else open_at_rest(self._key, row[0], purpose=_state_purpose(run))

    def latest_run(self) -> str | None:
        """The run of the step recorded last, for a site to go on with; None if there is none or it was forgotten."""
        with self._transaction() as db:
            row = db.execute("SELECT run FROM steps ORDER BY number DESC LIMIT 1").fetchone()
            return None if row is None or _is_forgotten(db, row[0]) else str(row[0])

    def refusals(self, run: str) -> list[Refusal]:
        """The first ``MAX_REFUSALS_KEPT`` requests refused for being other than the one answered, oldest first."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT run, phase, round, request, at FROM refusals WHERE run = ? ORDER BY rowid", (run,)
            ).fetchall()
        return [Refusal(Step(*row[:3]), row[3], row[4]) for row in rows]

    def forget(self, run: str) -> None:
        """Drop the replies and the state of a finished run for good; run at the operator's word.

        What stays: which steps were done, on which requests, and the refusals. So a forgotten run is not begun again.
        Their place in the file is overwritten with zeros; the disk may still hold older, sealed copies.

        Raises:
            JournalUnusable: there is no such run here, the disk is full or fails, or the file is damaged.
        """
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM steps WHERE run = ?", (run,)).fetchone() is None:
                raise JournalUnusable(f"{self._path}: got run {run!r} to forget, wanted a run of this site")
            db.execute("UPDATE steps SET reply = NULL WHERE run = ?", (run,))
            db.execute("DELETE FROM states WHERE run = ?", (run,))
            db.execute("INSERT OR IGNORE INTO forgotten (run) VALUES (?)", (run,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block is kept when it ends, or nothing if it raises."""
        with self._turn, _told_as_ours(self._path), transaction(self._db) as db:
            yield db

    def _begin_or_check(self) -> None:
        with self._transaction() as db:
            if begin_or_check(db, self._path, _APPLICATION_ID, _SCHEMA, what="a site's journal of version 1"):
                db.execute("INSERT INTO key_check VALUES (?)", (seal_at_rest(self._key, b"", purpose=_KEY_CHECK),))
            check_whole(db)
            (sealed,) = db.execute("SELECT sealed FROM key_check").fetchone()
        open_at_rest(self._key, sealed, purpose=_KEY_CHECK)


@contextmanager
def _told_as_ours(path: Path) -> Iterator[None]:
    """Tell an error of SQLite as one of ours."""
    with told_as_ours(path, what="journal", hint=_hint):
        try:
            yield
        except sqlite3.DataError as error:
            raise TooLarge(f"{path}: {error}; wanted at most {MAX_KEPT_BYTES} bytes") from error


def _hint(name: str) -> str:
    if name == "SQLITE_FULL":
        return "make room on the disk: the step was not recorded and is not answered"
    return "keep the file as it is and look at the disk; without the journal the site cannot go on with its runs"


def _columns(step: Step) -> tuple[str, str, int]:
    return step.run, step.phase, step.round


def _is_forgotten(db: sqlite3.Connection, run: str) -> bool:
    return db.execute("SELECT 1 FROM forgotten WHERE run = ?", (run,)).fetchone() is not None


def _fill(db: sqlite3.Connection, table: str, column: str, row: int | None, parts: Iterable[bytes]) -> None:
    """Write what a zeroblob made room for, piece by piece: what is given whole, SQLite copies."""
    assert row is not None  # noqa: S101 -- one was inserted
    with db.blobopen(table, column, row) as blob:
        for part in parts:
            for start in range(0, len(part), _PIECE):
                blob.write(memoryview(part)[start : start + _PIECE])


def _refuse_repetition(db: sqlite3.Connection, step: Step) -> None:
    if db.execute("SELECT 1 FROM steps WHERE (run, phase, round) = (?, ?, ?)", _columns(step)).fetchone():
        raise WrongRound(f"{step} is recorded already; a second answer to it must not leave")
    if _is_forgotten(db, step.run):
        raise WrongRound(f"{step}: the run was forgotten here at its operator's word")


def _note_refusal(db: sqlite3.Connection, step: Step, digest: bytes) -> None:
    (kept,) = db.execute("SELECT count(*) FROM refusals WHERE run = ?", (step.run,)).fetchone()
    if kept < MAX_REFUSALS_KEPT:
        db.execute("INSERT INTO refusals VALUES (?, ?, ?, ?, ?)", (*_columns(step), digest, time.time()))


def _reply_purpose(step: Step, digest: bytes) -> str:
    # the run comes last: it alone may hold a slash
    return f"site-reply/{digest.hex()}/{step.phase}/{step.round}/{step.run}"


def _state_purpose(run: str) -> str:
    return f"site-state/{run}"


def _check_size(what: str, data: bytes) -> None:
    if len(data) > MAX_KEPT_BYTES:
        raise TooLarge(f"{what}: got {len(data)} bytes, wanted at most {MAX_KEPT_BYTES}")
