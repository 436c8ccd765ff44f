"""The site service's socket: gRPC on a Unix socket of mode 0600, one call, bytes in and bytes out.

This is the wall between the courier, which talks to the network, and the process that owns data and keys. It checks
version and size before anything is kept, and passes whole messages to one function; what they mean is that function's
business. The format is site_service.proto.

What a courier that was taken over can do here: have messages answered, as any courier can, and be a nuisance to itself.
One message at a time is in memory, ``limit`` bytes at most; ``MOST_CALLS`` calls are waited for, the rest is told to
come back; a stream that stops half-way is ended after ``PATIENCE_SECONDS``; the health check is answered meanwhile.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import quote

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedseek.daemon.process import check_socket_path
from fedseek.errors import AddressTaken, FedseekError, Malformed, TooLarge, Unreachable

VERSION: Final = 1
CHUNK_BYTES: Final = 1 << 20
LARGEST_MESSAGE: Final = 1 << 30  # bytes
FRAME_BYTES: Final = CHUNK_BYTES + 1024  # a chunk and its fields
SERVICE: Final = "fedseek.site.v1.SiteService"
METHOD: Final = f"/{SERVICE}/Deliver"
MOST_CALLS: Final = 4  # that are being answered or wait for their turn
SPARE_THREADS: Final = 4  # to answer health checks, and to tell further calls to come back
PATIENCE_SECONDS: Final = 60.0  # in which a whole message has to come in, and in which its answer has to be taken
MODES: Final = (0o600, 0o660)
FAILED: Final = "INTERNAL"  # all that is told of an exception
_OPTIONS: Final = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_send_message_length", FRAME_BYTES),
    ("grpc.so_reuseport", 0),
]

_log = logging.getLogger(__name__)


def _chunk_type() -> Any:
    """The ``Chunk`` of site_service.proto, without a compiler or generated code."""
    file = descriptor_pb2.FileDescriptorProto(name="site_service.proto", package="fedseek.site.v1", syntax="proto3")
    message = file.message_type.add(name="Chunk")
    kinds = descriptor_pb2.FieldDescriptorProto
    for number, (name, kind) in enumerate(
        (("version", kinds.TYPE_UINT32), ("total", kinds.TYPE_UINT64), ("data", kinds.TYPE_BYTES)), start=1
    ):
        message.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fedseek.site.v1.Chunk"))


_Chunk: Any = _chunk_type()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a message, as read from the wire."""

    version: int
    total: int
    data: bytes


def encode_chunk(chunk: Chunk) -> bytes:
    """As protobuf."""
    encoded: bytes = _Chunk(version=chunk.version, total=chunk.total, data=chunk.data).SerializeToString()
    return encoded


def decode_chunk(data: bytes) -> Chunk:
    """From protobuf.

    Raises:
        Malformed: it is not a chunk.
    """
    try:
        parsed = _Chunk.FromString(data)
    except DecodeError as error:
        raise Malformed("site service: a frame is not a Chunk") from error
    if len(UnknownFieldSet(parsed)):
        raise Malformed("site service: a chunk has a field that this version does not know")
    return Chunk(parsed.version, parsed.total, parsed.data)


def split(message: bytes) -> Iterator[bytes]:
    """Encoded chunks of a message; at least one, so that an empty message arrives too.

    >>> [decode_chunk(piece).total for piece in split(b"four")]
    [4]
    """
    view = memoryview(message)
    for start in range(0, max(len(message), 1), CHUNK_BYTES):
        yield encode_chunk(Chunk(VERSION, len(message), bytes(view[start : start + CHUNK_BYTES])))


def join(frames: Iterable[bytes], *, limit: int) -> bytes:
    """The message that chunks make. What is held grows with what came in, not with what is announced.

    Raises:
        TooLarge: it announces more than ``limit`` bytes; nothing of it is kept.
        Malformed: another version, a total that changes, a chunk that is not of the size it should have at its place,
            or fewer bytes than announced.
    """
    message, got, total = io.BytesIO(), 0, None
    for frame in frames:
        chunk = decode_chunk(frame)
        if chunk.version != VERSION:
            raise Malformed(
                f"site service: got version {chunk.version}, wanted {VERSION}", hint="install the same release"
            )
        if chunk.total > limit:
            raise TooLarge(f"site service: got a message of {chunk.total} bytes, wanted at most {limit}")
        if total is not None and (chunk.total != total or got == total):
            raise Malformed(f"site service: got more than the {total} bytes announced, or another total")
        total = chunk.total
        if len(chunk.data) != min(CHUNK_BYTES, total - got):
            raise Malformed(f"site service: got a chunk of {len(chunk.data)} bytes at {got} of {total}")
        got += message.write(chunk.data)
    if total is None or got != total:
        raise Malformed(f"site service: got {got} of {total} bytes")
    return message.getvalue()  # does not copy


def serve(
    handle: Callable[[bytes], bytes],
    path: Path,
    *,
    limit: int = LARGEST_MESSAGE,
    mode: int = 0o600,
    group: int | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Callable[[float], None]:
    """Serve ``handle`` on a Unix socket, in threads of its own. Returns what stops it, given seconds of grace.

    Keep what is returned: the service ends when nobody holds it any more.

    Calls are handled one at a time. A courier that died and came back with the same message waits until the first
    call is done, and then gets the same answer.

    Args:
        handle: from a message of the coordinator's to the site's answer. It answers its own errors; if it raises
            nevertheless, the courier is told "INTERNAL" and no more.
        path: of the socket. A stale one is replaced.
        limit: bytes of the largest message taken.
        mode: of the socket; 0o660 lets in a courier that runs under another account of the socket's group. That
            account also needs the right to pass through the folder.
        group: number of the group that the socket is given to; None: as the folder has it.
        patience: seconds in which a message has to come in whole, and in which an answer has to be taken.

    Raises:
        AddressTaken: another process answers there, or no socket can be made of the path.
    """
    if mode not in MODES:
        raise ValueError(f"got mode {mode:04o}, wanted 0600 or 0660: nobody else may call a site")
    free_place(path)
    threads = MOST_CALLS + SPARE_THREADS
    wellness = health.HealthServicer()
    server = grpc.server(
        ThreadPoolExecutor(max_workers=threads, thread_name_prefix="site"),
        handlers=(_handler(handle, limit, patience), _health_handler(wellness)),
        options=_OPTIONS,
        maximum_concurrent_rpcs=threads,
    )
    bind_private(server, path)
    if group is not None:
        os.chown(path, -1, group)
    path.chmod(mode)
    ours = path.stat().st_ino
    server.start()
    wellness.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)

    def stop(grace: float) -> None:
        wellness.enter_graceful_shutdown()
        server.stop(grace).wait()
        if path.exists() and path.stat().st_ino == ours:
            path.unlink(missing_ok=True)

    return stop


def call(path: Path, request: bytes, *, limit: int = LARGEST_MESSAGE, timeout: float | None = None) -> bytes:
    """Hand a message to the site service; its answer. Waits as long as the service works on it.

    Raises:
        Unreachable: nobody answers on the socket, or not any more; the same message may be sent again.
        TooLarge, Malformed: the service refused the message as such, or its answer is neither.
    """
    with grpc.insecure_channel(grpc_address(path), options=_OPTIONS) as channel:
        answer = channel.stream_stream(METHOD)(split(request), timeout=timeout)
        try:
            return join(answer, limit=limit)
        except grpc.RpcError:
            raise _as_ours(answer.code(), answer.details()) from None
        finally:
            answer.cancel()


def is_serving(path: Path, *, timeout: float = 2.0) -> bool:
    """Does the service say that it is well (grpc.health.v1)?"""
    with grpc.insecure_channel(grpc_address(path), options=_OPTIONS) as channel:
        try:
            asked = health_pb2.HealthCheckRequest(service=SERVICE)
            answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _handler(handle: Callable[[bytes], bytes], limit: int, patience: float) -> grpc.GenericRpcHandler:
    places, turn = threading.BoundedSemaphore(MOST_CALLS), threading.Lock()

    def deliver(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if not places.acquire(blocking=False):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Busy")
        if not context.add_callback(places.release):  # the place is held until the answer is taken
            places.release()
            return iter(())
        if not _wait_for(turn, context):
            return iter(())
        try:
            request = _received(frames, context, limit, patience)
            answer = _answer(handle, request, context)
        finally:
            turn.release()
        context.add_callback(_end_after(patience, context).cancel)
        return split(answer)

    method = grpc.stream_stream_rpc_method_handler(deliver)
    return grpc.method_handlers_generic_handler(SERVICE, {"Deliver": method})


def _health_handler(wellness: health.HealthServicer) -> grpc.GenericRpcHandler:
    """``Check`` alone: each ``Watch`` would hold a place for ever, and the standard lets a server do without it."""
    method = grpc.unary_unary_rpc_method_handler(
        wellness.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": method})


def _wait_for(turn: threading.Lock, context: grpc.ServicerContext) -> bool:
    """Take the turn, unless the caller leaves first. Nothing of its message is read meanwhile."""
    while not turn.acquire(timeout=0.5):
        if not context.is_active():
            return False
    return True


def _received(frames: Iterator[bytes], context: grpc.ServicerContext, limit: int, patience: float) -> bytes:
    timer = _end_after(patience, context)
    try:
        return join(frames, limit=limit)
    except FedseekError as error:
        _abort(context, error)
    finally:
        timer.cancel()


def _end_after(seconds: float, context: grpc.ServicerContext) -> threading.Timer:
    """End the call then, unless the timer is cancelled: whatever waits for its other side fails."""
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    return timer


def _answer(handle: Callable[[bytes], bytes], request: bytes, context: grpc.ServicerContext) -> bytes:
    answer = None
    try:
        answer = handle(request)
    finally:
        if answer is None:
            _log.exception("the site service failed on a message of %d bytes", len(request))
            context.abort(grpc.StatusCode.INTERNAL, FAILED)  # replaces the exception: its text stays here
    return answer


def _abort(context: grpc.ServicerContext, error: FedseekError) -> NoReturn:
    _log.warning("refused a call: %s", error.message)
    code = grpc.StatusCode.RESOURCE_EXHAUSTED if isinstance(error, TooLarge) else grpc.StatusCode.FAILED_PRECONDITION
    context.abort(code, error.code)
    raise AssertionError("abort returns never")


def _as_ours(code: grpc.StatusCode, details: str | None) -> FedseekError:
    # by gRPC's own hand RESOURCE_EXHAUSTED means too many calls, and INTERNAL a broken connection
    if (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, TooLarge.__name__):
        return TooLarge("site service: the message is larger than it takes")
    ours = (code, details) == (grpc.StatusCode.INTERNAL, FAILED)
    if ours or code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED):
        return Malformed(f"site service: it refused the message ({code.name})", hint="the site's own log says more")
    return Unreachable(f"site service: {code.name}", hint="is it running, and may this account open its socket?")


def grpc_address(path: Path) -> str:
    """As gRPC reads it: a URI, in which a name may hold any character."""
    return f"unix:{quote(os.fsencode(path))}"


def bind_private(server: grpc.Server, path: Path) -> None:
    """Have the server listen on a socket of mode 0600. Raises ``AddressTaken``."""
    previous = os.umask(0o177)  # so that nobody else can connect before chmod
    try:
        server.add_insecure_port(grpc_address(path))
    except RuntimeError as error:
        raise AddressTaken(f"{path}: no socket can be made there", hint="is its folder there, and ours?") from error
    finally:
        os.umask(previous)


def free_place(path: Path) -> None:
    """Make place for a socket; what is not a stale one stays.

    Raises:
        AddressTaken: something else is there, or the path is too long.
    """
    check_socket_path(path)
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise AddressTaken(f"{path} is not a socket", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        if probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise AddressTaken(f"{path} is in use by another process", hint="is this site running already?")
    path.unlink(missing_ok=True)
