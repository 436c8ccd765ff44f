"""Entering: what a site does before its first round, or before its next one after it was away.

    PlanOffer     admit      sign the plan; fresh keys for two rounds
    KeyRequest    make_key   one site: a new group key, sealed to each
    ShareRequest  deal       shares of this site's secrets for the round it enters at

In the midst of a run the same is done ahead of each round, inside exchange A (``deal_round`` and ``draw_round`` below).
Each secret is drawn once and dealt once: a second set of shares of one secret would be a second chance to collect
enough of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from fedseek.cohort import RoundGraph, round_graph
from fedseek.deal import advertise, check_keys, deal_shares, draw_secrets
from fedseek.errors import Malformed, PlanRefused, WrongRound
from fedseek.groupkey import make_group_key
from fedseek.identity.signing import CONTEXT_PLAN, sign
from fedseek.messages import (
    GroupKeySealed,
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    RoundKeys,
    ShareRequest,
    SharesDealt,
    SharesSealed,
)
from fedseek_site.run import SiteRun, ciphertexts_of, values_of
from fedseek_site.state import RoundState, SiteState


def admit(run: SiteRun, state: SiteState, offer: PlanOffer) -> tuple[SiteState, PlanAdmitted]:
    """Sign the plan with everything it is bound to, and send keys for ``offer.round`` and the round after.

    Asked again when this site was away: keys that were drawn for one of the two rounds are sent again.

    Raises:
        PlanRefused: the run began here with another plan or roster.
        WrongRound: this site has taken part in that round or a later one, or the run has no such round.
    """
    if (offer.plan, offer.roster) != (run.plan.canonical(), run.federation.roster.canonical_bytes()):
        raise PlanRefused(run.me, "the run began at this site with another plan or roster")
    if not state.last_sent < offer.round <= run.closing_round:
        raise WrongRound(
            f"asked to enter at round {offer.round}, wanted one after {state.last_sent} and up to {run.closing_round}"
        )
    rounds = {number: state.rounds.get(number) or draw_round(run, number) for number in (offer.round, offer.round + 1)}
    reply = PlanAdmitted(
        run=run.name,
        site=run.me,
        round=offer.round,
        model_sha256=run.plan.spec.model.sha256,
        num_values=values_of(run),
        ciphertexts=ciphertexts_of(run),
        signature=sign(run.identity, CONTEXT_PLAN, run.federation.bind()),
        keys=(rounds[offer.round].keys, rounds[offer.round + 1].keys),
        group_key=_seal_group_key(run, state, 0) if offer.make_key else None,
        contributors=state.contributors,
    )
    return replace(state, rounds={**state.rounds, **rounds}), reply


def make_key(run: SiteRun, state: SiteState, request: KeyRequest) -> tuple[SiteState, KeysSealed]:
    """Draw the group key of the next epoch and seal it to each site of the roster, this one included.

    Nothing of it is kept: this site takes it from its envelope when it is first used, as all do.

    Raises:
        WrongRound: not the epoch after the last one that this site holds a key of.
    """
    sealed = _seal_group_key(run, state, request.epoch)
    return state, KeysSealed(run=run.name, site=run.me, group_key=sealed)


def deal(run: SiteRun, state: SiteState, request: ShareRequest) -> tuple[SiteState, SharesSealed]:
    """Share out this site's secrets for the round it enters at.

    Raises:
        WrongRound: no keys were sent for that round, its shares were dealt, or this site is not on its key list.
        CohortTooSmall: the key list is shorter than the plan allows.
        Malformed, WrongKey: not the keys of exactly this site's neighbours and kind.
    """
    listed = run.federation.names(request.listed)
    if run.me not in listed:
        raise WrongRound(f"asked for shares of round {request.round}, whose key list does not have this site")
    dealt, shares = deal_round(run, state, request.round, listed=listed, keys=request.keys)
    return replace(state, rounds={**state.rounds, request.round: dealt}), SharesSealed(
        run=run.name, site=run.me, shares=shares
    )


def draw_round(run: SiteRun, number: int) -> RoundState:
    """Fresh secrets for one round, and the public keys to them."""
    secrets = draw_secrets()
    return RoundState(keys=advertise(secrets, run.federation, number, identity=run.identity), secrets=secrets)


def deal_round(
    run: SiteRun, state: SiteState, number: int, *, listed: Sequence[str], keys: Sequence[RoundKeys]
) -> tuple[RoundState, SharesDealt]:
    """Share out the secrets of round ``number`` among the neighbours of its key list; this site is on it.

    Raises:
        WrongRound, CohortTooSmall, Malformed, WrongKey: as ``deal``.
    """
    drawn = state.rounds.get(number)
    if drawn is None or drawn.secrets is None or number <= state.last_sent:
        raise WrongRound(f"asked for shares of round {number}, for which this site has sent no keys")
    if drawn.listed:
        raise WrongRound(f"asked for shares of round {number}, which were dealt already")
    graph = round_graph(run.federation, number, listed)
    peers = _checked_peers(run, graph, keys)
    shares, own = deal_shares(drawn.secrets, peers, run.federation, graph, identity=run.identity)
    return replace(drawn, listed=graph.listed, peers=peers, held={run.me: own}), shares


def _checked_peers(run: SiteRun, graph: RoundGraph, keys: Sequence[RoundKeys]) -> Mapping[str, RoundKeys]:
    by_name = {each.site: each for each in keys}
    wanted = graph.peers(run.me)
    if set(by_name) != set(wanted) or len(keys) != len(wanted):
        raise Malformed(f"round {graph.number}: got keys of {sorted(by_name)}, wanted those of {sorted(wanted)}")
    for each in keys:
        check_keys(each, run.federation, graph.number)
    return by_name


def _seal_group_key(run: SiteRun, state: SiteState, epoch: int) -> GroupKeySealed:
    wanted = max(state.group_keys, default=-1) + 1
    if epoch != wanted:
        raise WrongRound(f"asked to make the group key of epoch {epoch}, this site's next one is {wanted}")
    return make_group_key(run.federation, epoch, identity=run.identity, now=run.clock())
