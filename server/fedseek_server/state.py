"""All that the coordinator knows of a run between two messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedseek.cohort import Federation
from fedseek.errors import WrongRound
from fedseek.messages import Continuation, ReleaseApproved
from fedseek_server.admission import Admissions
from fedseek_server.envelopes import Envelopes
from fedseek_server.history import EndedRounds, History
from fedseek_server.pipeline import Pipeline
from fedseek_server.rounds import Digests, MaskedRound, open_sum

Observe = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class RunState:
    """One run.

    Attributes:
        federation: run, plan and roster.
        observe: told what happens.
        admissions: which nodes speak for which sites.
        envelopes: sealed group keys.
        pipeline: keys and shares for rounds to come.
        history: how rounds ended.
        continues: what the run goes on from; None: from the plan's first values.
        next_round: to be played next; 0 before the first is ready, one more than the closing round before the release.
        rotation_wanted: a new group key was asked for.
        approvals: of the release, by site.
        put_off: by site that did not approve yet, the rule it named when last asked.
        now: Unix time in seconds, as last looked at.
        asked_since: when approvals were first asked for; 0 before.
        asked_until: when that wait is over.
        final_digests: what approvals are compared with.
        masked: the round that is being played, if it takes place.
    """

    federation: Federation
    observe: Observe
    admissions: Admissions
    envelopes: Envelopes
    pipeline: Pipeline
    history: History
    continues: Continuation | None = None
    next_round: int = 0
    rotation_wanted: bool = False
    approvals: dict[str, ReleaseApproved] = field(default_factory=dict, repr=False)
    put_off: dict[str, str] = field(default_factory=dict)
    now: float = 0.0
    asked_since: float = 0.0
    asked_until: float = 0.0
    final_digests: Digests = field(default_factory=dict, repr=False)
    masked: MaskedRound | None = None

    @classmethod
    def of(
        cls, federation: Federation, observe: Observe, ended: EndedRounds, continues: Continuation | None = None
    ) -> RunState:
        """A run in which nothing has happened."""
        first = continues.round + 1 if continues else 1
        parts = (Admissions(federation), Envelopes(federation), Pipeline(federation))
        return cls(federation, observe, *parts, History(federation, ended, first), continues)

    @property
    def closing(self) -> int:
        """Number of the closing round: nothing is trained in it, the final metrics are summed."""
        return self.federation.plan.rounds + 1

    @property
    def playing(self) -> MaskedRound:
        """The round that is being played.

        Raises:
            WrongRound: none is.
        """
        if self.masked is None:
            raise WrongRound("no round is open")
        return self.masked

    def open_round(self, number: int, participants: tuple[str, ...]) -> None:
        """Open a round if enough sites can take part; if not, nobody is asked to train: privacy is spent for something."""
        self.masked = None
        graph = self.pipeline.graphs.get(number)
        if graph is None or len(participants) < graph.min_survivors:
            return
        counts = {scope: size.ciphertexts for scope, size in self.admissions.sizes.items()}
        self.masked = MaskedRound(
            federation=self.federation,
            number=number,
            epoch=self.envelopes.epoch,
            graph=graph,
            participants=participants,
            keys=self.pipeline.keys[number],
            dealt=self.pipeline.dealt[number],
            aggregate=open_sum(self.federation, counts, participants, is_closing=number == self.closing),
        )
