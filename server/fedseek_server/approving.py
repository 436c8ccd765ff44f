"""Which sites a release waits for, for how long, and when there are enough.

Sites whose people have not approved yet answer NotNow, and some sites are away: both are asked again, with a pause
between. A release is made
    - when every site whose update is in the adapter has approved, or
    - where the plan names fewer (``release.min_approvals``): when so many of them have, and the others were asked once
      more after that, so that a site which is only slow is not left out.
One that refuses outright ends it: its gate has found something. When ``release.wait_hours`` are over without enough
approvals the release is refused, by the names of those that are missing; asked for once more, the wait begins anew.

A site that is not in the adapter is asked as well, and nobody waits for it.
"""

from __future__ import annotations

from typing import Any, Final

from fedseek.errors import ReleaseRefused
from fedseek.release import approvals_wanted
from fedseek_server.state import RunState

FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0  # seconds between two asks; as long as was waited so far, within these bounds
ASKS_A_SNAPSHOT: Final = 64  # so that the record of a wait of months does not grow without end
AWAY: Final = "away"
APPROVED: Final = "approved"


def contributors(state: RunState) -> tuple[str, ...]:
    """Sites whose update is in the adapter, in roster order."""
    return tuple(name for name in state.federation.roster.names if name in state.history.contributors)


def wanted(state: RunState) -> int:
    """How many of them have to approve.

    Raises:
        ReleaseRefused: more than there are.
    """
    there = contributors(state)
    count = approvals_wanted(state.federation.plan, there)
    if count > len(there):
        raise ReleaseRefused(
            f"the plan wants {count} approvals (release.min_approvals), updates of {len(there)} sites are in the adapter",
            hint="there can be no release of this run; what sites spent stays spent",
        )
    return count


def missing(state: RunState) -> tuple[str, ...]:
    """Sites in the adapter that have not approved."""
    return tuple(name for name in contributors(state) if name not in state.approvals)


def has_enough(state: RunState) -> bool:
    """Whether as many have approved as the plan asks for."""
    return len(contributors(state)) - len(missing(state)) >= wanted(state)


def senders(state: RunState) -> frozenset[str]:
    """Who sends the adapter with its approval: so many that whichever sites approve, one of them has sent it.

    With n sites in the adapter of which m have to approve these are n - m + 1; one, if all have to. They are the same
    whenever they are worked out: a site answers no two different requests. Preferred are those that were there to the end.
    """
    there = contributors(state)
    closed = set(state.federation.names(state.history.read(state.closing).survivors))
    ordered = sorted(there, key=lambda name: name not in closed)  # stable: roster order otherwise
    return frozenset(ordered[: len(there) - wanted(state) + 1])


def pause(state: RunState) -> float:
    """Seconds until those who are missing are asked again; to the end of the wait at most."""
    waited, left = state.now - state.asked_since, state.asked_until - state.now
    return max(0.0, min(LONGEST_PAUSE, max(FIRST_PAUSE, waited), left))


def how_far(state: RunState) -> dict[str, Any]:
    """For the status: of each site in the adapter a word, and how many have to approve."""
    words = {
        name: APPROVED if name in state.approvals else state.put_off.get(name, AWAY) for name in contributors(state)
    }
    return {"sites": words, "wanted": wanted(state), "until": state.asked_until}


def refused(state: RunState) -> ReleaseRefused:
    """The wait is over."""
    there, absent = contributors(state), missing(state)
    words = "; ".join(f"{name}: {state.put_off.get(name, AWAY)}" for name in absent)
    return ReleaseRefused(
        f"{len(there) - len(absent)} of {len(there)} sites in the adapter have approved, wanted {wanted(state)}; no approval "
        f"from {', '.join(absent)}",
        hint=f"{words}. When they can, ask once more: fedseek-server release RUN --ask-again",
    )
