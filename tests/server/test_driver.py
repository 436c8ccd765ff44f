"""The driver against a link that is a list: what dies, comes late or twice, and what the conductor sees of it."""

import gc
import itertools
import threading
import weakref
from dataclasses import dataclass, field

import pytest

from fedseek.errors import CohortTooSmall, Malformed, SessionOver, TooLarge, Undelivered, Unreachable, WrongKey
from fedseek_server.driver import Arrival, Driver, Stopped


@dataclass(frozen=True)
class Exchange:
    phase: str
    round: int
    requests: dict
    pause_seconds: float = 0.0


class Clock(threading.Event):
    """Time passes only when somebody waits."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, timeout=None):
        self.now += timeout or 0.0
        return self.is_set()


@dataclass
class Network:
    """A link. ``behave`` says what becomes of a request: (node, nth request to it) -> list of (seconds, what)."""

    clock: Clock
    behave: object
    stamps: dict = field(default_factory=lambda: {1: "a", 2: "a", 3: "a"})
    sent: list = field(default_factory=list)
    due: dict = field(default_factory=dict)
    discarded: list = field(default_factory=list)
    opened: int = 0
    closed: int = 0
    away_until: float = 0.0

    def _here(self):
        if self.clock.now < self.away_until:
            raise Unreachable("away")
        if self.opened <= self.closed:
            raise SessionOver("no run")

    def open(self):
        if self.clock.now < self.away_until:
            raise Unreachable("away")
        self.opened += 1
        self.closed = self.opened - 1
        self.due = {}

    def close(self):
        self.closed = self.opened

    def nodes(self):
        self._here()
        return dict(self.stamps)

    def push(self, node, data, phase, number, *, lifetime):
        self._here()
        self.sent.append((node, data))
        message_id = f"{node}.{len(self.sent)}"
        nth = sum(1 for to, _ in self.sent if to == node)
        for seconds, what in self.behave(node, nth):
            if isinstance(what, Undelivered):
                raise what
            self.due.setdefault(message_id, []).append([self.clock.now + seconds, what])
        return message_id

    def poll(self, message_ids):
        self._here()
        found = []
        for message_id in message_ids:
            for entry in [e for e in self.due.get(message_id, []) if e[0] <= self.clock.now]:
                self.due[message_id].remove(entry)
                error = entry[1] if isinstance(entry[1], int) else None
                found.append(Arrival(message_id, error, error in (5, 8), entry[1]))
        return found

    def fetch(self, arrival, *, limit):
        self._here()
        what = arrival.handle
        if isinstance(what, Exception):
            raise what
        if callable(what):
            return what(self.clock.now)
        return what

    def discard(self, arrival):
        self.discarded.append(arrival.handle)


class Conductor:
    def __init__(self, *exchanges, refuse=()):
        self.exchanges, self.refuse = exchanges, dict(refuse)
        self.received, self.rejected, self.nodes = [], [], []

    def play(self, nodes):
        for exchange in self.exchanges:
            self.nodes.append(nodes())
            yield exchange

    def receive(self, node, data):
        if node in self.refuse:
            raise self.refuse[node]
        self.received.append((node, data))

    def reject(self, node, error):
        self.rejected.append((node, error.code))


def drive(behave, *exchanges, deadline=100.0, refuse=(), prepare=lambda network: None):
    clock = Clock()
    network = Network(clock, behave)
    prepare(network)
    conductor = Conductor(*(exchanges or (ONE,)), refuse=refuse)
    Driver(network, deadline=lambda exchange: deadline, stop=clock, clock=clock).drive(conductor)
    return network, conductor


ONE = Exchange("round", 1, {1: b"to 1", 2: b"to 2", 3: b"to 3"})


def at_once(node, nth):
    return [(0.2, b"reply %d" % node)]


ALL = [(1, b"reply 1"), (2, b"reply 2"), (3, b"reply 3")]


def test_every_node_is_asked_once_and_heard_once():
    network, conductor = drive(at_once)
    assert network.sent == [(1, b"to 1"), (2, b"to 2"), (3, b"to 3")]
    assert sorted(conductor.received) == ALL
    assert (network.opened, network.closed) == (1, 1)


def test_the_conductor_is_told_who_is_connected_at_each_exchange():
    _, conductor = drive(at_once, ONE, ONE)
    assert conductor.nodes == [[1, 2, 3]] * 2


def test_a_node_that_does_not_answer_is_missing_and_holds_up_nobody_beyond_the_deadline():
    network, conductor = drive(lambda node, nth: [] if node == 2 else at_once(node, nth), deadline=30)
    assert sorted(conductor.received) == [ALL[0], ALL[2]]
    assert not conductor.rejected
    assert 30 <= network.clock.now < 32


def test_a_late_reply_is_deleted_unread():
    def behave(node, nth):
        return [(40.0, b"late")] if (node, nth) == (2, 1) else [(20.0 if nth == 2 else 0.2, b"reply %d" % node)]

    network, conductor = drive(behave, ONE, ONE, deadline=30)
    assert network.discarded == [b"late"]
    assert sorted(conductor.received) == sorted([ALL[0], ALL[2], *ALL])


@pytest.mark.parametrize("code", [5, 8])
def test_a_request_that_was_not_served_is_sent_again(code):
    def behave(node, nth):
        return [(0.2, code)] if node == 2 and nth < 4 else at_once(node, nth)

    network, conductor = drive(behave)
    assert [node for node, _ in network.sent].count(2) == 4
    assert sorted(conductor.received) == ALL


def test_a_refusal_is_told_by_the_node_that_was_asked_and_not_repeated():
    network, conductor = drive(lambda node, nth: [(0.2, 7)] if node == 2 else at_once(node, nth))
    assert conductor.rejected == [(2, "Undelivered")]
    assert [node for node, _ in network.sent].count(2) == 1


def test_a_node_that_starts_anew_is_asked_again():
    class Restarting(Network):
        def nodes(self):
            self.stamps[2] = "a" if self.clock.now < 5 else "b"
            return super().nodes()

    clock = Clock()
    network = Restarting(clock, lambda node, nth: [] if (node, nth) == (2, 1) else at_once(node, nth))
    conductor = Conductor(ONE)
    Driver(network, deadline=lambda exchange: 100.0, stop=clock, clock=clock).drive(conductor)
    assert sorted(conductor.received) == ALL
    assert clock.now < 10


def test_a_node_that_is_away_is_asked_when_it_is_back():
    class Away(Network):
        def nodes(self):
            everybody = super().nodes()
            return everybody if self.clock.now > 8 else {1: "a", 3: "a"}

    clock = Clock()
    network = Away(clock, at_once)
    conductor = Conductor(ONE)
    Driver(network, deadline=lambda exchange: 100.0, stop=clock, clock=clock).drive(conductor)
    assert sorted(conductor.received) == ALL


def test_the_clock_of_an_exchange_stands_still_while_the_superlink_is_away():
    class Dying(Network):
        def poll(self, message_ids):
            if self.opened == 1 and self.clock.now > 1 and not self.away_until:
                self.away_until = self.clock.now + 500
            return super().poll(message_ids)

    clock = Clock()
    network = Dying(clock, lambda node, nth: [(20.0, b"reply %d" % node)])
    conductor = Conductor(ONE)
    Driver(network, deadline=lambda exchange: 30.0, stop=clock, clock=clock).drive(conductor)
    assert sorted(conductor.received) == ALL
    assert network.opened == 2
    assert len(network.sent) == 6


def test_two_answers_to_a_request_sent_twice_count_once():
    network, conductor = drive(lambda node, nth: [(0.2, b"reply %d" % node), (0.2, b"again")])
    assert sorted(conductor.received) == ALL
    assert len(network.discarded) in (0, 3)


def test_a_half_uploaded_reply_does_not_hold_up_the_others():
    def behave(node, nth):
        if node == 1:
            return [(0.0, lambda now: b"reply 1" if now > 20 else None)]
        return at_once(node, nth)

    network, conductor = drive(behave)
    order = [node for node, _ in conductor.received]
    assert order[-1] == 1
    assert sorted(conductor.received) == ALL
    assert network.clock.now < 23


def test_an_upload_given_up_is_asked_for_again():
    def behave(node, nth):
        return [(0.1, _Gone() if (node, nth) == (1, 1) else b"reply %d" % node)]

    _, conductor = drive(behave)
    assert sorted(conductor.received) == ALL


class _Gone:
    def __call__(self, now):
        raise Undelivered("the sender gave up")


@pytest.mark.parametrize("error", [TooLarge("x"), Malformed("x")])
def test_a_reply_that_is_none_is_rejected_and_deleted(error):
    network, conductor = drive(lambda node, nth: [(0.1, error)] if node == 3 else at_once(node, nth))
    assert conductor.rejected == [(3, error.code)]
    assert network.discarded == [error]


@pytest.mark.parametrize("error", [Malformed("x"), WrongKey("x")])
def test_a_reply_that_the_conductor_refuses_is_rejected_and_the_run_goes_on(error):
    _, conductor = drive(at_once, refuse={2: error})
    assert conductor.rejected == [(2, error.code)]
    assert sorted(conductor.received) == [ALL[0], ALL[2]]


def test_what_ends_the_run_for_the_conductor_ends_it_and_closes_the_link():
    clock = Clock()
    network = Network(clock, at_once)
    conductor = Conductor(ONE, refuse={1: CohortTooSmall("over")})
    with pytest.raises(CohortTooSmall):
        Driver(network, deadline=lambda exchange: 30.0, stop=clock, clock=clock).drive(conductor)
    assert network.closed == 1


def test_a_request_that_the_superlink_does_not_take_is_tried_again():
    def behave(node, nth):
        return [(0, Undelivered("no"))] if (node, nth) == (2, 1) else at_once(node, nth)

    _, conductor = drive(behave)
    assert sorted(conductor.received) == ALL


@pytest.mark.parametrize("away", [0.0, 1e9])
def test_it_stops_when_told(away):
    clock = Clock()
    network = Network(clock, lambda node, nth: [], away_until=away)
    clock.set()
    with pytest.raises(Stopped):
        Driver(network, deadline=lambda exchange: 1e6, stop=clock, clock=clock).drive(Conductor(ONE))


# --------------------------------------------------------------------------------------------- what takes long, or never ends
def play(network, *exchanges, deadline=30.0, **options):
    """Drive over a network made by the test; the stop event is its clock."""
    conductor = Conductor(*(exchanges or (ONE,)), **options)
    stop = network.clock
    Driver(network, deadline=lambda exchange: deadline, stop=stop, clock=stop).drive(conductor)
    return conductor


def test_an_exchange_with_some_of_the_nodes_asks_and_awaits_those_alone():
    """After a restart of the coordinator only those are asked that have not answered before it."""
    network, conductor = drive(at_once, Exchange("round", 3, {2: b"to 2"}))
    assert network.sent == [(2, b"to 2")]
    assert conductor.received == [ALL[1]]
    assert network.clock.now < 2


def test_an_exchange_with_nobody_is_over_at_once():
    network, conductor = drive(at_once, Exchange("round", 3, {}))
    assert (network.sent, conductor.received, network.clock.now) == ([], [], 0.0)


class SlowFetch(Network):
    """To fetch a reply takes ten seconds, as when the SuperLink is very busy."""

    def fetch(self, arrival, *, limit):
        self.clock.now += 10
        return super().fetch(arrival, limit=limit)


def test_replies_that_are_slow_to_fetch_end_with_the_deadline_and_are_deleted():
    clock = Clock()
    network = SlowFetch(clock, at_once)
    conductor = play(network, deadline=15.0)
    assert len(conductor.received) == 2  # the second was begun in time
    assert len(network.discarded) == 1
    assert clock.now < 25


def test_a_reply_that_stays_half_uploaded_is_looked_at_ever_more_seldom_and_deleted_at_the_end():
    looks = []

    def never(now):
        looks.append(now)

    network, conductor = drive(lambda node, nth: [(0.0, never)] if node == 1 else at_once(node, nth), deadline=200)
    assert sorted(conductor.received) == ALL[1:]
    pauses = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert len(looks) < 80
    assert max(pauses) <= 11.5
    assert pauses[-1] > 5 * pauses[0]
    assert network.discarded == [never]


def test_of_two_replies_of_a_node_the_later_is_taken_and_the_earlier_deleted():
    """The process that sent the first was killed while it uploaded; its successor is asked again, and answers."""

    class Restarting(Network):
        def nodes(self):
            self.stamps[2] = "a" if self.clock.now < 5 else "b"
            return super().nodes()

    def half(now):
        return None

    clock = Clock()
    network = Restarting(clock, lambda node, nth: [(0.1, half)] if (node, nth) == (2, 1) else at_once(node, nth))
    conductor = play(network)
    assert sorted(conductor.received) == ALL
    assert network.discarded == [half]


def test_one_reply_at_most_is_held_and_none_when_it_is_over():
    alive = []

    class Reply(bytearray):
        """Bytes that can be watched."""

    class Watching(Network):
        def fetch(self, arrival, *, limit):
            gc.collect()
            assert not [ref for ref in alive if ref() is not None], "the reply before is still in memory"
            reply = Reply(b"x" * 100)
            alive.append(weakref.ref(reply))
            return reply

    class Forgetful(Conductor):
        def receive(self, node, data):
            self.received.append(node)

    clock = Clock()
    network, conductor = Watching(clock, at_once), Forgetful(ONE)
    Driver(network, deadline=lambda exchange: 30.0, stop=clock, clock=clock).drive(conductor)
    assert sorted(conductor.received) == [1, 2, 3]


def test_the_largest_reply_is_the_links_to_keep():
    limits = []

    class Limited(Network):
        def fetch(self, arrival, *, limit):
            limits.append(limit)
            return super().fetch(arrival, limit=limit)

    clock = Clock()
    network, conductor = Limited(clock, at_once), Conductor(ONE)
    Driver(network, deadline=lambda exchange: 30.0, stop=clock, limit=12345, clock=clock).drive(conductor)
    assert set(limits) == {12345}


def test_a_late_reply_is_looked_for_until_flower_has_forgotten_it_and_no_longer():
    asked = []

    class Listening(Network):
        def poll(self, message_ids):
            asked.append((self.clock.now, list(message_ids)))
            return super().poll(message_ids)

    def behave(node, nth):
        if nth == 1:
            return [] if node == 2 else at_once(node, nth)
        return [(1500.0, b"reply %d" % node)]

    clock = Clock()
    network, second = Listening(clock, behave), Exchange("round", 2, ONE.requests)
    seconds = {1: 30.0, 2: 2000.0}
    driver = Driver(network, deadline=lambda exchange: seconds[exchange.round], stop=clock, clock=clock)
    driver.drive(Conductor(ONE, second))
    [late] = [message_id for message_id in asked[0][1] if message_id.startswith("2.")]
    last = max(at for at, ids in asked if late in ids)
    assert 950 < last < 970  # its exchange, and 15 minutes beyond the end of that
    assert clock.now > 1500


@pytest.mark.parametrize("error", [SessionOver("HTTP 500"), Unreachable("HTTP 503")])
def test_a_superlink_that_opens_runs_and_fails_at_each_call_is_not_asked_all_the_time(error):
    """As with a full disk. The run waits for a person, without a busy loop, and stops when told."""

    class Failing(Network):
        def push(self, *arguments, **options):
            if self.clock.now > 300:
                self.clock.set()
            raise error

    clock = Clock()
    network = Failing(clock, at_once)
    with pytest.raises(Stopped):
        play(network)
    assert 20 < network.opened < 80


@pytest.mark.parametrize("error", [SessionOver("x"), Unreachable("x")])
def test_who_is_connected_is_asked_again_with_pauses_and_until_told_to_stop(error):
    class Failing(Network):
        def nodes(self):
            if self.clock.now > 60:
                self.clock.set()
            raise error

    clock = Clock()
    network = Failing(clock, at_once)
    with pytest.raises(Stopped):
        play(network)
    assert network.opened < 100


@pytest.mark.parametrize("call", ["nodes", "push", "poll", "fetch", "discard"])
@pytest.mark.parametrize("error", [Unreachable("x"), SessionOver("x")])
def test_wherever_the_superlink_dies_the_exchange_is_completed(call, error):
    class Dying(Network):
        died = False

    def dying(self, *arguments, **options):
        if not self.died and (self.sent or call == "push"):
            self.died = True
            self.closed = self.opened
            raise error
        return getattr(Network, call)(self, *arguments, **options)

    setattr(Dying, call, dying)
    clock = Clock()

    def behave(node, nth):
        return [(2.0, 8 if (node, nth) == (3, 1) else b"reply %d" % node)]  # an error, so that something is discarded

    network = Dying(clock, behave)
    conductor = play(network)
    assert sorted(conductor.received) == ALL
    assert network.died
    assert network.opened == 2


def test_it_stops_between_two_replies():
    class Stopping(Conductor):
        def receive(self, node, data):
            super().receive(node, data)
            clock.set()

    clock = Clock()
    network, conductor = Network(clock, at_once), Stopping(ONE)
    with pytest.raises(Stopped, match="round of round 1"):
        Driver(network, deadline=lambda exchange: 30.0, stop=clock, clock=clock).drive(conductor)
    assert len(conductor.received) == 1
    assert network.closed == 1


def test_what_cannot_be_deleted_at_the_end_of_an_exchange_does_not_end_the_run():
    class Stubborn(Network):
        def discard(self, arrival):
            raise Unreachable("away")

    clock = Clock()
    network = Stubborn(clock, lambda node, nth: [(0.0, lambda now: None)] if node == 1 else at_once(node, nth))
    conductor = play(network, deadline=5.0)
    assert sorted(conductor.received) == ALL[1:]
