"""A recorded run and played sites that answer from memory, for tests of what survives a crash.

The sites have played the run once, so they hold an answer to each request of it. Asked anything else, to the byte, they
fail the test: a coordinator that was stopped and started again must ask just what it asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from played_sites import ANNA, PlayedSite, played_plan

from fedseek.errors import CustodyError, MessageError
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek_server.exchange import Exchange
from fedseek_server.recorded import RecordedRun
from fedseek_server.run_log import KeyWished, RunLog

RUN = "试运行-1"
SITES = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("仁济医院", "hospital"), ("st-anna", "hospital"))
UNHEARD = {("round", 1, ANNA), ("unmask", 2, "harbour-bank"), ("shares", 1, ANNA)}  # a dropout that comes back
ROTATED_AT = ("unmask", 1)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@dataclass
class Story:
    """One run: its plan, its sites with all their answers, and what happened."""

    plan: Any
    roster: Roster
    sites: dict[int, PlayedSite]
    approvals: dict[str, Any] = field(default_factory=dict)
    times: Iterator[float] = field(default_factory=lambda: (1_000_000.0 + n for n in count()))
    asked: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    rotated: bool = False

    @classmethod
    def told(cls, folder: Path, **plan: Any) -> Story:
        """Play the run once, without a crash."""
        sites = {100 + place: PlayedSite(SiteIdentity.generate(*site)) for place, site in enumerate(SITES)}
        story = cls(played_plan(**plan), Roster.of(site.identity.public() for site in sites.values()), sites)
        recorded = story.begin(folder)
        story.drive(recorded)
        recorded.close()
        story.approvals = recorded.coordinator.approvals
        return story

    def begin(self, folder: Path, observe: Callable[[dict[str, Any]], None] = lambda event: None) -> RecordedRun:
        self.rotated = False
        return RecordedRun.begin(
            folder, plan=self.plan, roster=self.roster, run=RUN, observe=observe, clock=lambda: next(self.times)
        )

    def reopen(self, folder: Path, observe: Callable[[dict[str, Any]], None] = lambda event: None) -> RecordedRun:
        recorded = RecordedRun.reopen(folder, observe=observe, clock=lambda: next(self.times))
        wished = any(isinstance(event, KeyWished) for event in every_event(recorded))
        self.rotated = wished or has_wish(recorded) or recorded.coordinator.snapshot().next_round > ROTATED_AT[1]
        return recorded

    def exchanges(self, recorded: RecordedRun) -> Iterator[Exchange]:
        """The exchanges of the run; in one of them a new group key is asked for."""
        for exchange in recorded.play(lambda: list(self.sites)):
            if (exchange.phase, exchange.round) == ROTATED_AT and not self.rotated:
                self.rotated = True
                recorded.request_rotation()
            yield exchange

    def drive(self, recorded: RecordedRun) -> None:
        """As a driver does; the same sites are not heard in the same exchanges each time."""
        for exchange in self.exchanges(recorded):
            for node in exchange.requests:
                self.deliver(recorded, exchange, node)

    def deliver(self, recorded: RecordedRun, exchange: Exchange, node: int) -> None:
        request = exchange.requests[node]
        before = self.asked.setdefault((exchange.phase, exchange.round, node), request)
        assert request == before, f"{exchange.phase} of round {exchange.round}: another request than before"
        site = self.sites[node]
        if (exchange.phase, exchange.round, site.name) in UNHEARD:
            return
        try:
            recorded.receive(node, site.handle(request))
        except (MessageError, CustodyError) as error:
            recorded.reject(node, error)


def every_event(recorded: RecordedRun) -> list[Any]:
    """What is on the record since the last snapshot."""
    number, found = 1, []
    while event := recorded._log.event(number):
        number, found = number + 1, [*found, event]
    return found


def has_wish(recorded: RecordedRun) -> bool:
    with recorded._log._transaction() as db:
        return db.execute("SELECT count(*) FROM wishes").fetchone()[0] > 0


def dies_after(monkeypatch: Any, writes: int) -> None:
    """From now on the process dies right after so many things are on the disk, before it acts on the last of them."""
    left = [writes]

    def deadly(name: str) -> None:
        method = getattr(RunLog, name)

        def write(self: RunLog, *arguments: Any) -> Any:
            result = method(self, *arguments)
            if name != "take_wish" or result:
                left[0] -= 1
                if not left[0]:
                    self.close()  # a process that is gone holds no lock
                    raise Killed
            return result

        monkeypatch.setattr(RunLog, name, write)

    for name in ("begin", "add", "store", "wish_key", "take_wish"):
        deadly(name)
