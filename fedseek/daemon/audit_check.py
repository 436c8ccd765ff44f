"""Verifying an audit record with nothing but a public key, and exporting it for somebody who does just that."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedseek.daemon.audit_heads import HeadsSeen
from fedseek.daemon.audit_lines import (
    AUDIT_VERSION,
    HEADS,
    AuditHead,
    AuditLine,
    ExportHeader,
    canonical,
    is_signed_by_one_of,
    read_head,
)
from fedseek.daemon.audit_reading import Record, Trail, naming, open_record, walk
from fedseek.errors import AuditBroken, CustodyError, WrongKey
from fedseek.identity.secret_files import refusing, sync_folder

_NO_KEYS: Final[Mapping[str, bytes]] = {}


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a verified record says of itself. Line numbers are those of its entries, counted from 1.

    Attributes:
        name: whose record.
        first, last: numbers of the first and the last line that is there.
        first_at, last_at: when they were written, in milliseconds since 1970 (UTC), by the clock of its owner.
        last_digest: SHA-256 of the last line, in hexadecimal.
        files: how many segments; 1 for an exported file.
        keys: public keys that it was signed with, oldest first, in hexadecimal.
        dropped: lines before ``first``, dropped after their retention time.
        heads_seen: by name, the newest line of another party's record that this one notes.
        countersigned: by name, the newest line of this record that another party countersigned, checked with its key.
        unchecked: who countersigned too, but with a key that was not given.
        forks: two histories that another party has shown, in words.
        unfinished: place of a last line without an end: a crash left it, or it is being written; not part of the record.
    """

    name: str
    first: int
    last: int
    first_at: int
    last_at: int
    last_digest: str
    files: int
    keys: tuple[str, ...]
    dropped: int
    heads_seen: Mapping[str, int]
    countersigned: Mapping[str, int]
    unchecked: tuple[str, ...]
    forks: tuple[str, ...]
    unfinished: str

    @property
    def lines(self) -> int:
        """How many lines are there, each one checked."""
        return self.last - self.first + 1


def verify_audit(
    path: Path,
    *,
    public_key: bytes,
    name: str | None = None,
    others: Mapping[str, bytes] = _NO_KEYS,
    heads: Sequence[AuditHead] = (),
) -> AuditReport:
    """Check every line of a record; run by anybody. Costs about 0.2 ms a line.

    Guarantee: the lines are those that the holder of the key wrote, in that order, from the first to the last that is
    there. Lines cut from the very end leave no trace in the record: they are found if a later head is in ``heads``.

    Args:
        path: the folder of segments, or an exported file.
        public_key: of the owner, 32 bytes: the newest that is known, or an older one that this record was signed with.
        name: the owner; None: whoever it says.
        others: public keys of other parties by name, to check countersignatures with.
        heads: of this record, as other parties keep them (:func:`heads_kept_by`).

    Raises:
        AuditBroken: names the first line that is wrong, and what was wanted.
        WrongKey: one of ``heads`` is signed with no key of this record.
        CustodyError: a file cannot be read.
    """
    record, trail, seen = open_record(path), Trail(), HeadsSeen()
    wanted = _by_number(heads, name)
    for place, line, _ in walk(record, trail, thorough=True):
        with naming(place):
            seen.take(line, name=trail.name, own=trail.recent, keys=others)
        _check_name(trail, name, place)
        for head in wanted.pop(line.number, ()):
            _check_head(head, trail, place)
    _check_key(trail, public_key, path)
    for number in sorted(number for number in wanted if number > trail.number):
        for head in wanted[number]:
            _check_head(head, trail, place)
    return _report(record, trail, seen)


def _by_number(heads: Sequence[AuditHead], name: str | None) -> dict[int, list[AuditHead]]:
    by_number: dict[int, list[AuditHead]] = {}
    for head in heads:
        if name is None or head.name == name:
            by_number.setdefault(head.number, []).append(head)
    return by_number


def _check_head(head: AuditHead, trail: Trail, place: str) -> None:
    if head.name != trail.name:
        return
    if not is_signed_by_one_of(head, trail.keys):
        raise WrongKey(f"head of entry {head.number} of {head.name!r} is signed with no key of its record")
    if head.number > trail.number:
        raise AuditBroken(
            f"{place}: the record ends with entry {trail.number}, but its owner signed a head of entry {head.number} "
            f"with digest {head.digest.hex()}: the end was cut"
        )
    if head.digest != trail.digest:
        raise AuditBroken(
            f"{place}: entry {head.number} has digest {trail.digest.hex()}, but its owner signed a head of it with "
            f"{head.digest.hex()}: there are two records"
        )


def _report(record: Record, trail: Trail, seen: HeadsSeen) -> AuditReport:
    dropped = record.anchor.head.number if record.anchor else 0
    return AuditReport(
        name=trail.name,
        first=dropped + 1,
        last=trail.number,
        first_at=trail.first_at,
        last_at=trail.at,
        last_digest=trail.digest.hex(),
        files=len(record.files),
        keys=tuple(key.hex() for key in trail.keys),
        dropped=dropped,
        heads_seen={name: head.number for name, head in sorted(seen.newest.items())},
        countersigned={name: number for name, number in sorted(seen.countersigned.items()) if number},
        unchecked=tuple(sorted(seen.unchecked)),
        forks=tuple(str(fork) for fork in seen.forks),
        unfinished=trail.unfinished,
    )


def checked_lines(path: Path, *, public_key: bytes, name: str) -> Iterator[AuditLine]:
    """Every line of a record, each given only after it was checked.

    Raises:
        AuditBroken: at the first line that is wrong; at the end, if no line is signed with the key.
        CustodyError: a file cannot be read.
    """
    trail = Trail()
    for place, line, _ in walk(open_record(path), trail, thorough=True):
        _check_name(trail, name, place)
        yield line
    _check_key(trail, public_key, path)


def _check_name(trail: Trail, name: str | None, place: str) -> None:
    if name is not None and trail.name != name:
        raise AuditBroken(f"{place}: this is the record of {trail.name!r}, wanted that of {name!r}")


def _check_key(trail: Trail, public_key: bytes, path: Path) -> None:
    if public_key not in trail.signers:
        raise AuditBroken(
            f"{path}: no line is signed with the key {public_key.hex()}; the lines are signed with "
            + " and ".join(key.hex() for key in trail.keys),
            hint="compare the owner's key with the roster; after a change of key, give the newest one",
        )


def heads_kept_by(path: Path, name: str) -> tuple[AuditHead, ...]:
    """Heads of the record ``name`` that another party's record keeps, oldest first: what ``name`` is held to.

    Raises:
        AuditBroken: the other party's record is broken.
    """
    kept = []
    for place, line, _ in walk(open_record(path), Trail(), thorough=True):
        if line.kind == HEADS:
            with naming(place):
                kept += [head for each in line.detail.get("heads", ()) if (head := read_head(each)).name == name]
    return tuple(kept)


def export_audit(folder: Path, out: Path) -> int:
    """Write a record to one file that :func:`verify_audit` takes; returns the number of lines.

    A line that is still being written is left out. The file appears whole or not at all, and only its owner may open it.

    Raises:
        AuditBroken: the record is broken; then the folder itself is the evidence.
        CustodyError: ``out`` is there already, or cannot be written.
    """
    record, trail = open_record(folder), Trail()
    lines = sum(1 for _ in walk(record, trail, thorough=False))
    header = ExportHeader(
        fedseek_audit=AUDIT_VERSION,
        name=trail.name,
        public_key=trail.key.hex(),
        lines=lines,
        last=trail.digest.hex(),
        anchor=record.anchor,
    )
    if out.exists():
        raise CustodyError(f"{out} is there already; an export never replaces a file")
    with refusing(out, "written"), ExitStack() as undo:
        descriptor, scratch = tempfile.mkstemp(prefix=".fedseek-", dir=out.parent)
        undo.callback(Path(scratch).unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(canonical(header) + b"\n")
            for _, (_, _, raw) in zip(range(lines), walk(record, Trail(), thorough=False), strict=False):
                stream.write(raw + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, out)
        undo.pop_all()
        sync_folder(out.parent)
    return lines
