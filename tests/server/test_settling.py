"""A site that was there a moment ago is waited for, and not for ever."""

import threading
from dataclasses import dataclass, field

import pytest

from fedseek_server import playing
from fedseek_server.playing import Settled


class Clock(threading.Event):
    """Time passes only when somebody waits."""

    def __init__(self):
        super().__init__()
        self.now = 100.0

    def wait(self, timeout=None):
        self.now += timeout or 0.0
        return self.is_set()


@dataclass
class Looks:
    """A run that only looks who is there, as often as it is told to."""

    last_nodes: tuple[int, ...]
    times: int = 1
    seen: list[list[int]] = field(default_factory=list)

    def play(self, nodes):
        for _ in range(self.times):
            self.seen.append(list(nodes()))
            yield None


def settle(monkeypatch, nodes, *, last, seconds=20.0, times=1):
    clock, inner = Clock(), Looks(last, times)
    monkeypatch.setattr(playing.time, "monotonic", lambda: clock.now)
    list(Settled(inner, seconds, clock).play(lambda: nodes(clock.now - 100.0)))
    return inner.seen, clock.now - 100.0


def test_a_node_that_was_there_a_moment_ago_is_waited_for(monkeypatch):
    seen, took = settle(monkeypatch, lambda now: [2, 1] if now > 3 else [2], last=(1, 2))
    assert seen == [[1, 2]]
    assert 3 < took < 4


def test_it_is_not_waited_for_for_ever_and_not_once_more(monkeypatch):
    seen, took = settle(monkeypatch, lambda now: [2], last=(1, 2), times=3)
    assert seen == [[2]] * 3
    assert 20 < took < 21


def test_who_is_new_is_not_waited_for_but_is_there(monkeypatch):
    seen, took = settle(monkeypatch, lambda now: [3, 1], last=(1,))
    assert (seen, took) == ([[1, 3]], 0.0)


def test_a_node_that_goes_between_two_looks_is_waited_for_too(monkeypatch):
    gone = iter([[1, 2], [1], [1], [1, 2]])
    seen, took = settle(monkeypatch, lambda now: next(gone), last=(), times=2)
    assert seen == [[1, 2], [1, 2]]
    assert 0 < took < 1


def test_a_stop_ends_the_waiting():
    stop = threading.Event()
    stop.set()
    with pytest.raises(playing.Stopped):
        list(Settled(Looks((1,)), 60.0, stop).play(list))
