"""What the coordinator is answered: every reply is checked in full before any of it is kept."""

from __future__ import annotations

from collections.abc import Sequence

from fedseek.errors import FedseekError, Malformed, PlanRefused, SiteRefused, WrongRound
from fedseek.identity.signing import CONTEXT_RELEASE, verify
from fedseek.messages import (
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    Refused,
    ReleaseApproved,
    ReleaseRequest,
    Reply,
    Request,
    RoundRequest,
    ShareRequest,
    SharesRevealed,
    SharesSealed,
    UnmaskRequest,
    UpdateReply,
    release_message,
    reply_limit,
)
from fedseek_server.requests import KEYS_AHEAD
from fedseek_server.rounds import add_update, check_digests, check_update, keep_digests, take_revealed
from fedseek_server.state import RunState

SETUP_REPLY_BYTES = 64 << 20  # admissions and sealed keys: 1024 sites x 35 KB envelopes
SHARES_REPLY_BYTES = 4 << 20  # shares dealt or revealed: 1024 sites x 1 KB, with room


def largest_reply(state: RunState, asked: Request) -> int:
    """The most that a site has reason to answer this request with; bytes."""
    if isinstance(asked, PlanOffer | KeyRequest):
        return SETUP_REPLY_BYTES
    if isinstance(asked, ShareRequest | UnmaskRequest):
        return SHARES_REPLY_BYTES
    sizes = state.admissions.sizes.values()
    # fresh ciphertexts have 8 bytes a slot; 16 leaves room
    slot_bytes = 16 * state.federation.plan.packing.params.slot_count
    update = reply_limit(sum(size.ciphertexts for size in sizes), slot_bytes)
    # a released adapter travels as float32, lora_A beside lora_B
    return update + 16 * sum(size.num_values for size in sizes)


def take_reply(state: RunState, node: int, asked: Request, reply: Reply, *, nodes: Sequence[int], now: float) -> None:
    """Check a reply against what was asked, and keep it. A reply that is refused changes nothing.

    Args:
        state: of the run; changed in place.
        node: that answered.
        asked: what it was asked.
        reply: what it answered, parsed and of this run.
        nodes: that are there now.
        now: Unix time in seconds, when the nodes were looked at.

    Raises:
        MessageError, CustodyError: it is not what was asked, or not from whom it should be.
        WrongModel, AdapterDiverged: sites hold different models or adapters.
    """
    match asked, reply:
        case PlanOffer(), PlanAdmitted():
            _take_admission(state, node, asked, reply, nodes=nodes, now=now)
        case KeyRequest(), KeysSealed():
            state.envelopes.check(reply.site, reply.group_key, asked.epoch)
            state.envelopes.take(reply.group_key, now=now)
        case ShareRequest(), SharesSealed():
            state.pipeline.check_shares(reply.site, asked.round, reply.shares)
            state.pipeline.keep_shares(reply.site, reply.shares)
        case RoundRequest(), UpdateReply():
            _take_update(state, reply)
        case UnmaskRequest(), SharesRevealed():
            _take_revealed(state, reply)
        case ReleaseRequest(), ReleaseApproved():
            _take_approval(state, reply)
        case _:
            raise WrongRound(f"site {reply.site!r} answered a {type(asked).__name__} with {type(reply).__name__}")


def refusal(reply: Refused) -> FedseekError:
    """A site's "no" as an error of this side: by which rule, and with the exit code of its family."""
    if reply.code == PlanRefused.__name__:
        return PlanRefused(reply.site, f"{reply.rule} ({reply.code})", hint="the site's own log says more")
    return SiteRefused(reply.site, reply.code, reply.rule)


def _take_admission(
    state: RunState, node: int, offer: PlanOffer, reply: PlanAdmitted, *, nodes: Sequence[int], now: float
) -> None:
    state.admissions.check(node, reply, offer.round, nodes)
    state.pipeline.check_keys(reply.site, (offer.round, offer.round + 1), reply.keys)
    if (reply.group_key is not None) != offer.make_key:
        raise Malformed(f"site {reply.site!r} {'made no' if offer.make_key else 'was not asked for a'} group key")
    if reply.group_key is not None:
        state.envelopes.check(reply.site, reply.group_key, 0)
        state.envelopes.take(reply.group_key, now=now)
    state.admissions.admit(node, reply)
    state.pipeline.keep_keys(reply.keys)
    if state.continues is not None:
        state.history.contributors.update(state.federation.names(reply.contributors))


def _take_update(state: RunState, reply: UpdateReply) -> None:
    """Adding, which is all or nothing, goes last of what may fail."""
    site, masked = reply.site, state.playing
    check_update(masked, reply)
    state.pipeline.check_shares(site, masked.number + 1, reply.shares)
    entry = masked.number + KEYS_AHEAD
    wanted = [entry] if entry <= state.closing else []
    keys = [] if reply.keys is None else [reply.keys]
    if len(keys) != len(wanted):
        raise Malformed(f"update of site {site!r}: brings keys of {len(keys)} rounds to come, wanted {len(wanted)}")
    state.pipeline.check_keys(site, wanted, keys)
    add_update(masked, reply)
    state.pipeline.keep_keys(keys)
    if reply.shares is not None:
        state.pipeline.keep_shares(site, reply.shares)
    state.history.last_update[site] = masked.number
    state.envelopes.held[site] = masked.epoch


def _take_revealed(state: RunState, reply: SharesRevealed) -> None:
    dealers = take_revealed(state.playing, reply)
    if dealers:
        told = {"round": reply.round, "site": reply.site, "dealers": list(dealers)}
        state.observe({"event": "false-shares", **told})


def _take_approval(state: RunState, reply: ReleaseApproved) -> None:
    signed = release_message(reply.run, reply.digests, reply.statement)
    verify(state.federation.roster.entry(reply.site), CONTEXT_RELEASE, signed, reply.signature)
    check_digests(state.final_digests, reply.site, reply.digests, state.federation, where="release")
    keep_digests(state.final_digests, reply.site, reply.digests)
    state.approvals[reply.site] = reply
