"""Reading an audit record from its files, line by line, and naming the first thing that is wrong with it.

    audit/2026-10.jsonl 2026-11.jsonl ..   one segment a month (UTC); a line is in the month it was written
    audit/anchor.json                      where segments were dropped because they were old enough
    audit/torn-*.jsonl                     what a crash left of a line; not part of the record

or one exported file: a header, then all lines. Two ways to read: thorough, with every signature; or by the hashes and
the signature of the last line alone, which stands for all lines before it and takes a twentieth of the time, but names
the line after the one that was changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fedseek.daemon.audit_lines import (
    BEGUN,
    FIRST_PREVIOUS,
    KEY_ANNOUNCED,
    KEY_TAKEN,
    MAX_LINE_BYTES,
    PRUNED,
    TORN,
    Anchor,
    AuditLine,
    ExportHeader,
    Hex32,
    is_signed_by_one_of,
    line_digest,
    line_message,
    milliseconds,
    parse_anchor,
    parse_export_header,
    parse_line,
    read_head,
    time_text,
)
from fedseek.errors import AuditBroken, Malformed, WrongKey
from fedseek.identity.secret_files import refusing
from fedseek.identity.signing import CONTEXT_AUDIT, verify_with

ANCHOR_FILE: Final = "anchor.json"
MIN_RETENTION_DAYS: Final = 180
MS_A_DAY: Final = 86_400_000
DIGESTS_KEPT: Final = 10_000

_T = TypeVar("_T")
_SEGMENT: Final = re.compile(r"[0-9]{4}-[0-9]{2}\.jsonl")


@dataclass(frozen=True, slots=True)
class SegmentEnd:
    """Where a segment ends: its last line, the newest time of any of its lines, and the keys that stand at that point."""

    number: int
    digest: bytes
    at: int
    newest: int
    key: bytes
    announced: bytes


@dataclass(slots=True)
class Trail:
    """How far a reader or the writer has got, and what has to be known to take the next line.

    Attributes:
        name: whose record; empty before the first line.
        number, digest, at: of the last line.
        key: what the next line has to be signed with; empty before the first line.
        announced: the key that may take over, by a line that it signs; empty if there is none.
        keys: all of them so far, oldest first.
        signers: those that signed a line.
        segment: month of the last line's segment.
        ends: by segment.
        recent: digests of the newest lines, by number.
        pruned: what ``pruned`` lines say was dropped: segment, last number and digest.
        torn: files with torn lines that were noted.
        first_at: time of the first line.
        unfinished: place of a last line without an end, as a crash or a writer at work leaves it; "" if there is none.
    """

    name: str = ""
    number: int = 0
    digest: bytes = FIRST_PREVIOUS
    at: int = 0
    key: bytes = b""
    announced: bytes = b""
    keys: list[bytes] = field(default_factory=list)
    signers: set[bytes] = field(default_factory=set)
    segment: str = ""
    ends: dict[str, SegmentEnd] = field(default_factory=dict)
    recent: dict[int, bytes] = field(default_factory=dict)
    pruned: set[tuple[str, int, bytes]] = field(default_factory=set)
    torn: set[str] = field(default_factory=set)
    first_at: int = 0
    unfinished: str = ""

    def take(self, line: AuditLine, raw: bytes, *, check_signature: bool) -> None:
        """Go one line on.

        Raises:
            Malformed: it does not follow the last one.
            WrongKey: it is not signed as it has to be.
        """
        if line.kind == BEGUN or not self.key:
            self._begin(line)
        if line.number != self.number + 1:
            where = "lines before it are missing, or" if line.number > self.number + 1 else "it is there twice, or"
            raise Malformed(f"got entry {line.number}, wanted {self.number + 1}: {where} lines were moved")
        if line.previous != self.digest.hex():
            raise Malformed(
                f"entry {line.number} follows a line with digest {line.previous}, the line before it has "
                f"{self.digest.hex()}: one of the two was put in place of another"
            )
        if line.kind == KEY_TAKEN:
            self._change_key(line)
        if check_signature:
            check_line_signature(self.name, line, self.key)
        self.signers.add(self.key)
        self._advance(line, line_digest(raw))
        self._note(line)

    def month_of(self, at: int) -> str:
        """The segment of a line written at this time: never an older one than that of the line before."""
        return max(self.segment, month(at))

    def _begin(self, line: AuditLine) -> None:
        if self.number:
            raise Malformed(f"a record begins at entry {line.number}, in the middle of another")
        if line.kind != BEGUN or line.number != 1:
            raise Malformed(f"got entry {line.number} ({line.kind!r}), wanted entry 1: the beginning was cut or moved")
        begun = _read(line, _Begun)
        self.name, self.key = begun.name, bytes.fromhex(begun.public_key)
        self.keys.append(self.key)

    def _change_key(self, line: AuditLine) -> None:
        taken = bytes.fromhex(_read(line, _Key).public_key)
        if taken != self.announced:
            raise Malformed(f"the key {taken.hex()} takes over, which the key before it did not announce")
        self.key, self.announced = taken, b""
        self.keys.append(taken)

    def _advance(self, line: AuditLine, digest: bytes) -> None:
        at = milliseconds(line.at)
        self.first_at = self.first_at or at
        self.number, self.digest, self.at = line.number, digest, at
        self.segment = self.month_of(at)
        self.recent[line.number] = digest
        self.recent.pop(line.number - DIGESTS_KEPT, None)

    def _note(self, line: AuditLine) -> None:
        if line.kind == KEY_ANNOUNCED:
            self.announced = bytes.fromhex(_read(line, _Key).public_key)
        elif line.kind == PRUNED:
            dropped = _read(line, _Pruned)
            if self.at - dropped.at < MIN_RETENTION_DAYS * MS_A_DAY:
                raise Malformed(
                    f"lines up to {dropped.through} were dropped before {MIN_RETENTION_DAYS} days had passed"
                )
            self.pruned.add((dropped.segment, dropped.through, bytes.fromhex(dropped.digest)))
        elif line.kind == TORN:
            self.torn.add(_read(line, _Torn).file)
        before = self.ends.get(self.segment)
        newest = max(self.at, before.newest if before else 0)
        self.ends[self.segment] = SegmentEnd(self.number, self.digest, self.at, newest, self.key, self.announced)


class _Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    version: int
    name: str
    public_key: Hex32


class _Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    public_key: Hex32


class _Pruned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    segment: str
    through: int
    digest: Hex32
    at: int  # of the last line dropped
    retention_days: int


class _Torn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str
    bytes: int
    sha256: Hex32


def _read(line: AuditLine, form: type[_T]) -> _T:
    try:
        return msgspec.convert(line.detail, form)
    except msgspec.MsgspecError as error:
        raise Malformed(f"detail of a {line.kind!r} line: {error}") from None


def check_line_signature(name: str, line: AuditLine, key: bytes) -> None:
    """Check that the holder of ``key`` wrote this line of the record ``name``. Raises ``WrongKey``."""
    try:
        verify_with(key, CONTEXT_AUDIT, line_message(name, line), bytes.fromhex(line.signature), who=repr(name))
    except WrongKey:
        raise WrongKey(
            f"entry {line.number} is not signed with the key {key.hex()} of {name!r}: "
            "the line was changed, or somebody else wrote it"
        ) from None


def month(at: int) -> str:
    """The month in UTC, such as ``"2026-11"``."""
    return time_text(at)[:7]


@dataclass(frozen=True, slots=True)
class Record:
    """An audit record on disk.

    Attributes:
        path: the folder, or the exported file.
        header: of an exported file.
        anchor: where older lines were dropped.
        files: those with lines, in order.
    """

    path: Path
    header: ExportHeader | None
    anchor: Anchor | None
    files: tuple[Path, ...]


def open_record(path: Path) -> Record:
    """Find the files of a record: a folder or an exported file; nothing is checked yet but header and anchor.

    Raises:
        AuditBroken: the header or the anchor is not one.
        CustodyError: it cannot be read.
    """
    if path.is_dir():
        anchor_file = path / ANCHOR_FILE
        anchor = None
        if anchor_file.exists():
            with naming(ANCHOR_FILE):
                anchor = parse_anchor(_first_line(anchor_file))
        # what is older than the anchor is being dropped: a crash may have left some of it
        return Record(
            path, None, anchor, tuple(each for each in segments(path) if not anchor or each.stem > anchor.segment)
        )
    with naming(f"{path.name} line 1"):
        header = parse_export_header(_first_line(path))
    return Record(path, header, header.anchor, (path,))


def segments(folder: Path) -> list[Path]:
    """The segment files in a folder, oldest first."""
    with refusing(folder, "read"):
        return sorted(each for each in folder.iterdir() if _SEGMENT.fullmatch(each.name))


def _first_line(path: Path) -> bytes:
    with refusing(path, "read"), path.open("rb") as stream:
        return stream.readline(MAX_LINE_BYTES).removesuffix(b"\n")


def walk(record: Record, trail: Trail, *, thorough: bool) -> Iterator[tuple[str, AuditLine, bytes]]:
    """Take every line of the record, and give each with its place and its text, once it is checked.

    Guarantee: when the last line has been given and this has returned, every line is as its owner wrote it and none is
    missing but those at the very end, of which only other parties can know; and those that were dropped with a word.

    Args:
        record: what to read.
        trail: a new one.
        thorough: check every signature, not just that of the last line.

    Raises:
        AuditBroken: names file, line and what was wanted.
    """
    if record.anchor:
        _start_at(record.anchor, trail)
    last: AuditLine | None = None
    place = record.path.name
    for place, file, raw in _raw_lines(record, trail):
        with naming(place):
            last = parse_line(raw)
            trail.take(last, raw, check_signature=thorough)
            if record.header is None and trail.segment != file.stem:
                raise Malformed(f"entry {last.number} of {last.at} belongs in segment {trail.segment}")
        yield place, last, raw
    _finish(record, trail, place, None if thorough else last)


def _raw_lines(record: Record, trail: Trail) -> Iterator[tuple[str, Path, bytes]]:
    for file in record.files:
        with refusing(file, "read"), file.open("rb") as stream:
            count = 0
            if record.header:
                stream.readline(MAX_LINE_BYTES)
                count = 1
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                count += 1
                place = f"{file.name} line {count}"
                if raw.endswith(b"\n") and len(raw) <= MAX_LINE_BYTES:
                    yield place, file, raw[:-1]
                elif len(raw) > MAX_LINE_BYTES:
                    raise AuditBroken(f"{place}: got more than {MAX_LINE_BYTES} bytes in a line")
                elif record.header is None and file == record.files[-1]:
                    trail.unfinished = place
                    return  # a writer at work may finish it now: not to be read as a line of its own
                else:
                    raise AuditBroken(f"{place}: the line has no end; the rest of it was cut")


def _start_at(anchor: Anchor, trail: Trail) -> None:
    with naming(ANCHOR_FILE):
        head = read_head(anchor.head)
    trail.name, trail.number, trail.digest = head.name, head.number, head.digest
    trail.segment, trail.key = anchor.segment, bytes.fromhex(anchor.public_key)
    trail.announced = bytes.fromhex(anchor.announced)
    trail.keys.append(trail.key)
    trail.recent[head.number] = head.digest


def _finish(record: Record, trail: Trail, place: str, unchecked: AuditLine | None) -> None:
    """What can be said only when all lines were read."""
    anchor, header = record.anchor, record.header
    if not trail.signers:
        raise AuditBroken(f"{record.path}: no line of an audit record is here, wanted at least one")
    if unchecked is not None:
        with naming(place):
            check_line_signature(trail.name, unchecked, trail.key)
    if anchor:
        with naming(ANCHOR_FILE):
            _check_anchor(anchor, trail)
    if header and (header.name, header.public_key) != (trail.name, trail.key.hex()):
        raise AuditBroken(f"{record.path.name} line 1: the header does not name the owner or the key of the last line")
    counted = trail.number - (anchor.head.number if anchor else 0)
    if header and (header.lines, header.last) != (counted, trail.digest.hex()):
        raise AuditBroken(
            f"{place}: the file ends with entry {trail.number}, wanted {header.lines} lines and digest {header.last} "
            "of the last, as its header says: the end was cut"
        )


def _check_anchor(anchor: Anchor, trail: Trail) -> None:
    head = read_head(anchor.head)
    if (anchor.segment, head.number, head.digest) not in trail.pruned:
        raise Malformed(
            f"no line of the record says that it was dropped up to entry {head.number}: the beginning was cut"
        )
    if not is_signed_by_one_of(head, trail.keys):
        raise WrongKey(f"its head of entry {head.number} is signed with no key of this record")


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Tell what is wrong inside the block as an ``AuditBroken`` that names the place."""
    try:
        yield
    except (Malformed, WrongKey) as error:
        raise AuditBroken(
            f"{place}: {error.message}",
            hint="keep all files as they are: what this record says of its time before that line can still be checked",
        ) from None
