"""The privacy ledger of a site: what its people's data has cost, over rounds, runs, plans and adapters; never less.

    data read      take_data     which history these people and texts have
    run begins     total_after   does the whole plan fit?        reserve   then it is set aside
    round begins   spend         entered, on the disk, before anything is trained
    run is over    end           what was set aside and not trained is free again

One SQLite file of mode 0600, in the site's own folder; nothing that a coordinator sends can lower it. Entries are only
added, and chained (``fedseek_site.ledger_entries``); durability is that of ``fedseek.daemon.database``. A round that was
spent and not sent, because the process died, is trained again without a second entry: its first result never left.

Whose data it was is kept as keyed hashes, under a key sealed with the site's storage key: with the file alone nobody can
test whether a person is in the data. docs/ledger.md says what counts as the same data.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Final

from fedseek.daemon.database import (
    SharedDatabase,
    begin_or_check,
    check_whole,
)
from fedseek.dp.accounting import PrivacyParams
from fedseek.errors import AuditBroken, BudgetExceeded, JournalUnusable, WrongRound
from fedseek.identity.vault import StorageKey, open_at_rest, seal_at_rest
from fedseek_site.ledger_data import SEEN_TABLE, Hasher, Readable, add_seen, check_seen, sort_out
from fedseek_site.ledger_entries import (
    FIRST_DIGEST,
    Account,
    DataTaken,
    Ended,
    Entry,
    Limit,
    Mechanism,
    Noted,
    Part,
    Reserved,
    Spent,
    chain_digest,
    check_chain,
    encode_entry,
    epsilon_of,
)

_APPLICATION_ID: Final = 0x46534C31  # "FSL1": tells this file from any other SQLite database
_WHAT: Final = "privacy ledger"
_PURPOSE: Final = "privacy-ledger-key"
_SCHEMA: Final = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    "CREATE TABLE hash_key (sealed BLOB NOT NULL)",
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, entry BLOB NOT NULL, digest BLOB NOT NULL)",
    SEEN_TABLE,
)


def unlimited() -> None:
    """The limit of a simulation: its researcher owns every site."""


class Ledger:
    """The file, used by one process at a time. Its methods may be called from several threads; each is one transaction.

    Args:
        path: of the file, in a folder on a local disk; made if it is missing.
        key: the site's storage key: seals the key of the hashes.
        dataset: what the site's people call the data set.
        limit: asked before each spend; None allows everything.
        clock: Unix time in seconds.

    Raises:
        AuditBroken: an entry was changed, removed or put in; names it.
        WrongKey: the ledger was begun under another storage key.
        CustodyError: the file is open to group or others, or cannot be opened.
        JournalUnusable: it is damaged, in use for too long, or something else.
    """

    def __init__(
        self,
        path: Path,
        key: StorageKey,
        *,
        dataset: str,
        limit: Callable[[], Limit | None] = unlimited,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._dataset, self._limit, self._clock = path, dataset, limit, clock
        self._turn = RLock()  # for what is read here and then written, beside the file's own
        self._data = 0  # number of the data entry in use; 0: no data was taken yet
        self._follows: dict[str, tuple[str, tuple[int, ...]]] = {}

        def begin(db: sqlite3.Connection) -> None:
            if begin_or_check(db, path, _APPLICATION_ID, _SCHEMA, what="a site's privacy ledger of version 1"):
                db.execute("INSERT INTO hash_key VALUES (?)", (seal_at_rest(key, os.urandom(32), purpose=_PURPOSE),))
            (sealed,) = db.execute("SELECT sealed FROM hash_key").fetchone()
            self._entries = _read_checked(db, path)
            self._hasher = Hasher(open_at_rest(key, sealed, purpose=_PURPOSE))

        self._file = SharedDatabase(path, begin, what=_WHAT, hint=_hint)

    def close(self) -> None:
        """Close the file; closing twice does nothing more."""
        self._file.close()

    # --- whose data ---

    def take_data(self, records: Readable) -> str:
        """Find the history of these records, and spend on it from now on; the fingerprint of the data set.

        Known by its name, or by any person or text in it: such data continues every account that saw one of them.

        Raises:
            JournalUnusable: the disk is full or fails, or the file is damaged.
        """
        found = self._hasher.of_records(records)
        fingerprint = self._hasher.fingerprint(found)
        with self._turn:
            for noted in self._entries:
                entry = noted.entry
                if isinstance(entry, DataTaken) and (entry.name, entry.fingerprint) == (self._dataset, fingerprint):
                    self._data = noted.number
                    return fingerprint
            with self._file.transaction() as db:
                known, new = sort_out(db, [self._hasher.of_name(self._dataset), *found])
                taken = DataTaken(
                    name=self._dataset,
                    fingerprint=fingerprint,
                    continues=tuple(sorted(known)),
                    new_hashes=add_seen(db, new, len(self._entries) + 1),
                    num_new=len(new),
                    at=self._clock(),
                )
                [noted] = self._insert(db, [taken])
            self._entries.append(noted)
            self._data = noted.number
            return fingerprint

    # --- runs ---

    def follow(self, run: str, former: str, *, steps: Sequence[int]) -> None:
        """A run is about to be offered that goes on from ``former``, whose ``steps`` (by stage) it need not train again."""
        with self._turn:
            self._follows[run] = (former, tuple(steps))

    def total_after(self, run: str, parts: Sequence[Part], *, plan: str, delta: float) -> float:
        """Epsilon at ``delta`` over the life of the data once this run, and all others that were admitted, are through.

        Args:
            run: its name; "" where it has none yet. One that was admitted with this plan is counted once.
            parts: of its whole plan, one a stage; a mechanism of None is infinite.
            plan: digest.
            delta: of the account.
        """
        with self._turn:
            account = self._account()
            former, _ = self._follows.get(run, ("", ()))
            all_parts = account.spent() + account.reserved(without=former)
            if not any(admitted.plan == plan for admitted in account.reserved_by(run)):
                all_parts += self._left(run, parts)
        return epsilon_of(all_parts, delta)

    def reserve(self, run: str, parts: Sequence[Part], *, plan: str, unit: str) -> None:
        """Set aside what an admitted run may train; the same again changes nothing.

        Args:
            run: its name.
            parts: of its whole plan, one a stage.
            plan: digest.
            unit: what the plan protects.

        Raises:
            WrongRound: it was admitted with another plan.
            JournalUnusable: the disk is full or fails, or the file is damaged.
        """
        with self._turn:
            if known := self._reserved_by(run):
                if known[0].plan != plan:
                    raise WrongRound(f"run {run!r} was admitted to the privacy ledger with another plan")
                return
            data, now = self._account_data(), self._clock()
            self._append(
                *(
                    Reserved(run=run, plan=plan, unit=unit, data=data, mechanism=mechanism, steps=steps, at=now)
                    for mechanism, steps in self._left(run, parts)
                )
            )

    def spend(self, run: str, number: int, privacy: PrivacyParams | None, steps: int) -> Noted:
        """Enter what a round is about to cost; the same again is one entry. To be called before training.

        Guarantee: when this has returned, the entry is on the disk, once, and survives a crash of process and machine;
        if it raises, or the process dies within it, the entry is there or not, and nothing may be trained.

        Args:
            run: its name.
            number: of the round.
            privacy: of the round's stage; None is entered as infinite.
            steps: of the round.

        Raises:
            BudgetExceeded: the policy does not allow it; nothing is entered.
            WrongRound: the round was entered with other numbers or on other data, or the run has ended here.
            JournalUnusable: no data was taken, the disk is full or fails, or the file is damaged.
        """
        with self._turn:
            account = self._account()
            asked = Spent(
                run=run,
                round=number,
                data=self._data,
                mechanism=Mechanism.of(privacy),
                steps=steps,
                at=self._clock(),
            )
            if (entered := self._entered(asked, account)) is not None:
                return entered
            if run in account.ended:
                raise WrongRound(f"run {run!r} was ended in the privacy ledger; nothing more is trained in it")
            reserved = self._reserved_by(run)
            if reserved and asked.mechanism not in [each.mechanism for each in reserved]:
                raise WrongRound(f"run {run!r} was admitted to the privacy ledger with another mechanism")
            self._check_limit(asked, account)
            return self._append(asked)[0]

    def end(self, run: str) -> bool:
        """The run trains no more here, now or later: free what it had reserved. Whether it had been open."""
        with self._turn:
            if not self._reserved_by(run) or run in self._account().ended:
                return False
            self._append(Ended(run=run, at=self._clock()))
            return True

    def end_earlier(self, run: str) -> None:
        """End all runs that were admitted before this one: a site is in one run at a time, and never in an older one."""
        with self._turn:
            account = self._account()
            named = [noted.entry.run for noted in self._entries if isinstance(noted.entry, Reserved)]
            admitted = list(dict.fromkeys(named))
            before = admitted[: admitted.index(run)] if run in admitted else []
            for earlier in before:
                if earlier not in account.ended:
                    self._append(Ended(run=earlier, at=self._clock()))

    # --- what was entered ---

    def head(self) -> tuple[int, bytes]:
        """Number and digest of the newest entry; 0 and 32 zero bytes for an empty ledger."""
        with self._turn:
            return (self._entries[-1].number, self._entries[-1].digest) if self._entries else (0, FIRST_DIGEST)

    def check_holds(self, number: int, digest: bytes) -> None:
        """See that the ledger has this entry, which something else remembers: an older copy has not.

        Raises:
            AuditBroken: it has not.
        """
        with self._turn:
            if not number or (number <= len(self._entries) and self._entries[number - 1].digest == digest):
                return
            newest = len(self._entries)
        raise AuditBroken(
            f"privacy ledger {self._path}: the audit record knows of entry {number} ({digest.hex()[:16]}), the ledger "
            + (f"ends with entry {newest}" if newest < number else "has another one in its place"),
            hint="an older copy was put back, or the file was removed: what was spent since is missing. Put the newest "
            "copy back; nothing is trained without it",
        )

    def account(self) -> Account:
        """The history of the data set in use, as it is now.

        Raises:
            JournalUnusable: no data was taken yet.
        """
        with self._turn:
            return self._account()

    def entries(self) -> tuple[tuple[Noted, ...], int]:
        """All entries, and the number of the one of the data set in use. Raises as :meth:`account`."""
        with self._turn:
            return tuple(self._entries), self._account_data()

    def _account(self) -> Account:
        return Account(tuple(self._entries), self._account_data())

    def _account_data(self) -> int:
        if not self._data:
            raise JournalUnusable(f"privacy ledger {self._path}: no data set was taken yet; wanted one before any run")
        return self._data

    def _reserved_by(self, run: str) -> list[Reserved]:
        """Of this run on whatever data, ended or not; one entry a mechanism."""
        reserved = (noted.entry for noted in self._entries if isinstance(noted.entry, Reserved))
        return [entry for entry in reserved if entry.run == run]

    def _left(self, run: str, parts: Sequence[Part]) -> list[Part]:
        """What of a plan a run may train, less what was trained in one it goes on from; one part a mechanism."""
        _, taken_over = self._follows.get(run, ("", ()))
        left: dict[Mechanism | None, int] = {}
        for (mechanism, steps), before in zip(parts, (*taken_over, *[0] * len(parts)), strict=False):
            left[mechanism] = left.get(mechanism, 0) + max(0, steps - before)
        return list(left.items())

    def _entered(self, asked: Spent, account: Account) -> Noted | None:
        for noted in self._entries:
            entry = noted.entry
            if isinstance(entry, Spent) and (entry.run, entry.round) == (asked.run, asked.round):
                if (entry.mechanism, entry.steps) != (asked.mechanism, asked.steps):
                    raise WrongRound(
                        f"round {asked.round} of run {asked.run!r} is in the privacy ledger with other numbers",
                        hint="one run has one plan; a coordinator that changes it is at fault or hostile",
                    )
                if entry.data not in account.data_sets:
                    raise WrongRound(f"round {asked.round} of run {asked.run!r} was spent on other data")
                return noted
        return None

    def _check_limit(self, asked: Spent, account: Account) -> None:
        """What was admitted is set aside whole, so within a run the same sum is asked for again and again: cached.

        Only where that sum does not fit, as after the policy's limit was lowered, is the round looked at alone.
        """
        limit = self._limit() if asked.mechanism is not None else None
        if limit is None:
            return
        spent = account.spent()
        if account.fits(asked) and limit.allows(epsilon_of(spent + account.reserved(), limit.delta)):
            return
        after = epsilon_of([*spent, (asked.mechanism, asked.steps)], limit.delta)
        if not limit.allows(after):
            raise BudgetExceeded(
                spent=epsilon_of(spent, limit.delta), asked=after, limit=limit.epsilon, delta=limit.delta
            )

    def _append(self, *entries: Entry) -> list[Noted]:
        """All of them, or none."""
        with self._file.transaction() as db:
            noted = self._insert(db, entries)
        self._entries += noted
        return noted

    def _insert(self, db: sqlite3.Connection, entries: Sequence[Entry]) -> list[Noted]:
        number, previous = self.head()
        on_disk = db.execute("SELECT number, digest FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        if (on_disk or (0, FIRST_DIGEST)) != (number, previous):
            raise JournalUnusable(
                f"privacy ledger {self._path} was written to by another process; wanted it for this one alone",
                hint="find that process and stop it, then start this one again",
            )
        noted: list[Noted] = []
        for entry in entries:
            encoded = encode_entry(entry)
            previous, number = chain_digest(previous, encoded), number + 1
            noted.append(Noted(number, previous, entry))
            db.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, encoded, previous))
        return noted


def read_ledger(path: Path) -> list[Noted]:
    """Every entry of a ledger that no process has open, checked; needs no key.

    Raises:
        AuditBroken, CustodyError, JournalUnusable: as :class:`Ledger`.
    """
    found: list[Noted] = []

    def read(db: sqlite3.Connection) -> None:
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables:  # else its owner was killed before it was begun
            begin_or_check(db, path, _APPLICATION_ID, _SCHEMA, what="a site's privacy ledger of version 1")
            found.extend(_read_checked(db, path))

    SharedDatabase(path, read, what=_WHAT, hint=_hint).close()
    return found


def _read_checked(db: sqlite3.Connection, path: Path) -> list[Noted]:
    check_whole(db)
    entries = check_chain(db.execute("SELECT number, entry, digest FROM entries ORDER BY number"), source=str(path))
    check_seen(db, entries, source=str(path))
    return entries


def _hint(name: str) -> str:
    if name == "SQLITE_FULL":
        return "make room on the disk: nothing was entered, so nothing is trained"
    return "nothing is trained without the ledger; look at the disk, and keep the file as it is"
