"""The wall between courier and site service: whole messages pass, nothing else does."""

import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedseek_site
from fedseek.errors import AddressTaken, FedseekError, Malformed, TooLarge, Unreachable
from fedseek_site import socket_service
from fedseek_site.socket_service import (
    CHUNK_BYTES,
    METHOD,
    Chunk,
    call,
    decode_chunk,
    encode_chunk,
    is_serving,
    join,
    serve,
    split,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "北岸.sock"


@pytest.fixture
def service(path):
    stop = serve(lambda request: request[::-1], path, limit=4 * CHUNK_BYTES)
    yield path
    stop(0.5)


def raw(path, frames):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        return list(channel.stream_stream(METHOD)(iter(frames), timeout=5))


def refused(path, frames):
    with pytest.raises(grpc.RpcError) as caught:
        raw(path, frames)
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_message_of_any_size_passes(service, size):
    message = bytes(range(256)) * (size // 256 + 1)
    assert call(service, message[:size]) == message[:size][::-1]


def test_the_socket_is_for_its_owner_alone(service):
    assert service.stat().st_mode & 0o777 == 0o600


def test_it_says_that_it_is_well(service, tmp_path):
    assert is_serving(service)
    assert not is_serving(tmp_path / "nobody.sock", timeout=0.3)


def test_too_large_a_message_is_refused_at_its_first_chunk(service):
    with pytest.raises(TooLarge):
        call(service, bytes(4 * CHUNK_BYTES + 1))
    first = encode_chunk(Chunk(1, 2**63, b""))
    assert refused(service, [first]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TooLarge")


def test_too_large_an_answer_is_refused(path):
    stop = serve(lambda request: bytes(100), path)
    with pytest.raises(TooLarge):
        call(path, b"x", limit=99)
    stop(0.5)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"\xff\xff\xff"],
        [encode_chunk(Chunk(2, 1, b"x"))],
        [encode_chunk(Chunk(0, 1, b"x"))],
        [encode_chunk(Chunk(1, 1, b"xy"))],
        [encode_chunk(Chunk(1, 3, b"xy"))],
        [encode_chunk(Chunk(1, 2, b"x")), encode_chunk(Chunk(1, 3, b"x"))],
        [encode_chunk(Chunk(1, 2, b"x")), encode_chunk(Chunk(2, 2, b"x"))],
    ],
)
def test_what_is_no_message_is_refused_and_the_service_stays(service, frames):
    assert refused(service, frames) == (grpc.StatusCode.FAILED_PRECONDITION, "Malformed")
    assert call(service, b"still here") == b"ereh llits"


def test_a_frame_larger_than_a_chunk_is_refused(service):
    code, _ = refused(service, [encode_chunk(Chunk(1, 3 * CHUNK_BYTES, bytes(2 * CHUNK_BYTES)))])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call(service, b"") == b""


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_join_never_fails_but_in_our_way(frames):
    with contextlib.suppress(FedseekError):
        join(frames, limit=1000)


@given(st.binary(max_size=2000))
@settings(max_examples=30)
def test_join_undoes_split(message):
    assert join(split(message), limit=len(message)) == message


def test_the_text_of_an_exception_stays_inside(path):
    def fail(request):
        raise RuntimeError("patient-42")

    stop = serve(fail, path)
    code, details = refused(path, split(b"x"))
    assert (code, details) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    with pytest.raises(Malformed) as caught:
        call(path, b"x")
    assert "patient" not in str(caught.value)
    stop(0.5)


def test_calls_are_handled_one_at_a_time(path):
    inside, most = [], []

    def slow(request):
        inside.append(request)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(request)
        return request

    stop = serve(slow, path)
    threads = [threading.Thread(target=call, args=(path, b"%d" % n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop(0.5)
    assert most == [1, 1, 1, 1]


def test_a_service_that_is_not_there_is_said_to_be_unreachable(path):
    with pytest.raises(Unreachable):
        call(path, b"x", timeout=2)


def test_a_service_that_ends_in_the_middle_is_unreachable_and_its_socket_gone(path):
    began = threading.Event()

    def slow(request):
        began.set()
        time.sleep(1)
        return request

    stop = serve(slow, path)
    threading.Thread(target=lambda: (began.wait(5), stop(0.1))).start()
    with pytest.raises(Unreachable):
        call(path, b"x")
    time.sleep(0.2)
    assert not path.exists()


def test_a_stale_socket_is_replaced(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    stop = serve(lambda request: b"new", path)
    assert call(path, b"x") == b"new"
    stop(0.5)


def test_a_socket_in_use_is_left_alone(service):
    with pytest.raises(AddressTaken, match="in use"):
        serve(lambda request: b"", service)
    assert call(service, b"ab") == b"ba"


def test_a_file_in_the_way_is_left_alone(path):
    path.write_text("precious")
    with pytest.raises(AddressTaken, match="not a socket"):
        serve(lambda request: b"", path)
    assert path.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    with pytest.raises(AddressTaken, match="at most"):
        serve(lambda request: b"", tmp_path / ("x" * 100))


def test_the_published_file_says_what_is_spoken():
    text = Path(fedseek_site.__file__, "..", "site_service.proto").resolve()
    text = Path(socket_service.__file__).with_name("site_service.proto").read_text()
    package = re.search(r"^package ([\w.]+);", text, re.M)[1]
    name, method = re.search(
        r"service (\w+) \{.*?rpc (\w+)\(stream Chunk\) returns \(stream Chunk\);", text, re.S
    ).groups()
    assert f"/{package}.{name}/{method}" == METHOD
    body = re.search(r"message Chunk \{(.*?)\n\}", text, re.S)[1]
    written = {(kind, field, int(number)) for kind, field, number in re.findall(r"(\w+) (\w+) = (\d+);", body)}
    kinds = {13: "uint32", 4: "uint64", 12: "bytes"}
    spoken = {(kinds[f.type], f.name, f.number) for f in socket_service._Chunk.DESCRIPTOR.fields}
    assert written == spoken
    assert decode_chunk(b"\x08\x01\x10\x02\x1a\x02ab") == Chunk(1, 2, b"ab")
