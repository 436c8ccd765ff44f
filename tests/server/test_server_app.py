"""What the Flower side makes of nodes that fail, are slow, or answer nonsense: they are missing, and no more."""

import logging
import time

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from played_sites import ANNA, BEIAN, HARBOUR, RENJI, federate, played_plan

from fedseek.errors import CohortTooSmall, PlanRefused
from fedseek.messages import Refused, encode_message
from fedseek_server import app as server_app
from fedseek_server.exchange import Exchange

OTHERS = (HARBOUR, RENJI, BEIAN)


@pytest.fixture(autouse=True)
def in_a_task(monkeypatch):
    """A message belongs to a run, a task and a node; Flower's processes set this when they start."""
    for name, value in (("_task_id", 1), ("_run_id", 2), ("_node_id", 3)):
        monkeypatch.setattr(TaskIdentity, name, value)


class Grid:
    """The three methods of Flower's grid that are called, over played sites. ``odd`` may replace a reply, or lose it."""

    def __init__(self, federated, odd=lambda phase, name, reply: reply, unreachable=()):
        self.federated, self.odd, self.unreachable = federated, odd, unreachable
        self.sent, self.pulls = {}, 0

    def get_node_ids(self):
        return list(self.federated.here)

    def push_messages(self, messages):
        (message,) = messages  # one request in memory at a time
        if message.metadata.dst_node_id in self.unreachable:
            return []
        self.sent[f"id-{len(self.sent)}"] = message
        return [list(self.sent)[-1]]

    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        message = self.sent[message_id]
        site = self.federated.sites[message.metadata.dst_node_id]
        content = server_app.to_record(site.handle(server_app.from_record(message.content)))
        reply = self.odd(message.metadata.message_type, site.name, Message(content, reply_to=message))
        return [] if reply is None else [reply]


def play(federated, grid, **options):
    finished = []
    app = server_app.build_server_app(federated.coordinator, finished.append, **options)
    app(grid, Context(run_id=2, node_id=3, node_config={}, state=RecordDict(), run_config={}))
    assert finished == [federated.coordinator]


def failing(phase, name):
    """A Flower error in place of one site's reply in one phase."""

    def odd(message_type, site, reply):
        if (message_type, site) != (server_app.MESSAGE_TYPES[phase], name):
            return reply
        reply.__dict__["_content"], reply.__dict__["_error"] = None, Error(code=2, reason="患者王小明")
        return reply

    return odd


def test_a_whole_run():
    federated = federate(played_plan())
    play(federated, Grid(federated))
    assert len(federated.coordinator.approvals) == 4
    federated.check_adapter()


def test_a_node_that_fails_is_missing_and_its_text_is_repeated_nowhere(caplog):
    federated = federate(played_plan(rounds=3))
    with caplog.at_level(logging.WARNING):
        play(federated, Grid(federated, odd=failing("round", ANNA)))
    assert set(federated.ended.values()) == {OTHERS}
    assert f"round: node {federated.node(ANNA)} failed with Flower error 2" in caplog.text
    assert "王小明" not in caplog.text
    assert "王小明" not in str(federated.told)


def test_a_node_that_has_just_gone_is_missing(caplog):
    federated = federate(played_plan(rounds=3))
    with caplog.at_level(logging.WARNING):
        play(federated, Grid(federated, unreachable=(federated.node(ANNA),)))
    assert set(federated.ended.values()) == {OTHERS}
    assert federated.events("absent", "sites") == [([ANNA],)]
    assert f"plan: the request to node {federated.node(ANNA)} could not be sent" in caplog.text


def test_a_node_that_is_too_slow_is_missing():
    federated = federate(played_plan(rounds=1))

    def never(message_type, site, reply):
        return None if (message_type, site) == ("train.round", ANNA) else reply

    started = time.monotonic()
    play(federated, Grid(federated, odd=never), timeout=0.2)
    assert time.monotonic() - started < 10
    assert federated.ended == dict.fromkeys((1, 2), OTHERS)


def test_a_reply_that_is_there_when_time_is_up_is_still_taken():
    grid = Grid(federate(played_plan()))
    grid.pull_messages = lambda ids: [Message(server_app.to_record(b"x"), reply_to=grid.sent[ids[0]])]
    delivered = list(server_app.deliver(grid, Exchange("round", 1, {101: b"a", 102: b"b"}), timeout=0.0))
    assert [(node, server_app.from_record(content)) for node, content in delivered] == [(101, b"x"), (102, b"x")]


def test_a_reply_in_no_form_of_ours_is_rejected_and_the_run_goes_on():
    federated = federate(played_plan(rounds=1))

    def odd(message_type, site, reply):
        empty = (message_type, site) == ("evaluate.unmask", ANNA)
        return Message(RecordDict(), reply_to=grid.sent[list(grid.sent)[-1]]) if empty else reply

    grid = Grid(federated, odd=odd)
    play(federated, grid)
    assert set(federated.events("rejected", "phase", "site", "code")) == {("unmask", ANNA, "Malformed")}
    assert len(federated.coordinator.approvals) == 4


def test_a_sites_no_still_ends_the_run():
    federated = federate(played_plan())
    no = encode_message(Refused(run=federated.coordinator.run, site=ANNA, code="PlanRefused", rule="budget"))
    federated.site(ANNA).handle = lambda data: no
    with pytest.raises(PlanRefused, match="'st-anna' refused the plan: budget"):
        play(federated, Grid(federated))


def test_a_run_begins_without_a_site_that_does_not_connect():
    federated = federate(played_plan(rounds=1))
    federated.here.discard(federated.node(ANNA))
    play(federated, Grid(federated), connect_timeout=0.1)
    assert federated.ended == dict.fromkeys((1, 2), OTHERS)


def test_but_not_without_as_many_as_its_plan_wants():
    federated = federate(played_plan())
    federated.here -= {federated.node(ANNA), federated.node(RENJI)}
    with pytest.raises(CohortTooSmall, match="2 nodes connected after 0 s, wanted 3"):
        play(federated, Grid(federated), connect_timeout=0.1)


def test_waiting_for_nodes():
    federated = federate(played_plan())
    grid = Grid(federated)
    assert server_app.wait_for_nodes(grid, 4, at_least=3) == [100, 101, 102, 103]
    assert server_app.wait_for_nodes(grid, 5, at_least=4, timeout=0.1) == [100, 101, 102, 103]
    with pytest.raises(CohortTooSmall, match="4 nodes connected after 0 s, wanted 5"):
        server_app.wait_for_nodes(grid, 5, timeout=0.1)
