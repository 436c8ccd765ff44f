"""Carries a coordinator's exchanges over a link, and comes through whatever dies meanwhile.

The coordinator (no network in it) says what to ask of whom; the link (flower.py, or a list in a test) moves bytes. What
is here is time: how long to wait, when to ask again, what to drop. All of it rests on one property of the protocol:
the same request gets the same reply, so asking again is always safe.

    a site's SuperNode starts anew        its request is sent again: Flower delivers a message once
    a site's service is away              its courier says so; sent again
    the SuperLink dies                    the clock of the exchange stands still; when it is back a new run of Flower's
                                          is opened, so that nobody waits for what the old one lost, and all is sent
                                          again that was not answered
    a reply is late                       its node was missing; the bytes are deleted unread
    a reply is half uploaded              others are taken meanwhile; nothing of it is held here, and it is looked at
                                          ever more seldom, for a look may cost as much as the whole of it

When a run of Flower's ends while a site is still pulling a request, Flower 1.41 leaves a task at the site whose objects
never come. The site's courier gives that task up (clients/fedseek_site/flower.py); here nothing waits for it, because
the request is sent again in the new run under another id.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final, Protocol

from fedseek.errors import CustodyError, FedseekError, MessageError, SessionOver, Stopped, Undelivered, Unreachable

if TYPE_CHECKING:
    from fedseek_server.exchange import Exchange

SHORTEST_TICK, LONGEST_TICK = 0.1, 1.0  # seconds between two looks for replies
TICK_SHARE: Final = 0.02  # of the time already waited: so much may looking seldom add to it
LOOK_SECONDS: Final = 1.0  # between two looks at which nodes are connected
FIRST_RETRY, LONGEST_RETRY = 0.5, 10.0  # seconds before a request that came back is sent again
LOOK_SHARE: Final = 0.1  # of the time that a reply has been on its way, until it is looked at again
SPARE_LIFETIME: Final = 900.0  # seconds that Flower keeps a message beyond its deadline: clocks differ by minutes
LARGEST_REPLY: Final = 1 << 30  # bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """An answer that has been announced; what it says may still be on its way.

    Attributes:
        reply_to: id of the request that it answers.
        error: the link's error code; None for a reply of the site's.
        passing: the error says that the request was not served, not that the site refuses it.
        handle: the link's own way to find the bytes.
    """

    reply_to: str
    error: int | None
    passing: bool
    handle: object


class Link(Protocol):
    """What the driver needs of a network; flower.py:FlowerLink says what each call promises.

    Every call may raise Unreachable (not there now) or SessionOver (``open`` a new run first).
    """

    def open(self) -> None:
        """Begin a run of the link's own."""

    def close(self) -> None:
        """End it."""

    def nodes(self) -> dict[int, str]:
        """Connected nodes, each with a stamp that changes when its process starts anew."""

    def push(self, node: int, data: bytes, phase: str, number: int, *, lifetime: float) -> str:
        """Send a request; returns its id."""

    def poll(self, message_ids: Iterable[str]) -> list[Arrival]:
        """Answers announced since the last call."""

    def fetch(self, arrival: Arrival, *, limit: int) -> bytes | None:
        """The bytes of a reply; None while they are being uploaded."""

    def discard(self, arrival: Arrival) -> None:
        """Delete an answer unread."""


class Conductor(Protocol):
    """What is driven: a ``Coordinator``, or a stand-in that measures."""

    def play(self, nodes: Callable[[], Sequence[int]]) -> Iterator[Exchange]:
        """Exchanges, one after another."""

    def receive(self, node: int, data: bytes) -> None:
        """Take one reply."""

    def reject(self, node: int, error: FedseekError) -> None:
        """Be told that a reply was refused."""


@dataclass(slots=True)
class _Awaited:
    """A node that has not answered yet. ``stamp`` is that of the process which was sent the request."""

    stamp: str | None = None
    send_at: float = 0.0
    pause: float = FIRST_RETRY
    announced: Arrival | None = None
    announced_at: float = 0.0
    fetch_at: float = 0.0

    def announce(self, arrival: Arrival, now: float) -> None:
        """A reply is there, or on its way."""
        self.announced, self.announced_at, self.fetch_at = arrival, now, now

    def look_later(self, now: float) -> None:
        """It is still on its way."""
        self.fetch_at = now + min(LONGEST_RETRY, LOOK_SHARE * (now - self.announced_at))

    def send_again(self, at: float) -> None:
        """As if nothing had been sent, but not before ``at``."""
        self.stamp, self.announced, self.send_at = None, None, at


@dataclass(slots=True)
class _Waiting:
    """One exchange under way. Requests are made when they are sent: the one being sent is in memory, and no other."""

    exchange: Exchange
    nodes: dict[int, _Awaited]
    lifetime: float
    end: float
    owners: dict[str, int] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """Of the exchange."""
        return self.exchange.phase

    @property
    def round(self) -> int:
        """Of the exchange."""
        return self.exchange.round


class Driver:
    """Plays a run over a link.

    Args:
        link: to the sites.
        deadline: seconds that an exchange may take. A node that has not answered by then is missing from it.
        stop: set to end; :meth:`drive` then raises Stopped within a second or two.
        limit: bytes of the largest reply taken.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        link: Link,
        *,
        deadline: Callable[[Exchange], float],
        stop: threading.Event,
        limit: int = LARGEST_REPLY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._deadline = deadline
        self._stop = stop
        self._limit = limit
        self._clock = clock
        self._late: dict[str, float] = {}
        self._seen: dict[int, str] = {}
        self._look_at = -inf

    def drive(self, conductor: Conductor) -> None:
        """The whole run.

        Replies are taken one at a time, so one at most is in memory, however many sites there are.

        Raises:
            Stopped: ``stop`` was set.
            FedseekError: whatever ends the run for the conductor.
        """
        self._recover()
        try:
            for exchange in conductor.play(self.connected):
                self._carry(exchange, conductor)
        finally:
            self._link.close()

    def connected(self) -> list[int]:
        """Ids of the nodes that are connected now. Waits for the SuperLink if that is away."""
        failures = 0
        while True:
            try:
                return sorted(self._link.nodes())
            except (Unreachable, SessionOver):
                if self._stop.wait(_longer(failures)):
                    raise Stopped("stopped while the SuperLink was away") from None
                failures += 1
                self._recover()

    def _carry(self, exchange: Exchange, conductor: Conductor) -> None:
        if exchange.pause_seconds and self._stop.wait(exchange.pause_seconds):
            raise Stopped(f"stopped between two exchanges of {exchange.phase}")
        seconds = self._deadline(exchange)
        nodes = {node: _Awaited() for node in exchange.requests}
        began, self._look_at, failures = self._clock(), -inf, 0
        waiting = _Waiting(exchange, nodes, seconds + SPARE_LIFETIME, began + seconds)
        while waiting.nodes and (now := self._clock()) < waiting.end:
            if self._stop.is_set():
                raise Stopped(f"stopped in {exchange.phase} of round {exchange.round}")
            tick = min(LONGEST_TICK, max(SHORTEST_TICK, TICK_SHARE * (now - began)))
            try:
                self._step(waiting, conductor)
                failures = 0
            except (Unreachable, SessionOver) as error:
                _log.warning("%s of round %d: %s", exchange.phase, exchange.round, error.message)
                self._stop.wait(_longer(failures, LONGEST_RETRY))
                failures += 1
                self._come_back(waiting)
                waiting.end += self._clock() - now
            if waiting.nodes:
                self._stop.wait(tick)
        self._leave(waiting)

    def _leave(self, waiting: _Waiting) -> None:
        """Of those that have not answered: forget what is half there, and know what comes later for late."""
        forget_at = self._clock() + waiting.lifetime
        self._late.update(dict.fromkeys(waiting.owners, forget_at))
        try:
            for awaited in waiting.nodes.values():
                if awaited.announced is not None:
                    self._link.discard(awaited.announced)
        except (Unreachable, SessionOver) as error:
            _log.info("left at the SuperLink until its run ends: %s", error.message)

    def _step(self, waiting: _Waiting, conductor: Conductor) -> None:
        now = self._clock()
        if now >= self._look_at:
            self._seen, self._look_at = self._link.nodes(), now + LOOK_SECONDS
        self._send(waiting)
        self._sort_answers(waiting, conductor)
        for node, awaited in list(waiting.nodes.items()):
            if self._stop.is_set() or self._clock() >= waiting.end:
                return
            if awaited.announced is not None and self._clock() >= awaited.fetch_at:
                self._take(node, awaited.announced, waiting, conductor)

    def _send(self, waiting: _Waiting) -> None:
        """Send to each node that is connected and, as far as we know, has not got its request."""
        for node, awaited in waiting.nodes.items():
            stamp = self._seen.get(node)
            if stamp is None or stamp == awaited.stamp or self._clock() < awaited.send_at:
                continue
            try:
                data = waiting.exchange.requests[node]
                message_id = self._link.push(node, data, waiting.phase, waiting.round, lifetime=waiting.lifetime)
            except Undelivered as error:
                self._retry(awaited, error.message)
                continue
            awaited.stamp = stamp
            waiting.owners[message_id] = node

    def _sort_answers(self, waiting: _Waiting, conductor: Conductor) -> None:
        now = self._clock()
        self._late = {message_id: until for message_id, until in self._late.items() if until > now}
        wanted = [*waiting.owners, *self._late]
        for arrival in self._link.poll(wanted) if wanted else ():
            self._late.pop(arrival.reply_to, None)
            node = waiting.owners.pop(arrival.reply_to, None)
            awaited = None if node is None else waiting.nodes.get(node)
            if node is None or awaited is None:
                self._link.discard(arrival)  # late, or the second answer to a request sent twice
            elif arrival.error is None:
                if awaited.announced is not None:
                    self._link.discard(awaited.announced)  # of a process that has been restarted since
                awaited.announce(arrival, now)
            else:
                self._link.discard(arrival)
                self._failed(node, awaited, arrival, waiting, conductor)

    def _failed(self, node: int, awaited: _Awaited, arrival: Arrival, waiting: _Waiting, conductor: Conductor) -> None:
        text = f"{waiting.phase}: node {node} answered with Flower error {arrival.error}"  # its text may quote a site
        if arrival.passing:
            self._retry(awaited, text)
            return
        del waiting.nodes[node]
        conductor.reject(node, Undelivered(text, hint="the site's own log says more"))

    def _take(self, node: int, arrival: Arrival, waiting: _Waiting, conductor: Conductor) -> None:
        try:
            data = self._link.fetch(arrival, limit=self._limit)
        except Undelivered as error:
            self._retry(waiting.nodes[node], f"{waiting.phase}: node {node}: {error.message}")
            return
        except MessageError as error:
            self._link.discard(arrival)
            del waiting.nodes[node]
            conductor.reject(node, error)
            return
        if data is None:
            waiting.nodes[node].look_later(self._clock())
            return
        del waiting.nodes[node]
        try:
            conductor.receive(node, data)
        except (MessageError, CustodyError) as error:
            conductor.reject(node, error)

    def _retry(self, awaited: _Awaited, text: str) -> None:
        _log.info("%s; sent again in %.1f s", text, awaited.pause)
        awaited.send_again(self._clock() + awaited.pause)
        awaited.pause = min(2 * awaited.pause, LONGEST_RETRY)

    def _come_back(self, waiting: _Waiting) -> None:
        self._recover()
        self._look_at = -inf
        waiting.owners.clear()
        for awaited in waiting.nodes.values():
            awaited.send_again(self._clock())

    def _recover(self) -> None:
        """Open a new run of Flower's, as soon as the SuperLink is there. All that the old one held is gone then."""
        failures = 0
        while True:
            try:
                self._link.open()
            except (Unreachable, SessionOver) as error:
                _log.info("no run of Flower's yet: %s", error.message)
            else:
                self._late.clear()
                return
            if self._stop.wait(_longer(failures)):
                raise Stopped("stopped while the SuperLink was away")
            failures += 1


def _longer(failures: int, longest: float = LONGEST_TICK) -> float:
    """Seconds to wait after so many failures in a row."""
    return float(min(longest, SHORTEST_TICK * 2 ** min(failures, 10)))
