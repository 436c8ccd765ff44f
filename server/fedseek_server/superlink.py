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
import datetime
import logging
import os
import secrets
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedseek.daemon.bundle import FLOWER_ENVIRONMENT
from fedseek.daemon.process import check_socket_path, only_one
from fedseek.daemon.supervise import Child, die_with_parent
from fedseek.errors import FedseekError, WrongKey
from fedseek.identity.secret_files import read_secret_file, refusing, write_secret_file
from fedseek_server.certificate import check_certificate, keep_fresh, server_context
from fedseek_server.fleet_gate import Doorbell, fleet_gate, in_turn, with_bell
from fedseek_server.listeners import (
    Listener,
    Patience,
    allow_descriptors,
    http_config,
    private_socket,
    public_socket,
)

AT_A_TIME: Final = 1  # requests in Flower
SECRET_BYTES: Final = 32
ENVIRONMENT: Final = {**FLOWER_ENVIRONMENT, "PYTHONUNBUFFERED": "1"}

_log = logging.getLogger(__name__)


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

    @property
    def home(self) -> Path:
        """Flower's own folder."""
        return self.state / "flower"


def prepare(settings: SuperLinkSettings) -> bytes:
    """Make the state folder and the secret, if they are not there. Returns the secret.

    Raises:
        AddressTaken: the folder's path is too long for a Unix socket.
        CustodyError: the folder or the secret cannot be written or read, or is open to others.
        WrongKey: what is there is no such secret.
    """
    check_socket_path(settings.socket)
    with refusing(settings.state, "made"):
        for folder in (settings.state, settings.home):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
    if not settings.secret_file.exists():
        write_secret_file(settings.secret_file, secrets.token_bytes(SECRET_BYTES))
    secret = read_secret_file(settings.secret_file, limit=SECRET_BYTES)
    if len(secret) != SECRET_BYTES:
        raise WrongKey(
            f"{settings.secret_file}: got {len(secret)} bytes, wanted {SECRET_BYTES}",
            hint="delete it while the daemon is down; another is made",
        )
    return secret


def superlink(settings: SuperLinkSettings, *, log_file: Path | None = None) -> Child:
    """The child process, for ``fedseek.daemon.supervise.supervise``."""
    command = [sys.executable, "-m", "fedseek_server.superlink", "--state", str(settings.state)]
    command += ["--host", settings.host, "--port", str(settings.port)]
    command += ["--certificate", str(settings.certificate), "--key", str(settings.key)]
    environment = {**ENVIRONMENT, "FLWR_HOME": str(settings.home), "HOME": str(settings.state)}
    return Child("superlink", tuple(command), environment, log_file)


def main(arguments: list[str] | None = None) -> None:
    """Run the SuperLink until SIGTERM or the end of the parent process."""
    parser = argparse.ArgumentParser(prog="fedseek_server.superlink")
    for name in ("state", "certificate", "key"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    settings = SuperLinkSettings(**vars(parser.parse_args(arguments)))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    die_with_parent()
    os.umask(0o077)
    try:
        secret = prepare(settings)
        check_certificate(settings.certificate, datetime.datetime.now(datetime.UTC))
        allow_descriptors()
        with only_one(settings.home):
            asyncio.run(_serve(settings, secret))
    except FedseekError as error:
        _log.error("the SuperLink cannot start: %s", error)
        sys.exit(error.exit_code)


async def _serve(settings: SuperLinkSettings, secret: bytes) -> None:
    context = server_context(settings.certificate, settings.key)
    with private_socket(settings.socket) as private, public_socket(settings.host, settings.port) as public:
        # late: the supervisor's process needs none of it
        from fedseek_server.flower_host import is_own_reply, node_lookup, superlink_app

        superlink, bell = superlink_app(settings.state / "state.db", secret), Doorbell()
        app = in_turn(superlink, asyncio.Semaphore(AT_A_TIME))
        inside = Listener(http_config(with_bell(app, bell), lifespan="on"))
        outer = fleet_gate(app, node_lookup(superlink), bell, is_own_reply=is_own_reply)
        gate = http_config(outer, lifespan="off")
        gate.load()
        gate.ssl = context
        outside = Listener(gate, Patience())

        def end() -> None:
            bell.close()
            inside.stop()
            outside.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        renewal = loop.create_task(keep_fresh(context, settings.certificate, settings.key))
        try:
            await asyncio.gather(inside.serve(sockets=[private]), outside.serve(sockets=[public]))
        finally:
            renewal.cancel()
            with suppress(asyncio.CancelledError):
                await renewal


if __name__ == "__main__":
    main()
