"""The doors: how long a connection may say nothing, how long a call may take, how many there may be."""

import asyncio
import contextlib
import os
import resource
import socket
import stat
import time

import pytest

from fedseek.errors import AddressTaken
from fedseek_server.listeners import Listener, Patience, allow_descriptors, http_config, private_socket, public_socket

HEAD = b"POST /x HTTP/1.1\r\nhost: x\r\n"


async def app(scope, receive, send):
    """Answers when the body is there; in no hurry on /slow, and at length on /long."""
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] != "http.request":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(3)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * (64 << 20 if scope["path"] == "/long" else 1)})


def over(seconds, patience, talk):
    """Seconds after which the listener has hung up on somebody who talks so; None if it has not."""

    async def run():
        listening = public_socket("127.0.0.1", 0)
        port = listening.getsockname()[1]
        listener = Listener(http_config(app, lifespan="off"), patience)
        serving = asyncio.create_task(listener.serve(sockets=[listening]))
        while not listener.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        talking = asyncio.create_task(talk(reader, writer))
        ended = None
        while time.monotonic() - began < seconds:
            if not listener.server_state.connections:
                ended = time.monotonic() - began
                break
            await asyncio.sleep(0.01)
        talking.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await talking
        writer.close()
        listener.stop()
        await serving
        return ended

    return asyncio.run(run())


async def silence(reader, writer):
    await asyncio.sleep(30)


async def headers_drop_by_drop(reader, writer):
    writer.write(HEAD)
    while True:
        writer.write(b"x: y\r\n")
        await asyncio.sleep(0.05)


async def body_drop_by_drop(reader, writer):
    writer.write(HEAD + b"content-length: 1000000\r\n\r\n")
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.05)


async def an_answer_that_takes_long(reader, writer):
    writer.write(HEAD.replace(b"/x", b"/slow") + b"content-length: 0\r\n\r\n")
    await asyncio.sleep(30)


async def an_answer_that_is_not_read(reader, writer):
    reader._transport.pause_reading()
    writer.write(HEAD.replace(b"/x", b"/long") + b"content-length: 0\r\n\r\n")
    await asyncio.sleep(30)


async def silence_after_a_call(reader, writer):
    writer.write(HEAD + b"content-length: 0\r\n\r\n")
    await asyncio.sleep(30)


@pytest.mark.parametrize("talk", [silence, headers_drop_by_drop, silence_after_a_call])
def test_a_connection_that_asks_nothing_is_cut(talk):
    ended = over(4, Patience(quiet=0.6, request=60), talk)
    assert ended is not None
    assert 0.5 < ended < 2


@pytest.mark.parametrize("talk", [body_drop_by_drop, an_answer_that_takes_long, an_answer_that_is_not_read])
def test_a_call_that_takes_too_long_is_cut(talk):
    ended = over(4, Patience(quiet=60, request=0.6), talk)
    assert ended is not None
    assert 0.5 < ended < 2


async def an_answer_read_slowly(reader, writer):
    writer.write(HEAD.replace(b"/x", b"/long") + b"content-length: 0\r\n\r\n")
    while await reader.read(4096):
        await asyncio.sleep(0.01)


def test_a_slow_reader_is_given_the_time_of_a_call():
    assert over(1.5, Patience(quiet=0.3, request=60), an_answer_read_slowly) is None


async def calls_now_and_then(reader, writer):
    for _ in range(10):
        writer.write(HEAD + b"content-length: 0\r\n\r\n")
        await reader.read(1000)
        await asyncio.sleep(0.2)


def test_a_connection_in_use_is_left_alone():
    ended = over(1.5, Patience(quiet=0.6, request=0.6), calls_now_and_then)
    assert ended is None


def test_without_patience_nobody_is_cut():
    assert over(1.2, None, silence) is None


# ------------------------------------------------------------------------------------------------------------ sockets
def test_a_connection_too_many_is_hung_up_on_and_makes_room_when_one_ends():
    listening = public_socket("127.0.0.1", 0, most=3, most_of_one=3)
    address = listening.getsockname()
    clients = [socket.create_connection(address) for _ in range(4)]
    taken = [listening.accept()[0] for _ in range(3)]
    with pytest.raises(ConnectionAbortedError):
        listening.accept()
    clients[3].settimeout(5)
    assert clients[3].recv(1) == b""
    taken.pop().close()
    clients.append(socket.create_connection(address))
    taken.append(listening.accept()[0])
    for each in (*clients, *taken, listening):
        each.close()


def test_one_address_has_only_its_share():
    listening = public_socket("127.0.0.1", 0, most=9, most_of_one=1)
    address = listening.getsockname()
    first, second = socket.create_connection(address), socket.create_connection(address)
    other = socket.create_connection(address, source_address=("127.0.0.2", 0))
    taken = [listening.accept()[0]]
    with pytest.raises(ConnectionAbortedError):
        listening.accept()
    taken.append(listening.accept()[0])
    for each in (first, second, other, *taken, listening):
        each.close()


def test_a_port_in_use_is_told_with_its_number():
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(AddressTaken, match=str(port)):
            public_socket("127.0.0.1", port)


def test_the_private_socket_is_private_and_replaces_a_stale_one(tmp_path):
    path = tmp_path / "s.sock"
    private_socket(path).close()
    assert path.exists()
    previous = os.umask(0)
    try:
        with private_socket(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(previous)


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("/nowhere")])
def test_what_is_no_socket_is_left_there_and_told(tmp_path, make):
    path = tmp_path / "s.sock"
    make(path)
    with pytest.raises(AddressTaken, match="not a socket"):
        private_socket(path)
    assert path.is_symlink() or path.read_text() == "x"


def test_the_limit_of_open_files_is_raised_as_far_as_the_machine_lets_it(monkeypatch, caplog):
    limits, set_to = (256, 1000), []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: set_to.append(values))
    allow_descriptors(800)
    assert set_to == [(800, 1000)]
    assert not caplog.records
    allow_descriptors(1280)
    assert set_to[1:] == [(1000, 1000)]
    assert "LimitNOFILE" in caplog.text
    limits = (2000, 4000)
    allow_descriptors(1280)
    assert len(set_to) == 2
