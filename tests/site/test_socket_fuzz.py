"""The wall under attack: whatever a courier sends, it gets a gRPC status, and the service goes on, in bounded memory."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback import turned, until

from fedseek.errors import TooLarge, Unreachable
from fedseek_site.socket_service import (
    CHUNK_BYTES,
    FRAME_BYTES,
    METHOD,
    MOST_CALLS,
    SERVICE,
    SPARE_THREADS,
    Chunk,
    call,
    encode_chunk,
    is_serving,
    serve,
    split,
)

LIMIT = 3 * CHUNK_BYTES
OURS = {
    (grpc.StatusCode.FAILED_PRECONDITION, "Malformed"),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "TooLarge"),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "s.sock"
    stop = serve(turned, path, limit=LIMIT, patience=0.8)
    yield path
    stop(0.5)


@pytest.fixture
def channel(service):
    with grpc.insecure_channel(f"unix:{service}", options=[("grpc.max_send_message_length", 64 << 20)]) as channel:
        yield channel


@pytest.fixture(scope="module")
def shared_channel(service):
    with grpc.insecure_channel(f"unix:{service}") as channel:
        yield channel


def status_of(channel, frames, *, method=METHOD, timeout=5.0):
    """The status that the service gives to these frames, or the answer."""
    answer = channel.stream_stream(method)(iter(frames), timeout=timeout)
    try:
        return b"".join(answer)
    except grpc.RpcError:
        return answer.code(), answer.details()


def field(number, wire_type, content):
    return bytes([number << 3 | wire_type]) + content


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


numbers = st.sampled_from([0, 1, 2, 127, 128, CHUNK_BYTES, LIMIT, LIMIT + 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
pieces = st.one_of(
    st.builds(lambda n: field(1, 0, varint(n)), numbers),
    st.builds(lambda n: field(2, 0, varint(n)), numbers),
    st.builds(lambda data: field(3, 2, varint(len(data)) + data), st.binary(max_size=5)),
    st.builds(
        lambda data, lie: field(3, 2, varint(len(data) + lie) + data), st.binary(max_size=5), st.integers(0, 300)
    ),
    st.builds(lambda number, n: field(number, 0, varint(n)), st.integers(4, 15), numbers),
    st.builds(lambda number, kind: field(number, kind, bytes(8)), st.integers(1, 3), st.integers(0, 7)),
    st.binary(max_size=8),
)
frames = st.one_of(
    st.lists(pieces, max_size=4).map(b"".join),
    st.builds(
        lambda version, total, data: encode_chunk(Chunk(version, total, data)),
        st.sampled_from([0, 1, 1, 1, 1, 2, 2**32 - 1]),
        st.one_of(st.integers(0, 5), numbers.filter(lambda n: n < 2**64)),
        st.binary(max_size=5),
    ),
)


@given(st.lists(frames, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_frames_get_an_answer_or_one_of_two_refusals(shared_channel, sent):
    got = status_of(shared_channel, sent)
    if isinstance(got, bytes):
        assert sent, "nothing was sent, so nothing can be answered"
    else:
        assert got in OURS


@given(st.binary(max_size=300), st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_whole_message_with_one_byte_changed_gets_an_answer_or_a_refusal(shared_channel, message, data):
    (frame,) = split(message)
    place = data.draw(st.integers(0, len(frame) - 1))
    changed = frame[:place] + bytes([frame[place] ^ data.draw(st.integers(1, 255))]) + frame[place + 1 :]
    got = status_of(shared_channel, [changed])
    assert isinstance(got, bytes) or got in OURS


def whole(size):
    return list(split(os.urandom(size)))


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([], id="nothing"),
        pytest.param([b""], id="an empty frame"),
        pytest.param([b""] * 50, id="many empty frames"),
        pytest.param([encode_chunk(Chunk(1, 5, b""))], id="a chunk without data"),
        pytest.param([encode_chunk(Chunk(1, 0, b"")), encode_chunk(Chunk(1, 0, b""))], id="two empty messages"),
        pytest.param([encode_chunk(Chunk(1, 4, b"ab")), encode_chunk(Chunk(1, 4, b"cd"))], id="short chunks"),
        pytest.param([encode_chunk(Chunk(1, 0, b"x"))], id="more than announced"),
        pytest.param([encode_chunk(Chunk(1, 3, b"x"))], id="less than announced"),
        pytest.param(whole(2 * CHUNK_BYTES)[:1], id="half a message"),
        pytest.param(whole(CHUNK_BYTES + 9)[::-1], id="chunks in another order"),
        pytest.param([*whole(CHUNK_BYTES + 9), whole(9)[0]], id="one chunk more"),
        pytest.param([whole(CHUNK_BYTES + 9)[0]] * 2, id="the same chunk twice"),
        pytest.param([whole(9)[0] + b"\x20\x01"], id="a field of tomorrow"),
        pytest.param([whole(9)[0] + b"\x0a\x01x"], id="a field of another type"),
    ],
)
def test_what_is_no_message_is_refused(channel, service, sent):
    assert status_of(channel, sent) == (grpc.StatusCode.FAILED_PRECONDITION, "Malformed")
    assert call(service, b"still here") == b"ereh llits"


@pytest.mark.parametrize("total", [LIMIT + 1, 2**32, 2**64 - 1])
def test_an_announcement_over_the_limit_is_refused_before_anything_is_kept(channel, total):
    assert status_of(channel, [encode_chunk(Chunk(1, total, b""))]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TooLarge")


def test_the_limit_itself_passes(service):
    message = os.urandom(LIMIT)
    assert call(service, message) == turned(message)
    with pytest.raises(TooLarge):
        call(service, bytes(LIMIT + 1))


@pytest.mark.parametrize("size", [FRAME_BYTES + 1, 8 << 20, 32 << 20])
def test_a_frame_over_the_limit_is_refused_by_grpc(channel, service, size):
    code, _ = status_of(channel, [bytes(size)])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert is_serving(service)


def test_an_endless_stream_ends(channel, service):
    full = whole(2 * CHUNK_BYTES)[0]
    assert status_of(channel, itertools.repeat(full)) == (grpc.StatusCode.FAILED_PRECONDITION, "Malformed")
    assert is_serving(service)


@pytest.mark.parametrize("method", ["/fedseek.site.v1.SiteService/Other", "/fedseek.site.v2.SiteService/Deliver", "/x"])
def test_another_method_is_not_there(channel, method):
    code, _ = status_of(channel, whole(3), method=method)
    assert code is grpc.StatusCode.UNIMPLEMENTED


def test_a_watch_on_the_health_is_not_there_and_holds_no_place(channel, service):
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    for _ in range(3 * (MOST_CALLS + SPARE_THREADS)):
        with pytest.raises(grpc.RpcError) as caught:
            next(health_pb2_grpc.HealthStub(channel).Watch(request, timeout=5))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert is_serving(service)


def test_raw_bytes_on_the_socket_do_no_harm(service):
    import socket

    for greeting in (
        b"",
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(5000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(str(service))
            stream.sendall(greeting)
    assert call(service, b"ab") == b"ba"


# ----------------------------------------------------------------------------------------------- streams that hang on
class Stall:
    """Frames, and then nothing, until released."""

    def __init__(self, *sent):
        self.sent, self.released = sent, threading.Event()

    def __iter__(self):
        yield from self.sent
        self.released.wait(30)


def test_a_stream_that_stops_half_way_is_ended_and_holds_nobody_up(channel, service):
    stalls = [Stall(whole(2 * CHUNK_BYTES)[0]) for _ in range(MOST_CALLS)]
    hanging = [channel.stream_stream(METHOD)(iter(stall), timeout=30) for stall in stalls]
    time.sleep(0.3)
    assert is_serving(service)  # while every place is taken
    until(lambda: call(service, b"ab") == b"ba", 15, Unreachable)
    for answer in hanging:
        with pytest.raises(grpc.RpcError) as caught:
            list(answer)
        assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
    for stall in stalls:
        stall.released.set()


def test_an_answer_that_nobody_takes_is_ended_and_holds_nobody_up(tmp_path):
    path = tmp_path / "s.sock"
    stop = serve(lambda request: bytes(64 << 20) if request == b"much" else request, path, patience=1.0)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        hanging = [channel.stream_stream(METHOD)(split(b"much"), timeout=30) for _ in range(MOST_CALLS)]
        time.sleep(0.4)
        assert is_serving(path)  # while every place is taken
        with pytest.raises(Unreachable):
            call(path, b"little")
        until(lambda: call(path, b"little") == b"little", 15, Unreachable)
        for answer in hanging:
            answer.cancel()
    stop(0.5)


def test_calls_cancelled_at_any_moment_leave_the_service_well(channel, service):
    for number in range(60):
        answer = channel.stream_stream(METHOD)(iter(Stall(*whole(number * 40_000))), timeout=30)
        time.sleep(number % 4 * 0.003)
        answer.cancel()
    until(lambda: call(service, b"ab") == b"ba", 10, Unreachable)
    assert is_serving(service)


def test_many_calls_at_once_are_answered_or_told_to_come_back(service):
    told = []

    def one(number):
        message = b"%d" % number * 1000
        while True:
            try:
                told.append(call(service, message) == turned(message))
                return
            except Unreachable:
                time.sleep(0.02)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert told == [True] * 40


def test_too_many_calls_are_not_mistaken_for_too_large_a_message(tmp_path):
    release = threading.Event()
    stop = serve(lambda request: b"done" * release.wait(20), tmp_path / "s.sock")
    errors = []

    def one():
        try:
            call(tmp_path / "s.sock", b"x")
        except Unreachable as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: len(errors) == 20 - MOST_CALLS, 10)
    release.set()
    for thread in threads:
        thread.join(20)
    stop(0.5)
    assert len(errors) == 20 - MOST_CALLS


def test_a_courier_that_left_does_not_have_its_message_handled(tmp_path):
    """It waited for its turn and was killed: the message is not worked on for nobody."""
    handled, release = [], threading.Event()

    def handle(request):
        handled.append(request)
        release.wait(20)
        return request

    path = tmp_path / "s.sock"
    stop = serve(handle, path)
    first = threading.Thread(target=call, args=(path, b"first"))
    first.start()
    until(lambda: handled == [b"first"], 10)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        second = channel.stream_stream(METHOD)(iter(whole(5)), timeout=30)
        time.sleep(0.2)
        second.cancel()
    time.sleep(0.8)
    release.set()
    first.join(20)
    assert call(path, b"third") == b"third"
    assert handled == [b"first", b"third"]
    stop(0.5)


SERVER = """
import sys, time
from pathlib import Path
from fedseek_site.socket_service import serve
stop = serve(lambda request: request, Path(sys.argv[1]), limit=64 << 20, patience=20.0)
time.sleep(60)
"""


def resident(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def test_memory_is_bounded_by_one_message_however_many_are_sent(tmp_path):
    path = tmp_path / "s.sock"
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(path)])
    try:
        until(lambda: is_serving(path), 20)
        before = resident(process.pid)
        almost = list(split(bytes(64 << 20)))[:-1]
        stalls = [Stall(*almost) for _ in range(12)]
        with contextlib.ExitStack() as channels:
            hanging = []
            for stall in stalls:
                channel = channels.enter_context(grpc.insecure_channel(f"unix:{path}"))
                hanging.append(channel.stream_stream(METHOD)(iter(stall), timeout=30))
            time.sleep(2)
            assert sum(not answer.done() for answer in hanging) == MOST_CALLS
            grown = resident(process.pid) - before
            assert is_serving(path)
            for stall in stalls:
                stall.released.set()
        assert grown < 3 * (64 << 20), f"{grown >> 20} MiB for one message of 64 MiB"
    finally:
        process.kill()
        process.wait()
