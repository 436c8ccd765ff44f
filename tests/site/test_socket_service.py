"""The wall between courier and site service: whole messages pass, nothing else does."""

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import turned

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


def test_a_socket_in_use_is_left_alone_also_when_its_queue_is_full(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(str(path))
        deaf.listen(0)
        with contextlib.ExitStack() as waiting:
            for _ in range(2):
                one = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                one.setblocking(False)
                one.connect_ex(str(path))
            with pytest.raises(AddressTaken, match="in use"):
                serve(lambda request: b"", path)
        assert path.exists()


def test_a_symbolic_link_in_the_way_is_left_alone(path, tmp_path):
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(AddressTaken, match="not a socket"):
        serve(lambda request: b"", path)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(AddressTaken, match="no socket can be made"):
        serve(lambda request: b"", tmp_path / "none" / "s.sock")


@pytest.mark.parametrize("name", ["a b.sock", "100%41#?.sock", "仁济医院.sock", "ü&=+.sock"])
def test_any_name_means_the_file_of_that_name(tmp_path, name):
    stop = serve(turned, tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert call(tmp_path / name, b"ab") == b"ba"
    assert is_serving(tmp_path / name)
    stop(0.5)
    assert not list(tmp_path.iterdir())


def test_stopping_leaves_the_socket_of_a_successor(path):
    stop = serve(turned, path)
    path.unlink()
    stop_other = serve(lambda request: b"other", path)
    moved = path.with_name("kept")
    path.rename(moved)  # gRPC itself removes whatever has the name; ours must not
    moved.touch()
    stop(0.1)
    assert moved.exists()
    stop_other(0.1)


# ------------------------------------------------------------------------------------------------------- permissions
CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


@pytest.fixture
def open_folder():
    folder = Path(tempfile.mkdtemp(prefix="fs."))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def connects(path, *, user, group):
    done = subprocess.run(
        ["/usr/bin/python3", "-c", CONNECT, str(path)], user=user, group=group, extra_groups=[], capture_output=True
    )
    assert done.returncode == 0 or b"PermissionError" in done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("mode", [0o606, 0o666, 0o777, 0o644, 0o400, 0])
def test_a_mode_that_lets_in_others_is_refused(path, mode):
    with pytest.raises(ValueError, match="wanted 0600 or 0660"):
        serve(turned, path, mode=mode)
    assert not path.exists()


def test_the_mode_and_group_are_what_was_asked_for(path):
    group = os.getgid()
    stop = serve(turned, path, mode=0o660, group=group)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert path.stat().st_gid == group
    stop(0.5)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/bin/python3").exists(), reason="becomes another account")
def test_only_its_owner_and_if_so_set_its_group_can_connect(open_folder):
    path, stranger, member = open_folder / "s.sock", 65534, 54321
    stop = serve(turned, path)
    assert not connects(path, user=stranger, group=member)
    stop(0.5)
    stop = serve(turned, path, mode=0o660, group=member)
    assert connects(path, user=stranger, group=member)
    assert not connects(path, user=stranger, group=stranger)
    stop(0.5)


# --------------------------------------------------------------------------------------------------------- the format
TYPES = {"uint32": 13, "uint64": 4, "bytes": 12}  # google.protobuf.FieldDescriptorProto.Type


def published():
    """What site_service.proto says: package, service, method, fields."""
    text = Path(socket_service.__file__).with_name("site_service.proto").read_text(encoding="utf-8")
    text = re.sub(r"//.*", "", text)
    package = re.search(r"^package ([\w.]+);", text, re.M)[1]
    (service, body) = re.search(r"service (\w+) \{(.*?)\n\}", text, re.S).groups()
    methods = re.findall(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);", body)
    messages = dict(re.findall(r"message (\w+) \{(.*?)\n\}", text, re.S))
    fields = {
        name: [(field, TYPES[kind], int(number)) for kind, field, number in re.findall(r"(\w+) (\w+) = (\d+);", inside)]
        for name, inside in messages.items()
    }
    assert re.search(r'^syntax = "proto3";', text, re.M)
    assert not re.search(r"\b(repeated|optional|oneof|map|extend|import|option|enum)\b", text)
    return package, service, methods, fields


def test_the_published_file_says_what_is_spoken():
    package, service, methods, fields = published()
    assert f"{package}.{service}" == socket_service.SERVICE
    assert methods == [("Deliver", "stream ", "Chunk", "stream ", "Chunk")]
    assert f"/{package}.{service}/Deliver" == METHOD
    spoken = socket_service._Chunk.DESCRIPTOR
    assert spoken.full_name == f"{package}.Chunk"
    assert spoken.file.package == package
    assert fields == {"Chunk": [(field.name, field.type, field.number) for field in spoken.fields]}
    assert str(socket_service.VERSION) == re.search(r"\.v(\d+)$", package)[1]


def test_bytes_on_the_wire_are_these():
    assert decode_chunk(b"\x08\x01\x10\x02\x1a\x02ab") == Chunk(1, 2, b"ab")
    assert list(split(b"ab")) == [b"\x08\x01\x10\x02\x1a\x02ab"]
