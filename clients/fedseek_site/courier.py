"""The courier: a site's only process that talks to the network. It owns nothing.

    fleet gate ══ TLS ══ SuperNode (Flower's) ── worker ── Unix socket ── site service

SuperNode and worker are two threads of this one process, with Flower's Runtime interface between them on a private Unix
socket. What the coordinator sends ends up here first, so this process has neither data nor keys but its node key, may
run under another account, and never writes or imports the code of a bundle: the worker passes bytes to the site service
and passes its answer back, for messages under the one code-free bundle (fedseek/daemon/bundle.py), and refuses the rest.

Run by the site's daemon as its child, or under an account of its own by systemd, which starts it again when it ends.
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
from typing import Final, NoReturn

from fedseek.daemon.bundle import FLOWER_ENVIRONMENT, bundle_digest, code_free_bundle
from fedseek.daemon.process import check_socket_path
from fedseek.daemon.supervise import Child, die_with_parent
from fedseek.errors import FedseekError, Unreachable
from fedseek_site.gate import Credentials, Failure, load_authority, load_node_key
from fedseek_site.socket_service import call

AWAY_SECONDS: Final = 60.0  # that the site service may take to come back before the coordinator is told
RETRY_SECONDS: Final = 0.5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two knocks at the gate; doubled each time
# glibc reads these when the process starts. Otherwise it keeps the freed pieces of a large message, in each thread's
# own arena: 880 MB at most for a message of 200 MB each way, against 630 MB
ALLOCATOR: Final = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}

_log = logging.getLogger("fedseek_site.courier")  # also when this file is the program


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
    command = [sys.executable, "-P", "-m", "fedseek_site.courier", "--state", str(settings.state)]
    command += ["--coordinator", settings.coordinator, "--ca", str(settings.ca)]
    command += ["--node-key", str(settings.node_key), "--service", str(settings.service)]
    return Child("courier", tuple(command), {"HOME": str(settings.state), **ALLOCATOR}, log_file)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the courier that the arguments describe."""
    parser = argparse.ArgumentParser(prog="fedseek_site.courier")
    for name in ("state", "ca", "node-key", "service"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--coordinator", required=True)
    settings = CourierSettings(**vars(parser.parse_args(arguments)))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.WARNING)
    logging.getLogger("fedseek_site").setLevel(logging.INFO)
    run_courier(settings)


def run_courier(settings: CourierSettings) -> NoReturn:
    """Be the courier, until SIGTERM or the end of the parent process. While the gate is shut, knock again and again."""
    os.environ.update(FLOWER_ENVIRONMENT, FLWR_HOME=str(settings.state / "flower"))
    die_with_parent()
    try:
        _run(settings)
    except FedseekError as error:
        sys.exit(f"fedseek-site courier: {_one_line(error)}")
    except OSError as error:  # our own folder: no right to it, disk full
        sys.exit(f"fedseek-site courier: {settings.state}: {error}")
    sys.exit(1)  # a SuperNode does not end by itself


def _run(settings: CourierSettings) -> None:
    from fedseek_site import flower  # late: the supervisor's process needs none of it

    os.umask(0o077)
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret, bell = secrets.token_bytes(32), threading.Event()
    with _private_socket(settings.state / "runtime.sock") as listener:
        credentials = _knock(settings, flower.take_place)
        tasks = flower.Tasks(settings.state / "runtime.sock", secret, frozenset({bundle_digest(code_free_bundle())}))
        deliver = delivery(settings.service)
        threading.Thread(target=work, args=(tasks.answer_next, deliver, bell), name="worker", daemon=True).start()
        flower.run_supernode(credentials, listener, secret, bell)


def _knock(settings: CourierSettings, take_place: Callable[[Credentials, Path], int]) -> Credentials:
    """Try until the gate lets us in; a failure is told once, not each time.

    Everything is read anew each time, so a person may put right what is wrong while this runs.
    """
    pause, told = FIRST_PAUSE, ""
    while True:
        try:
            key, authority = load_node_key(settings.node_key), load_authority(settings.ca)
            credentials = Credentials(settings.coordinator, authority, key)
            node = take_place(credentials, settings.state / "node")
            _log.info("connected to %s as node %d", settings.coordinator, node)
            return credentials
        except FedseekError as error:
            if (text := _one_line(error)) != told:
                _log.error("%s; tried again until it works", text)
                told = text
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _private_socket(path: Path) -> socket.socket:
    """A listening Unix socket in our own folder; the umask keeps others out.

    Raises:
        AddressTaken: the path is too long for one.
    """
    check_socket_path(path)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    return listener


def _one_line(error: FedseekError) -> str:
    return f"{error.code}: {error.message} ({error.hint})" if error.hint else f"{error.code}: {error.message}"


def work(
    answer_next: Callable[[Callable[[bytes], bytes | Failure]], bool],
    deliver: Callable[[bytes], bytes | Failure],
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


def delivery(service: Path, *, away: float = AWAY_SECONDS) -> Callable[[bytes], bytes | Failure]:
    """Hands a message to the site service; while that is being restarted, tries again for ``away`` seconds.

    Nothing else than the site's own answer or one of the three failures comes out.
    """

    def deliver(request: bytes) -> bytes | Failure:
        given_up_at = time.monotonic() + away
        while True:
            started = time.monotonic()
            try:
                return call(service, request)
            except Unreachable as error:
                now = time.monotonic()
                if now - started > away:
                    given_up_at = now + away  # it was there, working, until just now
                if now > given_up_at:
                    _log.warning("%s", _one_line(error))
                    return Failure.AWAY
                time.sleep(RETRY_SECONDS)
            except FedseekError as error:
                _log.warning("%s", _one_line(error))
                return Failure.REFUSED

    return deliver


if __name__ == "__main__":
    main()
