"""Going on from a run whose coordinator was lost with its disk: what a site can offer, and what it takes over.

A sum travels down with the next request, so when a coordinator is lost some sites have applied the last sum and others
have not. Each keeps the adapter before its last sum; so there is one that all have (``fedseek_server.continuing``). The
new run has a new name, which every key, share, mask and signature is bound to: none of the old run is used again. What
was trained counts as spent, whether its sum ever came or not.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from fedseek.errors import Malformed, PlanRefused
from fedseek.identity.roster import Roster, parse_roster
from fedseek.messages import PlanOffer, Standing, decode_request, encode_message
from fedseek.plan import plan_digest
from fedseek_site.state import SiteState

_MOST_EARLIER_RUNS: Final = 16  # kept; a run that goes on from one before these is refused


def standing_of(site: str, run: str, state: SiteState) -> Standing | None:
    """What this site could go on from; None if a sum did not pass: then nobody goes on before people have looked."""
    if state.stopped:
        return None
    offer = offer_of(state)
    roster = parse_roster(offer.roster)
    adapters, contributors = {state.last_applied: state.digests}, {state.last_applied: state.contributors}
    if state.before is not None:
        adapters[state.before.round] = state.before.digests
        contributors[state.before.round] = state.before.contributors
    return Standing(
        site=site,
        runs=(run, *state.earlier_runs),
        plan_digest=plan_digest(offer.plan),
        roster_digest=roster.digest(),
        adapters=adapters,
        contributors={number: _names(roster, positions) for number, positions in contributors.items()},
    )


def continue_run(me: str, offer: PlanOffer, run: str | None, state: SiteState | None) -> SiteState:
    """The state in which a new run begins here that goes on from another.

    Weights, steps, their privacy, the guards and the canaries are taken over; a head that stays at home as it is now,
    which may be a round ahead of the rest. What a sum showed of the canaries was seen, though it is applied no more.

    Args:
        me: this site.
        offer: of the new run.
        run: the run that this site is in; None: in none.
        state: its state.

    Raises:
        PlanRefused: this site does not hold what is to be gone on from.
    """
    continues = offer.continues
    if continues is None or run is None or state is None or continues.run not in (run, *state.earlier_runs):
        raise PlanRefused(me, "this site is not in the run that is to be gone on from")
    if state.stopped:
        raise PlanRefused(me, "the run to be gone on from was stopped at this site: a sum did not pass")
    begun = offer_of(state)
    if (offer.plan, offer.roster) != (begun.plan, begun.roster):
        raise PlanRefused(me, "the run to be gone on from has another plan or roster")
    earlier_runs = (run, *state.earlier_runs)[:_MOST_EARLIER_RUNS]
    taken = _at_round(me, state, continues.round)
    return replace(
        taken, offer=encode_message(offer), last_sent=continues.round, earlier_runs=earlier_runs, released=False
    )


def offer_of(state: SiteState) -> PlanOffer:
    """The offer that began the run.

    Raises:
        Malformed: the state holds another message in its place.
    """
    offer = decode_request(state.offer)
    if not isinstance(offer, PlanOffer):
        raise Malformed(f"a run was begun here on a {type(offer).__name__}")
    return offer


def _at_round(me: str, state: SiteState, number: int) -> SiteState:
    """The state with the weights as they were after a round; of keys and rounds under way nothing is left."""
    cleared = replace(state, rounds={}, group_keys={})
    if number == state.last_applied:
        return cleared
    before = state.before
    if before is None or number != before.round:
        held = [state.last_applied] if before is None else [state.last_applied, before.round]
        raise PlanRefused(me, f"asked to go on from round {number}, this site holds the adapter after {sorted(held)}")
    return replace(
        cleared,
        scopes={**state.scopes, **before.scopes},
        digests=before.digests,
        contributors=before.contributors,
        last_applied=number,
        before=None,
        resting_since=0 if state.resting_since > number else state.resting_since,  # that sum is applied no more
    )


def _names(roster: Roster, positions: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(roster.entries[position].name for position in positions)
