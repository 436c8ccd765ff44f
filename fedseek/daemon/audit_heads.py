"""What a record says of other records: heads it was shown, countersignatures, forks.

Each round the heads of all records go around. Whoever keeps a head holds its owner to it: a record that is later
shorter, or has another line in that place, is a fork, and is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from fedseek.daemon.audit_lines import (
    ACCEPTED,
    COUNTERSIGNED,
    FORK,
    HEADS,
    AuditHead,
    AuditLine,
    HeadDocument,
    Hex32,
    Hex64,
    head_document,
    heads_digest,
    in_order,
    read_head,
)
from fedseek.errors import Malformed, WrongKey
from fedseek.identity.signing import CONTEXT_HEADS_SEEN, verify_with

_E = TypeVar("_E")

MAX_FORKS_KEPT: Final = 1000  # more are refused all the same, but nobody can fill the disk with them
ENTRIES_A_LINE: Final = 64  # heads, or countersignatures: at most 600 bytes each, so they fit a line


class _HeadsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Detail of a ``heads`` line; a long list takes several lines. ``list`` is the digest of the whole list."""

    list: Hex32
    part: int
    parts: int
    heads: tuple[HeadDocument, ...]


class _CountersignedEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Detail of a ``countersigned`` line."""

    list: Hex32
    signatures: dict[str, Hex64]


class _ForkEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Detail of a ``fork`` line: two heads that cannot both be of one record."""

    seen: HeadDocument
    shown: HeadDocument


class _AcceptedEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Detail of a ``new-record-accepted`` line: who begins anew, why, and the newest line that was seen before."""

    name: str
    why: str
    instead_of: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Two heads of one name that cannot both be of one record that only grows.

    Attributes:
        seen: the one that was there first.
        shown: the one that came after it.
        claim: which of the two came from outside just now: number and digest, by name.
    """

    seen: AuditHead
    shown: AuditHead
    claim: tuple[str, int, bytes]

    def __str__(self) -> str:
        first, second = self.seen, self.shown
        return (
            f"the record of {first.name!r} was at line {first.number} with digest {first.digest.hex()}, "
            f"and now is at line {second.number} with digest {second.digest.hex()}"
        )


@dataclass(slots=True)
class HeadsSeen:
    """What the lines so far say of other records, and of their own.

    Attributes:
        newest: by name, the newest head noted; of other records.
        noted, noted_heads: the list of heads noted last, by name, and its digest.
        own_line: by list noted, the line of this record that it vouches for.
        signed: which countersignatures were noted: digest of the list, name.
        countersigned: by name, the newest line of this record that it has countersigned, checked with its key.
        unchecked: names whose last countersignature was not checked: their key is not known, or is another now.
        forks: what was found, oldest first.
        claims: of these forks.
    """

    newest: dict[str, AuditHead] = field(default_factory=dict)
    noted: bytes = b""
    noted_heads: tuple[AuditHead, ...] = ()
    own_line: dict[bytes, int] = field(default_factory=dict)
    signed: set[tuple[bytes, str]] = field(default_factory=set)
    countersigned: dict[str, int] = field(default_factory=dict)
    unchecked: set[str] = field(default_factory=set)
    forks: list[Fork] = field(default_factory=list)
    claims: set[tuple[str, int, bytes]] = field(default_factory=set)
    _parts: list[AuditHead] = field(default_factory=list)

    def take(self, line: AuditLine, *, name: str, own: Mapping[int, bytes], keys: Mapping[str, bytes]) -> None:
        """Read one line of the record ``name``.

        Args:
            line: of any kind.
            name: whose record it is.
            own: digests of the newest lines of this record, by number.
            keys: of other parties, 32 bytes each, to check countersignatures with; may be empty.

        Raises:
            Malformed: the line contradicts itself or the lines before it.
        """
        if line.kind == HEADS:
            self._take_heads(line, name, own)
        elif line.kind == COUNTERSIGNED:
            self._take_countersignatures(_detail(line, _CountersignedEntry), keys)
        elif line.kind == FORK:
            entry = _detail(line, _ForkEntry)
            seen, shown = read_head(entry.seen), read_head(entry.shown)
            self.forks.append(Fork(seen, shown, claim=_claim(seen if shown.name == name else shown)))
            self.claims.add(self.forks[-1].claim)
        elif line.kind == ACCEPTED:
            self.newest.pop(_detail(line, _AcceptedEntry).name, None)

    def _take_heads(self, line: AuditLine, name: str, own: Mapping[int, bytes]) -> None:
        entry = _detail(line, _HeadsEntry)
        heads = [read_head(document) for document in entry.heads]
        self._parts = [*self._parts, *heads] if entry.part > 1 else heads
        for head in heads:
            if head.name != name:
                self.newest[head.name] = head
            elif head.number >= line.number or own.get(head.number, head.digest) != head.digest:
                raise Malformed(
                    f"it notes the head of line {head.number} of this very record with digest {head.digest.hex()}, "
                    "which is not the digest of that line: lines after it were cut, and others written"
                )
        if entry.part == entry.parts:
            if heads_digest(self._parts).hex() != entry.list:
                raise Malformed("its list of heads is not the one whose digest it names")
            self.noted, self.noted_heads = bytes.fromhex(entry.list), tuple(self._parts)
            self.own_line[self.noted] = next((head.number for head in self._parts if head.name == name), 0)

    def _take_countersignatures(self, entry: _CountersignedEntry, keys: Mapping[str, bytes]) -> None:
        noted = bytes.fromhex(entry.list)
        for name, signature in entry.signatures.items():
            self.signed.add((noted, name))
            try:
                check_countersignature(noted, name, bytes.fromhex(signature), keys)
            except WrongKey:
                self.unchecked.add(name)
            else:
                self.unchecked.discard(name)
                self.countersigned[name] = max(self.countersigned.get(name, 0), self.own_line.get(noted, 0))

    def forks_among(self, heads: Sequence[AuditHead], *, mine: AuditHead, own: Mapping[int, bytes]) -> list[Fork]:
        """Which of these heads contradict what was noted before, or, if it is of this very record, what it has now.

        Args:
            heads: as they went around; their signatures were checked.
            mine: the head of this record.
            own: digests of its newest lines, by number.
        """
        forks = []
        for head in heads:
            if head.name == mine.name:
                if head.number > mine.number or own.get(head.number, head.digest) != head.digest:
                    forks.append(Fork(seen=head, shown=mine, claim=_claim(head)))
            elif (seen := self.newest.get(head.name)) and _goes_back(seen, head):
                forks.append(Fork(seen=seen, shown=head, claim=_claim(head)))
        return forks


def _goes_back(seen: AuditHead, shown: AuditHead) -> bool:
    return shown.number < seen.number or (shown.number == seen.number and shown.digest != seen.digest)


def _claim(head: AuditHead) -> tuple[str, int, bytes]:
    return head.name, head.number, head.digest


def check_countersignature(noted: bytes, name: str, signature: bytes, keys: Mapping[str, bytes]) -> None:
    """Check that ``name`` countersigned the list of this digest. Raises ``WrongKey``, also when its key is not known."""
    verify_with(key_of(name, keys), CONTEXT_HEADS_SEEN, noted, signature, who=repr(name))


def key_of(name: str, keys: Mapping[str, bytes]) -> bytes:
    """The key of a party, 32 bytes. Raises ``WrongKey``: none is known."""
    if name not in keys:
        raise WrongKey(f"no key is known for the audit record of {name!r}", hint="is it on the roster?")
    return keys[name]


def heads_details(heads: Sequence[AuditHead]) -> Iterator[dict[str, Any]]:
    """Details of the ``heads`` lines that note this list."""
    ordered = in_order(heads)
    noted = heads_digest(ordered).hex()
    starts = range(0, len(ordered), ENTRIES_A_LINE)
    for part, start in enumerate(starts, start=1):
        documents = [head_document(head) for head in ordered[start : start + ENTRIES_A_LINE]]
        yield {"list": noted, "part": part, "parts": len(starts), "heads": documents}


def countersigned_details(noted: bytes, signatures: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    """Details of the ``countersigned`` lines for these signatures."""
    names = sorted(signatures)
    for start in range(0, len(names), ENTRIES_A_LINE):
        chosen = {name: signatures[name].hex() for name in names[start : start + ENTRIES_A_LINE]}
        yield {"list": noted.hex(), "signatures": chosen}


def fork_detail(fork: Fork) -> dict[str, Any]:
    """Detail of a ``fork`` line."""
    return {"seen": head_document(fork.seen), "shown": head_document(fork.shown)}


def _detail(line: AuditLine, form: type[_E]) -> _E:
    try:
        return msgspec.convert(line.detail, form)
    except msgspec.MsgspecError as error:
        raise Malformed(f"detail of a {line.kind!r} line: {error}") from None
