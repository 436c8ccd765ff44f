"""A round played by all of its sites up to the masks, over vectors of a few slots; shared by the tests of the verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from scipy.stats import chi2

from fedseek.cohort import Federation, RoundGraph, presence_message, round_graph
from fedseek.deal import (
    HeldShares,
    RoundSecrets,
    advertise,
    check_dealt,
    check_keys,
    deal_shares,
    draw_secrets,
    open_box,
)
from fedseek.encode import Slots
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_PRESENCE, CONTEXT_UNMASK, sign
from fedseek.mask import mask_slots
from fedseek.messages import RoundKeys, SharesDealt, SharesRevealed, UnmaskRequest
from fedseek.plan import Plan
from fedseek.reveal import reveal_shares, revealed_message
from fedseek.unmask import RoundRecord

RUN = "试运行-1"
EPOCH, ADAPTER = 4, b"\x07" * 32  # of the group key; digest of the adapter that all sites start from
NAMES = (
    "北岸银行",
    "harbour-bank",
    "仁济医院",
    "st-anna",
    "banque-août",
    "клиника",
    *(f"site-{n:02}" for n in range(90)),
)
KINDS = ("bank", "bank", "hospital", "hospital", "bank", "hospital")

# RFC 7748, section 6.1: from these keys every private key gets an all-zero secret. Points of order 1, 2, 4 and 8 on the
# curve and on its twist, and their other encodings below 2^255 (https://cr.yp.to/ecdh.html#validate).
P = 2**255 - 19
LOW_ORDER = tuple(
    value.to_bytes(32, "little")
    for value in (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        P - 1,
        P,
        P + 1,
    )
)


@dataclass(frozen=True)
class Played:
    """What every party of a round holds before updates are sent."""

    federation: Federation
    identities: Mapping[str, SiteIdentity]
    graph: RoundGraph
    secrets: Mapping[str, RoundSecrets]
    keys: Mapping[str, RoundKeys]
    dealt: Mapping[str, SharesDealt]
    held: Mapping[str, Mapping[str, HeldShares]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.graph.listed

    @property
    def modulus(self) -> int:
        return self.federation.plan.packing.params.plain_modulus

    def scopes(self, name: str) -> tuple[str, ...]:
        return self.federation.shared_scopes(self.identities[name].kind)

    def updates(self, *, seed: int = 0, size: int = 5) -> dict[str, dict[str, Slots]]:
        """Slots of every site, by scope, anywhere below t."""
        rng = np.random.default_rng(seed)
        return {
            name: {scope: rng.integers(0, self.modulus, size, dtype=np.uint64) for scope in self.scopes(name)}
            for name in self.names
        }

    def mask_one(self, name: str, slots: Mapping[str, Slots], participants: Sequence[str]) -> dict[str, Slots]:
        """One site's slots under its masks; it has the keys of its peers and no others."""
        keys = {peer: self.keys[peer] for peer in self.graph.peers(name)}
        secrets = self.secrets[name]
        return mask_slots(slots, secrets, keys, self.federation, self.graph, participants=participants, me=name)

    def mask(self, updates, participants: Sequence[str] | None = None) -> dict[str, dict[str, Slots]]:
        """What the participants send: the scopes that are summed in such a round."""
        chosen = self.names if participants is None else participants
        summed = self.federation.summed_scopes(chosen)
        sent = {name: {scope: each for scope, each in updates[name].items() if scope in summed} for name in chosen}
        return {name: self.mask_one(name, slots, chosen) for name, slots in sent.items()}

    def vouched(self, participants: Sequence[str], *, epoch: int = EPOCH, digest: bytes = ADAPTER) -> bytes:
        return presence_message(self.federation, self.graph, participants, epoch=epoch, digest=digest)

    def presence(self, participants: Sequence[str], **vouched) -> dict[str, bytes]:
        message = self.vouched(participants, **vouched)
        return {name: sign(self.identities[name], CONTEXT_PRESENCE, message) for name in participants}

    def request(self, participants: Sequence[str], survivors: Sequence[str]) -> UnmaskRequest:
        presence = {name: signed for name, signed in self.presence(participants).items() if name in survivors}
        positions = self.federation.positions(survivors)
        return UnmaskRequest(run=RUN, round=self.graph.number, survivors=positions, presence=presence)

    def reveal(
        self,
        name: str,
        participants: Sequence[str],
        survivors: Sequence[str],
        request: UnmaskRequest | None = None,
        **vouched,
    ) -> SharesRevealed:
        return reveal_shares(
            request or self.request(participants, survivors),
            {dealer: shares for dealer, shares in self.held[name].items() if dealer in participants},
            self.federation,
            self.graph,
            participants=participants,
            vouched=self.vouched(participants, **vouched),
            identity=self.identities[name],
        )

    def record(self, participants: Sequence[str], survivors: Sequence[str]) -> RoundRecord:
        return RoundRecord(self.graph, self.keys, self.dealt, participants, survivors)

    def resign(self, revealed: SharesRevealed, record: RoundRecord, **changes) -> SharesRevealed:
        """An answer that is false and signed by the site that gives it."""
        false = msgspec.structs.replace(revealed, **changes)
        message = revealed_message(
            self.federation,
            self.graph.number,
            record.participants,
            record.survivors,
            false.self_masks,
            false.mask_keys,
        )
        signature = sign(self.identities[false.site], CONTEXT_UNMASK, message)
        return msgspec.structs.replace(false, signature=signature)


def make_identities(count: int, kinds: Sequence[str] = KINDS) -> dict[str, SiteIdentity]:
    """``count`` sites, of these kinds in turn."""
    return {name: SiteIdentity.generate(name, kinds[place % len(kinds)]) for place, name in enumerate(NAMES[:count])}


def federate(plan: Plan, identities: Mapping[str, SiteIdentity], *, run: str = RUN) -> Federation:
    """The federation of these sites."""
    return Federation.of(run, plan, Roster.of(identity.public() for identity in identities.values()))


def play_round(federation: Federation, identities: Mapping[str, SiteIdentity], *, number: int = 1) -> Played:
    """Keys, graph, shares and boxes of a round, each checked as its receiver checks it."""
    graph = round_graph(federation, number, federation.roster.names)
    secrets = {name: draw_secrets() for name in identities}
    keys = {name: advertise(secrets[name], federation, number, identity=each) for name, each in identities.items()}
    for each in keys.values():
        check_keys(each, federation, number)
    dealt, held = {}, {name: {} for name in identities}
    for name, identity in identities.items():
        dealt[name], held[name][name] = deal_shares(secrets[name], keys, federation, graph, identity=identity)
        check_dealt(dealt[name], federation, graph, dealer=name)
    for name in identities:
        for dealer in graph.neighbours[name]:
            box = dealt[dealer].boxes[name]
            held[name][dealer] = open_box(box, secrets[name], keys[dealer], federation, receiver=keys[name])
    return Played(federation, identities, graph, secrets, keys, dealt, held)


def flip(data: bytes, place: int, mask: int = 1) -> bytes:
    """The same bytes with some bits of one changed."""
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def check_uniform(slots: Slots, modulus: int, *, bins: int = 256) -> None:
    """Slots that look drawn anew modulo t: low digits, high ones, and from one slot to the next. Errs once in 10^8."""
    low, high = slots & np.uint64(bins - 1), (slots.astype(np.float64) * bins / modulus).astype(np.uint64)
    for digits in (low, high, low[:-1] ^ low[1:]):
        counts = np.bincount(digits.astype(np.int64), minlength=bins)
        statistic = float(((counts - digits.size / bins) ** 2).sum() / (digits.size / bins))
        assert chi2.ppf(1e-9, bins - 1) < statistic < chi2.ppf(1 - 1e-9, bins - 1)
