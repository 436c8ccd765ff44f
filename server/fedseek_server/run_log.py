"""What a run has seen, on disk, so that a coordinator that is killed at any instant goes on as if nothing had been.

    begin       plan, roster, name
    add         each look, reply, end of an exchange and wish for a key, before the coordinator acts on it
    append      how a round ended: one row a round, never dropped; written with the snapshot that follows
    store       a snapshot between two rounds; in the same transaction the events that led to it go

So what it grows by is the ends of rounds; of replies it holds those of one round.

Durability is that of ``fedseek.daemon.database``. Every row carries the SHA-256 of its bytes, so a disk that has altered
one is found here and not by a site, which would take the sum for tampered with. Nothing in it opens a ciphertext; its
owner alone may read it all the same.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Final, Literal, Self, TypeVar

import msgspec

from fedseek.daemon.database import begin_or_check, connect, take_folder, told_as_ours, transaction
from fedseek.errors import JournalUnusable
from fedseek.identity.secret_files import refusing
from fedseek.messages import AggregateDown, Continuation, Document, RunId

LOG_FILE: Final = "run.sqlite3"
LOCK_FILE: Final = "run.lock"

_APPLICATION_ID: Final = 0x46535231  # "FSR1": tells this file from any other SQLite database
_SCHEMA: Final = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    # sha256: of data. kept: begin, snapshot
    "CREATE TABLE kept (name TEXT PRIMARY KEY, sha256 BLOB NOT NULL, data BLOB NOT NULL)",
    "CREATE TABLE rounds (number INTEGER PRIMARY KEY, sha256 BLOB NOT NULL, data BLOB NOT NULL)",
    # number: from 1 after each snapshot
    "CREATE TABLE events (number INTEGER PRIMARY KEY, is_look INTEGER NOT NULL, sha256 BLOB NOT NULL, data BLOB NOT NULL)",
    "CREATE TABLE wishes (number INTEGER PRIMARY KEY)",  # for a new group key, not yet an event
)
_T = TypeVar("_T")


class Begin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a run began with; ``started`` is Unix time in seconds."""

    version: Literal[1] = 1
    run: RunId
    plan: Document
    roster: Document
    continues: Continuation | None
    started: float


class Looked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="look"):
    """The coordinator looked at which nodes are there, and at the clock."""

    nodes: tuple[int, ...]
    at: float


class Replied(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reply"):
    """A node replied; what it sent may still be refused."""

    node: int
    data: bytes


class Over(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="over"):
    """The exchange under way is over: who has not answered is missing."""


class KeyWished(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="key"):
    """A new group key was asked for."""


class AskedAgain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="again"):
    """The wait for approvals of the release was over, and an operator had it begin once more."""

    at: float


Event = Looked | Replied | Over | KeyWished | AskedAgain
_BEGIN: Final[msgspec.msgpack.Decoder[Begin]] = msgspec.msgpack.Decoder(Begin)
_BYTES: Final[msgspec.msgpack.Decoder[bytes]] = msgspec.msgpack.Decoder(bytes)
_EVENT: Final[msgspec.msgpack.Decoder[Event]] = msgspec.msgpack.Decoder(Event)
_DOWN: Final[msgspec.msgpack.Decoder[AggregateDown]] = msgspec.msgpack.Decoder(AggregateDown)


class RunLog:
    """The record of one run, in ``run.sqlite3`` of a folder of its own; one process at a time has it open.

    Every method that writes has written, durably, when it returns; if it raises, it has written nothing. Methods may be
    called from several threads.

    Args:
        folder: of the run; made with mode 0700 if it is missing.

    Raises:
        CustodyError: the file is open to group or others, or cannot be opened.
        JournalUnusable: another process has it open, it is damaged, or it is no record of a run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE
        self._turn = Lock()
        self._ended: AggregateDown | None = None
        with ExitStack() as opened:
            with refusing(folder.parent, "made"):
                folder.parent.mkdir(parents=True, exist_ok=True)
            take_folder(folder, LOCK_FILE, LOG_FILE, opened, what=_WHAT, whose="coordinator process")
            with told_as_ours(self._path, what=_WHAT, hint=_hint):
                self._db = connect(self._path, opened)
            with self._transaction() as db:
                begin_or_check(
                    db, self._path, _APPLICATION_ID, _SCHEMA, what="a coordinator's record of a run, version 1"
                )
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other processes have it; closing twice does nothing more."""
        with self._turn:
            self._opened.close()

    def begin(self, begin: Begin) -> None:
        """Write down what the run begins with.

        Raises:
            JournalUnusable: a run was begun here before.
        """
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM kept WHERE name = 'begin'").fetchone():
                raise JournalUnusable(f"{self._path} holds a run that has begun; a new run needs another folder")
            _keep(db, "begin", begin)

    def has_begun(self) -> bool:
        """Whether a run was begun here."""
        with self._transaction() as db:
            return db.execute("SELECT 1 FROM kept WHERE name = 'begin'").fetchone() is not None

    def begun(self) -> Begin:
        """What the run began with.

        Raises:
            JournalUnusable: no run was begun here.
        """
        begin = self._read("SELECT sha256, data FROM kept WHERE name = 'begin'", (), _BEGIN)
        if begin is None:
            raise JournalUnusable(f"{self._path} holds no run that has begun")
        return begin

    def snapshot(self) -> bytes | None:
        """The last one stored; None before the first."""
        return self._read("SELECT sha256, data FROM kept WHERE name = 'snapshot'", (), _BYTES)

    def store(self, snapshot: bytes) -> None:
        """Replace the snapshot, keep how the round before it ended, and drop the events that led to it."""
        with self._transaction() as db:
            db.execute("DELETE FROM events")  # first: what follows takes their place in the file
            if self._ended is not None:
                data = msgspec.msgpack.encode(self._ended)
                values = (self._ended.round, _sha256(data), data)
                db.execute("INSERT INTO rounds (number, sha256, data) VALUES (?, ?, ?)", values)
            _keep(db, "snapshot", snapshot)
        self._ended = None

    def add(self, event: Event) -> None:
        """Write down what is about to be acted on."""
        with self._transaction() as db:
            _add(db, event)

    def event(self, number: int) -> Event | None:
        """The events since the snapshot, one by one: 1 is the first; None after the last."""
        return self._read("SELECT sha256, data FROM events WHERE number = ?", (number,), _EVENT)

    def last_look(self) -> Looked | None:
        """The last look since the snapshot."""
        query = "SELECT sha256, data FROM events WHERE is_look ORDER BY number DESC LIMIT 1"
        event = self._read(query, (), _EVENT)
        return event if isinstance(event, Looked) else None

    def append(self, down: AggregateDown) -> None:
        """Keep how a round ended; on the disk with the next ``store``, until when it follows from the events there."""
        self._ended = down

    def read(self, number: int) -> AggregateDown:
        """How round ``number`` ended.

        Raises:
            JournalUnusable: that was never written down, or is damaged.
        """
        if self._ended is not None and self._ended.round == number:
            return self._ended
        down = self._read("SELECT sha256, data FROM rounds WHERE number = ?", (number,), _DOWN)
        if down is None:
            raise JournalUnusable(f"{self._path} does not hold how round {number} ended")
        return down

    def wish_key(self) -> None:
        """Remember that a new group key was asked for, until ``take_wish``."""
        with self._transaction() as db:
            db.execute("INSERT INTO wishes DEFAULT VALUES")

    def take_wish(self) -> bool:
        """Make an event of the wishes since the last call, if there are any."""
        with self._transaction() as db:
            is_wished = db.execute("DELETE FROM wishes").rowcount > 0
            if is_wished:
                _add(db, KeyWished())
        return is_wished

    def _read(self, query: str, values: tuple[int, ...], decoder: msgspec.msgpack.Decoder[_T]) -> _T | None:
        with self._transaction() as db:
            row = db.execute(query, values).fetchone()
        if row is None:
            return None
        if _sha256(row[1]) != row[0]:
            raise JournalUnusable(f"{self._path}: {query!r} gives other bytes than were written", hint=_DAMAGE_HINT)
        try:
            return decoder.decode(row[1])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the last two through
            raise JournalUnusable(f"{self._path}: written by another version: {error}") from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block is kept when it ends, or nothing if it raises."""
        with self._turn, told_as_ours(self._path, what=_WHAT, hint=_hint), transaction(self._db) as db:
            yield db


_WHAT: Final = "record of a run"
_DAMAGE_HINT = "look at the disk; sites can go on from their last common adapter in a new run (docs/protocol.md)"
_HINTS: Mapping[str, str] = {
    "SQLITE_FULL": "make room on the disk and start again: nothing is lost, the run goes on from here",
    "SQLITE_IOERR": "look at the disk, then start again: the run goes on from what was written",
}


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _keep(db: sqlite3.Connection, name: str, value: object) -> None:
    data = msgspec.msgpack.encode(value)
    db.execute("REPLACE INTO kept (name, sha256, data) VALUES (?, ?, ?)", (name, _sha256(data), data))


def _add(db: sqlite3.Connection, event: Event) -> None:
    data = msgspec.msgpack.encode(event)
    is_look = isinstance(event, Looked)
    db.execute("INSERT INTO events (is_look, sha256, data) VALUES (?, ?, ?)", (is_look, _sha256(data), data))


def _hint(name: str) -> str:
    return next((hint for prefix, hint in _HINTS.items() if name.startswith(prefix)), _DAMAGE_HINT)
