"""How each round ended, kept for sites that were away: they apply what they missed, in order, before they go on.

Sums are large and there is one for each round, so where they lie is a choice: in memory for a simulation, in the
run's record on disk for a daemon. Who is in the adapter is kept apart from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fedseek.cohort import Federation
from fedseek.messages import AggregateDown


class EndedRounds(Protocol):
    """Where the ends of rounds lie. One is added after another; none is ever dropped: a site may be away from the start."""

    def append(self, down: AggregateDown) -> None:
        """Keep how a round ended. The same once more, after a restart, changes nothing."""

    def read(self, number: int) -> AggregateDown:
        """How round ``number`` ended; it was appended."""


class RoundsInMemory(list[AggregateDown]):
    """For a process that is not meant to be started again."""

    def read(self, number: int) -> AggregateDown:
        """How round ``number`` ended."""
        return self[number - self[0].round]


@dataclass(slots=True)
class History:
    """The ends of all rounds so far.

    Attributes:
        federation: the run.
        ended: sums of all scopes, by round.
        first: the run's first round; above 1 where it goes on from another run.
        contributors: sites whose update is in the adapter.
        last_update: by site, the round of its last update that was taken. It has applied every round before that one;
            later ones perhaps, if an answer of it was lost.
    """

    federation: Federation
    ended: EndedRounds = field(repr=False)
    first: int = 1
    contributors: set[str] = field(default_factory=set)
    last_update: dict[str, int] = field(default_factory=dict)
    _latest: AggregateDown | None = field(default=None, repr=False)  # most sites miss this one and no other

    def end(self, down: AggregateDown) -> None:
        """Keep how a round ended. What is trained in rounds of the plan is in the adapter; the closing round's is not."""
        self.ended.append(down)
        self._latest = down
        if down.round <= self.federation.plan.rounds:
            self.contributors.update(self.federation.names(down.survivors))

    def read(self, number: int) -> AggregateDown:
        """How a round ended, sums of all scopes."""
        if self._latest is None or self._latest.round < number:
            self._latest = self.ended.read(number)
        return self._latest if self._latest.round == number else self.ended.read(number)

    def for_site(self, down: AggregateDown, site: str) -> AggregateDown:
        """The same end of a round with only those sums that are this site's business."""
        scopes = self.federation.shared_scopes(self.federation.roster.entry(site).kind)
        sums = tuple(total for total in down.sums if total.scope in scopes)
        return AggregateDown(round=down.round, epoch=down.epoch, survivors=down.survivors, sums=sums)

    def missed(self, site: str, *, before: int) -> tuple[AggregateDown, ...]:
        """The rounds below ``before`` that this site is not known to have applied, in order."""
        first = max(self.last_update.get(site, self.first), self.first)
        return tuple(self.for_site(self.read(number), site) for number in range(first, before))


def given_up(number: int, epoch: int) -> AggregateDown:
    """The end of a round of which nothing was opened."""
    return AggregateDown(round=number, epoch=epoch, survivors=(), sums=())
