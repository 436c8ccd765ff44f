"""Flower's SuperLink as a child process of the coordinator: what sites connect to, and what the driver talks to.

    sites ══ TLS ══ fleet gate ─┐
                                ├─ SuperLink ── state.db
    driver ── Unix socket ──────┘

The Unix socket carries Control and Runtime. It lies in a folder of mode 0700, so only the coordinator's account can
open it: narrower than a port on loopback, which every account of the machine could reach.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import ssl
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn

from fedseek.daemon.supervise import Child, die_with_parent
from fedseek.errors import AddressTaken
from fedseek_server.fleet_gate import Application, Doorbell, fleet_gate, in_turn, with_bell

DRAIN_SECONDS: Final = 2  # for requests in flight, after SIGTERM
MOST_CONNECTIONS: Final = 512
AT_A_TIME: Final = 1  # requests in Flower
LONGEST_SOCKET_PATH: Final = 100  # bytes; the kernel's limit is 108
# Flower reads these when it is imported, so they are set before the process starts
ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class SuperLinkSettings:
    """Where a SuperLink listens and keeps its state.

    Attributes:
        state: folder, made with mode 0700; holds the database, the socket, the secret and Flower's home.
        host, port: what sites dial.
        certificate, key: PEM files of the TLS listener.
    """

    state: Path
    host: str
    port: int
    certificate: Path
    key: Path

    @property
    def socket(self) -> Path:
        """Control and Runtime, for the driver."""
        return self.state / "superlink.sock"

    @property
    def secret_file(self) -> Path:
        """What proves to the SuperLink that it is the driver who asks for a run's task."""
        return self.state / "superexec.secret"


def prepare(settings: SuperLinkSettings) -> bytes:
    """Make the state folder and the secret, if they are not there. Returns the secret.

    Raises:
        AddressTaken: the folder's path is too long for a Unix socket.
    """
    if len(os.fsencode(settings.socket)) > LONGEST_SOCKET_PATH:
        raise AddressTaken(
            f"{settings.socket}: got {len(os.fsencode(settings.socket))} bytes, wanted at most {LONGEST_SOCKET_PATH}",
            hint="choose a state folder with a shorter path",
        )
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings.state.chmod(0o700)
    if not settings.secret_file.exists():
        partial = settings.secret_file.with_suffix(".new")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(settings.secret_file)
    return settings.secret_file.read_bytes()


def superlink(settings: SuperLinkSettings, *, log_file: Path | None = None) -> Child:
    """The child process, for ``fedseek.daemon.supervise.supervise``."""
    command = [sys.executable, "-m", "fedseek_server.superlink", "--state", str(settings.state)]
    command += ["--host", settings.host, "--port", str(settings.port)]
    command += ["--certificate", str(settings.certificate), "--key", str(settings.key)]
    environment = {**ENVIRONMENT, "FLWR_HOME": str(settings.state / "flower"), "HOME": str(settings.state)}
    return Child("superlink", tuple(command), environment, log_file)


def main(arguments: list[str] | None = None) -> None:
    """Run the SuperLink until SIGTERM or the end of the parent process."""
    parser = argparse.ArgumentParser(prog="fedseek_server.superlink")
    for name in ("state", "certificate", "key"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    settings = SuperLinkSettings(**vars(parser.parse_args(arguments)))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.WARNING)
    die_with_parent()
    os.umask(0o077)
    asyncio.run(_serve(settings, prepare(settings)))


async def _serve(settings: SuperLinkSettings, secret: bytes) -> None:
    from fedseek_server.flower import node_lookup, superlink_app  # late: the supervisor's process needs none of it

    with private_socket(settings.socket) as private, public_socket(settings.host, settings.port) as public:
        superlink, bell = superlink_app(settings.state / "state.db", secret), Doorbell()
        app = in_turn(superlink, asyncio.Semaphore(AT_A_TIME))
        inside = _Listener(_config(with_bell(app, bell), lifespan="on"))
        outer = fleet_gate(app, node_lookup(superlink), bell)
        gate = _config(outer, lifespan="off", limit_concurrency=MOST_CONNECTIONS)
        gate.load()
        gate.ssl = server_context(settings.certificate, settings.key)
        outside = _Listener(gate)

        def end() -> None:
            bell.close()
            inside.stop()
            outside.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        await asyncio.gather(inside.serve(sockets=[private]), outside.serve(sockets=[public]))
    settings.socket.unlink(missing_ok=True)


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 only: both ends are ours."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context


def private_socket(path: Path) -> socket.socket:
    """A listening Unix socket of mode 0600. A stale one, left by a killed process, is replaced.

    Raises:
        AddressTaken: another process answers there, or the path is something else than a socket.
    """
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise AddressTaken(f"{path} is not a socket", hint="move it away")
        if _is_answered(path):
            raise AddressTaken(f"{path} is in use by another process", hint="is a coordinator running already?")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    return listener


def public_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        AddressTaken: the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise AddressTaken(
            f"{host} port {port}: {error.strerror}", hint="choose another port, or stop its user"
        ) from error


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _config(app: Application, **options: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        **options,  # type: ignore[arg-type]
    )


class _Listener(uvicorn.Server):
    """One of two servers in one process: signals are the process's business."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve(sockets)

    def stop(self) -> None:
        self.should_exit = True


if __name__ == "__main__":
    main()
