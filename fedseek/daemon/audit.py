"""The audit record of a site or of the coordinator: append-only, hash-chained, signed.

    record(kind, ...)  ->  one more line, on the disk before this returns

What a line is stands in ``audit_lines``, what a folder of them is in ``audit_reading``. Its owner can read it, show it
and export it, and can prove with it; nobody, not even its owner, can change it unseen once another party keeps a head
of it, which the heads that go around each round see to.

Durability. A line is written with one call and synced; a new segment's folder is synced too. A crash leaves at most one
line without an end, which ``record`` has not returned for: it is moved aside when the record is next opened, and noted.
The folder must be on a local disk. An open record is not to be used in a forked child.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Final, Self

from fedseek.daemon.audit_files import SegmentFolder
from fedseek.daemon.audit_heads import (
    MAX_FORKS_KEPT,
    HeadsSeen,
    check_countersignature,
    countersigned_details,
    fork_detail,
    heads_details,
    key_of,
)
from fedseek.daemon.audit_lines import (
    ACCEPTED,
    AUDIT_VERSION,
    BEGUN,
    COUNTERSIGNED,
    FORK,
    HEADS,
    KEY_ANNOUNCED,
    KEY_TAKEN,
    MAX_LINE_BYTES,
    OWN_KINDS,
    PRUNED,
    TORN,
    Anchor,
    AuditHead,
    AuditLine,
    Detail,
    HeadDocument,
    Sign,
    canonical,
    check_entry,
    head_document,
    heads_digest,
    in_order,
    is_signed_by_one_of,
    parse_line,
    sign_head,
    sign_line,
    time_text,
    verify_head,
)
from fedseek.daemon.audit_reading import (
    ANCHOR_FILE,
    MIN_RETENTION_DAYS,
    MS_A_DAY,
    Record,
    SegmentEnd,
    Trail,
    naming,
    open_record,
    walk,
)
from fedseek.errors import AuditBroken, InvalidConfig, WrongKey
from fedseek.identity.roster import check_name
from fedseek.identity.secret_files import read_secret_file, write_secret_file
from fedseek.identity.signing import CONTEXT_AUDIT, CONTEXT_HEADS_SEEN

RETENTION_DAYS: Final = 400


class AuditChain:
    """The record in ``folder``, open for writing; one process at a time. Methods may be called from several threads.

    Args:
        folder: of the segments; made with mode 0700 if it is missing, its parent is not.
        name: whose record: the site's name, or the coordinator's.
        sign: signs a message for a context, such as ``partial(signing.sign, identity)``.
        public_key: to that key, 32 bytes.
        clock: Unix time in seconds.
        retention_days: lines are kept at least so long.

    Raises:
        AuditBroken: the record is damaged, is another party's, or goes on with another key; nothing is appended.
        JournalUnusable: another process has it open, or the disk fails.
        CustodyError: a file is open to group or others, or cannot be opened.
        InvalidConfig: fewer than 180 days of retention.
        WrongKey: ``sign`` does not sign with that key.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        sign: Sign,
        public_key: bytes,
        clock: Callable[[], float] = time.time,
        retention_days: int = RETENTION_DAYS,
    ) -> None:
        check_name("name of an audit record", name)
        if retention_days < MIN_RETENTION_DAYS:
            problem = f"retention_days: got {retention_days}, wanted at least {MIN_RETENTION_DAYS}"
            raise InvalidConfig([problem], source="audit record")
        self._folder, self._name = folder, name
        self._sign, self._public_key = sign, public_key
        self._clock, self._retention_days = clock, retention_days
        self._turn = RLock()
        self._trail, self._seen = Trail(), HeadsSeen()
        verify_head(sign_head(sign, name, 1, bytes(32), 0), public_key)
        with ExitStack() as opened:
            self._files = SegmentFolder(folder)
            opened.callback(self._files.close)
            self._open_and_check()
            opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have it; closing twice does nothing more."""
        with self._turn:
            self._files.close()

    def record(self, kind: str, /, **detail: Detail) -> AuditHead:
        """Append one entry.

        Guarantee: when this has returned, the line is on the disk and survives a crash of process and machine; if it
        raises, no part of it counts.

        Args:
            kind: lower-case letters, digits and hyphens, such as ``"plan-refused"``.
            detail: texts, numbers, bools, lists and dicts. Never a secret: it is shown and exported.

        Returns:
            The head of the record now.

        Raises:
            TypeError, ValueError, Malformed: the detail cannot be recorded; bytes never can.
            TooLarge: the line would be longer than 64 KiB.
            JournalUnusable: the disk is full or fails.
            AuditBroken: the file is not as this process left it.
        """
        if kind in OWN_KINDS:
            raise ValueError(f"entries of kind {kind!r} are written by the record itself")
        check_entry(kind, detail)
        with self._turn:
            self._append(kind, detail)
            return self.head()

    def head(self) -> AuditHead:
        """The signed head of the newest line; the same bytes until there is a newer one or the key changes."""
        with self._turn:
            return sign_head(self._sign, self._name, self._trail.number, self._trail.digest, self._trail.at)

    def noted_heads(self) -> tuple[AuditHead, ...]:
        """The list of heads noted last, by name; what to send once more after a restart. Empty before the first."""
        with self._turn:
            return self._seen.noted_heads

    def announce_key(self, new_public_key: bytes) -> None:
        """Name the key that may take over. To be called before that key is put in the place of the present one.

        From then on the record can be opened with either; opening it with the new one takes over. So keys can be
        changed by whoever changes them, at whatever moment, and a crash leaves no record that nobody can go on with.
        The same key once more: nothing is written. Another one: only the last one announced can take over.

        Raises:
            JournalUnusable, AuditBroken: as :meth:`record`.
        """
        with self._turn:
            if new_public_key not in (self._trail.announced, self._public_key):
                self._append(KEY_ANNOUNCED, {"public_key": new_public_key.hex()})

    def change_key(self, new_sign: Sign, new_public_key: bytes) -> AuditHead:
        """Go on with another key: one line signed by the old key names it, one signed by the new key takes over.

        After this the record can be opened with the new key only. Called again with the same key it does nothing.

        Raises:
            WrongKey: ``new_sign`` does not sign with the new key.
            JournalUnusable, AuditBroken: as :meth:`record`.
        """
        verify_head(sign_head(new_sign, self._name, 1, bytes(32), 0), new_public_key)
        with self._turn:
            self.announce_key(new_public_key)
            if new_public_key != self._public_key:
                self._append(KEY_TAKEN, {"public_key": new_public_key.hex()}, sign=new_sign)
                self._sign, self._public_key = new_sign, new_public_key
            return self.head()

    def note_heads(self, heads: Sequence[AuditHead], keys: Mapping[str, bytes]) -> None:
        """Keep the heads of all records, as they went around; of this one too, if it is among them.

        The list noted last, once more: nothing is written.

        Args:
            heads: one a name.
            keys: public keys of the other parties by name, 32 bytes each.

        Raises:
            AuditBroken: a record went back, or has two lines of one number; written down before this is raised, once.
            WrongKey: a head is not signed by whom it names. Nothing is written.
            Malformed: two heads of one name, none, or too many. Nothing is written.
            JournalUnusable: as :meth:`record`.
        """
        ordered = in_order(heads)
        with self._turn:
            for head in ordered:
                self._check_head(head, keys)
            if heads_digest(ordered) == self._seen.noted:
                return
            self._refuse_forks(ordered)
            for detail in heads_details(ordered):
                self._append(HEADS, detail)

    def countersign(self, heads: Sequence[AuditHead]) -> bytes:
        """Sign the list that :meth:`note_heads` took last: "these I have seen, and keep". 64 bytes.

        Raises:
            ValueError: another list: only what is written down here is countersigned.
        """
        with self._turn:
            if (noted := heads_digest(heads)) != self._seen.noted:
                raise ValueError("these heads are not the ones that were noted last")
            return self._sign(CONTEXT_HEADS_SEEN, noted)

    def note_countersignatures(
        self, heads: Sequence[AuditHead], signatures: Mapping[str, bytes], keys: Mapping[str, bytes]
    ) -> None:
        """Keep what other parties say of a list of heads that was noted here; what is kept already is not written again.

        Args:
            heads: the list that they countersigned.
            signatures: by name, 64 bytes each.
            keys: public keys by name, 32 bytes each.

        Raises:
            ValueError: the list was never noted here.
            WrongKey: one of the signatures is not of whom it names. Nothing is written.
            JournalUnusable, AuditBroken: as :meth:`record`.
        """
        noted = heads_digest(heads)
        for name, signature in signatures.items():
            check_countersignature(noted, name, signature, keys)
        with self._turn:
            if noted not in self._seen.own_line:
                raise ValueError("these heads were never noted here")
            news = {name: signature for name, signature in signatures.items() if (noted, name) not in self._seen.signed}
            for detail in countersigned_details(noted, news):
                self._append(COUNTERSIGNED, detail)

    def accept_new_record(self, name: str, *, why: str) -> None:
        """Let another party's record begin anew, at the word of a person here: its owner lost the disk, and said so.

        Until then every head of the new record is refused as a fork. What was seen of the old one stays written down.

        Raises:
            ValueError: no head of that name is kept here.
        """
        check_entry(ACCEPTED, {"why": why})
        with self._turn:
            if (seen := self._seen.newest.get(name)) is None:
                raise ValueError(f"no head of the record of {name!r} is kept here")
            self._append(ACCEPTED, {"name": name, "why": why, "instead_of": seen.number})

    def prune(self) -> int:
        """Drop the segments that are wholly older than the retention time; returns how many. The newest one stays.

        Guarantee: killed at any moment, what is left still verifies, and the next opening finishes what was begun.
        """
        with self._turn:
            oldest_kept = self._now() - self._retention_days * MS_A_DAY
            dropped = ""
            for segment, end in sorted(self._trail.ends.items())[:-1]:
                if end.newest >= oldest_kept:
                    break
                dropped = segment
            if not dropped:
                return 0
            self._drop(dropped, self._trail.ends[dropped])
            return self._files.remove(dropped)

    def _drop(self, segment: str, end: SegmentEnd) -> None:
        """Say so in the record first: an anchor that no line speaks of would hide a cut."""
        detail = {"segment": segment, "through": end.number, "digest": end.digest.hex(), "at": end.at}
        self._append(PRUNED, {**detail, "retention_days": self._retention_days})
        head = sign_head(self._sign, self._name, end.number, end.digest, end.at)
        document = HeadDocument(**head_document(head))
        anchor = Anchor(
            version=AUDIT_VERSION,
            segment=segment,
            head=document,
            public_key=end.key.hex(),
            announced=end.announced.hex(),
        )
        write_secret_file(self._folder / ANCHOR_FILE, canonical(anchor) + b"\n")
        for old in [month for month in self._trail.ends if month <= segment]:
            del self._trail.ends[old]

    def _open_and_check(self) -> None:
        stamp = time_text(self._now()).replace(":", "").replace(".", "-")
        if self._files.holds_no_line():
            self._files.set_torn_line_aside(stamp)
            self._append(BEGUN, {"version": AUDIT_VERSION, "name": self._name, "public_key": self._public_key.hex()})
        else:
            self._read_back(stamp)
        self._write_what_a_crash_left_out()

    def _read_back(self, stamp: str) -> None:
        record = self._read()
        if self._trail.name != self._name or self._public_key not in (self._trail.key, self._trail.announced):
            raise AuditBroken(
                f"{self._folder} is the record of {self._trail.name!r} and goes on with the key {self._trail.key.hex()}, "
                f"wanted {self._name!r} and {self._public_key.hex()}",
                hint="the old key has to announce a new one before it goes: without it, begin a new record and say so",
            )
        if self._trail.unfinished:
            self._files.set_torn_line_aside(stamp)
        if record.anchor:
            self._files.remove(record.anchor.segment)

    def _read(self) -> Record:
        record = open_record(self._folder)
        try:
            for place, line, _ in walk(record, self._trail, thorough=False):
                with naming(place):
                    self._seen.take(line, name=self._name, own=self._trail.recent, keys={})
        except AuditBroken:
            for _ in walk(record, Trail(), thorough=True):  # names the very line, not the one after it
                pass
            raise
        return record

    def _write_what_a_crash_left_out(self) -> None:
        if self._public_key != self._trail.key:
            self._append(KEY_TAKEN, {"public_key": self._public_key.hex()})
        for file in self._files.torn_files():
            if file.name not in self._trail.torn:
                torn = read_secret_file(file, limit=MAX_LINE_BYTES)
                digest = hashlib.sha256(torn).hexdigest()
                self._append(TORN, {"file": file.name, "bytes": len(torn), "sha256": digest})

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _check_head(self, head: AuditHead, keys: Mapping[str, bytes]) -> None:
        if head.name != self._name:
            verify_head(head, key_of(head.name, keys))
        elif not is_signed_by_one_of(head, self._trail.keys):  # others may still hand on one of an older key
            raise WrongKey(f"a head in the name of this record ({self._name!r}) is signed with none of its keys")

    def _refuse_forks(self, heads: tuple[AuditHead, ...]) -> None:
        forks = self._seen.forks_among(heads, mine=self.head(), own=self._trail.recent)
        for fork in forks:
            if fork.claim not in self._seen.claims and len(self._seen.claims) < MAX_FORKS_KEPT:
                self._append(FORK, fork_detail(fork))
        if forks:
            raise AuditBroken(
                "; ".join(str(fork) for fork in forks),
                hint="it was cut or rewritten, or put back from an old copy: its owner has to explain; both heads are kept",
            )

    def _append(self, kind: str, detail: Mapping[str, Any], *, sign: Sign | None = None) -> None:
        trail = self._trail
        at = self._now()
        line = AuditLine(
            number=trail.number + 1,
            at=time_text(at),
            kind=kind,
            detail=dict(detail),
            previous=trail.digest.hex(),
            signature="",
        )
        raw = sign_line(partial(sign or self._sign, CONTEXT_AUDIT), self._name, line)
        read_back = parse_line(raw)
        self._files.append(trail.month_of(at), raw + b"\n")
        trail.take(read_back, raw, check_signature=False)
        self._seen.take(read_back, name=self._name, own=trail.recent, keys={})
