"""A site of a round with a big adapter, in a process of its own: each step takes a message and answers with one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np
from adding_side import EPOCH, ROUND, RUN
from party import Steps, peak_rss_mb, reset_peak, rss_mb
from site_side import ADAPTER_DIGEST, SiteInRound, update_reply
from workload import VALUE_RANGE, Workload

from fedseek.apply import ScopeState, apply_sums
from fedseek.cohort import Federation, RoundGraph, presence_message, round_graph
from fedseek.deal import advertise, check_keys, deal_shares, draw_secrets, open_box
from fedseek.decrypt import decrypt_sum
from fedseek.encode import Float32Vector
from fedseek.encrypt import encrypt_update
from fedseek.he.keys import SecretKey
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import parse_roster
from fedseek.identity.signing import CONTEXT_PRESENCE, sign
from fedseek.mask import mask_slots
from fedseek.messages import (
    AggregateDown,
    Request,
    RoundRequest,
    ShareRequest,
    SharesSealed,
    UnmaskRequest,
    decode_request,
    encode_message,
)
from fedseek.plan import GLOBAL_SCOPE, plan_from_canonical
from fedseek.reveal import reveal_shares
from fedseek.tag import add_tags, tag_key

CHECKED_VALUES = 100_000  # of the mean, for whoever knows all updates
_R = TypeVar("_R", bound=Request)


class Measured(msgspec.Struct, frozen=True):
    """CPU seconds by phase, and its peak memory above what the site had before the update was encoded, or the sum read."""

    seconds: dict[str, float]
    peaks_mb: dict[str, float]


class ToldOfSum(msgspec.Struct, frozen=True):
    """What the sum came to at a site; ``mean`` is its first values, little-endian float64."""

    digest: bytes
    contributors: int
    weight: int
    mean: bytes


@dataclass(slots=True)
class Phases:
    """A stopwatch for seconds and memory; ``base_mb`` is what memory is counted from."""

    base_mb: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peaks_mb: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        reset_peak()
        started = time.process_time()
        yield
        self.seconds[phase] = time.process_time() - started
        self.peaks_mb[phase] = peak_rss_mb() - self.base_mb


@dataclass(slots=True)
class BigSite:
    """What one site has in the round."""

    workload: Workload
    federation: Federation
    graph: RoundGraph
    group_key: SecretKey = field(repr=False)
    own: SiteInRound
    phases: Phases = field(default_factory=Phases)
    vector: Float32Vector = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    weight: int = 1

    def keys(self, _: bytes) -> bytes:
        return msgspec.msgpack.encode(self.own.keys)

    def deal(self, message: bytes) -> bytes:
        own, request = self.own, _request(message, ShareRequest)
        own.peers = {keys.site: keys for keys in request.keys}
        for keys in request.keys:
            check_keys(keys, self.federation, ROUND)
        shares, mine = deal_shares(own.secrets, own.peers, self.federation, self.graph, identity=own.identity)
        own.held[own.name] = mine
        return encode_message(SharesSealed(run=RUN, site=own.name, shares=shares))

    def train(self, _: bytes) -> bytes:
        """Get an update; what ``submit`` takes is counted from here."""
        self.vector, self.weight = self.workload.update(self.own.number)
        return b""

    def submit(self, message: bytes) -> bytes:
        """Encode, tag, mask, encrypt and write the message, and keep what ``fedseek_site.rounds`` keeps on the way."""
        own, federation = self.own, self.federation
        for dealer, box in _request(message, RoundRequest).boxes.items():
            own.held[dealer] = open_box(box, own.secrets, own.peers[dealer], federation, receiver=own.keys)
        self.phases.base_mb = rss_mb()
        with self.phases("encode"):
            encoded = {GLOBAL_SCOPE: self.workload.encode(self.vector, self.weight)}
        with self.phases("tag"):
            key, modulus = tag_key(self.group_key, federation, ROUND, GLOBAL_SCOPE), self.group_key.params.plain_modulus
            tagged = {GLOBAL_SCOPE: add_tags(encoded.pop(GLOBAL_SCOPE), key, site=own.name, modulus=modulus)}
        with self.phases("mask"):
            listed = self.graph.listed
            masked = mask_slots(
                tagged, own.secrets, own.peers, federation, self.graph, participants=listed, me=own.name
            )
            del tagged
        with self.phases("encrypt"):
            update = encrypt_update(self.group_key, masked)
            del masked
        with self.phases("write"):
            return encode_message(update_reply(own, update, sign(own.identity, CONTEXT_PRESENCE, self._vouched())))

    def reveal(self, message: bytes) -> bytes:
        request = _request(message, UnmaskRequest)
        listed, own = self.graph.listed, self.own
        revealed = reveal_shares(
            request,
            own.held,
            self.federation,
            self.graph,
            participants=listed,
            vouched=self._vouched(),
            identity=own.identity,
        )
        self.vector = np.zeros(0, np.float32)
        return encode_message(revealed)

    def receive(self, message: bytes) -> bytes:
        """Read, decrypt, verify and apply the sum to weights of zeros; counted from the weights and the message."""
        layout, federation = self.workload.layout, self.federation
        weights = np.full(layout.num_values, 0.0, np.float32)
        held = ScopeState(layout, weights, np.zeros(layout.num_values), VALUE_RANGE)
        self.phases.base_mb = rss_mb()
        with self.phases("read"):
            down = msgspec.msgpack.decode(message, type=AggregateDown)
        with self.phases("decrypt"):
            summed = decrypt_sum(
                self.group_key,
                down.sums,
                federation=federation,
                number=ROUND,
                survivors=federation.open_scopes(self.graph.listed, federation.names(down.survivors)),
                layouts={GLOBAL_SCOPE: layout},
                value_ranges={GLOBAL_SCOPE: VALUE_RANGE},
            )
        with self.phases("apply"):
            after = apply_sums({GLOBAL_SCOPE: held}, summed, federation.plan)[GLOBAL_SCOPE]
        found = summed[GLOBAL_SCOPE]
        mean = found.mean[:CHECKED_VALUES].astype("<f8").tobytes()
        return msgspec.msgpack.encode(ToldOfSum(after.digest(), found.contributors, found.weight, mean))

    def measured(self, _: bytes) -> bytes:
        return msgspec.msgpack.encode(Measured(self.phases.seconds, self.phases.peaks_mb))

    def _vouched(self) -> bytes:
        return presence_message(self.federation, self.graph, self.graph.listed, epoch=EPOCH, digest=ADAPTER_DIGEST)


def start_site(plan: bytes, roster: bytes, group_key: bytes, workload: Workload, identity: bytes, number: int) -> Steps:
    """The site's process: ``number`` says whose update it has."""
    federation = Federation.of(RUN, plan_from_canonical(plan), parse_roster(roster))
    mine, secrets = SiteIdentity.from_bytes(identity), draw_secrets()
    site = BigSite(
        workload,
        federation,
        round_graph(federation, ROUND, federation.roster.names),
        SecretKey.from_bytes(workload.packing.params, group_key),
        SiteInRound(number, mine, secrets, advertise(secrets, federation, ROUND, identity=mine)),
    )
    return {
        "keys": site.keys,
        "deal": site.deal,
        "train": site.train,
        "submit": site.submit,
        "reveal": site.reveal,
        "receive": site.receive,
        "measured": site.measured,
    }


def _request(message: bytes, wanted: type[_R]) -> _R:
    request = decode_request(message)
    if not isinstance(request, wanted):
        raise TypeError(f"got {type(request).__name__}, wanted {wanted.__name__}")
    return request
