"""The protocol as code: one round, all parties in one process, no network.

Steps and their numbers are those of the design (docs/protocol.md). What crosses from one party to another is bytes, and
the coordinator's part of ``run_round`` touches nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.decrypt import apply_mean, decrypt_sum
from fedseek.encode import (
    Float32Vector,
    Float64Vector,
    Slots,
    SummedUpdate,
    UpdateLayout,
    encode_update,
    next_value_range,
    num_ciphertexts,
    unflatten,
)
from fedseek.encrypt import encrypt_update
from fedseek.errors import AdapterDiverged
from fedseek.he.ciphertext import ScopedCiphertexts, ScopedSum
from fedseek.he.keys import SecretKey
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.sealing import SealedKey, open_sealed, seal
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, join_fields, sign, verify
from fedseek.lora.digest import tensors_digest
from fedseek.messages import digest_message
from fedseek.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class ScopeState:
    """What every member of a scope holds between rounds, the same at all of them.

    Attributes:
        layout: names and shapes of the tensors.
        weights: float32, shape (num_values,).
        momentum: of the server step, float64, shape (num_values,).
        value_range: C of the quantiser.
    """

    layout: UpdateLayout
    weights: Float32Vector = field(repr=False)
    momentum: Float64Vector = field(repr=False)
    value_range: float

    def digest(self) -> bytes:
        """What a site signs about these tensors, 32 bytes."""
        return tensors_digest(unflatten(self.weights, self.layout))


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
        bytes_up: its encrypted update.
        bytes_down: the encrypted sums it got.
    """

    scopes: Mapping[str, ScopeState]
    summed: Mapping[str, SummedUpdate] = field(repr=False)
    digests: Mapping[str, bytes]
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, eq=False)
class RoundOutcome:
    """Every site by name, and all that the coordinator carried: envelopes, updates, sums."""

    sites: Mapping[str, AfterRound]
    carried: Sequence[bytes] = field(repr=False)


def run_round(plan: Plan, sites: Sequence[Participant], *, run: str, number: int) -> RoundOutcome:
    """Play round ``number``, from the plan to the applied sum.

    Masks and tags are not in this release: mask keys and their shares (steps 3, 4) will stand before training, mask and
    tag between encode and encrypt, and unmasking (step 6) between the coordinator's sum and the sites' decryption.

    Raises:
        FedseekError: a party did not follow the protocol; the text says which and how.
    """
    members = {site.identity.name: site for site in sites}
    roster, params = Roster.of(site.identity.public() for site in sites), plan.packing.params

    # 1. Plan. Each site signs what it admits: this run of this plan with exactly these sites.
    admitted = join_fields(run.encode(), plan.digest.encode(), roster.digest())
    for name, site in members.items():
        verify(roster.entry(name), CONTEXT_PLAN, admitted, sign(site.identity, CONTEXT_PLAN, admitted))

    # 2. Group key. One site generates the BFV secret key for the epoch (here each round is one) and seals it to each
    #    member with HPKE; the coordinator carries envelopes that it cannot open.
    maker, secret = members[roster.names[0]].identity, SecretKey.generate(params).to_bytes()
    envelopes, keys = {}, {}
    for entry in roster.entries:
        sealed = seal(secret, sender=maker, receiver=entry, roster=roster, run=run, epoch=number)
        envelopes[entry.name] = msgspec.msgpack.encode(sealed)
    for name, site in members.items():
        received = msgspec.msgpack.decode(envelopes[name], type=SealedKey)
        opened = open_sealed(received, receiver=site.identity, roster=roster, run=run, epoch=number)
        keys[name] = SecretKey.from_bytes(params, opened)

    # 5. Train and submit. Training gave the updates. Each site quantises and packs its own, encrypts it, uploads it.
    uploads = {}
    for name, site in members.items():
        uploads[name] = msgspec.msgpack.encode(encrypt_update(keys[name], encode_scopes(plan, site)))

    # The coordinator adds ciphertexts and learns nothing; each scope is summed only over its members.
    layouts = {scope: state.layout for site in sites for scope, state in site.scopes.items()}
    expected = {scope: num_ciphertexts(layout, plan.packing) for scope, layout in layouts.items()}
    aggregate = agg_init(params, expected, max_sites=plan.packing.max_sites)
    for upload in uploads.values():
        agg_update(aggregate, msgspec.msgpack.decode(upload, type=tuple[ScopedCiphertexts, ...]))
    sums = agg_finish(aggregate, min_sites=plan.spec.cohort.min_sites)
    downloads = {
        name: msgspec.msgpack.encode(tuple(each for each in sums if each.scope in site.scopes))
        for name, site in members.items()
    }

    # 7. Apply. Sites decrypt, check how many sites the sum holds, divide, apply, and sign the digest of what they now
    #    hold; a digest that differs stops the run and names the site.
    after: dict[str, AfterRound] = {}
    agreed: dict[str, bytes] = {}
    for name, site in members.items():
        received_sums = msgspec.msgpack.decode(downloads[name], type=tuple[ScopedSum, ...])
        scopes, summed = apply_sums(plan, site, keys[name], received_sums)
        digests = {scope: state.digest() for scope, state in scopes.items()}
        signed = digest_message(run, number, digests)
        verify(roster.entry(name), CONTEXT_ADAPTER, signed, sign(site.identity, CONTEXT_ADAPTER, signed))
        for scope, digest in digests.items():
            if agreed.setdefault(scope, digest) != digest:
                raise AdapterDiverged(f"round {number}: site {name!r} holds other values of {scope!r}")
        after[name] = AfterRound(scopes, summed, digests, len(uploads[name]), len(downloads[name]))
    return RoundOutcome(after, (*envelopes.values(), *uploads.values(), *downloads.values()))


def encode_scopes(plan: Plan, site: Participant) -> dict[str, Slots]:
    """Encode every scope of one site's update; run by the site."""
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


def apply_sums(
    plan: Plan, site: Participant, key: SecretKey, sums: Sequence[ScopedSum]
) -> tuple[dict[str, ScopeState], dict[str, SummedUpdate]]:
    """Decrypt and check the sums, and take the server's step in every scope; run by each site for itself."""
    summed = decrypt_sum(
        key,
        sums,
        layouts={scope: state.layout for scope, state in site.scopes.items()},
        packing=plan.packing,
        value_ranges={scope: state.value_range for scope, state in site.scopes.items()},
        weight_cap=plan.weight_cap,
    )
    scopes = {}
    for scope, state in site.scopes.items():
        weights, momentum = apply_mean(
            state.weights,
            summed[scope].mean,
            state.momentum,
            learning_rate=plan.spec.training.server_learning_rate,
            momentum_factor=plan.spec.training.server_momentum,
        )
        next_range = next_value_range(summed[scope], state.value_range)
        scopes[scope] = ScopeState(state.layout, weights, momentum, next_range)
    return scopes, summed
