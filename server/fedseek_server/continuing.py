"""Where a new run can go on when a coordinator was lost with its disk: the last adapter that the sites have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedseek.errors import AdapterDiverged, CohortTooSmall
from fedseek.identity.roster import Roster
from fedseek.messages import Continuation, Standing

_HINT = "have these sites connected, or begin a run that goes on from nothing"


def last_common(standings: Mapping[str, Standing], run: str, roster: Roster) -> Continuation:
    """The last adapter of ``run`` that every site has which is in it.

    Sites that are in no adapter of the run, and have nothing to go on from, are left out: they may not take part.

    Args:
        standings: by site, what it told last.
        run: the run that was lost.
        roster: of that run, and of the one to come.

    Raises:
        CohortTooSmall: sites whose updates are in the adapter are not there or too far behind, or nobody knows the run.
        AdapterDiverged: sites hold different tensors after the same round; names two.
    """
    known = {name: each for name, each in standings.items() if name in roster.names and _is_of(each, run, roster)}
    if not known:
        raise CohortTooSmall(f"no site that is connected is in run {run!r} with this roster", hint=_HINT)
    newest = max(max(each.adapters) for each in known.values())
    candidates = [_Candidate.of(known, number) for number in (newest, newest - 1)]
    held_by_all = [each for each in candidates if each.holders >= set(known)]
    for candidate in (*held_by_all, *candidates):
        if candidate.holders and candidate.holders >= candidate.needed:
            _check_same(known, candidate)
            return Continuation(run=run, round=candidate.round)
    behind = {name: max(each.adapters) for name, each in known.items()}
    absent = sorted(candidates[-1].needed - set(known))
    raise CohortTooSmall(
        f"the sites of run {run!r} have no adapter in common: "
        + ", ".join([f"{name} holds that after round {number}" for name, number in sorted(behind.items())])
        + "".join(f", {name} is not there" for name in absent),
        hint=_HINT,
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """The adapter after a round: which sites hold it, and whose updates are in it."""

    round: int
    holders: frozenset[str]
    needed: frozenset[str]

    @classmethod
    def of(cls, known: Mapping[str, Standing], number: int) -> _Candidate:
        holders = frozenset(name for name, each in known.items() if number in each.adapters)
        needed = frozenset(site for name in holders for site in known[name].contributors.get(number, ()))
        return cls(number, holders, needed)


def _is_of(standing: Standing, run: str, roster: Roster) -> bool:
    return run in standing.runs and standing.roster_digest == roster.digest()


def _check_same(known: Mapping[str, Standing], candidate: _Candidate) -> None:
    agreed: dict[str, tuple[str, bytes]] = {}
    for name in sorted(candidate.holders):
        for scope, digest in known[name].adapters[candidate.round].items():
            first, common = agreed.setdefault(scope, (name, digest))
            if digest != common:
                raise AdapterDiverged(
                    f"after round {candidate.round} site {name!r} holds other values of {scope!r} than site {first!r}",
                    hint="compare versions and hardware of the two sites",
                )
