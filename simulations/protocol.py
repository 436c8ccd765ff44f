"""The protocol as code: one round with both locks, all parties in one process, no network.

Steps and their numbers are those of the design (docs/protocol.md). What crosses from one party to another goes through
``Wire.carry`` as bytes; the coordinator's part of ``run_round`` touches nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.apply import ScopeState, apply_sums
from fedseek.cohort import Federation, RoundGraph, presence_message, round_graph
from fedseek.deal import RoundSecrets, advertise, check_dealt, check_keys, deal_shares, draw_secrets, open_box
from fedseek.decrypt import decrypt_sum
from fedseek.encode import Float32Vector, Slots, SummedUpdate, encode_update, num_ciphertexts
from fedseek.encrypt import encrypt_update
from fedseek.errors import AdapterDiverged
from fedseek.groupkey import GroupKey, make_group_key, open_group_key
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, CONTEXT_PRESENCE, sign, verify
from fedseek.mask import mask_slots
from fedseek.messages import AggregateDown, RoundKeys, UnmaskRequest, UpdateReply, digest_message
from fedseek.plan import GLOBAL_SCOPE, Plan
from fedseek.reveal import reveal_shares
from fedseek.site_noise import encode_noised
from fedseek.tag import add_tags, tag_key
from fedseek.unmask import RoundRecord, check_revealed, unmask_sum

_M = TypeVar("_M", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, eq=False)
class Participant:
    """A site as it enters a round.

    Attributes:
        identity: its private keys.
        scopes: what it holds, by scope: the adapter of all, the head of its kind.
        updates: trained minus initial, by scope, float32, shape (num_values,). Secret: stands for local training.
        metrics: numbers that ride along, by scope and name.
        weight: what its update counts, in [1, plan.weight_cap].
        rng: draws for the quantiser's rounding; seeded by the operating system when absent.
    """

    identity: SiteIdentity
    scopes: Mapping[str, ScopeState]
    updates: Mapping[str, Float32Vector] = field(repr=False)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    weight: int = 1
    rng: np.random.Generator | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class AfterRound:
    """A site as it leaves a round.

    Attributes:
        scopes: what it holds now, the sums applied.
        summed: what the sums said.
        digests: of what it holds now, as it signed them; 32 bytes each.
    """

    scopes: Mapping[str, ScopeState]
    summed: Mapping[str, SummedUpdate] = field(repr=False)
    digests: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class RoundOutcome:
    """Every site by name, and all that the coordinator carried, in order."""

    sites: Mapping[str, AfterRound]
    carried: Sequence[bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Wire:
    """What stands for the network: every message crosses as bytes, and the coordinator sees all of them."""

    carried: list[bytes] = field(default_factory=list, repr=False)

    def carry(self, message: _M) -> _M:
        """The message as the other side reads it."""
        self.carried.append(msgspec.msgpack.encode(message))
        return msgspec.msgpack.decode(self.carried[-1], type=type(message))


def run_round(
    plan: Plan, sites: Sequence[Participant], *, run: str, number: int, vanish: Collection[str] = ()
) -> RoundOutcome:
    """Play round ``number``, from the plan to the applied sum; sites in ``vanish`` deal shares and send no update.

    Raises:
        FedseekError: a party did not follow the protocol; the text says which and how.
    """
    wire, members = Wire(), {site.identity.name: site for site in sites}
    roster = Roster.of(site.identity.public() for site in sites)
    federation, present = Federation.of(run, plan, roster), [name for name in members if name not in vanish]

    # 1. Plan. Each site signs what it admits: this run of this plan with exactly these sites.
    for name, site in members.items():
        verify(
            roster.entry(name), CONTEXT_PLAN, federation.bind(), sign(site.identity, CONTEXT_PLAN, federation.bind())
        )

    # 2. Group key. One site makes the key of the epoch (here each round is one) and seals it to each.
    maker = members[roster.names[0]].identity
    sealed = wire.carry(make_group_key(federation, number, identity=maker, now=time.time()))
    group_keys = {
        name: open_group_key(sealed.envelopes[name], federation, number, identity=site.identity)
        for name, site in members.items()
    }

    # 3. Keys. Fresh ones for the round, signed by each site's identity, checked against the roster.
    secrets = {name: draw_secrets() for name in members}
    keys = {
        name: wire.carry(advertise(secrets[name], federation, number, identity=site.identity))
        for name, site in members.items()
    }
    for each in keys.values():
        check_keys(each, federation, number)

    # 4. Shares. Each site shares its secrets out to its neighbours, in boxes the coordinator cannot open.
    graph = round_graph(federation, number, roster.names)
    dealt, held = {}, {name: {} for name in members}
    for name, site in members.items():
        shares, held[name][name] = deal_shares(secrets[name], keys, federation, graph, identity=site.identity)
        dealt[name] = wire.carry(shares)
        check_dealt(dealt[name], federation, graph, dealer=name)
    for name in members:
        for dealer in graph.neighbours[name]:
            box = dealt[dealer].boxes[name]
            held[name][dealer] = open_box(box, secrets[name], keys[dealer], federation, receiver=keys[name])

    # 5. Train and submit. Training gave the updates: quantised, packed, tagged, masked, encrypted. The coordinator adds.
    aggregate = agg_init(plan.packing.params, ciphertexts_of(plan, sites), max_sites=plan.packing.max_sites)
    presence = {}
    for name in present:
        reply = wire.carry(submit(federation, members[name], graph, secrets[name], keys, group_keys[name]))
        presence[name] = reply.presence
        agg_update(aggregate, reply.update)

    # 6. Unmask. Each survivor reveals one share for each neighbour, and the mask of the sum comes off under encryption.
    record = RoundRecord(graph, keys, dealt, participants=roster.names, survivors=present)
    asked = UnmaskRequest(run=run, round=number, survivors=federation.positions(present), presence=presence)
    revealed = {}
    for name in present:
        vouched, me = vouched_by(federation, graph, members[name]), members[name].identity
        answer = reveal_shares(
            wire.carry(asked), held[name], federation, graph, participants=roster.names, vouched=vouched, identity=me
        )
        revealed[name] = check_revealed(wire.carry(answer), record, federation)
    unmask_sum(aggregate, revealed, record, federation)
    opened = federation.open_scopes(roster.names, present)
    sums = agg_finish(aggregate, min_sites=plan.spec.cohort.min_contributors, scopes=list(opened))

    # 7. Apply. Sites decrypt, verify tags and counts, apply, and sign the digest of what they now hold.
    after, agreed = {}, {}
    for name, site in members.items():
        mine = tuple(each for each in sums if each.scope in site.scopes)
        down = AggregateDown(round=number, epoch=number, survivors=asked.survivors, sums=mine)
        after[name] = apply_down(federation, site, group_keys[name], wire.carry(down))
        for scope, digest in after[name].digests.items():
            if agreed.setdefault(scope, digest) != digest:
                raise AdapterDiverged(f"round {number}: site {name!r} holds other values of {scope!r}")
    return RoundOutcome(after, wire.carried)


def ciphertexts_of(plan: Plan, sites: Sequence[Participant]) -> dict[str, int]:
    """How many ciphertexts an update has in each scope; sites announce it when they admit a plan."""
    layouts = {scope: state.layout for site in sites for scope, state in site.scopes.items()}
    return {scope: num_ciphertexts(layout, plan.packing) for scope, layout in layouts.items()}


def submit(
    federation: Federation,
    site: Participant,
    graph: RoundGraph,
    secrets: RoundSecrets,
    keys: Mapping[str, RoundKeys],
    group_key: GroupKey,
) -> UpdateReply:
    """A site's update on its way out: encode, tag, mask, encrypt; and its word on whom it masked with."""
    identity, number, plan = site.identity, graph.number, federation.plan
    modulus = plan.packing.params.plain_modulus
    tagged = {
        scope: add_tags(
            slots, tag_key(group_key.secret, federation, number, scope), site=identity.name, modulus=modulus
        )
        for scope, slots in encode_scopes(plan, site).items()
    }
    masked = mask_slots(tagged, secrets, keys, federation, graph, participants=graph.listed, me=identity.name)
    digests = {scope: state.digest() for scope, state in site.scopes.items()}
    return UpdateReply(
        run=federation.run,
        site=identity.name,
        round=number,
        epoch=group_key.epoch,
        digests=digests,
        signature=sign(identity, CONTEXT_ADAPTER, digest_message(federation.run, number, digests)),
        presence=sign(identity, CONTEXT_PRESENCE, vouched_by(federation, graph, site)),
        update=encrypt_update(group_key.secret, masked),
        shares=None,
        keys=None,
    )


def vouched_by(federation: Federation, graph: RoundGraph, site: Participant) -> bytes:
    """What a site signs with its update: whom it masks with, under which epoch, and from which adapter it starts."""
    digest = site.scopes[GLOBAL_SCOPE].digest()
    return presence_message(federation, graph, graph.listed, epoch=graph.number, digest=digest)


def encode_scopes(plan: Plan, site: Participant) -> dict[str, Slots]:
    """Encode every scope of one site's update; run by the site."""
    if plan.site_level is not None:
        layouts = {scope: state.layout for scope, state in site.scopes.items()}
        metrics = {name: value for each in site.metrics.values() for name, value in each.items()}
        return encode_noised(site.updates, layouts, params=plan.site_level, packing=plan.packing, metrics=metrics)[0]
    return {
        scope: encode_update(
            site.updates[scope],
            state.layout,
            packing=plan.packing,
            value_range=state.value_range,
            weight=site.weight,
            weight_cap=plan.weight_cap,
            metrics=site.metrics.get(scope, {}),
            rng=site.rng,
        )
        for scope, state in site.scopes.items()
    }


def apply_down(federation: Federation, site: Participant, group_key: GroupKey, down: AggregateDown) -> AfterRound:
    """Decrypt and verify the sums, and take the server's step in every scope; run by each site for itself."""
    members = federation.open_scopes(federation.roster.names, federation.names(down.survivors))
    states = {scope: state for scope, state in site.scopes.items() if scope in members}
    summed = decrypt_sum(
        group_key.secret,
        down.sums,
        federation=federation,
        number=down.round,
        survivors=members,
        layouts={scope: state.layout for scope, state in states.items()},
        value_ranges={scope: state.value_range for scope, state in states.items()},
    )
    scopes = apply_sums(site.scopes, summed, federation.plan)
    digests = {scope: state.digest() for scope, state in scopes.items()}
    signed = digest_message(federation.run, down.round + 1, digests)
    entry = federation.roster.entry(site.identity.name)
    verify(entry, CONTEXT_ADAPTER, signed, sign(site.identity, CONTEXT_ADAPTER, signed))
    return AfterRound(scopes, summed, digests)
