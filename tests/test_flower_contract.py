"""What we use of Flower, at exactly the version we pin: when an upgrade changes it, this fails before a run does."""

import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path

import flwr
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.task_identity import TaskIdentity

from fedseek.errors import CohortTooSmall, Malformed
from fedseek_server import app as server_app
from fedseek_server.exchange import Exchange
from fedseek_site import app as site_app

ROOT = Path(__file__).resolve().parent.parent
NODE_CONFIG = {"partition-id": 3, "num-partitions": 4}


@pytest.fixture
def in_a_task(monkeypatch):
    """A message belongs to a run, a task and a node; Flower's processes set this when they start."""
    for name, value in (("_task_id", 1), ("_run_id", 2), ("_node_id", 3)):
        monkeypatch.setattr(TaskIdentity, name, value)


def context(node=3):
    config = {**NODE_CONFIG, "node": node}
    return Context(run_id=2, node_id=node, node_config=config, state=RecordDict(), run_config={})


def ask(app, data, message_type):
    request = Message(content=server_app.to_record(data), dst_node_id=3, message_type=message_type, group_id="1")
    return app(request, context())


def test_the_version_is_the_one_every_extra_pins():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    pins = {line for lines in extras.values() for line in lines if line.startswith("flwr")}
    assert pins == {f"flwr=={flwr.__version__}", f"flwr[simulation]=={flwr.__version__}"}
    assert version("flwr") == flwr.__version__
    assert f"flwr=={flwr.__version__}" in (ROOT / "constraints.txt").read_text("utf-8").split()


def test_a_message_outside_of_a_task_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_run_id", None)
    with pytest.raises(RuntimeError, match="run_id"):
        Message(content=RecordDict(), dst_node_id=3, message_type="query.plan", group_id="1")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
def test_bytes_come_back_as_they_were_whatever_their_size(size):
    data = np.random.default_rng(size).bytes(size)
    for wrap, unwrap in ((server_app.to_record, site_app.from_record), (site_app.to_record, server_app.from_record)):
        assert unwrap(wrap(data)) == data


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_bytes_survive_flowers_own_deflating_and_inflating(size):
    """Flower sends a record as objects, chunk by chunk, each named by its hash."""
    data = bytes(size // 2) + np.random.default_rng(size).bytes(size - size // 2)
    array = server_app.to_record(data)["fedseek"]["message"]
    assert len(array.children) == -(-size // CHUNK)
    inflated = Array.inflate(array.deflate(), children=array.children)
    assert (inflated.dtype, inflated.stype, inflated.shape) == ("uint8", "raw", (size,))
    assert inflated.data == data


def test_all_zero_chunks_that_are_one_object_come_back_whole():
    data = bytes(3 * CHUNK)
    array = server_app.to_record(data)["fedseek"]["message"]
    assert Array.inflate(array.deflate(), children=array.children).data == data


@pytest.mark.parametrize("phase", server_app.MESSAGE_TYPES)
def test_the_site_answers_each_phase_under_the_coordinators_message_type(in_a_task, phase):
    seen = []

    def deliver(node_config, data):
        seen.append((node_config["partition-id"], data))
        return "答复 ".encode() + data

    app = site_app.build_client_app(deliver)
    assert isinstance(app, ClientApp)
    reply = ask(app, b"\x00\xff", server_app.MESSAGE_TYPES[phase])
    assert seen == [(3, b"\x00\xff")]
    assert server_app.from_record(reply.content) == "答复 ".encode() + b"\x00\xff"
    assert not reply.has_error()


@pytest.mark.parametrize(
    "message_type", ["train", "query", "query.other", "train.plan", "evaluate.round", "system.plan"]
)
def test_the_site_answers_no_other_message_type(in_a_task, message_type):
    app = site_app.build_client_app(lambda node_config, data: b"")
    with pytest.raises(ValueError, match=r"registered with name|[Ii]nvalid message type"):
        ask(app, b"", message_type)


def test_message_types_are_those_of_the_protocol():
    assert server_app.MESSAGE_TYPES == {
        "plan": "query.plan",
        "key": "query.key",
        "shares": "query.shares",
        "round": "train.round",
        "unmask": "evaluate.unmask",
        "close": "evaluate.close",
        "release": "query.release",
    }


def test_a_reply_knows_what_it_replies_to(in_a_task):
    request = Message(content=server_app.to_record(b"x"), dst_node_id=3, message_type="train.round", group_id="7")
    request.metadata.__dict__["_message_id"] = "id-of-the-request"
    reply = Message(site_app.to_record(b"y"), reply_to=request)
    assert reply.metadata.reply_to_message_id == "id-of-the-request"
    assert (reply.metadata.group_id, reply.metadata.message_type) == ("7", "train.round")


def raw(data=b"x", *, dtype="uint8", stype="raw", shape=(1,)):
    return ArrayRecord({"message": Array(dtype=dtype, shape=shape, stype=stype, data=data)})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": raw()}),
        RecordDict({"fedseek": ConfigRecord({"message": b"x"})}),
        RecordDict({"fedseek": raw(), "more": raw()}),
        RecordDict({"fedseek": ArrayRecord({"other": raw()["message"]})}),
        RecordDict({"fedseek": ArrayRecord({"message": raw()["message"], "more": raw()["message"]})}),
        RecordDict({"fedseek": raw(dtype="float32")}),
        RecordDict({"fedseek": raw(stype="numpy.ndarray")}),
        RecordDict({"fedseek": raw(shape=(2,))}),
    ],
    ids=["empty", "name", "config", "two-records", "field", "two-fields", "dtype", "stype", "shape"],
)
@pytest.mark.parametrize("unwrap", [server_app.from_record, site_app.from_record], ids=["coordinator", "site"])
def test_both_sides_take_one_raw_array_and_nothing_else(unwrap, content):
    with pytest.raises(Malformed, match="Flower message"):
        unwrap(content)


class LoopGrid:
    """The three methods of Flower's grid that the coordinator calls, over a client app in this process."""

    def __init__(self, app, nodes, failing=()):
        self.app, self.nodes, self.failing, self.sent = app, nodes, failing, {}

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        for message in messages:
            self.sent[f"id-{len(self.sent)}"] = message
        return list(self.sent)[-len(messages) :]

    def pull_messages(self, message_ids):
        message = self.sent[message_ids[0]]
        if message.metadata.dst_node_id in self.failing:
            return [Message(Error(code=2, reason="患者王小明"), reply_to=message)]
        return [self.app(message, context(message.metadata.dst_node_id))]


def test_the_grid_has_the_methods_that_the_coordinator_calls():
    for name in ("get_node_ids", "push_messages", "pull_messages"):
        assert set(inspect.signature(getattr(LoopGrid, name)).parameters) == set(
            inspect.signature(getattr(Grid, name)).parameters
        )


def test_each_node_gets_its_own_request_and_gives_its_own_reply(in_a_task):
    grid = LoopGrid(site_app.build_client_app(lambda node_config, data: data[::-1]), nodes=(11, 12, 13))
    exchange = Exchange("round", 4, {11: b"ab", 12: b"cd", 13: b"ef"})
    delivered = {node: server_app.from_record(content) for node, content in server_app.deliver(grid, exchange)}
    assert delivered == {11: b"ba", 12: b"dc", 13: b"fe"}
    assert {message.metadata.message_type for message in grid.sent.values()} == {"train.round"}
    assert {message.metadata.group_id for message in grid.sent.values()} == {"4"}


def test_a_node_that_fails_is_left_out_and_its_text_is_not_repeated(in_a_task, caplog):
    grid = LoopGrid(site_app.build_client_app(lambda node_config, data: data), nodes=(11, 12), failing=(12,))
    assert [node for node, _ in server_app.deliver(grid, Exchange("round", 1, {11: b"", 12: b""}))] == [11]
    assert "round: node 12 failed with Flower error 2" in caplog.text
    assert "王小明" not in caplog.text


def test_waiting_for_nodes_ends(in_a_task):
    grid = LoopGrid(None, nodes=(12, 11))
    assert server_app.wait_for_nodes(grid, 2) == [11, 12]
    with pytest.raises(CohortTooSmall, match="2 nodes connected after 0 s, wanted 3"):
        server_app.wait_for_nodes(grid, 3, timeout=0.1)


def test_a_whole_run_through_both_apps_of_flower(in_a_task, make_cohort):
    """The real server app against the real client app; only Flower's network is a loop."""
    cohort = make_cohort()
    app = site_app.build_client_app(lambda node_config, data: cohort.services[node_config["node"]].handle(data))

    finished = []
    server = server_app.build_server_app(cohort.coordinator, finished.append)
    assert isinstance(server, ServerApp)
    server(LoopGrid(app, cohort.services), context())
    assert finished == [cohort.coordinator]
    assert len(cohort.coordinator.approvals) == 4


def test_run_simulation_takes_what_the_engine_gives_it():
    parameters = inspect.signature(run_simulation).parameters
    assert {"server_app", "client_app", "num_supernodes", "backend_config"} <= set(parameters)
    assert parameters["backend_config"].default is None
    assert parameters["backend_name"].default == "ray"
