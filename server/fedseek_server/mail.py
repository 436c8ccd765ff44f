"""What travels around each message: the roster, heads of audit chains, plans announced; and what sites tell in return.

The protocol's own messages stay byte for byte the same when they are sent again. The parcel around one says what is
true now: it is made when it is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_heads import check_countersignature
from fedseek.daemon.audit_lines import COORDINATOR, AuditHead, heads_digest, verify_head
from fedseek.daemon.parcels import ParcelDown, ParcelUp, Verdict, decode_parcel_up, encode_parcel
from fedseek.errors import AuditBroken, FedseekError, Malformed, MessageError, WrongKey
from fedseek.identity.signed_roster import SignedRoster
from fedseek.messages import Standing
from fedseek_server.driver import Conductor
from fedseek_server.exchange import Exchange

GREET = "greet"
ASKED_AGAIN = "again"  # without heads: a wait for people's approvals may take weeks, and would fill every record
_WITH_HEADS = frozenset({GREET, "round", "close", "release"})  # once a round, and between runs
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Mail:
    """What the coordinator knows of its sites besides their messages.

    Attributes:
        roster: that is in force; sites that hold another are sent it.
        site_of: the site that a node was enrolled for; None for a node that is not.
        audit: the coordinator's own record.
        verdicts: by site, its word on the plan last announced.
        standings: by site, which run it was in and how far it got.
        renewals: by site, the new keys it asks to be put on the roster.
        heard: nodes that sent a parcel.
    """

    roster: SignedRoster
    site_of: Callable[[int], str | None] = field(repr=False)
    audit: AuditChain = field(repr=False)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)
    renewals: dict[str, bytes] = field(default_factory=dict, repr=False)
    heard: set[int] = field(default_factory=set)
    _holds: dict[str, bytes] = field(default_factory=dict, repr=False)  # by site, the digest of the roster it has
    _heads: dict[str, AuditHead] = field(default_factory=dict, repr=False)
    _sent: tuple[AuditHead, ...] = ()
    _signed: dict[str, bytes] = field(default_factory=dict, repr=False)  # over ``_sent``
    _seen: tuple[AuditHead, ...] = ()
    _seen_signed: dict[str, bytes] = field(default_factory=dict, repr=False)

    def open_exchange(self, phase: str) -> None:
        """Fix the list of heads that goes out with an exchange, and what was signed of the list before."""
        if self._sent:  # until there is another: a site that was not in the exchange after it gets it all the same
            self._seen, self._seen_signed = self._sent, {**self._signed}
            others = {site: signature for site, signature in self._signed.items() if site != COORDINATOR}
            self.audit.note_countersignatures(self._seen, others, self.roster.signing_keys)
        self._sent, self._signed = (), {}
        if phase not in _WITH_HEADS:
            return
        heads = (*self._heads.values(), self.audit.head())
        try:
            self.audit.note_heads(heads, self.roster.signing_keys)
        except (AuditBroken, WrongKey, MessageError):
            self._heads = {name: head for name, head in self._heads.items() if self._is_good(head)}
            heads = (*self._heads.values(), self.audit.head())
            self.audit.note_heads(heads, self.roster.signing_keys)
        self._sent = heads
        self._signed[COORDINATOR] = self.audit.countersign(heads)

    def parcel(self, node: int, message: bytes | None, *, run: str | None, notice: bytes | None = None) -> bytes:
        """The parcel for one node, made when it is sent."""
        site = self.site_of(node)
        return encode_parcel(
            ParcelDown(
                message=message,
                notice=notice,
                run=run,
                roster=None if site is not None and self.holds_roster(site) else self.roster.to_bytes(),
                heads=self._sent,
                seen=self._seen,
                countersignatures=self._seen_signed,
            )
        )

    def take(self, node: int, data: bytes) -> ParcelUp:
        """Open what a node sent.

        Raises:
            Malformed, TooLarge: it is no parcel, or speaks for another site than the node was enrolled for.
        """
        parcel = decode_parcel_up(data)
        site = self.site_of(node)
        if site is None or parcel.site != site:
            raise Malformed(f"node {node} was enrolled for site {site!r} and speaks for {parcel.site!r}")
        self.heard.add(node)
        self._holds[site] = parcel.roster_digest
        if parcel.verdict is not None:
            self.verdicts[site] = parcel.verdict
        if parcel.standing is not None:
            self.standings[site] = parcel.standing
        if parcel.renewal is not None:
            self.renewals[site] = parcel.renewal
        self._take_head(site, parcel)
        return parcel

    def heads_seen(self) -> tuple[tuple[AuditHead, ...], dict[str, bytes]]:
        """The heads of all records as they last went around, and the countersignatures of sites over that list."""
        return self._sent, {site: signature for site, signature in self._signed.items() if site != COORDINATOR}

    def holds_roster(self, site: str) -> bool:
        """Whether the site said that it holds the roster in force."""
        return self._holds.get(site) == self.roster.digest()

    def _is_good(self, head: AuditHead) -> bool:
        """Whether a record goes on where it was. One that does not is noted as such, and sent to nobody."""
        try:
            self.audit.note_heads([head], self.roster.signing_keys)
        except (AuditBroken, WrongKey, MessageError) as error:
            _log.error("audit head of %s: %s", head.name, error)
            return False
        return True

    def _take_head(self, site: str, parcel: ParcelUp) -> None:
        """Keep what is signed by the site; what is not is dropped here, for it would spoil the list for all."""
        keys = self.roster.signing_keys
        if parcel.head is None or parcel.head.name != site or site not in keys:
            return
        try:
            verify_head(parcel.head, keys[site])
            if parcel.head.number >= self._heads.get(site, parcel.head).number:  # a late parcel may carry an older one
                self._heads[site] = parcel.head
            if parcel.countersignature is not None and self._sent:
                check_countersignature(heads_digest(self._sent), site, parcel.countersignature, keys)
                self._signed[site] = parcel.countersignature
        except (WrongKey, MessageError) as error:
            _log.warning("audit head of site %s: %s", site, error)


@dataclass(frozen=True, slots=True)
class Parcels(Mapping[int, bytes]):
    """Requests in their parcels, each made when it is asked for: one at a time is in memory."""

    mail: Mail = field(repr=False)
    messages: Mapping[int, bytes | None] = field(repr=False)
    run: str | None
    notice: bytes | None = field(default=None, repr=False)

    def __getitem__(self, node: int) -> bytes:
        return self.mail.parcel(node, self.messages[node], run=self.run, notice=self.notice)

    def __iter__(self) -> Iterator[int]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)


@dataclass(frozen=True, slots=True)
class Posted:
    """A run whose messages travel in parcels."""

    run: str
    inner: Conductor = field(repr=False)
    mail: Mail = field(repr=False)

    def play(self, nodes: Callable[[], Sequence[int]]) -> Iterator[Exchange]:
        """The run's exchanges, each message in a parcel."""
        before = None
        for exchange in self.inner.play(nodes):
            if exchange.pause_seconds:
                yield exchange
                continue
            where = (exchange.phase, exchange.round)
            self.mail.open_exchange(exchange.phase if where != before else ASKED_AGAIN)
            before = where
            yield Exchange(*where, Parcels(self.mail, exchange.requests, self.run))

    def receive(self, node: int, data: bytes) -> None:
        """Open the parcel, take what is around the message, hand on the message.

        Raises:
            Malformed: no parcel, or nothing in it; else as the run says.
        """
        parcel = self.mail.take(node, data)
        if parcel.message is None:
            raise Malformed(f"node {node} sent a parcel without a message")
        self.inner.receive(node, parcel.message)

    def reject(self, node: int, error: FedseekError) -> None:
        """Hand on that a reply was refused."""
        self.inner.reject(node, error)


@dataclass(frozen=True, slots=True)
class Greeting:
    """One exchange outside of a run: sites get the roster and the plan announced, and tell where they stand."""

    mail: Mail = field(repr=False)
    run: str | None = None
    notice: bytes | None = field(default=None, repr=False)

    def play(self, nodes: Callable[[], Sequence[int]]) -> Iterator[Exchange]:
        """The one exchange, with whoever is there; none if nobody is."""
        here = [node for node in nodes() if self.mail.site_of(node) is not None]
        self.mail.open_exchange(GREET)
        if here:
            yield Exchange(GREET, 0, Parcels(self.mail, dict.fromkeys(here), self.run, self.notice))

    def receive(self, node: int, data: bytes) -> None:
        """Take what a site tells. Raises ``Malformed``."""
        self.mail.take(node, data)

    def reject(self, node: int, error: FedseekError) -> None:
        """Log it: a site that cannot greet cannot run either, and says so there."""
        _log.warning("greeting of node %d refused: %s", node, error.message)
