"""The adding side: the coordinator's half of each scheme, in a process of its own, fed one message at a time.

A process of its own (``party``), so that its memory can be compared between cohorts and between schemes. Nothing here
imports what could decrypt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from party import Steps

from fedseek.aggregate import Aggregate, agg_finish, agg_init, agg_update
from fedseek.cohort import Federation, RoundGraph, round_graph
from fedseek.deal import check_dealt, check_keys
from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.he.packing import choose_packing
from fedseek.identity.roster import parse_roster
from fedseek.messages import (
    AggregateDown,
    RoundKeys,
    RoundRequest,
    ShareRequest,
    SharesDealt,
    SharesRevealed,
    SharesSealed,
    UnmaskRequest,
    UpdateReply,
    decode_reply,
    encode_message,
)
from fedseek.plan import GLOBAL_SCOPE, plan_from_canonical
from fedseek.unmask import RoundRecord, check_revealed, unmask_sum

RUN, ROUND, EPOCH = "基准-1", 1, 0


def start_plain(num_values: int) -> Steps:
    """float32 in the clear."""
    total = np.zeros(num_values, dtype=np.float32)

    def update(message: bytes) -> bytes:
        np.add(total, np.frombuffer(message, dtype=np.float32), out=total)
        return b""

    return {"update": update, "finish": lambda _: total.tobytes()}


def start_ckks(context: bytes) -> Steps:
    """TenSEAL vectors under a context without the secret key, as its tutorials add them."""
    import tenseal

    public = tenseal.context_from(context, n_threads=1)
    running: list[Any] = []

    def update(message: bytes) -> bytes:
        for place, data in enumerate(msgspec.msgpack.decode(message, type=tuple[bytes, ...])):
            vector = tenseal.ckks_vector_from(public, data)
            if place == len(running):
                running.append(vector)
            else:
                running[place] += vector
        return b""

    return {"update": update, "finish": lambda _: msgspec.msgpack.encode([each.serialize() for each in running])}


def start_outer(bits: int, max_sites: int, num_ciphertexts: int) -> Steps:
    """Homomorphic encryption alone: the sum of what sites sent."""
    aggregate = agg_init(choose_packing(bits, max_sites).params, {GLOBAL_SCOPE: num_ciphertexts}, max_sites=max_sites)

    def update(message: bytes) -> bytes:
        agg_update(aggregate, msgspec.msgpack.decode(message, type=tuple[ScopedCiphertexts, ...]))
        return b""

    return {"update": update, "finish": lambda _: msgspec.msgpack.encode(agg_finish(aggregate, min_sites=1))}


def start_both(plan: bytes, roster: bytes, num_ciphertexts: int) -> Steps:
    """Both locks; each step is one message in or one message out."""
    federation = Federation.of(RUN, plan_from_canonical(plan), parse_roster(roster))
    packing = federation.plan.packing
    aggregate = agg_init(packing.params, {GLOBAL_SCOPE: num_ciphertexts}, max_sites=packing.max_sites)
    graph = round_graph(federation, ROUND, federation.roster.names)
    held = HeldOfRound(federation, graph, aggregate)
    return {
        "keys": held.take_keys,
        "share_request": held.share_request,
        "shares": held.take_shares,
        "round_request": held.round_request,
        "update": held.take_update,
        "unmask_request": held.unmask_request,
        "reveal": held.take_revealed,
        "unmask": held.unmask,
        "finish": held.finish,
    }


@dataclass(slots=True)
class HeldOfRound:
    """What the coordinator holds of one round with both locks."""

    federation: Federation
    graph: RoundGraph
    aggregate: Aggregate
    keys: dict[str, RoundKeys] = field(default_factory=dict)
    dealt: dict[str, SharesDealt] = field(default_factory=dict)
    presence: dict[str, bytes] = field(default_factory=dict)
    revealed: dict[str, SharesRevealed] = field(default_factory=dict)

    @property
    def survivors(self) -> tuple[str, ...]:
        return tuple(name for name in self.graph.listed if name in self.presence)

    @property
    def record(self) -> RoundRecord:
        return RoundRecord(self.graph, self.keys, self.dealt, self.graph.listed, self.survivors)

    def take_keys(self, message: bytes) -> bytes:
        keys = msgspec.msgpack.decode(message, type=RoundKeys)
        check_keys(keys, self.federation, ROUND)
        self.keys[keys.site] = keys
        return b""

    def share_request(self, name: bytes) -> bytes:
        listed = self.federation.positions(self.graph.listed)
        keys = tuple(self.keys[each] for each in self.graph.peers(name.decode()))
        return encode_message(ShareRequest(run=RUN, round=ROUND, listed=listed, keys=keys))

    def take_shares(self, message: bytes) -> bytes:
        sealed = _reply(message, SharesSealed)
        check_dealt(sealed.shares, self.federation, self.graph, dealer=sealed.site)
        self.dealt[sealed.site] = sealed.shares
        return b""

    def round_request(self, name: bytes) -> bytes:
        site = name.decode()
        request = RoundRequest(
            run=RUN,
            round=ROUND,
            previous=(),
            epoch=EPOCH,
            envelopes={},
            participants=self.federation.positions(self.graph.listed),
            boxes={dealer: self.dealt[dealer].boxes[site] for dealer in self.graph.neighbours[site]},
            next_listed=(),
            next_keys=(),
        )
        return encode_message(request)

    def take_update(self, message: bytes) -> bytes:
        reply = _reply(message, UpdateReply)
        agg_update(self.aggregate, reply.update)
        self.presence[reply.site] = reply.presence
        return b""

    def unmask_request(self, name: bytes) -> bytes:
        survivors = self.federation.positions(self.survivors)
        around = self.graph.neighbours[name.decode()]
        presence = {each: self.presence[each] for each in around if each in self.presence}
        return encode_message(UnmaskRequest(run=RUN, round=ROUND, survivors=survivors, presence=presence))

    def take_revealed(self, message: bytes) -> bytes:
        revealed = check_revealed(_reply(message, SharesRevealed), self.record, self.federation)
        self.revealed[revealed.site] = revealed
        return b""

    def unmask(self, _: bytes) -> bytes:
        unmask_sum(self.aggregate, self.revealed, self.record, self.federation)
        return b""

    def finish(self, _: bytes) -> bytes:
        sums = agg_finish(self.aggregate, min_sites=2)
        survivors = self.federation.positions(self.survivors)
        return msgspec.msgpack.encode(AggregateDown(round=ROUND, epoch=EPOCH, survivors=survivors, sums=sums))


def _reply(message: bytes, wanted: type[Any]) -> Any:
    reply = decode_reply(message)
    if not isinstance(reply, wanted):
        raise TypeError(f"got {type(reply).__name__}, wanted {wanted.__name__}")
    return reply
