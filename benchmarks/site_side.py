"""The sites' side of the sum under one lock and under both, with the library's own code, and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
from adding_side import EPOCH, ROUND, RUN, start_both, start_outer
from party import Party, peak_rss_mb
from workload import KIND, RECEIVERS, VALUE_RANGE, WEIGHT_CAP, Stopwatch, Truth, Workload

from fedseek.cohort import Federation, RoundGraph, presence_message, round_graph
from fedseek.deal import HeldShares, RoundSecrets, advertise, check_keys, deal_shares, draw_secrets, open_box
from fedseek.decrypt import decrypt_sum
from fedseek.encode import Slots, decode_sum, num_ciphertexts, num_slots, quantiser_bound
from fedseek.encrypt import encrypt_update
from fedseek.errors import Malformed, Tampered
from fedseek.he.ciphertext import ScopedCiphertexts, ScopedSum
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_PRESENCE, SIGNATURE_BYTES, sign
from fedseek.mask import mask_slots
from fedseek.messages import (
    AggregateDown,
    RoundKeys,
    SharesSealed,
    UpdateReply,
    decode_request,
    encode_message,
)
from fedseek.plan import GLOBAL_SCOPE, head_scope
from fedseek.reveal import reveal_shares
from fedseek.secagg.mac import NUM_TAGS
from fedseek.tag import add_tags, tag_key

# Stages of a site's round; the first row is the outer lock.
OUTER_UP = ("encode", "encrypt")
INNER_UP = ("keys", "deal", "open", "tag", "mask", "sign")
INNER_DOWN = ("reveal",)
HEAD = head_scope(KIND)
ADAPTER_DIGEST = bytes(32)  # of the adapter a round starts from: no part of the sum


def measure_outer(workload: Workload) -> dict[str, object]:
    """Homomorphic encryption alone: no masks, no tags."""
    layout, packing = workload.layout, workload.packing
    key = SecretKey.generate(packing.params)
    watch, truth, up_bytes = Stopwatch(), Truth.empty(workload), 0
    with Party(start_outer, workload.bits, workload.max_sites, num_ciphertexts(layout, packing)) as adding:
        for site in workload.present:
            vector, weight = workload.update(site)
            with watch("encode", site):
                slots = workload.encode(vector, weight)
            with watch("encrypt", site):
                update = encrypt_update(key, {layout.scope: slots})
            message = msgspec.msgpack.encode(update)
            adding.ask("update", message)
            up_bytes = max(up_bytes, len(message))
            truth.add(vector, weight, slots)
        answer = adding.ask("finish")
    for site in workload.present[:RECEIVERS]:
        with watch("decrypt", site):
            (scoped,) = msgspec.msgpack.decode(answer, type=tuple[ScopedSum, ...])
            slots = decrypt_slots(key, scoped.ciphertexts)
            decode_sum(slots, layout, packing=packing, value_range=VALUE_RANGE, weight_cap=WEIGHT_CAP)
    return {
        **_measured(workload, watch, adding, up_bytes=up_bytes, down_bytes=len(answer)),
        **_judged(slots, truth, workload),
    }


@dataclass(slots=True)
class SiteInRound:
    """What one site holds of the round."""

    number: int
    identity: SiteIdentity
    secrets: RoundSecrets
    keys: RoundKeys
    peers: dict[str, RoundKeys] = field(default_factory=dict, repr=False)
    held: dict[str, HeldShares] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.identity.name


@dataclass(frozen=True, slots=True)
class BothLocks:
    """The round that is measured, and what it has cost so far; ``share_up`` and ``share_down`` are bytes by site."""

    workload: Workload
    federation: Federation
    graph: RoundGraph
    group_key: SecretKey = field(repr=False)
    adding: Party
    watch: Stopwatch
    truth: Truth = field(repr=False)
    share_up: Counter[int] = field(default_factory=Counter, repr=False)
    share_down: Counter[int] = field(default_factory=Counter, repr=False)
    update_bytes: Counter[int] = field(default_factory=Counter, repr=False)


def measure_both(workload: Workload) -> dict[str, object]:
    """The round with both locks; sites that vanish deal shares first. One update is in memory at a time."""
    plan = workload.plan()
    identities = [SiteIdentity.generate(f"支行-{number:04d}", KIND) for number in range(workload.sites)]
    federation = Federation.of(RUN, plan, Roster.of(identity.public() for identity in identities))
    graph = round_graph(federation, ROUND, federation.roster.names)
    group_key = SecretKey.generate(plan.packing.params)  # of an epoch, not of a round: not timed
    start = (plan.canonical(), federation.roster.canonical_bytes(), num_ciphertexts(workload.layout, plan.packing))
    with Party(start_both, *start) as adding:
        locks = BothLocks(workload, federation, graph, group_key, adding, Stopwatch(), Truth.empty(workload))
        sites = [make_keys(locks, number, identity) for number, identity in enumerate(identities)]
        for site in sites:
            deal(locks, site)
        present = [sites[number] for number in workload.present]
        for site in present:
            submit(locks, site)
        for site in present:
            reveal(locks, site)
        adding.ask("unmask")
        answer = adding.ask("finish")
    slots, tags_fit = receive(locks, answer)
    return {**_summary(locks, answer), **_judged(slots, locks.truth, workload), "tags_fit": tags_fit}


def make_keys(locks: BothLocks, number: int, identity: SiteIdentity) -> SiteInRound:
    """Fresh keys for the round."""
    with locks.watch("keys", number):
        secrets = draw_secrets()
        keys = advertise(secrets, locks.federation, ROUND, identity=identity)
    message = msgspec.msgpack.encode(keys)
    locks.adding.ask("keys", message)
    locks.share_up[number] += len(message)
    return SiteInRound(number, identity, secrets, keys)


def deal(locks: BothLocks, site: SiteInRound) -> None:
    """Check the keys of neighbours and kin, work the graph out, deal shares. All sites are of one kind: the most kin."""
    asked = locks.adding.ask("share_request", site.name.encode())
    with locks.watch("keys", site.number):
        request = decode_request(asked)
        site.peers = {keys.site: keys for keys in request.keys}
        for keys in request.keys:
            check_keys(keys, locks.federation, ROUND)
        graph = round_graph(locks.federation, ROUND, locks.federation.names(request.listed))
    with locks.watch("deal", site.number):
        shares, own = deal_shares(site.secrets, site.peers, locks.federation, graph, identity=site.identity)
    site.held[site.name] = own
    message = encode_message(SharesSealed(run=RUN, site=site.name, shares=shares))
    locks.adding.ask("shares", message)
    locks.share_up[site.number] += len(message)
    locks.share_down[site.number] += len(asked)


def submit(locks: BothLocks, site: SiteInRound) -> None:
    """Open the boxes, then encode, tag, mask, encrypt and send one update.

    A head of one ciphertext is masked as well, as in a run; it is not sent, so that bytes are those of one vector.
    """
    number, watch, federation = site.number, locks.watch, locks.federation
    asked = locks.adding.ask("round_request", site.name.encode())
    with watch("open", number):
        request = decode_request(asked)
        for dealer, box in request.boxes.items():
            site.held[dealer] = open_box(box, site.secrets, site.peers[dealer], federation, receiver=site.keys)
    vector, weight = locks.workload.update(number)
    with watch("encode", number):
        slots = locks.workload.encode(vector, weight)
    with watch("tag", number):
        key = tag_key(locks.group_key, federation, ROUND, GLOBAL_SCOPE)
        tagged = add_tags(slots, key, site=site.name, modulus=locks.group_key.params.plain_modulus)
    with watch("mask", number):
        head = np.zeros(locks.group_key.params.slot_count, dtype=np.uint64)
        scopes, listed = {GLOBAL_SCOPE: tagged, HEAD: head}, locks.graph.listed
        masked = mask_slots(
            scopes, site.secrets, site.peers, federation, locks.graph, participants=listed, me=site.name
        )
        del masked[HEAD]
    with watch("encrypt", number):
        update = encrypt_update(locks.group_key, masked)
    with watch("sign", number):
        presence = sign(site.identity, CONTEXT_PRESENCE, vouched_by(locks))
    message = encode_message(update_reply(site, update, presence))
    locks.adding.ask("update", message)
    locks.update_bytes[number] = len(message) - len(presence)
    locks.share_up[number] += len(presence)
    locks.share_down[number] += len(asked) - len(
        encode_message(msgspec.structs.replace(request, participants=(), boxes={}))
    )
    locks.truth.add(vector, weight, slots)


def vouched_by(locks: BothLocks) -> bytes:
    """What every site signs as its presence."""
    graph = locks.graph
    return presence_message(locks.federation, graph, graph.listed, epoch=EPOCH, digest=ADAPTER_DIGEST)


def update_reply(site: SiteInRound, update: tuple[ScopedCiphertexts, ...], presence: bytes) -> UpdateReply:
    """The message with the update. Shares and keys of coming rounds go beside it here, and are counted as if in it."""
    return UpdateReply(
        run=RUN,
        site=site.name,
        round=ROUND,
        epoch=EPOCH,
        digests={},
        signature=bytes(SIGNATURE_BYTES),  # of the adapter: no part of the sum
        presence=presence,
        update=update,
        shares=None,
        keys=None,
    )


def reveal(locks: BothLocks, site: SiteInRound) -> None:
    """One share for each neighbour."""
    asked = locks.adding.ask("unmask_request", site.name.encode())
    listed = locks.graph.listed
    with locks.watch("reveal", site.number):
        request = decode_request(asked)
        revealed = reveal_shares(
            request,
            site.held,
            locks.federation,
            locks.graph,
            participants=listed,
            vouched=vouched_by(locks),
            identity=site.identity,
        )
    message = encode_message(revealed)
    locks.adding.ask("reveal", message)
    locks.share_up[site.number] += len(message)
    locks.share_down[site.number] += len(asked)


def receive(locks: BothLocks, answer: bytes) -> tuple[Slots, bool]:
    """Decrypt, verify and decode as a site does; returns the slots, and whether the tags fit."""
    tags_fit, federation = True, locks.federation
    for number in locks.workload.present[:RECEIVERS]:
        with locks.watch("decrypt", number):
            down = msgspec.msgpack.decode(answer, type=AggregateDown)
            try:
                decrypt_sum(
                    locks.group_key,
                    down.sums,
                    federation=federation,
                    number=ROUND,
                    survivors=federation.open_scopes(locks.graph.listed, federation.names(down.survivors)),
                    layouts={GLOBAL_SCOPE: locks.workload.layout},
                    value_ranges={GLOBAL_SCOPE: VALUE_RANGE},
                )
            except Tampered:
                tags_fit = False
    return decrypt_slots(locks.group_key, down.sums[0].ciphertexts), tags_fit


def _summary(locks: BothLocks, answer: bytes) -> dict[str, object]:
    present, watch, graph = locks.workload.present, locks.watch, locks.graph
    stages = OUTER_UP + INNER_UP + INNER_DOWN
    share_up, share_down = (
        round(float(np.median([count[number] for number in present]))) for count in (locks.share_up, locks.share_down)
    )
    outer_up = max(locks.update_bytes.values())
    received = watch.median("decrypt", sites=present[:RECEIVERS])
    return {
        **_measured(
            locks.workload, watch, locks.adding, up_bytes=outer_up + share_up, down_bytes=len(answer) + share_down
        ),
        "site_crypto_s": round(watch.median(*stages, sites=present) + received, 4),
        "inner_lock_s": round(watch.median(*INNER_UP, *INNER_DOWN, sites=present), 4),
        **{f"{stage}_s": round(watch.median(stage, sites=present), 4) for stage in stages},
        "courier_s_per_site": round(_courier_seconds(locks.adding) / locks.workload.sites, 4),
        "share_bytes": share_up + share_down,
        "share_bytes_up": share_up,
        "share_bytes_down": share_down,
        "inner_lock_overhead": round((share_up + share_down) / outer_up, 5),
        "degree": max(len(around) for around in graph.neighbours.values()),
        "threshold": graph.threshold,
        "min_survivors": graph.min_survivors,
        "survivors": len(present),
    }


def _courier_seconds(adding: Party) -> float:
    """What the coordinator spends on the inner lock before it unmasks: checks, and messages made for each site."""
    steps = ("keys", "share_request", "shares", "round_request", "unmask_request")
    return sum(sum(adding.seconds[step]) for step in steps)


def _measured(
    workload: Workload, watch: Stopwatch, adding: Party, *, up_bytes: int, down_bytes: int
) -> dict[str, object]:
    present = workload.present
    up = [stage for stage in OUTER_UP + INNER_UP if stage in watch.seconds]
    down = watch.median("decrypt", sites=present[:RECEIVERS])
    return {
        "digits_per_slot": workload.packing.digits_per_slot,
        "up_bytes_per_value": round(up_bytes / workload.values, 4),
        "down_bytes_per_value": round(down_bytes / workload.values, 4),
        "up_vs_float32": round(up_bytes / (4 * workload.values), 3),
        "down_vs_float32": round(down_bytes / (4 * workload.values), 3),
        "encode_encrypt_s": round(watch.median(*OUTER_UP, sites=present), 4),
        "site_up_s": round(watch.median(*up, sites=present), 4),
        "site_down_s": round(watch.median(*INNER_DOWN, sites=present) + down, 4),
        "add_s_per_site": round(float(np.median(adding.seconds["update"])), 4),
        "unmask_s": round(sum(adding.seconds["reveal"]) + sum(adding.seconds["unmask"]), 4),
        "finish_s": round(adding.seconds["finish"][0], 4),
        "decrypt_decode_s": round(down, 4),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "server_idle_rss_mb": round(adding.idle_mb, 1),
        "server_peak_rss_mb": round(adding.peak_mb, 1),
    }


def _judged(slots: Slots, truth: Truth, workload: Workload) -> Mapping[str, object]:
    """The decrypted slots against the integer sum, and the decoded mean against the mean in float64."""
    packing, content = workload.packing, slice(NUM_TAGS, num_slots(workload.layout, workload.packing))
    exact = bool((slots[content] == truth.slots[content]).all())
    bound = quantiser_bound(
        packing,
        value_range=VALUE_RANGE,
        contributors=len(workload.present),
        weight=truth.weight,
        weight_cap=WEIGHT_CAP,
    )
    try:
        summed = decode_sum(slots, workload.layout, packing=packing, value_range=VALUE_RANGE, weight_cap=WEIGHT_CAP)
    except Malformed:
        return {"exact": False, "max_error": None, "quantiser_bound": bound, "within_bound": False}
    error = truth.error(summed.mean)
    return {
        "exact": exact and summed.weight == truth.weight,
        "max_error": error,
        "quantiser_bound": bound,
        "within_bound": error <= bound,
    }
