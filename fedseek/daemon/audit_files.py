"""The files of an audit record, as its one writer has them: a lock, segments to append to, what a crash left behind."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fedseek.daemon.audit_lines import MAX_LINE_BYTES
from fedseek.daemon.audit_reading import ANCHOR_FILE, segments
from fedseek.errors import AuditBroken, CustodyError, JournalUnusable
from fedseek.identity.secret_files import check_private, locked, refusing, sync_folder, write_secret_file

LOCK_FILE: Final = "audit.lock"
_TORN: Final = "torn-{stamp}.jsonl"


class SegmentFolder:
    """A folder of segments, open for writing by this process alone. Not for several threads at once.

    Args:
        folder: made with mode 0700 if it is missing, its parent is not.

    Raises:
        JournalUnusable: another process has it open.
        CustodyError: a segment is open to group or others, or the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, int, int] | None = None  # month, descriptor and size of the segment appended to
        self._unusable = ""  # why nothing can be appended any more
        with ExitStack() as opened:
            opened.callback(self._close_segment)
            _lock(folder, opened)
            for file in segments(folder):
                with refusing(file, "read"):
                    check_private(file, os.lstat(file))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let other processes have it; closing twice does nothing more."""
        self._opened.close()
        self._unusable = "it was closed"

    def holds_no_line(self) -> bool:
        """Whether no record was begun here, or a crash left nothing but a part of its first line."""
        if (self.folder / ANCHOR_FILE).exists():
            return False
        return not any(_has_a_line(file) for file in segments(self.folder))

    def append(self, month: str, data: bytes) -> None:
        """Write at the end of a segment; it is on the disk when this returns.

        Guarantee: if it raises, nothing of it is left, or a last line without an end, which does not count.

        Raises:
            JournalUnusable: the disk is full or fails, or it was closed.
            AuditBroken: the segment is not as this process left it.
        """
        if self._unusable:
            raise JournalUnusable(f"audit record {self.folder} takes no more lines: {self._unusable}")
        descriptor, size = self._segment_of(month)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:
            self._take_back(descriptor, size)
            raise JournalUnusable(
                f"audit record {self.folder}: the entry cannot be written: {error.strerror}",
                hint="make room on the disk or look at it: the entry does not count, so what it is about must not happen",
            ) from error
        self._open = month, descriptor, size + len(data)

    def _take_back(self, descriptor: int, size: int) -> None:
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        except OSError as error:
            self._unusable = f"what was left of a failed entry cannot be cut off: {error.strerror}; open it anew"

    def _segment_of(self, month: str) -> tuple[int, int]:
        """Descriptor and size of a segment, after a look that nobody else wrote there."""
        path = self.folder / f"{month}.jsonl"
        try:
            if self._open is None or self._open[0] != month:
                self._close_segment()
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                self._open = month, descriptor, os.fstat(descriptor).st_size
                sync_folder(self.folder)
            _, descriptor, size = self._open
            mine, there = os.fstat(descriptor), os.lstat(path)
        except OSError as error:
            raise JournalUnusable(f"audit record {path} cannot be opened: {error.strerror}") from error
        if (mine.st_ino, mine.st_size) != (there.st_ino, size):
            raise AuditBroken(f"{path}: got {there.st_size} bytes, wanted {size}: somebody else wrote or replaced it")
        return descriptor, size

    def set_torn_line_aside(self, stamp: str) -> None:
        """Copy what comes after the last line's end, then cut it off; in this order, so that a crash loses nothing."""
        for segment in segments(self.folder)[-1:]:  # in an older one such a line is not a crash's: reading refuses it
            with refusing(segment, "repaired"), segment.open("rb+") as stream:
                whole = stream.read()
                end = whole.rfind(b"\n") + 1
                if end < len(whole):
                    write_secret_file(self.folder / _TORN.format(stamp=stamp), whole[end:])
                    stream.truncate(end)
                    os.fsync(stream.fileno())

    def torn_files(self) -> list[Path]:
        """What was set aside, oldest first."""
        return sorted(self.folder.glob(_TORN.format(stamp="*")))

    def remove(self, through: str) -> int:
        """Delete the segments up to this month, and the torn lines of that time; returns how many segments."""
        with refusing(self.folder, "pruned"):
            old = [file for file in segments(self.folder) if file.stem <= through]
            torn = [file for file in self.torn_files() if file.stem.removeprefix("torn-")[: len(through)] <= through]
            for file in old + torn:
                file.unlink()
            sync_folder(self.folder)
        return len(old)

    def _close_segment(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


def _has_a_line(file: Path) -> bool:
    with refusing(file, "read"), file.open("rb") as stream:
        return b"\n" in stream.read(MAX_LINE_BYTES)


def _lock(folder: Path, opened: ExitStack) -> None:
    """Take the record for this process; the lock ends with ``opened``, or with the process."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)
        opened.enter_context(locked(folder / LOCK_FILE, wait=False))
    except BlockingIOError:
        raise JournalUnusable(
            f"audit record {folder} is being written by another process; wanted it for this one alone",
            hint="stop that process first; its lock ends with it",
        ) from None
    except OSError as error:
        raise CustodyError(f"audit record in {folder} cannot be opened: {error.strerror}") from error
