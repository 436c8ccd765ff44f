"""A reply as a site uploads it, object by object: the honest shape is read, and nothing else."""

import hashlib
import json
import random

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import MessageError, TooLarge
from fedseek_server.app import to_record
from fedseek_server.objects import parse_object, read_reply

CHUNK = 5 << 20


@pytest.fixture(autouse=True)
def in_a_task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)


def objects_of(record):
    """Root and contents, as Flower itself makes them."""
    message = Message(record, 5, "query.round", ttl=60)
    return message.object_id, {key: each.deflate() for key, each in get_all_nested_objects(message).items()}


class Store(dict):
    """Keeps what was pulled; makes objects that name one another, as a site could."""

    def __init__(self, contents=()):
        super().__init__(contents)
        self.pulled = []

    def pull(self, object_id):
        self.pulled.append(object_id)
        return self[object_id]

    def add(self, kind, children=(), body=b"", *, length=None):
        head = f"{kind} {','.join(children)} {len(body) if length is None else length}"
        content = head.encode() + b"\0" + body
        object_id = hashlib.sha256(content).hexdigest()
        self[object_id] = content
        return object_id

    def reply(self, chunks, *, shape, order, dtype="uint8", stype="raw", record="fedseek", field="message", **more):
        described = {"dtype": dtype, "shape": shape, "stype": stype, "arraychunk_ids": order, **more}
        array = self.add("Array", chunks, json.dumps(described).encode())
        arrays = self.add("ArrayRecord", [array], json.dumps({field: array}).encode())
        dictionary = self.add("RecordDict", [arrays], json.dumps({record: arrays}).encode())
        return self.add("Message", [dictionary], b"whatever")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_what_flower_makes_of_a_reply_is_read_back(size):
    data = random.Random(size).randbytes(size)
    root, contents = objects_of(to_record(data))
    store = Store(contents)
    assert read_reply(root, store.pull, limit=size) == data
    assert sorted(store.pulled) == sorted(contents)


def test_equal_pieces_are_pulled_once_and_used_as_often_as_they_are_there():
    data = bytes(3 * CHUNK)
    root, contents = objects_of(to_record(data))
    store = Store(contents)
    assert read_reply(root, store.pull, limit=len(data)) == data
    assert len(store.pulled) == 5


def test_whatever_is_missing_the_reply_is_on_its_way():
    root, contents = objects_of(to_record(bytes(range(256)) * 30_000))
    for missing in contents:
        assert (
            read_reply(root, lambda wanted, gone=missing: None if wanted == gone else contents[wanted], limit=1 << 30)
            is None
        )


def test_a_few_bytes_that_say_they_are_many_gigabytes_are_refused_unread():
    store = Store()
    chunk = store.add("ArrayChunk", [], bytes(1000))
    bomb = store.reply([chunk], shape=[1000 * 10_000], order=[0] * 10_000)
    with pytest.raises(TooLarge, match="10000000 bytes"):
        read_reply(bomb, store.pull, limit=9_999_999)
    assert chunk not in store.pulled
    liar = store.reply([chunk], shape=[10], order=[0] * 10_000)
    with pytest.raises(MessageError):
        read_reply(liar, store.pull, limit=100)


def test_chunks_beyond_what_the_array_says_are_not_gathered():
    store = Store()
    chunks = [store.add("ArrayChunk", [], bytes([number]) * 100) for number in range(50)]
    root = store.reply(chunks, shape=[250], order=list(range(50)))
    with pytest.raises(MessageError):
        read_reply(root, store.pull, limit=1000)
    assert len(store.pulled) == 4 + 3


WRONG = {
    "another dtype": {"dtype": "float32"},
    "a pickle": {"stype": "pickle"},
    "two dimensions": {"shape": [2, 2]},
    "no dimension": {"shape": []},
    "a negative size": {"shape": [-4]},
    "a size of text": {"shape": ["4"]},
    "a chunk that is not there": {"order": [0, 1]},
    "a chunk from behind": {"order": [-1]},
    "no chunk": {"order": []},
    "too small": {"shape": [3]},
    "too large": {"shape": [5]},
    "a field more": {"note": "hello"},
    "another record": {"record": "other"},
    "another field": {"field": "other"},
}


@pytest.mark.parametrize("name", WRONG)
def test_an_array_that_is_not_ours_is_refused(name):
    store = Store()
    chunk = store.add("ArrayChunk", [], b"data")
    good = {"shape": [4], "order": [0]}
    assert read_reply(store.reply([chunk], **good), store.pull, limit=100) == b"data"
    with pytest.raises(MessageError):
        read_reply(store.reply([chunk], **{**good, **WRONG[name]}), store.pull, limit=100)


def test_a_chunk_with_parts_is_refused():
    store = Store()
    inner = store.add("ArrayChunk", [], b"data")
    with pytest.raises(MessageError):
        read_reply(store.reply([store.add("ArrayChunk", [inner], b"data")], shape=[4], order=[0]), store.pull, limit=9)


@pytest.mark.parametrize(
    "record",
    [RecordDict(), RecordDict({"fedseek": ConfigRecord({"x": b"y"})}), RecordDict({"fedseek": MetricRecord({"x": 1})})],
)
def test_other_records_are_refused(record):
    root, contents = objects_of(record)
    with pytest.raises(MessageError):
        read_reply(root, Store(contents).pull, limit=100)


def test_two_records_are_refused():
    record = to_record(b"x")
    record["second"] = ConfigRecord()
    root, contents = objects_of(record)
    with pytest.raises(MessageError, match="2 parts"):
        read_reply(root, Store(contents).pull, limit=100)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"ArrayChunk  3",
        b"ArrayChunk  4\0abc",
        b"ArrayChunk  03\0abc",
        b"ArrayChunk  -3\0abc",
        b"ArrayChunk 3\0abc",
        b"ArrayChunk   3\0abc",
        b"Array  3\0abc",
        b"arraychunk  3\0abc",
        b"ArrayChunk ../../etc/passwd 3\0abc",
        b"ArrayChunk " + b"A" * 64 + b" 3\0abc",
        b"ArrayChunk " + b"a" * 64 + b", 3\0abc",
        b"ArrayChunk " + b"a" * 64 + b"\n 3\0abc",
        b"x" * 2_000_000 + b"\0",
        "ArrayChunk  \uff13\0abc".encode(),
    ],
)
def test_an_object_with_another_head_is_none(content):
    with pytest.raises(MessageError):
        parse_object(content, "ArrayChunk")


@given(st.data())
def test_no_damage_to_any_object_does_more_than_be_refused(data):
    """Flower's own reader lets errors of other kinds through, which would end the coordinator's run."""
    contents = Store()
    root = contents.reply([contents.add("ArrayChunk", [], b"0123456789")], shape=[10], order=[0])
    victim = data.draw(st.sampled_from(sorted(contents)))
    content = bytearray(contents[victim])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["change", "cut", "insert", "swap"]))
        if kind == "change" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            content = bytearray(contents[data.draw(st.sampled_from(sorted(contents)))])
    contents[victim] = bytes(content)
    try:
        got = read_reply(root, contents.get, limit=10)
    except MessageError:
        return
    assert got is None or len(got) <= 10
