"""One masked round at the coordinator: updates are added as they come, then the mask is taken off the sum.

The round is given up, and nothing of it is opened, when too few updates came or too few sites revealed true shares. What
is left behind is one masked sum that nobody can read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedseek.aggregate import Aggregate, agg_finish, agg_init, agg_update
from fedseek.cohort import Federation, RoundGraph, presence_message
from fedseek.errors import AdapterDiverged, CohortTooSmall, Malformed, WrongKey, WrongRound
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PRESENCE, verify
from fedseek.messages import (
    AggregateDown,
    RoundKeys,
    SharesDealt,
    SharesRevealed,
    UnmaskRequest,
    UpdateReply,
    digest_message,
)
from fedseek.plan import GLOBAL_SCOPE
from fedseek.unmask import RoundRecord, check_revealed, unmask_sum

Digests = dict[str, tuple[str, bytes]]


@dataclass(slots=True)
class MaskedRound:
    """A round that is being played.

    Attributes:
        federation: the run.
        number: of the round.
        epoch: of the group key that updates must be encrypted under.
        graph: who masks with whom.
        participants: who was asked, in roster order.
        keys: round keys of the key list.
        dealt: shares dealt for the round, by dealer.
        aggregate: the running sum.
        digests: by scope, what the first site signed for, and which site that was.
        presence: by site whose update is in the sum, its signature over the participants.
        revealed: by site, the true shares it revealed.
        adding_seconds: spent on the sum so far.
    """

    federation: Federation
    number: int
    epoch: int
    graph: RoundGraph
    participants: tuple[str, ...]
    keys: Mapping[str, RoundKeys] = field(repr=False)
    dealt: Mapping[str, SharesDealt] = field(repr=False)
    aggregate: Aggregate = field(repr=False)
    digests: Digests = field(default_factory=dict, repr=False)
    presence: dict[str, bytes] = field(default_factory=dict, repr=False)
    revealed: dict[str, SharesRevealed] = field(default_factory=dict, repr=False)
    adding_seconds: float = 0.0

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose updates are in the sum, in roster order."""
        return tuple(name for name in self.participants if name in self.presence)

    @property
    def vanished(self) -> tuple[str, ...]:
        """Participants whose updates did not come, in roster order."""
        return tuple(name for name in self.participants if name not in self.presence)

    @property
    def has_enough(self) -> bool:
        """Whether sites may be asked to reveal shares at all."""
        return len(self.presence) >= self.graph.min_survivors

    @property
    def needs_unmasking(self) -> bool:
        """Whether the adapter is summed in this round; heads need none."""
        return GLOBAL_SCOPE in self.aggregate.expected

    @property
    def open_scopes(self) -> tuple[str, ...]:
        """Scopes whose sum can be read once the adapter is unmasked: all survived who took part in them."""
        scopes = self.federation.open_scopes(self.participants, self.survivors)
        return tuple(scope for scope in scopes if scope in self.aggregate.expected)

    @property
    def record(self) -> RoundRecord:
        """The round as unmasking wants it."""
        return RoundRecord(self.graph, self.keys, self.dealt, self.participants, self.survivors)


def open_sum(
    federation: Federation, ciphertexts: Mapping[str, int], participants: Sequence[str], *, is_closing: bool
) -> Aggregate:
    """An empty sum for a round. In the closing round only heads are sent: they carry the final metrics."""
    sent = federation.summed_scopes(participants)
    expected = {
        scope: count
        for scope, count in ciphertexts.items()
        if scope in sent and not (is_closing and scope == GLOBAL_SCOPE)
    }
    packing = federation.plan.packing
    return agg_init(packing.params, expected, max_sites=packing.max_sites)


def check_update(masked: MaskedRound, reply: UpdateReply) -> None:
    """Check all of an update but its ciphertexts, and what it brings for rounds to come.

    Raises:
        WrongRound: for another round.
        WrongKey: under another epoch's key, or a signature is not the site's.
        AdapterDiverged: the site started from other tensors than the others.
        Malformed: other scopes than the site's.
    """
    site, federation = reply.site, masked.federation
    if reply.round != masked.number:
        raise WrongRound(f"site {site!r} answered for round {reply.round}, wanted {masked.number}")
    if reply.epoch != masked.epoch:
        raise WrongKey(
            f"update of site {site!r}: encrypted under the key of epoch {reply.epoch}, wanted epoch {masked.epoch}",
            hint="it would make the whole sum unreadable",
        )
    entry = federation.roster.entry(site)
    verify(entry, CONTEXT_ADAPTER, digest_message(reply.run, reply.round, reply.digests), reply.signature)
    check_digests(masked.digests, site, reply.digests, federation, where=f"round {masked.number}")
    vouched = presence_message(
        federation, masked.graph, masked.participants, epoch=reply.epoch, digest=reply.digests[GLOBAL_SCOPE]
    )
    verify(entry, CONTEXT_PRESENCE, vouched, reply.presence)
    wanted = [scope for scope in federation.shared_scopes(entry.kind) if scope in masked.aggregate.expected]
    got = [scoped.scope for scoped in reply.update]
    if sorted(got) != sorted(wanted):
        raise Malformed(f"site {site!r} sent scopes {got}, wanted {wanted}, each once")


def add_update(masked: MaskedRound, reply: UpdateReply) -> None:
    """Add an update that passed ``check_update``. All or nothing.

    Raises:
        Malformed: a ciphertext does not parse, or their number is wrong.
    """
    started = time.perf_counter()
    if reply.update:  # in the closing round, a site whose head stays at home has nothing to send
        agg_update(masked.aggregate, reply.update)
    masked.adding_seconds += time.perf_counter() - started
    keep_digests(masked.digests, reply.site, reply.digests)
    masked.presence[reply.site] = reply.presence


def unmask_request(masked: MaskedRound, site: str, survivors: Sequence[int]) -> UnmaskRequest:
    """What a survivor is asked; ``survivors`` are the positions of all of them."""
    around = [name for name in masked.graph.neighbours[site] if name in masked.presence]
    return UnmaskRequest(
        run=masked.federation.run,
        round=masked.number,
        survivors=tuple(survivors),
        presence={name: masked.presence[name] for name in around},
    )


def take_revealed(masked: MaskedRound, reply: SharesRevealed) -> tuple[str, ...]:
    """Keep the true shares of what a site revealed.

    Returns:
        Dealers of whom it revealed a false share: either of the two lied.

    Raises:
        WrongRound: for another round.
        WrongKey, Malformed: as ``check_revealed``.
    """
    if reply.round != masked.number:
        raise WrongRound(f"site {reply.site!r} revealed shares of round {reply.round}, wanted {masked.number}")
    kept = check_revealed(reply, masked.record, masked.federation)
    masked.revealed[reply.site] = kept
    false = (set(reply.self_masks) - set(kept.self_masks)) | (set(reply.mask_keys) - set(kept.mask_keys))
    return tuple(sorted(false))


def finish_round(masked: MaskedRound) -> AggregateDown:
    """Take the mask off and write the sums of the open scopes out.

    Raises:
        CohortTooSmall: too few updates, or too few true shares of a secret.
        Malformed: the shares of a dealer do not make the secret it vouched for.
        WrongKey: a participant's mask key is of low order.
    """
    graph = masked.graph
    if not masked.has_enough:
        raise CohortTooSmall(
            f"round {masked.number}: {len(masked.presence)} of {len(masked.participants)} participants sent an update, "
            f"wanted at least {graph.min_survivors}"
        )
    if masked.needs_unmasking:
        unmask_sum(masked.aggregate, masked.revealed, masked.record, masked.federation)
    floor = masked.federation.plan.spec.cohort.min_contributors
    sums = agg_finish(masked.aggregate, min_sites=floor, scopes=masked.open_scopes)
    survivors = masked.federation.positions(masked.survivors)
    return AggregateDown(round=masked.number, epoch=masked.epoch, survivors=survivors, sums=sums)


def check_digests(
    agreed: Digests, site: str, digests: Mapping[str, bytes], federation: Federation, *, where: str
) -> None:
    """Every site of a scope must hold the same tensors (docs/protocol.md, apply).

    Raises:
        Malformed: digests of other scopes than the site shares.
        AdapterDiverged: of other tensors than the site's that answered first; names both.
    """
    wanted = set(federation.shared_scopes(federation.roster.entry(site).kind))
    if set(digests) != wanted:
        raise Malformed(f"site {site!r} signed digests of {sorted(digests)}, wanted {sorted(wanted)}")
    for scope, digest in digests.items():
        first, common = agreed.get(scope, (site, digest))
        if digest != common:
            raise AdapterDiverged(
                f"{where}: site {site!r} holds other values of {scope!r} than site {first!r}",
                hint="the run stops before they are mixed; compare versions and hardware of the two sites",
            )


def keep_digests(agreed: Digests, site: str, digests: Mapping[str, bytes]) -> None:
    """What the next sites are compared with; only of a reply that was taken whole."""
    for scope, digest in digests.items():
        agreed.setdefault(scope, (site, digest))
