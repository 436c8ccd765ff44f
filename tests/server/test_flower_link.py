"""The link and the driver against the real SuperLink, with sites that answer, lie or stop half-way."""

import os
import signal
import sqlite3
import threading
import time
from dataclasses import dataclass

import httpx
import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from superlink_process import a_world, until

from fedseek.daemon.bundle import code_free_bundle
from fedseek.errors import Malformed, NotAdmitted, SessionOver, TooLarge, Undelivered
from fedseek_server.driver import Driver
from fedseek_server.flower import PASSING, FlowerLink


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with a_world(tmp_path_factory.mktemp("wire")) as world:
        yield world


@pytest.fixture(scope="module")
def site(world):
    site = world.party("site")
    site.activate()
    world.link.open()
    yield site
    site.close()


def asked(world, site, data=b"question"):
    sent = world.link.push(site.node, data, "round", 1, lifetime=60)
    [(request, _)] = site.pull()
    return sent, request


@pytest.mark.parametrize("size", [0, 1, 5 << 20, (5 << 20) + 1, 12_000_000])
def test_a_reply_of_any_size_comes_back_as_it_was(world, site, size):
    sent, request = asked(world, site)
    data = os.urandom(size)
    site.upload(*site.announce(request, data))
    [arrival] = world.link.poll([sent])
    assert world.link.fetch(arrival, limit=max(size, 1)) == data


@pytest.mark.parametrize("data", [bytes(40 << 20), b"7" * (6 << 20)], ids=["one chunk, eight times", "two chunks"])
def test_a_reply_too_large_is_refused_before_its_data_are_fetched(world, site, data, monkeypatch):
    sent, request = asked(world, site)
    site.upload(*site.announce(request, data))
    [arrival] = world.link.poll([sent])
    pulled, pull = [], world.link._pull
    monkeypatch.setattr(world.link, "_pull", lambda object_id: pulled.append(object_id) or pull(object_id))
    with pytest.raises(TooLarge, match=f"{len(data)} bytes"):
        world.link.fetch(arrival, limit=len(data) - 1)
    assert len(pulled) == 4
    assert world.link.fetch(arrival, limit=len(data)) == data


def test_a_reply_of_another_form_is_malformed(world, site):
    sent, request = asked(world, site)
    reply = site.reply(request, RecordDict({"other": ConfigRecord({"x": b"y"})}))
    site.upload(reply, site.push(reply))
    [arrival] = world.link.poll([sent])
    with pytest.raises(Malformed):
        world.link.fetch(arrival, limit=1000)


@pytest.mark.parametrize(("code", "passing"), [(8, True), (2, False), (7, False)])
def test_an_error_is_told_with_its_code_and_without_its_text(world, site, code, passing):
    sent, request = asked(world, site)
    reply = site.reply(request, Error(code, "/data/patients.csv, line 3"))
    site.upload(reply, site.push(reply))
    [arrival] = world.link.poll([sent])
    assert (arrival.error, arrival.passing) == (code, passing)
    assert (code in PASSING) == passing
    assert "patients" not in repr(arrival)
    world.link.discard(arrival)


def test_a_reply_deleted_meanwhile_may_be_asked_for_again(world, site):
    sent, request = asked(world, site)
    reply, _ = site.announce(request, b"x")
    [arrival] = world.link.poll([sent])
    gone = ConfirmMessageReceivedRequest(
        node=Node(node_id=site.node), run_id=request.metadata.run_id, message_object_id=reply.metadata.message_id
    )
    site.fleet.ConfirmMessageReceived(gone)
    with pytest.raises(Undelivered):
        world.link.fetch(arrival, limit=100)


def test_a_request_to_a_node_that_is_none_is_undelivered(world, site):
    with pytest.raises(Undelivered, match="12345"):
        world.link.push(12345, b"x", "round", 1, lifetime=60)


def test_the_same_request_has_another_id_each_time(world, site):
    """So a reply to the first cannot be taken for one to the second, and no site can guess another's."""
    ids = {world.link.push(site.node, b"same", "round", 1, lifetime=60) for _ in range(3)}
    assert len(ids) == 3
    for _ in ids:
        site.pull()


def test_a_key_that_is_none_is_not_registered(world):
    with pytest.raises(NotAdmitted, match="北岸"):
        world.link.enrol(b"no key", "北岸")


def test_a_new_run_ends_that_of_a_predecessor_and_all_it_held(world, site):
    world.link.push(site.node, os.urandom(6 << 20), "round", 1, lifetime=60)
    successor = FlowerLink(world.settings.socket, world.settings.secret_file.read_bytes(), code_free_bundle())
    successor.open()
    with pytest.raises(SessionOver):
        world.link.poll(["x"])
    successor.close()
    with pytest.raises(SessionOver):
        successor.nodes()
    with sqlite3.connect(f"file:{world.settings.state}/state.db?mode=ro", uri=True) as database:
        [(stored,)] = database.execute("select count(*) from objects").fetchall()
    assert stored == 0
    world.link.open()
    sent, request = asked(world, site)  # the one of the run before is not among what the site is given
    assert request.metadata.message_id == sent


def test_without_the_secret_nobody_takes_the_runs_task(world, site):
    other = FlowerLink(world.settings.socket, b"y" * 32, code_free_bundle())
    with pytest.raises(SessionOver, match="HTTP 401"):
        other.open()
    other.close()
    world.link.open()


# ------------------------------------------------------------------------------------------------------------ the driver
@dataclass(frozen=True)
class Exchange:
    phase: str
    round: int
    requests: dict
    pause_seconds: float = 0.0


class Conductor:
    """Two exchanges; does something in the middle of the first."""

    def __init__(self, nodes, meanwhile=lambda: None):
        self.wanted, self.meanwhile, self.received, self.rejected = nodes, meanwhile, [], []

    def play(self, nodes):
        until(lambda: set(self.wanted) <= set(nodes()))
        for number in (1, 2):
            yield Exchange("round", number, {node: b"%d to %d" % (number, node) for node in self.wanted})

    def receive(self, node, data):
        if not self.received:
            self.meanwhile()
        self.received.append((node, bytes(data)))

    def reject(self, node, error):
        self.rejected.append((node, error))


def answering(party, stop):
    """A site that is there until told otherwise, whatever happens to the SuperLink."""
    while not stop.is_set():
        try:
            for request, _ in party.pull():
                party.upload(*party.announce(request, b"from %d" % party.node))
        except httpx.HTTPError:
            time.sleep(0.2)


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_driven_run_comes_through_the_death_of_the_superlink(world, kill):
    parties = [world.party(f"driven {number} {kill}") for number in range(3)]
    for party in parties:
        party.activate()
    stop, ended = threading.Event(), threading.Event()
    threads = [threading.Thread(target=answering, args=(party, ended)) for party in parties]

    def kill_it():
        if kill:
            [process] = world.processes()
            os.kill(process, signal.SIGKILL)

    nodes = [party.node for party in parties]
    conductor = Conductor(nodes, kill_it)
    driver = Driver(world.link, deadline=lambda exchange: 120.0, stop=stop)
    runner = threading.Thread(target=driver.drive, args=(conductor,))
    runner.start()
    for thread in threads:
        thread.start()
    runner.join(timeout=120)
    ended.set()
    world.link.open()
    for party in parties:
        world.link.revoke(party.node)
    for thread in threads:
        thread.join(timeout=25)
    assert not runner.is_alive()
    assert not conductor.rejected
    assert sorted(conductor.received) == sorted([(node, b"from %d" % node) for node in nodes] * 2)
