"""What stands in a site's privacy ledger, line by line, and what follows from it: a chain of entries, and sums over them.

    data      a data set was read: which earlier ones it continues    reserved  a run may begin, with what it may train
    spent     a round is about to be trained                          ended     a run trains no more here

Each entry is bound to the one before by SHA-256. The lines of one account are found from the ``data`` entries alone:
two data sets that share a name, a person or a text are one account, also if a third is what they share.

>>> chain_digest(bytes(32), b"{}").hex()[:16]
'ff5e72d71e855375'
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from fedseek.dp.accounting import PrivacyParams, PrivacySpend
from fedseek.dp.composition import composed_epsilon, composed_epsilon_rdp
from fedseek.errors import AuditBroken, UnsupportedMechanism
from fedseek.plan import Plan

FIRST_DIGEST: Final = bytes(32)  # what the first entry follows
_DOMAIN: Final = b"fedseek/ledger/v1\0"
_ROUNDING: Final = 1e-9  # three times 0.1 fit in 0.3: the last bits of a sum are no overspending

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
RunName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class Limit:
    """What the site's policy allows over the life of its data: epsilon at this delta."""

    epsilon: float
    delta: float

    def allows(self, total: float) -> bool:
        """Whether so much in all is no overspending; nothing that is not a number is allowed."""
        return total <= self.epsilon * (1 + _ROUNDING)


class Mechanism(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """DP-SGD as the plan says; ``delta`` is the plan's, the account has one of its own."""

    noise_multiplier: float
    sampling_probability: float
    l2_clip_norm: float
    delta: float

    @classmethod
    def of(cls, params: PrivacyParams | None) -> Mechanism | None:
        """The mechanism of a plan; None if it promises nothing."""
        if params is None:
            return None
        return cls(
            noise_multiplier=params.noise_multiplier,
            sampling_probability=params.sampling_probability,
            l2_clip_norm=params.l2_clip_norm,
            delta=params.delta,
        )

    def params(self) -> PrivacyParams:
        """The same for the accountant. Raises :class:`UnsupportedMechanism` where no guarantee exists."""
        return PrivacyParams(
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            delta=self.delta,
            l2_clip_norm=self.l2_clip_norm,
        )


class DataTaken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="data", tag_field="kind"):
    """A data set as it was read.

    Attributes:
        name: what the site's people call it.
        fingerprint: keyed hash over the sorted hashes of its people and texts.
        continues: numbers of the data entries that knew its name, or one of its people or texts.
        new_hashes: SHA-256 over the sorted hashes that this entry brought in, its name's among them.
        num_new: how many those are.
        at: Unix seconds.
    """

    name: Name
    fingerprint: Hex
    continues: tuple[Count, ...]
    new_hashes: Hex
    num_new: Count
    at: float


class Reserved(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="reserved", tag_field="kind"):
    """A run was admitted: what it may train counts until it is trained, or the run has ended.

    A run whose stages have different noise has an entry for each mechanism, entered together.

    Attributes:
        run: its name.
        plan: digest.
        unit: what the plan protects.
        data: number of the data entry.
        mechanism: None for a run without privacy.
        steps: of this mechanism that it has left: all of the plan's, less those of a run that it goes on from.
        at: Unix seconds.
    """

    run: RunName
    plan: Hex
    unit: Name
    data: Count
    mechanism: Mechanism | None
    steps: Count
    at: float


class Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="spent", tag_field="kind"):
    """A round that is trained next; what it costs is spent, whatever comes of it. As :class:`Reserved`."""

    run: RunName
    round: Count
    data: Count
    mechanism: Mechanism | None
    steps: Count
    at: float


class Ended(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="ended", tag_field="kind"):
    """A run that trains no more here: what it had reserved and not trained is free again."""

    run: RunName
    at: float


Entry = DataTaken | Reserved | Spent | Ended
Part = tuple[Mechanism | None, int]
"""A mechanism and a number of its steps."""

_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Entry)


@dataclass(frozen=True, slots=True)
class Noted:
    """An entry in its place: counted from 1, with the digest of the chain up to it, 32 bytes."""

    number: int
    digest: bytes
    entry: Entry = field(repr=False)


def encode_entry(entry: Entry) -> bytes:
    """Canonical JSON."""
    return _encoder.encode(entry)


def chain_digest(previous: bytes, encoded: bytes) -> bytes:
    """Digest of the chain with this entry at its end; 32 bytes."""
    return hashlib.sha256(_DOMAIN + previous + encoded).digest()


def check_chain(rows: Iterable[tuple[int, bytes, bytes]], *, source: str) -> list[Noted]:
    """Every entry of a ledger, the chain recomputed.

    Args:
        rows: number, canonical entry, digest; in the order of their numbers.
        source: named in errors.

    Raises:
        AuditBroken: an entry was changed, removed or put in; names it.
    """
    found: list[Noted] = []
    previous = FIRST_DIGEST
    for number, encoded, digest in rows:
        if number != len(found) + 1:
            raise _broken(source, f"entry {len(found) + 1} is missing, the next one is {number}")
        try:
            entry = _decoder.decode(encoded)
            if isinstance(entry, Reserved | Spent) and entry.mechanism is not None:
                entry.mechanism.params()
        except (msgspec.MsgspecError, UnicodeDecodeError, UnsupportedMechanism) as error:
            raise _broken(source, f"entry {number} was changed: it cannot be read ({error})") from None
        if chain_digest(previous, encoded) != digest or encode_entry(entry) != encoded:
            raise _broken(source, f"entry {number} ({_words(entry)}) was changed, or the one before it was")
        if not _refers_back(entry, found):
            raise _broken(source, f"entry {number} ({_words(entry)}) names a data set that is not before it")
        found.append(Noted(number, digest, entry))
        previous = digest
    return found


class Account:
    """All that ever happened to one body of data: a view of the entries, for one data entry.

    Args:
        entries: of the whole ledger, in order.
        data: number of a data entry; the account is that of every data set joined with it.
    """

    def __init__(self, entries: Sequence[Noted], data: int) -> None:
        self.data_sets = _joined(entries, data)
        self._entries = entries
        self.ended = frozenset(noted.entry.run for noted in entries if isinstance(noted.entry, Ended))

    def spends(self) -> Iterator[Spent]:
        """In the order of training."""
        for noted in self._entries:
            if isinstance(noted.entry, Spent) and noted.entry.data in self.data_sets:
                yield noted.entry

    def reservations(self) -> Iterator[Reserved]:
        """Of all runs, in the order of admission."""
        for noted in self._entries:
            if isinstance(noted.entry, Reserved) and noted.entry.data in self.data_sets:
                yield noted.entry

    def spent(self) -> list[Part]:
        """What was trained."""
        return [(spent.mechanism, spent.steps) for spent in self.spends()]

    def reserved(self, *, without: str = "") -> list[Part]:
        """What admitted runs that have not ended may still train; one of them can be left out."""
        trained = self._trained()
        return [
            (each.mechanism, max(0, each.steps - trained[each.run, each.mechanism]))
            for each in self.reservations()
            if each.run not in self.ended and each.run != without
        ]

    def reserved_by(self, run: str) -> list[Reserved]:
        """Of this run, one a mechanism; none if it was not admitted, or has ended."""
        return [each for each in self.reservations() if each.run == run and run not in self.ended]

    def fits(self, asked: Spent) -> bool:
        """Whether steps about to be trained are among those that the run has set aside."""
        reserved = sum(each.steps for each in self.reserved_by(asked.run) if each.mechanism == asked.mechanism)
        return self._trained()[asked.run, asked.mechanism] + asked.steps <= reserved

    def _trained(self) -> Counter[tuple[str, Mechanism | None]]:
        """Steps by run and mechanism."""
        steps = Counter[tuple[str, Mechanism | None]]()
        for spent in self.spends():
            steps[spent.run, spent.mechanism] += spent.steps
        return steps


def parts_of(plan: Plan) -> tuple[Part, ...]:
    """What a site spends that plays a plan to its end: one part a stage."""
    return tuple((Mechanism.of(stage.privacy), stage.num_steps) for stage in plan.stages)


def epsilon_of(parts: Sequence[Part], delta: float) -> float:
    """Epsilon at ``delta`` of all parts, by the privacy loss distribution; infinite with one step without privacy."""
    return composed_epsilon(_as_spends(parts), delta) if _is_bounded(parts) else math.inf


def epsilon_rdp_of(parts: Sequence[Part], delta: float) -> float:
    """The second opinion on :func:`epsilon_of`, by Renyi accounting."""
    return composed_epsilon_rdp(_as_spends(parts), delta) if _is_bounded(parts) else math.inf


def _refers_back(entry: Entry, found: Sequence[Noted]) -> bool:
    named = entry.continues if isinstance(entry, DataTaken) else () if isinstance(entry, Ended) else (entry.data,)
    return all(1 <= number <= len(found) and isinstance(found[number - 1].entry, DataTaken) for number in named)


def _is_bounded(parts: Sequence[Part]) -> bool:
    return all(mechanism is not None or not steps for mechanism, steps in parts)


def _as_spends(parts: Sequence[Part]) -> list[PrivacySpend]:
    return [PrivacySpend(mechanism.params(), steps) for mechanism, steps in parts if mechanism is not None]


def _joined(entries: Sequence[Noted], data: int) -> frozenset[int]:
    """Numbers of the data entries that hang together with this one."""
    group = {noted.number: {noted.number} for noted in entries if isinstance(noted.entry, DataTaken)}
    for noted in entries:
        if isinstance(noted.entry, DataTaken):
            merged = set[int]().union(group[noted.number], *(group[other] for other in noted.entry.continues))
            for number in merged:
                group[number] = merged
    return frozenset(group[data])


def _words(entry: Entry) -> str:
    match entry:
        case DataTaken():
            return f"data set {entry.name!r}"
        case Spent():
            return f"round {entry.round} of run {entry.run!r}"
        case Reserved():
            return f"run {entry.run!r} admitted"
        case Ended():
            return f"run {entry.run!r} ended"


def _broken(source: str, problem: str) -> AuditBroken:
    return AuditBroken(
        f"privacy ledger {source}: {problem}",
        hint="nothing is trained on a ledger that was altered: keep the file, find out who changed it, restore the newest",
    )
