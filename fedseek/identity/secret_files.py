"""Files that nobody but their owner may open, written whole or not at all.

Both daemons keep their keys in such files. What is in a file, and whether it is sealed too, is its owner's business.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from fedseek.errors import CustodyError, TooLarge

LOCK_FILE: Final = ".lock"


def write_secret_file(path: Path, data: bytes) -> None:
    """Put ``data`` in the file at ``path``, replacing what was there; mode 0600 from its first moment.

    Guarantee: a crash at any time leaves the old file or the new one whole, and the new one once this has returned. A
    crash in between may leave a file ``.fedseek-*`` of mode 0600 beside it, which may be deleted.

    Raises:
        CustodyError: it cannot be written; the old file or the new one is there, whole.
    """
    with refusing(path, "written"), ExitStack() as undo:
        descriptor, scratch = tempfile.mkstemp(prefix=".fedseek-", dir=path.parent)  # mkstemp: O_EXCL and 0600
        undo.callback(Path(scratch).unlink, missing_ok=True)
        write_through(descriptor, data)
        os.replace(scratch, path)
        undo.pop_all()
        sync_folder(path.parent)


def read_secret_file(path: Path, *, limit: int) -> bytes:
    """The content of a file that nobody but its owner may open.

    Args:
        path: a plain file.
        limit: bytes it may have.

    Raises:
        CustodyError: missing, a symbolic link, not a plain file, or open to group or others.
        TooLarge: longer than ``limit``.
    """
    with open_private(path) as descriptor:
        data = read_at_most(descriptor, limit + 1)
    if len(data) > limit:
        raise TooLarge(f"{path}: got more than {limit} bytes, wanted at most that")
    return data


def read_file(path: Path, *, limit: int) -> bytes:
    """The content of a file that anybody may open: what another party sent.

    Raises:
        CustodyError: missing, or not a plain file.
        TooLarge: longer than ``limit``.
    """
    with refusing(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not make us wait; it is refused below
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CustodyError(f"{path} is not a plain file")
            data = read_at_most(descriptor, limit + 1)
        finally:
            os.close(descriptor)
    if len(data) > limit:
        raise TooLarge(f"{path}: got more than {limit} bytes, wanted at most that")
    return data


@contextmanager
def refusing(path: Path, action: str) -> Iterator[None]:
    """Tell an ``OSError`` of the block as one of ours."""
    try:
        yield
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise CustodyError(f"{path} cannot be {action}: {reason}") from error


@contextmanager
def open_private(path: Path) -> Iterator[int]:
    """A descriptor to read a plain file with that only its owner may open."""
    with refusing(path, "read"):
        # O_NONBLOCK: opening a pipe must not wait for a writer; it is refused below
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            check_private(path, os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)


def check_private(path: Path, status: os.stat_result) -> None:
    """Refuse what is not a plain file, or what group or others may read, write or run.

    Raises:
        CustodyError: it is one of these.
    """
    if not stat.S_ISREG(status.st_mode):
        raise CustodyError(f"{path} is not a plain file")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise CustodyError(
            f"{path} has mode {mode:04o}, open to group or others; wanted 0600",
            hint=f"find out who may have read it, then: chmod 600 {path}",
        )


def read_at_most(descriptor: int, count: int) -> bytes:
    """The first ``count`` bytes; the descriptor stays open."""
    with os.fdopen(descriptor, "rb", closefd=False) as stream:
        return stream.read(count)


def write_through(descriptor: int, data: bytes) -> None:
    """Write all of it, see that it is on the disk, and close."""
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """A new or renamed file is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock file for the block; the lock ends with the process, however that ends.

    Raises:
        BlockingIOError: another process has it, and ``wait`` is false.
        OSError: the file cannot be opened.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Be the only process that changes the files of ``folder``, for the block; waits its turn.

    Others read meanwhile: each file is replaced whole. The lock ends with the process, however that ends.

    Raises:
        CustodyError: the folder does not exist, or may not be written to.
    """
    with ExitStack() as held:
        with refusing(folder / LOCK_FILE, "opened"):
            held.enter_context(locked(folder / LOCK_FILE, wait=True))
        yield
