"""What the coordinator asks: one request for each node of an exchange, in roster order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from fedseek.messages import PlanOffer, ReleaseRequest, Request, RoundRequest
from fedseek_server.rounds import MaskedRound, unmask_request
from fedseek_server.state import RunState

KEYS_AHEAD = 2  # an update brings keys for the round after the next, so that is where a returner can enter


def plan_offers(
    state: RunState, nodes: Sequence[int], number: int, *, key_maker: int | None = None
) -> dict[int, Request]:
    """The plan, from round ``number`` on, to these nodes; ``key_maker`` also makes the first group key."""
    federation = state.federation
    offer = PlanOffer(
        run=federation.run,
        round=number,
        plan=federation.plan.canonical(),
        roster=federation.roster.canonical_bytes(),
        make_key=False,
        continues=state.continues,
    )
    return {node: replace(offer, make_key=node == key_maker) for node in nodes}


def share_requests(state: RunState, connected: Mapping[str, int], number: int) -> dict[int, Request]:
    """The key list of a round, to all on it who are there."""
    pipeline = state.pipeline
    return {
        node: pipeline.share_request(site, number)
        for site, node in connected.items()
        if pipeline.is_listed(site, number)
    }


def round_requests(state: RunState, connected: Mapping[str, int], number: int) -> dict[int, Request]:
    """Updates from those who take part; from the others shares, if they enter at the next round."""
    masked = state.masked
    if masked is None:
        return share_requests(state, connected, number + 1)
    participants = state.federation.positions(masked.participants)
    updates: dict[int, Request] = {
        connected[site]: _round_request(state, masked, site, participants) for site in masked.participants
    }
    others = {site: node for site, node in connected.items() if node not in updates}
    return updates | share_requests(state, others, number + 1)


def unmask_requests(state: RunState, nodes: Sequence[int], number: int) -> dict[int, Request]:
    """Shares from survivors, if the sum may be opened; and the plan to all who have no keys for the round to enter at."""
    masked, connected = state.masked, state.admissions.connected(nodes)
    requests: dict[int, Request] = {}
    if masked is not None and masked.needs_unmasking and masked.has_enough:
        positions = state.federation.positions(masked.survivors)
        for site in masked.survivors:
            if site in connected:
                requests[connected[site]] = unmask_request(masked, site, positions)
    entry = number + KEYS_AHEAD
    if entry > state.closing:
        return requests
    returning = [node for site, node in connected.items() if not state.pipeline.has_keys(site, entry)]
    return requests | plan_offers(state, [*returning, *state.admissions.strangers(nodes)], entry)


def release_requests(state: RunState, connected: Mapping[str, int], senders: Collection[str]) -> dict[int, Request]:
    """What each site has not applied yet, and the final metrics, to those who have not approved yet.

    The same site is asked the same whenever it is asked. ``senders`` send the adapter.
    """
    history, metrics = state.history, state.history.read(state.closing)
    return {
        node: ReleaseRequest(
            run=state.federation.run,
            previous=history.missed(site, before=state.closing),
            metrics=history.for_site(metrics, site),
            envelopes=state.envelopes.for_site(site),
            send_adapter=site in senders,
        )
        for site, node in connected.items()
        if site not in state.approvals
    }


def _round_request(state: RunState, masked: MaskedRound, site: str, participants: tuple[int, ...]) -> RoundRequest:
    number, pipeline = masked.number, state.pipeline
    next_listed, next_keys = pipeline.key_list(site, number + 1)
    return RoundRequest(
        run=state.federation.run,
        round=number,
        previous=state.history.missed(site, before=number),
        epoch=masked.epoch,
        envelopes=state.envelopes.for_site(site),
        participants=participants,
        boxes=pipeline.boxes(site, number, masked.participants),
        next_listed=next_listed,
        next_keys=next_keys,
    )
