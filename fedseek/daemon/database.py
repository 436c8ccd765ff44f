"""A SQLite file that a daemon lives by: private, durable, used by one process, its errors told as ours.

Durability. A rollback journal and ``synchronous=EXTRA``. ``FULL`` alone does not sync the folder after the rollback
journal is removed: a power failure could bring that file back and with it undo a transaction already acted on (SQLite,
"PRAGMA synchronous"). A write-ahead log with ``FULL`` would be as durable, but somebody who tidies the ``-wal`` file
away makes the file forget and nothing shows; here every transaction is in the one file. A ``-journal`` file that a crash
leaves must stay for the next start: without it the file is damaged (SQLite, "How To Corrupt An SQLite Database File",
sections 1.3 and 1.4). The folder must be on a local disk: locks and syncs of network file systems cannot be relied on.
An open file is not to be used in a forked child.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock
from typing import Final

from fedseek.errors import CustodyError, JournalUnusable
from fedseek.identity.secret_files import check_private, locked, sync_folder

_PRAGMAS: Final = (
    "journal_mode = DELETE",
    "synchronous = EXTRA",
    "fullfsync = ON",  # macOS: fsync alone leaves the data in the disk's cache
    "temp_store = MEMORY",
)


def take_folder(folder: Path, lock: str, file: str, opened: ExitStack, *, what: str, whose: str) -> None:
    """Take the folder's lock, and see that the file exists, for its owner only.

    The lock ends with ``opened``, or with the process and whatever it has forked.

    Args:
        folder: made with mode 0700 if it is missing, its parent is not.
        lock: name of the lock file. Not the database itself: closing any descriptor of that would drop SQLite's own locks.
        file: name of the database.
        opened: keeps the lock.
        what: the file is, for errors.
        whose: process uses it, for errors.

    Raises:
        JournalUnusable: another process has the lock.
        CustodyError: the file is open to group or others, or cannot be opened.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        opened.enter_context(locked(folder / lock, wait=False))
        _make_private(folder / file)
        sync_folder(folder)
    except BlockingIOError:
        raise JournalUnusable(
            f"{folder} is in use by another {whose}; wanted it for this one alone",
            hint="stop that process first; its lock ends with it",
        ) from None
    except OSError as error:
        raise CustodyError(f"{what} in {folder} cannot be opened: {error.strerror}") from error


def make_private_file(path: Path, *, what: str) -> None:
    """See that the file exists, for its owner only.

    Raises:
        CustodyError: it is open to group or others, or cannot be opened.
    """
    try:
        _make_private(path)
    except OSError as error:
        raise CustodyError(f"{what} {path} cannot be opened: {error.strerror}") from error


def connect(path: Path, opened: ExitStack, *, patience: float = 0.0, overwrites: bool = False) -> sqlite3.Connection:
    """A connection that ends with ``opened``.

    Args:
        path: of the file.
        opened: closes it.
        patience: seconds to wait for another connection's transaction.
        overwrites: put zeros in place of what is deleted.

    Raises:
        sqlite3.DatabaseError: see :func:`told_as_ours`.
    """
    db = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
    opened.callback(db.close)
    for pragma in (*_PRAGMAS, *(("secure_delete = ON",) if overwrites else ())):
        db.execute(f"PRAGMA {pragma}")
    return db


def begin_or_check(
    db: sqlite3.Connection, path: Path, application_id: int, schema: Sequence[str], *, what: str
) -> bool:
    """Lay the tables out in a file with nothing in it, or check that it is ours. Inside a transaction.

    Returns:
        Whether the file was begun just now.

    Raises:
        JournalUnusable: it is another program's.
    """
    (is_ours,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and not is_ours:
        for statement in schema:
            db.execute(statement)
        return True
    if is_ours != application_id:
        raise JournalUnusable(f"{path} is a database, but not {what}")
    return False


def check_whole(db: sqlite3.Connection) -> None:
    """Read the whole file. Raises ``sqlite3.DatabaseError`` if it is damaged."""
    damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise sqlite3.DatabaseError(damage)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """One transaction: all of the block is kept when it ends, or nothing if it raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def nothing_was_changed(name: str) -> str:
    """What to do about any error of a file that only its own process writes."""
    return "nothing was changed; look at the disk, and keep the file as it is"


class SharedDatabase:
    """A private file that the threads of one process share, a transaction at a time.

    Args:
        path: of the file, in a folder on a local disk; made if it is missing.
        begin: what the first transaction does, such as laying out tables; if it raises, the file is closed again.
        what: the file is, for errors.
        hint: what to do, given SQLite's name of the error.
        patience: seconds to wait for another process's transaction.

    Raises:
        CustodyError: the file is open to group or others, or cannot be opened.
        JournalUnusable: it is damaged, in use for too long, or something else.
    """

    def __init__(
        self,
        path: Path,
        begin: Callable[[sqlite3.Connection], None],
        *,
        what: str,
        hint: Callable[[str], str] = nothing_was_changed,
        patience: float = 10.0,
    ) -> None:
        self.path, self._what, self._hint = path, what, hint
        self._turn = RLock()
        make_private_file(path, what=what)
        with ExitStack() as opened:
            with told_as_ours(path, what=what, hint=hint):
                self._db = connect(path, opened, patience=patience)
            with self.transaction() as db:
                begin(db)
            opened.pop_all()

    def close(self) -> None:
        """Close the file; closing twice does nothing more."""
        with self._turn:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing of it.

        Raises:
            JournalUnusable: the file is damaged or locked, the disk is full or fails.
        """
        with self._turn, told_as_ours(self.path, what=self._what, hint=self._hint), transaction(self._db) as db:
            yield db


@contextmanager
def told_as_ours(path: Path, *, what: str, hint: Callable[[str], str]) -> Iterator[None]:
    """Tell an error of SQLite as one of ours.

    Args:
        path: of the file.
        what: it is.
        hint: what to do, given SQLite's name of the error.

    Raises:
        JournalUnusable: the file is damaged or locked, the disk is full or fails.
    """
    try:
        yield
    except sqlite3.ProgrammingError:  # it was closed: a mistake of the programmer
        raise
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "damaged")
        raise JournalUnusable(f"{what} {path} cannot be used: {error} ({name})", hint=hint(name)) from error


def _make_private(path: Path) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        check_private(path, os.fstat(file))
    finally:
        os.close(file)
