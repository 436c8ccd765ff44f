"""How each round ended, kept for sites that were away: they apply what they missed, in order, before they go on."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedseek.cohort import Federation
from fedseek.messages import AggregateDown


@dataclass(slots=True)
class History:
    """The ends of all rounds so far.

    Attributes:
        federation: the run.
        ended: round 1 first, sums of all scopes. In memory, and a site may be away from the start: none is dropped.
        last_update: by site, the round of its last update that was taken. It has applied every round before that one;
            later ones perhaps, if an answer of it was lost.
    """

    federation: Federation
    ended: list[AggregateDown] = field(default_factory=list, repr=False)
    last_update: dict[str, int] = field(default_factory=dict)

    def for_site(self, down: AggregateDown, site: str) -> AggregateDown:
        """The same end of a round with only those sums that are this site's business."""
        scopes = self.federation.shared_scopes(self.federation.roster.entry(site).kind)
        sums = tuple(total for total in down.sums if total.scope in scopes)
        return AggregateDown(round=down.round, epoch=down.epoch, survivors=down.survivors, sums=sums)

    def missed(self, site: str, *, before: int) -> tuple[AggregateDown, ...]:
        """The rounds below ``before`` that this site is not known to have applied, in order."""
        first = max(self.last_update.get(site, 1), 1)
        return tuple(self.for_site(down, site) for down in self.ended[first - 1 : before - 1])

    def contributors(self, rounds: int) -> tuple[str, ...]:
        """Sites whose update is in the sum of one of the first ``rounds`` rounds, in roster order."""
        positions = {position for down in self.ended[:rounds] for position in down.survivors}
        return self.federation.names(sorted(positions))


def given_up(number: int, epoch: int) -> AggregateDown:
    """The end of a round of which nothing was opened."""
    return AggregateDown(round=number, epoch=epoch, survivors=(), sums=())
