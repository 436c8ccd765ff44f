"""Vectors of one masked round of three sites, from the plan to the total mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from fixed import bytes_for, fixed_randomness, site

from fedseek.cohort import Federation, RoundGraph, presence_message, round_graph
from fedseek.deal import (
    HeldShares,
    RoundSecrets,
    advertise,
    deal_shares,
    head_seed,
    mask_private_key,
    open_box,
    pairwise_seed,
)
from fedseek.he.keys import SecretKey
from fedseek.he.params import coeff_modulus
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster, RosterEntry
from fedseek.identity.signing import (
    CONTEXT_ADAPTER,
    CONTEXT_PLAN,
    CONTEXT_PRESENCE,
    CONTEXT_RELEASE,
    sign,
)
from fedseek.mask import mask_slots
from fedseek.messages import RoundKeys, SharesDealt, UnmaskRequest, digest_message, release_message
from fedseek.plan import GLOBAL_SCOPE, Plan, check_plan, parse_spec
from fedseek.reveal import reveal_shares
from fedseek.secagg.stream import Slots, expand
from fedseek.tag import add_tags, check_tags, tag_key
from fedseek.unmask import RoundRecord, check_revealed, rebuild_seeds, total_mask

RUN, NUMBER, EPOCH, NUM_SLOTS = "试运行-1", 3, 1, 8
ADAPTER = bytes_for("adapter", 32)  # digest of what every site starts the round from
SITES = (("北岸银行", "bank"), ("仁济医院", "hospital"), ("harbour-bank", "bank"))


def plan_of_three() -> Plan:
    """Nobody colludes and two sites are enough, so that one of three may vanish. No plan for real sites."""
    document = {
        "name": "vectors",
        "model": {"source": "path:base-model", "sha256": bytes_for("model", 32).hex()},
        "kinds": {"bank": {"labels": ["欺诈", "正常"]}, "hospital": {"labels": ["急诊", "普通"]}},
        "lora": {"target_modules": ["query", "value"]},
        "training": {
            "rounds": 4,
            "steps_per_round": 2,
            "sampling_probability": 0.5,
            "learning_rate": 0.01,
            "head_learning_rate": 0.05,
        },
        "privacy": {"mechanism": "none"},
        "cohort": {"min_sites": 2, "max_sites": 4, "colluders": 0, "min_contributors": 2},
    }
    return check_plan(parse_spec(document))


@dataclass(frozen=True, slots=True)
class Played:
    """Everything about the round, of all parties."""

    federation: Federation
    identities: Mapping[str, SiteIdentity]
    secrets: Mapping[str, RoundSecrets]
    keys: Mapping[str, RoundKeys]
    graph: RoundGraph
    dealt: Mapping[str, SharesDealt]
    held: Mapping[str, Mapping[str, HeldShares]]
    group_key: SecretKey
    tagged: Mapping[str, Mapping[str, Slots]]
    masked: Mapping[str, Mapping[str, Slots]]


def group_key_of(plan: Plan) -> SecretKey:
    """A group key with coefficients from a stream. Enough to derive tag keys from; nothing is encrypted with it."""
    params = plan.packing.params
    drawn = expand(bytes_for("group key"), b"coefficients", params.poly_modulus_degree, coeff_modulus())
    polynomial = SimpleNamespace(data=drawn.tolist().__getitem__)
    return SecretKey(params, SimpleNamespace(data=lambda: polynomial))


def play() -> Played:
    """The round, with fixed randomness."""
    identities = {name: site(name, kind) for name, kind in SITES}
    roster = Roster.of(identity.public() for identity in identities.values())
    federation = Federation.of(RUN, plan_of_three(), roster)
    modulus = federation.plan.packing.params.plain_modulus
    group_key = group_key_of(federation.plan)
    secrets = {}
    for name, _ in SITES:
        secrets[name] = RoundSecrets(
            mask_seed=bytes_for(f"{name}/mask"),
            self_seed=bytes_for(f"{name}/self"),
            share_key=bytes_for(f"{name}/share", 32),
        )
    keys = {name: advertise(secrets[name], federation, NUMBER, identity=identities[name]) for name in roster.names}
    graph = round_graph(federation, NUMBER, roster.names)
    dealt, held = {}, {name: {} for name in roster.names}
    for name in roster.names:
        with fixed_randomness(f"deal/{name}"):
            dealt[name], held[name][name] = deal_shares(
                secrets[name], keys, federation, graph, identity=identities[name]
            )
    for name in roster.names:
        for dealer in graph.neighbours[name]:
            box = dealt[dealer].boxes[name]
            held[name][dealer] = open_box(box, secrets[name], keys[dealer], federation, receiver=keys[name])
    tagged, masked = {}, {}
    for name in roster.names:
        tagged[name] = {}
        for scope in federation.shared_scopes(identities[name].kind):
            slots = expand(bytes_for(f"{name}/slots"), scope.encode(), NUM_SLOTS, 1 << 40)
            slots[:2] = 0
            key = tag_key(group_key, federation, NUMBER, scope)
            tagged[name][scope] = add_tags(slots, key, site=name, modulus=modulus)
        masked[name] = mask_slots(
            tagged[name], secrets[name], keys, federation, graph, participants=roster.names, me=name
        )
    return Played(federation, identities, secrets, keys, graph, dealt, held, group_key, tagged, masked)


def plain(message: msgspec.Struct) -> dict[str, Any]:
    """A message as a JSON object: bytes as hexadecimal digits."""

    def hexed(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        if isinstance(value, dict):
            return {str(key): hexed(each) for key, each in value.items()}
        return [hexed(each) for each in value] if isinstance(value, list | tuple) else value

    return hexed(msgspec.to_builtins(message, builtin_types=(bytes,)))


def round_vectors(played: Played) -> dict[str, Any]:
    """All of ``round.json`` but what is refused."""
    federation, plan = played.federation, played.federation.plan
    return {
        "source": "fedseek/cohort.py, deal.py, mask.py, tag.py, reveal.py, unmask.py",
        "run": RUN,
        "round": NUMBER,
        "epoch": EPOCH,
        "adapter": ADAPTER.hex(),
        "plan": plan.canonical().decode(),
        "plan_digest": plan.digest,
        "roster": federation.roster.canonical_bytes().hex(),
        "roster_digest": federation.roster.digest().hex(),
        "fingerprints": {entry.name: entry.fingerprint() for entry in federation.roster.entries},
        "bound": federation.bound.hex(),
        "modulus": plan.packing.params.plain_modulus,
        "group_key_seed": bytes_for("group key").hex(),
        "coefficient_modulus": coeff_modulus(),
        "threshold": played.graph.threshold,
        "min_survivors": played.graph.min_survivors,
        "sites": [site_vector(played, name) for name in federation.roster.names],
        "pairs": pair_vectors(played),
        "heads": head_vectors(played),
        "tag_keys": [
            {"name": scope, "key": tag_key(played.group_key, federation, NUMBER, scope).hex()}
            for scope in federation.scopes()
        ],
        "graphs": graph_vectors(),
        "endings": [ending(played, gone) for gone in ((), ("仁济医院",), ("北岸银行",))],
        "signed": signed_vectors(played),
    }


def site_vector(played: Played, name: str) -> dict[str, Any]:
    identity, secrets = played.identities[name], played.secrets[name]
    return {
        "name": name,
        "kind": identity.kind,
        "identity": identity.to_bytes().hex(),
        "mask_seed": secrets.mask_seed.hex(),
        "mask_private_key": mask_private_key(secrets.mask_seed).private_bytes_raw().hex(),
        "share_key": secrets.share_key.hex(),
        "self_seed": secrets.self_seed.hex(),
        "neighbours": list(played.graph.neighbours[name]),
        "kin": list(played.graph.kin[name]),
        "keys": plain(played.keys[name]),
        "dealt": plain(played.dealt[name]),
        "own_shares": {secret: share.hex() for secret, share in played.held[name][name].shares.items()},
        "tagged": {scope: slots.tolist() for scope, slots in played.tagged[name].items()},
        "masked": {scope: slots.tolist() for scope, slots in played.masked[name].items()},
    }


def pair_vectors(played: Played) -> list[dict[str, Any]]:
    names = played.federation.roster.names
    return [
        {
            "name": f"{one} and {other}",
            "sites": [one, other],
            "seed": pairwise_seed(
                mask_private_key(played.secrets[one].mask_seed), played.keys[other], played.federation, me=one
            ).hex(),
        }
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    ]


def head_vectors(played: Played) -> list[dict[str, Any]]:
    """Seeds of heads' masks, between sites of a kind."""
    return [
        {
            "name": f"{one} and {other}",
            "sites": [one, other],
            "seed": head_seed(played.secrets[one], played.keys[other], played.federation, me=one).hex(),
        }
        for one, kin in played.graph.kin.items()
        for other in kin
        if one < other
    ]


def graph_vectors() -> list[dict[str, Any]]:
    """A sparse graph needs more sites than the round has: a roster that only its digest stands for."""
    federation = play_roster(64)
    graphs = []
    for listed in (range(64), range(60)):
        names = federation.names(tuple(listed))
        graph = round_graph(federation, NUMBER, names)
        around = {name: federation.positions(found) for name, found in graph.neighbours.items()}
        graphs.append(
            {
                "name": f"{len(names)} of 64 sites",
                "bound": federation.bound.hex(),
                "listed": list(listed),
                "colluders": federation.plan.spec.cohort.colluders,
                "dropout": str(federation.plan.spec.cohort.dropout_fraction),
                "neighbours": [list(around[name]) for name in names],
                "threshold": graph.threshold,
            }
        )
    return graphs


def play_roster(count: int) -> Federation:
    entries = [
        RosterEntry(f"site-{n:03}", "bank", bytes_for(f"sign/{n}", 32), bytes_for(f"seal/{n}", 1216))
        for n in range(count)
    ]
    plan = check_plan(
        plan_of_three().spec.model_copy(
            update={"cohort": plan_of_three().spec.cohort.model_copy(update={"max_sites": count})}
        )
    )
    return Federation.of(RUN, plan, Roster.of(entries))


def asked_for(played: Played, survivors: Sequence[str]) -> UnmaskRequest:
    names = played.federation.roster.names
    message = presence_message(played.federation, played.graph, names, epoch=EPOCH, digest=ADAPTER)
    return UnmaskRequest(
        run=RUN,
        round=NUMBER,
        survivors=played.federation.positions(survivors),
        presence={name: sign(played.identities[name], CONTEXT_PRESENCE, message) for name in survivors},
    )


def ending(played: Played, gone: Sequence[str]) -> dict[str, Any]:
    """One end of the round: who vanished, what the survivors reveal, the mask of their sum."""
    federation, names = played.federation, played.federation.roster.names
    survivors = [name for name in names if name not in gone]
    request = asked_for(played, survivors)
    record = RoundRecord(played.graph, played.keys, played.dealt, participants=names, survivors=survivors)
    revealed = {
        name: check_revealed(
            reveal_shares(
                request,
                played.held[name],
                federation,
                played.graph,
                participants=names,
                vouched=presence_message(federation, played.graph, names, epoch=EPOCH, digest=ADAPTER),
                identity=played.identities[name],
            ),
            record,
            federation,
        )
        for name in survivors
    }
    self_seeds, mask_seeds = rebuild_seeds(revealed, record, federation)
    modulus = federation.plan.packing.params.plain_modulus
    masks, sums = {}, {}
    for scope, members in federation.open_scopes(names, survivors).items():
        mask = np.zeros(NUM_SLOTS, dtype=np.uint64)  # of a head: its masks cancel, or it stays closed
        if scope == GLOBAL_SCOPE:
            mask = total_mask(self_seeds, mask_seeds, record, federation, num_slots=NUM_SLOTS)
        masked = sum((played.masked[name][scope].astype(object) for name in members), np.zeros(NUM_SLOTS, object))
        opened = ((masked - mask) % modulus).astype(np.uint64)
        key = tag_key(played.group_key, federation, NUMBER, scope)
        check_tags(opened, key, survivors=members, modulus=modulus, what=scope)
        masks[scope], sums[scope] = mask.tolist(), opened.tolist()
    return {
        "name": f"{', '.join(gone)} vanished" if gone else "all survived",
        "survivors": survivors,
        "presence": plain(request)["presence"],
        "revealed": [plain(revealed[name]) for name in survivors],
        "mask": masks,
        "sum": sums,
    }


def signed_vectors(played: Played) -> list[dict[str, Any]]:
    """What sites sign besides: plan, digests, release. The message is made from the fields by the reader."""
    name, federation = "北岸银行", played.federation
    digests = {"kind/bank": bytes_for("head", 32), "global": ADAPTER}
    plain_digests = {scope: digest.hex() for scope, digest in digests.items()}
    messages = {
        "plan": (CONTEXT_PLAN, federation.bind(), {}),
        "digests": (CONTEXT_ADAPTER, digest_message(RUN, NUMBER, digests), {"digests": plain_digests}),
        "release": (
            CONTEXT_RELEASE,
            release_message(RUN, digests, "声明".encode()),
            {"digests": plain_digests, "statement": "声明"},
        ),
    }
    return [
        {"name": what, "site": name, **fields, "signature": sign(played.identities[name], context, message).hex()}
        for what, (context, message, fields) in messages.items()
    ]
