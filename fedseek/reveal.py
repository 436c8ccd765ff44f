"""Reveal: a site's answer when the coordinator says whose updates arrived. Run by a site, once a round.

For each neighbour it gives its share of the self mask, if that neighbour's update is in the sum, or its share of the
mask key, if it is not; never both. What that, the threshold and the checks below prove together, and what they do not:
docs/adr/0011 and ``fedseek.secagg.graph``.

Source: K. Bonawitz et al., CCS 2017, figure 4, round 4 (Unmasking). Its consistency check (round 3) is replaced by the
threshold and by ``presence``, a signature that rides on every update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedseek.cohort import Federation, RoundGraph, participants_message
from fedseek.deal import HeldShares
from fedseek.errors import CohortTooSmall, WrongRound
from fedseek.identity.signing import CONTEXT_PRESENCE, CONTEXT_UNMASK, sign, verify
from fedseek.messages import MASK_KEY, SELF_MASK, SharesRevealed, UnmaskRequest

if TYPE_CHECKING:  # the coordinator loads this module and must not load private identities
    from fedseek.identity.keys import SiteIdentity


def reveal_shares(
    request: UnmaskRequest,
    held: Mapping[str, HeldShares],
    federation: Federation,
    graph: RoundGraph,
    *,
    participants: Sequence[str],
    vouched: bytes,
    identity: SiteIdentity,
) -> SharesRevealed:
    """Answer one announcement of survivors. The caller sees to it that a round gets one answer.

    Args:
        request: from the coordinator, untrusted.
        held: shares this site holds, by dealer: of every neighbour among the participants, and its own.
        federation: the run.
        graph: of the round.
        participants: whom this site masked with.
        vouched: what this site signed as its presence; its neighbours must have signed the same.
        identity: of this site, which must have sent an update of the round.

    Raises:
        Malformed, WrongRound: survivors that this site did not mask with, or a set without this site.
        CohortTooSmall: fewer survivors than the round needs, or fewer than the threshold in this site's neighbourhood:
            the sum would say too much.
        WrongKey: a neighbour that is said to have survived did not vouch for the same participants, epoch and adapter.
    """
    survivors = federation.names(request.survivors)
    _check_survivors(
        request, survivors, federation, graph, participants=participants, vouched=vouched, me=identity.name
    )
    self_masks = {dealer: held[dealer].shares[SELF_MASK] for dealer in held if dealer in survivors}
    mask_keys = {dealer: held[dealer].shares[MASK_KEY] for dealer in held if dealer not in survivors}
    message = revealed_message(federation, graph.number, participants, survivors, self_masks, mask_keys)
    return SharesRevealed(
        run=federation.run,
        site=identity.name,
        round=graph.number,
        self_masks=self_masks,
        mask_keys=mask_keys,
        signature=sign(identity, CONTEXT_UNMASK, message),
    )


def revealed_message(
    federation: Federation,
    number: int,
    participants: Sequence[str],
    survivors: Sequence[str],
    self_masks: Mapping[str, bytes],
    mask_keys: Mapping[str, bytes],
) -> bytes:
    """What a site signs when it reveals shares: for whom it took the survivors to be, and what it gave."""
    fields = [
        participants_message(federation, number, participants),
        participants_message(federation, number, survivors),
    ]
    for dealer in sorted(self_masks):
        fields += [b"self", dealer.encode(), self_masks[dealer]]
    for dealer in sorted(mask_keys):
        fields += [b"mask", dealer.encode(), mask_keys[dealer]]
    return federation.bind_round(number, *fields)


def _check_survivors(
    request: UnmaskRequest,
    survivors: Sequence[str],
    federation: Federation,
    graph: RoundGraph,
    *,
    participants: Sequence[str],
    vouched: bytes,
    me: str,
) -> None:
    if request.round != graph.number:
        raise WrongRound(f"unmasking: got round {request.round}, this site masked for round {graph.number}")
    strangers = sorted(set(survivors) - set(participants))
    if strangers or me not in survivors:
        raise WrongRound(
            f"round {graph.number}: the survivors announced "
            + (f"hold {', '.join(strangers)}, with whom this site did not mask" if strangers else "lack this site"),
            hint="nothing was revealed",
        )
    if len(survivors) < graph.min_survivors:
        raise CohortTooSmall(
            f"round {graph.number}: {len(survivors)} sites survived, wanted at least {graph.min_survivors} "
            f"of {len(graph.listed)}",
            hint="nothing was revealed; the round is given up and the next one may go on",
        )
    # Against lists told site by site; the bound in fedseek/secagg/graph.py counts on it (docs/adr/0011).
    nearby = len(set(graph.holders(me)) & set(survivors))
    if nearby < graph.threshold:
        raise CohortTooSmall(
            f"round {graph.number}: {nearby} sites of this site's neighbourhood survived, wanted at least "
            f"{graph.threshold} of {len(graph.holders(me))}",
            hint="nothing was revealed; the round is given up and the next one may go on",
        )
    for name in graph.neighbours[me]:
        if name in survivors:
            verify(federation.roster.entry(name), CONTEXT_PRESENCE, vouched, request.presence.get(name, b""))
