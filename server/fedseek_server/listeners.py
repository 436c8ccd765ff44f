"""The SuperLink's two doors as sockets and servers: who may open them, how many may stand in them, and for how long.

uvicorn bounds neither how long a connection says nothing nor how long a request takes; :class:`Listener` does. A
request is held for 20 s at most (fleet_gate.py), so one that takes minutes is stuck, or meant to be.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import stat
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn

from fedseek.errors import AddressTaken

DRAIN_SECONDS: Final = 2  # for requests in flight, after SIGTERM
KEEP_ALIVE_SECONDS: Final = 150
BACKLOG: Final = 128
MOST_CONNECTIONS, MOST_OF_ONE_ADDRESS = 1024, 256
SPARE_DESCRIPTORS: Final = 256  # for the database, its threads and the private socket

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may do nothing, and how long a request may take, both ways and all; in seconds."""

    quiet: float = 15.0
    request: float = 150.0  # an object of 5 MiB then needs 35 kB/s


class Listener(uvicorn.Server):
    """One of two servers in one process: signals are the process's business.

    Args:
        config: of uvicorn.
        patience: after which connections are cut; None: never.
    """

    def __init__(self, config: uvicorn.Config, patience: Patience | None = None) -> None:
        super().__init__(config)
        self._patience = patience
        self._seen: dict[Any, tuple[object, bool, float]] = {}

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until :meth:`stop`."""
        await self._serve(sockets)

    def stop(self) -> None:
        """Have :meth:`serve` return, a few seconds from now at most."""
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._patience is not None:
            self._cut_overdue(self._patience)
        return await super().on_tick(counter)

    def _cut_overdue(self, patience: Patience) -> None:
        """A connection is timed from the last change of what it is at: nothing, or this very request."""
        now, seen = time.monotonic(), {}
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            is_asking = cycle is not None and not cycle.response_complete
            is_asking = is_asking or connection.transport.get_write_buffer_size() > 0  # an answer under way
            before, was_asking, since = self._seen.get(connection, (cycle, is_asking, now))
            if before is not cycle or was_asking != is_asking:
                since = now
            seen[connection] = (cycle, is_asking, since)
            if now - since > (patience.request if is_asking else patience.quiet):
                connection.transport.abort()
        self._seen = seen


def http_config(app: Any, **options: Any) -> uvicorn.Config:
    """What both servers have in common: no log of requests, no WebSockets, no header from a proxy is believed.

    h11 reads at most 16 KiB of headers; httptools, uvicorn's first choice, reads on for ever.
    """
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        http="h11",
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,  # uvicorn's closes while a slow reader still reads; ours does not
        timeout_graceful_shutdown=DRAIN_SECONDS,
        **options,
    )


class _CountingSocket(socket.socket):
    """A listening socket that hangs up on a connection too many, before TLS has cost anything."""

    most: int
    most_of_one: int
    _open: list[tuple[socket.socket, str]]

    def limit(self, most: int, most_of_one: int) -> None:
        self.most, self.most_of_one, self._open = most, most_of_one, []

    def accept(self) -> tuple[socket.socket, Any]:
        """As usual.

        Raises:
            ConnectionAbortedError: one too many, which is closed; an event loop takes it for no connection at all.
        """
        connection, address = super().accept()
        self._open = [(each, host) for each, host in self._open if each.fileno() >= 0]
        of_one = Counter(host for _, host in self._open)[address[0]]
        if len(self._open) >= self.most or of_one >= self.most_of_one:
            connection.close()
            raise ConnectionAbortedError("too many connections")
        self._open.append((connection, address[0]))
        return connection, address


def public_socket(
    host: str, port: int, *, most: int = MOST_CONNECTIONS, most_of_one: int = MOST_OF_ONE_ADDRESS
) -> socket.socket:
    """A listening TCP socket that takes so many connections at a time, and so many of one address.

    Raises:
        AddressTaken: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        plain = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise AddressTaken(
            f"{host} port {port}: {error.strerror}", hint="choose another port, or stop its user"
        ) from error
    listener = _CountingSocket(family, socket.SOCK_STREAM, fileno=plain.detach())
    listener.limit(most, most_of_one)
    return listener


def private_socket(path: Path) -> socket.socket:
    """A Unix socket of mode 0600. One that is there is stale, left by a killed process: the caller holds the lock.

    Raises:
        AddressTaken: the path is something else than a socket.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISSOCK(status.st_mode):
            raise AddressTaken(f"{path} is not a socket", hint="move it away")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    return listener


def allow_descriptors(wanted: int = MOST_CONNECTIONS + SPARE_DESCRIPTORS) -> None:
    """Raise the process's limit of open files to ``wanted`` if the machine lets it; warn if it does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        _log.warning("open files: the limit is %d, wanted %d (LimitNOFILE)", hard, wanted)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
