"""The courier: a site's only process that talks to the network. It owns nothing.

    fleet gate ══ TLS ══ SuperNode (Flower's) ── worker ── Unix socket ── site service

SuperNode and worker are two threads of this one process, with Flower's Runtime interface between them on a private Unix
socket. What the coordinator sends ends up here first, so this process has neither data nor keys but its node key, may
run under another account, and never writes or imports the code of a bundle: the worker passes bytes to the site service
and passes its answer back, for messages under the one code-free bundle (fedseek/daemon/bundle.py), and refuses the rest.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedseek.daemon.bundle import bundle_digest, code_free_bundle
from fedseek.daemon.supervise import Child, die_with_parent
from fedseek.errors import FedseekError, Unreachable
from fedseek_site.socket_service import call

if TYPE_CHECKING:
    from fedseek_site.flower import Error

AWAY_SECONDS: Final = 60.0  # that the site service may take to come back before the coordinator is told
# Flower reads these when it is imported, so they are set before the process starts
ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
    "PYTHONUNBUFFERED": "1",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CourierSettings:
    """What a courier is given.

    Attributes:
        state: its own folder, made with mode 0700; nothing in it is worth a backup.
        coordinator: HOST:PORT of the fleet gate.
        ca: PEM file of the authority that the gate's certificate is from.
        node_key: the key that Flower knows this site by.
        service: the site service's socket.
    """

    state: Path
    coordinator: str
    ca: Path
    node_key: Path
    service: Path


def courier(settings: CourierSettings, *, log_file: Path | None = None) -> Child:
    """The child process, for ``fedseek.daemon.supervise.supervise``."""
    command = [sys.executable, "-m", "fedseek_site.courier", "--state", str(settings.state)]
    command += ["--coordinator", settings.coordinator, "--ca", str(settings.ca)]
    command += ["--node-key", str(settings.node_key), "--service", str(settings.service)]
    environment = {**ENVIRONMENT, "FLWR_HOME": str(settings.state / "flower"), "HOME": str(settings.state)}
    return Child("courier", tuple(command), environment, log_file)


def main(arguments: list[str] | None = None) -> None:
    """Run the courier until SIGTERM or the end of the parent process."""
    parser = argparse.ArgumentParser(prog="fedseek_site.courier")
    for name in ("state", "ca", "node-key", "service"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--coordinator", required=True)
    settings = CourierSettings(**vars(parser.parse_args(arguments)))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    die_with_parent()
    try:
        _run(settings)
    except FedseekError as error:
        sys.exit(f"fedseek-site courier: {error}")
    sys.exit(1)  # a SuperNode does not end by itself


def _run(settings: CourierSettings) -> None:
    from fedseek_site import flower  # late: the supervisor's process needs none of it

    os.umask(0o077)
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    key, ca = flower.load_node_key(settings.node_key), settings.ca.read_bytes()
    node = flower.take_place(settings.coordinator, ca, key, settings.state / "node")
    _log.info("connected to %s as node %d", settings.coordinator, node)
    path, secret, bell = settings.state / "runtime.sock", secrets.token_bytes(32), threading.Event()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        tasks = flower.Tasks(path, secret, frozenset({bundle_digest(code_free_bundle())}))
        deliver = _delivery(settings.service, away=flower.AWAY, refused=flower.REFUSED)
        threading.Thread(target=work, args=(tasks.answer_next, deliver, bell), name="worker", daemon=True).start()
        flower.run_supernode(settings.coordinator, ca, key, listener, secret, bell)


def work(
    answer_next: Callable[[Callable[[bytes], bytes | Error]], bool],
    deliver: Callable[[bytes], bytes | Error],
    bell: threading.Event,
) -> None:
    """Answer messages for ever, whenever the bell says that there may be one.

    If this thread fails the process ends, and is started anew: a courier that takes messages and answers none would
    hold up its site unseen.
    """
    try:
        while True:
            try:
                while answer_next(deliver):
                    pass
            except Unreachable as error:
                _log.warning("%s", error.message)
            bell.wait()
            bell.clear()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _delivery(service: Path, *, away: Error, refused: Error) -> Callable[[bytes], bytes | Error]:
    """Hand a message to the site service; while that is being restarted, try again."""

    def deliver(request: bytes) -> bytes | Error:
        given_up_at = time.monotonic() + AWAY_SECONDS
        while True:
            started = time.monotonic()
            try:
                return call(service, request)
            except Unreachable as error:
                now = time.monotonic()
                if now - started > AWAY_SECONDS:
                    given_up_at = now + AWAY_SECONDS  # it was there, working, until just now
                if now > given_up_at:
                    _log.warning("%s", error.message)
                    return away
                time.sleep(0.5)
            except FedseekError as error:
                _log.warning("%s", error.message)
                return refused

    return deliver


if __name__ == "__main__":
    main()
