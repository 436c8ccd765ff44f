"""The site service's socket: gRPC on a Unix socket of mode 0600, one call, bytes in and bytes out.

This is the wall between the courier, which talks to the network, and the process that owns data and keys. It checks
version and size before anything is kept, and passes whole messages to one function; what they mean is that function's
business. The format is site_service.proto.
"""

from __future__ import annotations

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

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedseek.errors import AddressTaken, FedseekError, Malformed, TooLarge, Unreachable

VERSION: Final = 1
CHUNK_BYTES: Final = 1 << 20
LARGEST_MESSAGE: Final = 1 << 30  # bytes
FRAME_BYTES: Final = CHUNK_BYTES + 1024  # a chunk and its fields
SERVICE: Final = "fedseek.site.v1.SiteService"
METHOD: Final = f"/{SERVICE}/Deliver"
LONGEST_PATH: Final = 100  # bytes; the kernel's limit is 108
MOST_CALLS: Final = 8
_OPTIONS: Final = [
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
    """The message that chunks make.

    Raises:
        TooLarge: it announces more than ``limit`` bytes; nothing of it is kept.
        Malformed: another version, a total that changes, or more or fewer bytes than announced.
    """
    message, total = bytearray(), None
    for frame in frames:
        chunk = decode_chunk(frame)
        if chunk.version != VERSION:
            raise Malformed(
                f"site service: got version {chunk.version}, wanted {VERSION}", hint="install the same release"
            )
        if chunk.total > limit:
            raise TooLarge(f"site service: got a message of {chunk.total} bytes, wanted at most {limit}")
        total = chunk.total if total is None else total
        if chunk.total != total or len(message) + len(chunk.data) > total:
            raise Malformed(f"site service: got more than the {total} bytes announced, or another total")
        message += chunk.data
    if total is None or len(message) != total:
        raise Malformed(f"site service: got {len(message)} of {total} bytes")
    return bytes(message)


def serve(
    handle: Callable[[bytes], bytes], path: Path, *, limit: int = LARGEST_MESSAGE, mode: int = 0o600
) -> Callable[[float], None]:
    """Serve ``handle`` on a Unix socket, in threads of its own. Returns what stops it, given seconds of grace.

    Calls are handled one at a time. A courier that died and came back with the same message waits until the first
    call is done, and then gets the same answer.

    Args:
        handle: from a message of the coordinator's to the site's answer. It answers its own errors; if it raises
            nevertheless, the courier is told "INTERNAL" and no more.
        path: of the socket. A stale one is replaced.
        limit: bytes of the largest message taken.
        mode: of the socket; 0o660 lets in a courier that runs as another account of the folder's group.

    Raises:
        AddressTaken: another process answers there, or the path is no socket, or it is too long.
    """
    _free(path)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=MOST_CALLS, thread_name_prefix="site"),
        handlers=(_handler(handle, limit),),
        options=_OPTIONS,
        maximum_concurrent_rpcs=MOST_CALLS,
    )
    wellness = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(wellness, server)
    previous = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(previous)
    path.chmod(mode)
    server.start()
    wellness.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)

    def stop(grace: float) -> None:
        wellness.enter_graceful_shutdown()
        server.stop(grace).wait()
        path.unlink(missing_ok=True)

    return stop


def call(path: Path, request: bytes, *, limit: int = LARGEST_MESSAGE, timeout: float | None = None) -> bytes:
    """Hand a message to the site service; its answer. Waits as long as the service works on it.

    Raises:
        Unreachable: nobody answers on the socket, or not any more; the same message may be sent again.
        TooLarge, Malformed: the service refused the message as such, or its answer is neither.
    """
    with grpc.insecure_channel(f"unix:{path}", options=_OPTIONS) as channel:
        answer = channel.stream_stream(METHOD)(split(request), timeout=timeout)
        try:
            return join(answer, limit=limit)
        except grpc.RpcError:
            raise _as_ours(answer.code()) from None
        finally:
            answer.cancel()


def is_serving(path: Path, *, timeout: float = 2.0) -> bool:
    """Does the service say that it is well (grpc.health.v1)?"""
    with grpc.insecure_channel(f"unix:{path}", options=_OPTIONS) as channel:
        try:
            asked = health_pb2.HealthCheckRequest(service=SERVICE)
            answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _handler(handle: Callable[[bytes], bytes], limit: int) -> grpc.GenericRpcHandler:
    one_at_a_time = threading.Lock()

    def deliver(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            request = join(frames, limit=limit)
        except FedseekError as error:
            _abort(context, error)
        with one_at_a_time:
            if not context.is_active():
                return
            answer = _answer(handle, request, context)
        yield from split(answer)

    method = grpc.stream_stream_rpc_method_handler(deliver)
    return grpc.method_handlers_generic_handler(SERVICE, {"Deliver": method})


def _answer(handle: Callable[[bytes], bytes], request: bytes, context: grpc.ServicerContext) -> bytes:
    answer = None
    try:
        answer = handle(request)
    finally:
        if answer is None:
            _log.exception("the site service failed on a message of %d bytes", len(request))
            context.abort(grpc.StatusCode.INTERNAL, "INTERNAL")  # replaces the exception: its text stays here
    return answer


def _abort(context: grpc.ServicerContext, error: FedseekError) -> NoReturn:
    _log.warning("refused a call: %s", error.message)
    code = grpc.StatusCode.RESOURCE_EXHAUSTED if isinstance(error, TooLarge) else grpc.StatusCode.FAILED_PRECONDITION
    context.abort(code, error.code)
    raise AssertionError("abort returns never")


def _as_ours(code: grpc.StatusCode) -> FedseekError:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return TooLarge("site service: the message is larger than it takes")
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED):
        return Malformed(f"site service: it refused the message ({code.name})", hint="the site's own log says more")
    return Unreachable(f"site service: {code.name}", hint="is it running?")


def _free(path: Path) -> None:
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise AddressTaken(f"{path}: got {len(os.fsencode(path))} bytes, wanted at most {LONGEST_PATH} for a socket")
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise AddressTaken(f"{path} is not a socket", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise AddressTaken(f"{path} is in use by another process", hint="is this site running already?")
    path.unlink()
