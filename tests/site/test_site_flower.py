"""The worker at the SuperNode's Runtime interface: what a hostile coordinator can put there, and what is replied.

The interface is Flower's own, on a Unix socket, with a state that each test fills as the SuperNode's loop would.
"""

import hashlib
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import uvicorn
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from loopback import until

from fedseek.daemon.bundle import bundle_digest, code_free_bundle
from fedseek.errors import TooLarge, Unreachable
from fedseek_site import flower
from fedseek_site.app import from_record, to_record
from fedseek_site.gate import Failure

RUN, NODE = 11, 22
WAIT = b"\x01" * 32


@contextmanager
def supernode_at(path):
    objects, bell = ObjectStoreFactory(), threading.Event()
    factory = NodeStateFactory(objectstore_factory=objects)
    factory.state_instance = state = flower._RingingState(objects, bell)
    state.set_node_id(NODE)
    app = create_app(state_factory=factory, superexec_auth_secret=WAIT)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: server.started, 10)
    tasks = flower.Tasks(path, WAIT, frozenset({bundle_digest(code_free_bundle())}))
    yield SimpleNamespace(state=state, store=objects.store(), tasks=tasks, bell=bell, path=path)
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN)
    with supernode_at(tmp_path / "runtime.sock") as inside:
        yield inside


def arrive(inside, content, *, bundle=None, task_type=TaskType.CLIENT_APP, lost=(), replaced=None):
    """Leave a message where the SuperNode's loop leaves it."""
    bundle = code_free_bundle() if bundle is None else bundle
    run = Run.create_empty(RUN)
    run.fab_hash, run.series_id = hashlib.sha256(bundle).hexdigest(), 5
    state = inside.state
    state.set_run_series_context(5, Context(RUN, NODE, {}, RecordDict(), {}, series_id=5))
    state.store_run(run)
    state.store_fab(Fab(run.fab_hash, bundle, {}))
    state.create_task(task_type=task_type, run_id=RUN, fab_hash=run.fab_hash)
    message = Message(content, NODE, "query.round", group_id="1")
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        inside.store.preregister(RUN, get_object_tree(message))
        state.store_message(remove_content_from_message(message))
        for number, (name, item) in enumerate(reversed(get_all_nested_objects(message).items())):
            if number not in lost:
                inside.store.put(name, item.deflate())
    return message


def replies(inside):
    return list(inside.state.get_messages_legacy(is_reply=True))


def content_of(inside, reply):
    contents, todo = {}, [inside.store.get_object_tree(reply.metadata.message_id)]
    while todo:
        tree = todo.pop()
        contents[tree.object_id] = inside.store.get(tree.object_id)
        todo += tree.children
    return from_record(inflate_object_from_contents(reply.metadata.message_id, contents).content)


def never(request):
    raise AssertionError("the site must not see this")


def test_a_message_of_ours_is_answered(inside):
    asked = arrive(inside, to_record(b"question"))
    assert inside.tasks.answer_next(lambda request: request[::-1])
    (reply,) = replies(inside)
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id
    assert content_of(inside, reply) == b"noitseuq"
    assert not inside.tasks.answer_next(never)


def test_nothing_of_the_request_is_kept(inside):
    arrive(inside, to_record(b"question"))
    inside.tasks.answer_next(lambda request: b"answer")
    assert not [entry for entry in inside.store.store.values() if b"question" in entry.content]


def test_looking_for_replies_rings(inside):
    assert not inside.bell.is_set()
    replies(inside)
    assert inside.bell.is_set()


@pytest.mark.parametrize("bundle", [b"", b"PK\x03\x04 not ours", code_free_bundle() + b"\0"])
def test_under_another_bundle_the_site_does_not_see_the_message(inside, bundle):
    asked = arrive(inside, to_record(b"question"), bundle=bundle)
    assert inside.tasks.answer_next(never)
    (reply,) = replies(inside)
    assert (reply.error.code, reply.error.reason) == (7, "the site runs no such bundle")
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id
    assert not [entry for entry in inside.store.store.values() if b"question" in entry.content]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"fedseek": ConfigRecord({"message": b"x"})}),
        RecordDict({"other": to_record(b"x")["fedseek"]}),
        RecordDict({"fedseek": to_record(b"x")["fedseek"], "more": ConfigRecord({})}),
        RecordDict({"fedseek": ArrayRecord({})}),
    ],
)
def test_what_is_no_message_of_ours_is_refused_and_does_not_block(inside, content):
    arrive(inside, content)
    assert inside.tasks.answer_next(never)
    (reply,) = replies(inside)
    assert (reply.error.code, reply.error.reason) == (2, "the site refused the message")


def test_objects_that_do_not_make_a_message_are_refused_and_do_not_block(inside, monkeypatch):
    asked = arrive(inside, to_record(b"question"))
    # a valid object of the right name by its hash, and of another kind than a message needs at its place
    record = ConfigRecord({"x": 1})
    tree = ObjectTree(object_id=record.object_id)
    entry = inside.store.store[asked.object_id]
    inside.store.preregister(RUN, tree)
    inside.store.put(record.object_id, record.deflate())
    monkeypatch.setattr(type(inside.store), "get_object_tree", lambda self, name: tree)
    assert entry.is_available
    assert inside.tasks.answer_next(never)
    monkeypatch.undo()
    (reply,) = replies(inside)
    assert reply.error.code == 2


def test_a_message_that_is_not_all_there_is_left_without_blocking(inside):
    arrive(inside, to_record(b"question"), lost=(0,))
    assert inside.tasks.answer_next(never)
    assert not replies(inside)
    assert not inside.tasks.answer_next(never)


def test_a_run_that_claims_to_be_another_kind_is_answered_all_the_same(inside):
    """Our worker takes ClientApp tasks only: one of another kind would make the SuperNode wait for ever."""
    arrive(inside, to_record(b"question"), task_type=TaskType.AGENT_APP)
    assert inside.tasks.answer_next(lambda request: b"answer")
    assert len(replies(inside)) == 1


@pytest.mark.parametrize("failure", list(Failure))
def test_a_failure_leaves_as_a_code_and_its_fixed_text(inside, failure):
    arrive(inside, to_record(b"question"))
    inside.tasks.answer_next(lambda request: failure)
    (reply,) = replies(inside)
    assert (reply.error.code, reply.error.reason) == (flower._CODES[failure], failure.value)


def test_without_the_secret_no_task_is_given_out(inside):
    arrive(inside, to_record(b"question"))
    stranger = flower.Tasks(inside.path, bytes(32), frozenset())
    with pytest.raises(Unreachable):
        stranger.answer_next(never)


def test_a_supernode_that_is_not_there_is_said_to_be_unreachable(tmp_path):
    tasks = flower.Tasks(tmp_path / "nobody.sock", WAIT, frozenset())
    with pytest.raises(Unreachable):
        tasks.answer_next(never)


def test_a_message_of_more_objects_than_the_largest_has_is_not_taken(monkeypatch):
    client = object.__new__(flower._GuardedClient)
    many = [ObjectTree(object_id=f"{number:064x}") for number in range(flower.MOST_OBJECTS)]
    answer = PullMessagesResponse(message_object_trees=[ObjectTree(object_id="f" * 64, children=many)])
    monkeypatch.setattr(flower.FleetHttpClient, "PullMessages", lambda self, request: answer)
    with pytest.raises(TooLarge, match="objects"):
        client.PullMessages(PullMessagesRequest())
    del answer.message_object_trees[0].children[0]
    assert client.PullMessages(PullMessagesRequest()) is answer


def test_the_node_number_is_remembered_and_a_broken_memory_is_none(tmp_path):
    memory = tmp_path / "node"
    assert flower._remembered(memory) is None
    for content in (b"", b"x", b"\xff" * 9):
        memory.write_bytes(content)
        assert flower._remembered(memory) is None
    memory.write_bytes(b"18446744073709551615")
    assert flower._remembered(memory) == 2**64 - 1
