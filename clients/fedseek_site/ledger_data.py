"""Whose data it was: keyed hashes of names, people and texts, by which a ledger knows data again.

    same name, or one person, text or dialogue in common  ->  the same account      (docs/ledger.md)

People, texts and dialogues are hashed, whichever of them a plan protects or learns from: neither a change of the unit nor
one of the task begins anew.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from fedseek.dialogues import Dialogue
from fedseek.errors import AuditBroken
from fedseek_site.ledger_entries import DataTaken, Noted

HASH_BYTES: Final = 16
# keyed hashes, and the data entry that each came with
SEEN_TABLE: Final = "CREATE TABLE seen (hash BLOB PRIMARY KEY, entry INTEGER NOT NULL) WITHOUT ROWID"


class Readable(Protocol):
    """What of ``fedseek.records.Records`` a ledger looks at."""

    @property
    def texts(self) -> tuple[str, ...]:
        """One a record, "" where it has none."""

    @property
    def units(self) -> tuple[str, ...]:
        """Whose record it is."""

    @property
    def unit_column(self) -> str | None:
        """None: every record counts as a person of its own."""

    @property
    def dialogues(self) -> tuple[Dialogue, ...]:
        """One a record, an empty one where it has none; or nothing at all."""


@dataclass(frozen=True, slots=True)
class Hasher:
    """HMAC-SHA256 (RFC 2104) under a key that only the site has, cut to 16 bytes: nobody else can test who is in."""

    key: bytes = field(repr=False)

    def of_name(self, dataset: str) -> bytes:
        """What the site's people call the data set."""
        return self._hash(b"name", _normal(dataset))

    def of_records(self, records: Readable) -> set[bytes]:
        """Of every text and dialogue, and of every person where a column names them."""
        found = {self._hash(b"text", _normal(text)) for text in records.texts if text}
        found |= {self._hash(b"dialogue", _said(dialogue)) for dialogue in records.dialogues if dialogue}
        if records.unit_column is not None:
            found |= {self._hash(b"unit", _normal(unit)) for unit in set(records.units)}
        return found

    def fingerprint(self, found: Iterable[bytes]) -> str:
        """Of a data set: over the sorted hashes of what is in it; 64 hexadecimal digits."""
        return hmac.digest(self.key, b"data set\0" + b"".join(sorted(found)), "sha256").hex()

    def _hash(self, purpose: bytes, data: bytes) -> bytes:
        return hmac.digest(self.key, purpose + b"\0" + data, "sha256")[:HASH_BYTES]


def sort_out(db: sqlite3.Connection, hashes: Iterable[bytes]) -> tuple[set[int], list[bytes]]:
    """Numbers of the data entries that know some of these; and those that none knows."""
    known, new = set[int](), []
    for one in hashes:
        row = db.execute("SELECT entry FROM seen WHERE hash = ?", (one,)).fetchone()
        if row is None:
            new.append(one)
        else:
            known.add(row[0])
    return known, new


def add_seen(db: sqlite3.Connection, new: Sequence[bytes], number: int) -> str:
    """Put hashes into the table as those of data entry ``number``; SHA-256 over them for that entry."""
    db.executemany("INSERT INTO seen VALUES (?, ?)", ((one, number) for one in new))
    return hashlib.sha256(b"".join(sorted(new))).hexdigest()


def check_seen(db: sqlite3.Connection, entries: Sequence[Noted], *, source: str) -> None:
    """The table is what the chained entries say of it: with a line less, somebody's history would be lost.

    Raises:
        AuditBroken: it is not; names the entry.
    """
    wanted = {
        noted.number: (noted.entry.num_new, noted.entry.new_hashes)
        for noted in entries
        if isinstance(noted.entry, DataTaken)
    }
    counts, digests = dict.fromkeys(wanted, 0), {number: hashlib.sha256() for number in wanted}
    for number, one in db.execute("SELECT entry, hash FROM seen ORDER BY entry, hash"):
        counts[number] = counts.get(number, 0) + 1
        digests.setdefault(number, hashlib.sha256()).update(one)
    got = {number: (count, digests[number].hexdigest()) for number, count in counts.items()}
    if odd := sorted(number for number in got if got[number] != wanted.get(number)):
        raise AuditBroken(
            f"privacy ledger {source}: the people and texts of entry {odd[0]} are not those it was written with",
            hint="nothing is trained on a ledger that was altered: find out who changed it, restore the newest",
        )


def _said(dialogue: Dialogue) -> bytes:
    """What user and assistant said, in turn; what a system turn told the model before is nobody's, and often changed."""
    spoken = [_normal(turn.text).decode() for turn in dialogue if turn.role != "system"]
    return json.dumps(spoken, ensure_ascii=False).encode()


def _normal(text: str) -> bytes:
    # NFC, without blanks at the ends: two files may write one person differently
    return unicodedata.normalize("NFC", text).strip().encode()
