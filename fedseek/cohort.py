"""Who sums what with whom: the scopes of a roster, and the neighbours of a round.

Derived from public things alone (plan, roster, run, round, who is listed), so every party works it out for itself and
nobody has to be believed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedseek.errors import CohortTooSmall, Malformed
from fedseek.identity.roster import Roster
from fedseek.identity.signing import join_fields
from fedseek.plan import GLOBAL_SCOPE, Plan, head_scope
from fedseek.secagg.graph import choose_graph, neighbours

_GRAPH_DOMAIN = b"fedseek/round-graph/v1"
_PARTICIPANTS_DOMAIN = b"fedseek/participants/v1"
_PRESENCE_DOMAIN = b"fedseek/presence/v1"


@dataclass(frozen=True, slots=True)
class Federation:
    """One run of one plan by the sites of one roster: what every key, share and signature of the run is bound to."""

    run: str
    plan: Plan = field(repr=False)
    roster: Roster = field(repr=False)
    bound: bytes = field(repr=False)

    @classmethod
    def of(cls, run: str, plan: Plan, roster: Roster) -> Federation:
        """The federation of this run."""
        return cls(run, plan, roster, join_fields(run.encode(), plan.digest.encode(), roster.digest()))

    def bind(self, *fields: bytes) -> bytes:
        """``fields`` after run, plan digest and roster digest; no two different inputs give the same bytes."""
        return self.bound + join_fields(*fields)

    def bind_round(self, number: int, *fields: bytes) -> bytes:
        """``bind``, with the number of a round in front of ``fields``."""
        return self.bind(number.to_bytes(4, "big"), *fields)

    def members(self, scope: str) -> tuple[str, ...]:
        """Names of the sites of a scope, in roster order."""
        return tuple(entry.name for entry in self.roster.entries if scope in self.plan.scopes(entry.kind))

    def shared_scopes(self, kind: str) -> tuple[str, ...]:
        """The scopes that sites of this kind sum. A head that too few sites share stays at home and is none of them."""
        floor = self.plan.spec.cohort.min_contributors
        return tuple(scope for scope in self.plan.scopes(kind) if len(self.members(scope)) >= floor)

    def scopes(self) -> tuple[str, ...]:
        """Every scope that is summed: the adapter, then heads by kind."""
        kinds = sorted({entry.kind for entry in self.roster.entries})
        return GLOBAL_SCOPE, *(
            scope for kind in kinds for scope in self.shared_scopes(kind) if scope == head_scope(kind)
        )

    def summed_scopes(self, participants: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The scopes that are sent in a round, and by whom of its participants, in roster order.

        A head is sent where at least ``min_contributors`` of its sites take part: fewer would show each other theirs.
        """
        there, floor = set(participants), self.plan.spec.cohort.min_contributors
        senders = {scope: tuple(name for name in self.members(scope) if name in there) for scope in self.scopes()}
        return {scope: names for scope, names in senders.items() if len(names) >= floor}

    def open_scopes(self, participants: Sequence[str], survivors: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The scopes whose sum can be read, and whose updates are in it, in roster order.

        The adapter is summed over the survivors. A head is whole or closed: its masks cancel only where every
        participant of its kind survived (docs/adr/0012).
        """
        alive = set(survivors)
        sent = self.summed_scopes(participants)
        if GLOBAL_SCOPE not in sent:
            return {}
        whole = {scope: names for scope, names in sent.items() if scope != GLOBAL_SCOPE and alive.issuperset(names)}
        return {GLOBAL_SCOPE: tuple(name for name in sent[GLOBAL_SCOPE] if name in alive), **whole}

    def names(self, positions: Sequence[int]) -> tuple[str, ...]:
        """Names of the sites at these positions of the roster.

        Raises:
            Malformed: not in ascending order, or beyond the roster.
        """
        places = range(len(self.roster.entries))
        if list(positions) != sorted(set(positions)) or any(position not in places for position in positions):
            raise Malformed(f"positions on the roster: got {list(positions)[:20]}, wanted ascending ones, each once")
        return tuple(self.roster.entries[position].name for position in positions)

    def positions(self, names: Sequence[str]) -> tuple[int, ...]:
        """Positions of these sites on the roster, ascending."""
        wanted = set(names)
        return tuple(position for position, name in enumerate(self.roster.names) if name in wanted)


@dataclass(frozen=True, slots=True)
class RoundGraph:
    """Who masks with whom in a round, and who holds whose shares.

    Attributes:
        number: of the round.
        listed: the sites on its key list, in roster order.
        neighbours: by site: whom it masks the adapter with and who holds shares of its secrets, besides itself.
        kin: by site: the others of its kind, with whom it masks a head that they share.
        threshold: shares that rebuild a secret.
        min_survivors: fewer updates than these, and the round is given up with nothing revealed.
    """

    number: int
    listed: tuple[str, ...]
    neighbours: Mapping[str, tuple[str, ...]] = field(repr=False)
    kin: Mapping[str, tuple[str, ...]] = field(repr=False)
    threshold: int
    min_survivors: int

    def holders(self, dealer: str) -> tuple[str, ...]:
        """Who holds shares of ``dealer``'s secrets: its neighbours and itself, in roster order. Shamir's x is 1 + place."""
        around = {*self.neighbours[dealer], dealer}
        return tuple(name for name in self.listed if name in around)

    def peers(self, site: str) -> tuple[str, ...]:
        """Whose round keys a site needs: its neighbours' and those of its kind, in roster order."""
        wanted = {*self.neighbours[site], *self.kin[site]}
        return tuple(name for name in self.listed if name in wanted)


def round_graph(federation: Federation, number: int, listed: Sequence[str]) -> RoundGraph:
    """The graph of round ``number`` among the listed sites; everybody computes the same.

    Its randomness is a hash of public things. A coordinator may choose whom it lists, and so try graphs: the
    probabilities of ``fedseek.secagg.graph`` leave room for that.

    Raises:
        CohortTooSmall: fewer are listed than the plan's ``min_sites``.
    """
    cohort = federation.plan.spec.cohort
    ordered = federation.names(federation.positions(listed))
    if len(ordered) < cohort.min_sites:
        raise CohortTooSmall(f"round {number}: {len(ordered)} sites are listed, wanted at least {cohort.min_sites}")
    params = choose_graph(len(ordered), colluders=cohort.colluders, dropout_fraction=cohort.dropout_fraction)
    seed = hashlib.sha256(_GRAPH_DOMAIN + _bind_sites(federation, number, ordered)).digest()
    places = neighbours(len(ordered), params.degree, seed)
    return RoundGraph(
        number=number,
        listed=ordered,
        neighbours={
            name: tuple(ordered[place] for place in around) for name, around in zip(ordered, places, strict=True)
        },
        kin=_kin(federation, ordered),
        threshold=params.threshold,
        min_survivors=max(params.min_survivors, cohort.min_sites, cohort.min_contributors),
    )


def _kin(federation: Federation, listed: Sequence[str]) -> dict[str, tuple[str, ...]]:
    kinds = {entry.name: entry.kind for entry in federation.roster.entries}
    shares_head = {kind: len(federation.shared_scopes(kind)) > 1 for kind in set(kinds.values())}
    by_kind = {kind: [name for name in listed if kinds[name] == kind] for kind in shares_head}
    return {
        name: tuple(other for other in by_kind[kinds[name]] if other != name) if shares_head[kinds[name]] else ()
        for name in listed
    }


def presence_message(
    federation: Federation, graph: RoundGraph, participants: Sequence[str], *, epoch: int, digest: bytes
) -> bytes:
    """What a site vouches for with its update: the key list, whom it masked with, epoch, and the adapter it started from.

    Its neighbours reveal shares of its secrets only if they would sign the same: nobody is led into a fork.
    """
    listed = participants_message(federation, graph.number, graph.listed)
    masked_with = participants_message(federation, graph.number, participants)
    return join_fields(_PRESENCE_DOMAIN, listed, masked_with, epoch.to_bytes(4, "big"), digest)


def participants_message(federation: Federation, number: int, participants: Sequence[str]) -> bytes:
    """A set of sites in a round, as it stands in what is signed."""
    return join_fields(_PARTICIPANTS_DOMAIN, _bind_sites(federation, number, participants))


def _bind_sites(federation: Federation, number: int, names: Sequence[str]) -> bytes:
    """A set of sites in a round as bytes: two for each position on the roster, ascending."""
    positions = b"".join(position.to_bytes(2, "big") for position in federation.positions(names))
    return federation.bind_round(number, positions)
