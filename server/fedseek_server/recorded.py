"""A run that survives its process: ``RunLog`` and ``Coordinator`` put together.

What comes from outside is written down, then acted on. A process that starts again brings the coordinator to the last
snapshot, gives it what came since, in order and in silence, and goes on live where the record ends: the exchange under
way is opened once more, for the nodes that have not answered. The coordinator draws nothing and takes the time from the
record, so what it asks again is what it asked before, to the byte, and a site answers that as it did before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from fedseek.errors import CustodyError, FedseekError, JournalUnusable, MessageError
from fedseek.identity.roster import Roster, parse_roster
from fedseek.messages import Continuation
from fedseek.plan import Plan, plan_from_canonical
from fedseek_server.coordinator import Coordinator, Nodes
from fedseek_server.exchange import Exchange
from fedseek_server.run_log import LOG_FILE, AskedAgain, Begin, Event, KeyWished, Looked, Over, Replied, RunLog
from fedseek_server.snapshot import Snapshot
from fedseek_server.state import Observe

Clock = Callable[[], float]
_E = TypeVar("_E", Looked, Over)


class RecordedRun:
    """One run with its record; driven as a ``Coordinator`` is. Made by :meth:`begin` or :meth:`reopen`.

    After a ``JournalUnusable`` close it; once there is room on the disk again, ``reopen`` goes on.

    Attributes:
        coordinator: of the run.
        last_nodes: the nodes that were there when last looked at; after a restart, those to wait for.
    """

    def __init__(self, log: RunLog, *, observe: Observe, clock: Clock) -> None:
        """Open the run that ``log`` holds; called by :meth:`begin` and :meth:`reopen`."""
        begun = log.begun()
        self._log = log
        self._observe = observe
        self._clock = clock
        self._nodes: Nodes = tuple
        self._looked = Looked((), 0.0)
        self._place = 1
        self._ahead: Event | None = log.event(self._place)  # on the record, still to be acted on; None: this is now
        self.coordinator = Coordinator(
            plan_from_canonical(begun.plan),
            parse_roster(begun.roster),
            run=begun.run,
            observe=self._tell,
            clock=lambda: self._looked.at,
            continues=begun.continues,
            ended=log,
            checkpoint=self._store,
            all_needed=False,  # people were asked before the run; one that has changed its mind ends nobody else's
        )
        stored, last = log.snapshot(), log.last_look()
        snapshot = Snapshot.from_bytes(stored) if stored is not None else None
        if snapshot is not None:
            self.coordinator.resume(snapshot)
        self.last_nodes = last.nodes if last else tuple(snapshot.sites) if snapshot else ()

    @classmethod
    def begin(
        cls,
        folder: Path,
        *,
        plan: Plan,
        roster: Roster,
        run: str,
        observe: Observe,
        clock: Clock = time.time,
        continues: Continuation | None = None,
    ) -> Self:
        """Begin a run, with its record in a folder of its own.

        Raises:
            JournalUnusable: there is a run in the folder, or the disk does not take it.
            CustodyError: the folder cannot be used.
            InvalidPlan: no round is left after the one it goes on from.
        """
        log = RunLog(folder)
        begin = Begin(
            run=run,
            plan=plan.canonical(),
            roster=roster.canonical_bytes(),
            continues=continues,
            started=clock(),
        )
        return cls._open(log, lambda: log.begin(begin), observe, clock)

    @classmethod
    def reopen(cls, folder: Path, *, observe: Observe, clock: Clock = time.time) -> Self:
        """Take up the run whose record lies in a folder.

        Raises:
            JournalUnusable: there is none, another process plays it, or the record is damaged.
            CustodyError: the folder cannot be used.
        """
        return cls._open(RunLog(folder), lambda: None, observe, clock)

    @classmethod
    def _open(cls, log: RunLog, first: Callable[[], None], observe: Observe, clock: Clock) -> Self:
        try:
            first()
            return cls(log, observe=observe, clock=clock)
        except FedseekError:
            log.close()
            raise

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a run was begun in this folder, so that ``reopen`` is to be called."""
        if not (folder / LOG_FILE).exists():
            return False
        with RunLog(folder) as log:
            return log.has_begun()

    def request_rotation(self) -> None:
        """Have a new group key made before the next round; from any thread. It is not forgotten if the process dies."""
        self._log.wish_key()

    def ask_again(self) -> None:
        """Wait for approvals of the release once more; before ``play``, of a run that has ended without enough."""
        self._log.add(AskedAgain(self._clock()))
        if self._ahead is None:
            self._ahead = self._log.event(self._place)

    def close(self) -> None:
        """Let go of the record; another process may take the run up."""
        self._log.close()

    def play(self, nodes: Nodes) -> Iterator[Exchange]:
        """The exchanges from here on; the one that was under way comes first, if anybody has not answered.

        Raises:
            JournalUnusable: the record cannot be written, or is of another version of this program.
            CohortTooSmall, ReleaseRefused: as ``Coordinator.play``; it comes again if the run is taken up again.
            PlanRefused, SiteRefused, WrongModel, AdapterDiverged: a reply on the record had ended the run.
        """
        self._nodes = nodes
        exchanges = self.coordinator.play(self._look)
        while True:
            self._take_wishes()
            exchange = next(exchanges, None)
            if exchange is None:
                return
            if self._act_on_replies():
                exchange = self.coordinator.unanswered()
            if self._ahead is None and (exchange.requests or exchange.pause_seconds):
                yield exchange
            self._take(Over, Over)

    def receive(self, node: int, data: bytes) -> None:
        """Write a reply down and take it. Raises as ``Coordinator.receive``, and ``JournalUnusable``: it was not taken."""
        self.coordinator.check_asked(node, len(data))
        self._log.add(Replied(node, data))
        self.coordinator.receive(node, data)

    def reject(self, node: int, error: FedseekError) -> None:
        """Record that a reply of this node was refused."""
        self.coordinator.reject(node, error)

    def _act_on_replies(self) -> bool:
        """Give the coordinator the replies on the record, up to the end of the exchange or of the record."""
        found = False
        while isinstance(self._ahead, Replied):
            reply, found = self._ahead, True
            self._step()
            try:
                self.coordinator.receive(reply.node, reply.data)
            except (MessageError, CustodyError) as error:
                self.coordinator.reject(reply.node, error)
        return found

    def _take_wishes(self) -> None:
        while isinstance(self._ahead, AskedAgain):
            asked = self._ahead
            self._step()
            self.coordinator.ask_again(asked.at)
        if self._ahead is None:
            wished = self._log.take_wish()
        else:
            wished = isinstance(self._ahead, KeyWished)
            if wished:
                self._step()
        if wished:
            self.coordinator.request_rotation()

    def _look(self) -> Sequence[int]:
        self._looked = self._take(Looked, lambda: Looked(tuple(self._nodes()), self._clock()))
        self.last_nodes = self._looked.nodes
        return self.last_nodes

    def _take(self, wanted: type[_E], happen: Callable[[], _E]) -> _E:
        """The next event: from the record, or, when that is at its end, what happens now."""
        if self._ahead is None:
            event = happen()
            self._log.add(event)
            return event
        got = self._ahead
        if not isinstance(got, wanted):
            raise JournalUnusable(
                f"record of run {self.coordinator.run!r}: got {type(got).__name__}, wanted {wanted.__name__}",
                hint="it was written by another version of FedSeek; finish the run with that one",
            )
        self._step()
        return got

    def _step(self) -> None:
        self._place += 1
        self._ahead = self._log.event(self._place)

    def _store(self) -> None:
        self._log.store(self.coordinator.snapshot().to_bytes())

    def _tell(self, event: dict[str, Any]) -> None:
        """What follows from the last event on the record may have been told before the crash, or not: it is told again."""
        if self._ahead is None:
            self._observe(event)
