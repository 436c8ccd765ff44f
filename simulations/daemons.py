"""The daemons of a consortium on this machine: real processes, each in a group of its own, none of them left behind.

    this process ── fedseek-server serve ── SuperLink
                 └─ fedseek-site serve ──── courier        one for each site

A daemon ends when this process does, even by ``kill -9``: it holds the reading end of a pipe, as the daemons' own
children do (fedseek/daemon/supervise.py).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from fedseek.daemon.supervise import SUPERVISED
from fedseek.errors import FedseekError

GRACE_SECONDS: Final = 10.0  # from SIGTERM to SIGKILL; a daemon ends within seconds
TAIL_LINES: Final = 15
# what `fedseek-server serve` and `fedseek-site serve` run, and one thread that ends them with their parent
PROGRAM: Final = (
    "from fedseek.daemon.supervise import die_with_parent; die_with_parent(); from {package}.cli import main; main()"
)
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the sites of a real consortium do not share a machine
    SUPERVISED: "1",
}


@dataclass(slots=True)
class Daemon:
    """A process to start, and to start again.

    Attributes:
        name: of the site, or ``coordinator``.
        command: program and arguments.
        log: takes what it and its children write, from all of its starts.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Its process, or the last one that was."""
        if self.process is None:
            raise FedseekError(f"{self.name}: the daemon was not started")
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it, or start it again."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join(path for path in sys.path if path)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603  our own interpreter and modules
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths},
            )

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of its log."""
        text = self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def failure(self) -> FedseekError:
        """That it ended by itself, as an error with the exit code it ended with."""
        code = self.process.returncode if self.process else None
        error = FedseekError(f"the daemon of {self.name} ended with {code}:\n{self.tail()}", hint=f"see {self.log}")
        error.exit_code = code if code and code > 0 else 1  # of this one instance: the class travelled as a code
        return error


def coordinator_daemon(folder: Path, log: Path, *, verbose: bool = False) -> Daemon:
    """``fedseek-server serve``."""
    return Daemon("coordinator", _serve("fedseek_server", folder, verbose), log)


def site_daemon(name: str, folder: Path, log: Path, *, verbose: bool = False) -> Daemon:
    """``fedseek-site serve``."""
    return Daemon(name, _serve("fedseek_site", folder, verbose), log)


def end_all(daemons: Iterable[Daemon], *, grace: float = GRACE_SECONDS) -> list[str]:
    """End daemons and everything they started: all politely at once, then what is left not so.

    Returns:
        Names of those that had to be killed.
    """
    started = [daemon for daemon in daemons if daemon.process is not None]
    family = [process for daemon in started for process in _family(daemon)]
    for daemon in started:
        if daemon.is_running:
            os.kill(daemon.pid, signal.SIGTERM)
    limit = time.monotonic() + grace
    while any(daemon.is_running for daemon in started) and time.monotonic() < limit:
        time.sleep(0.05)
    stubborn = [daemon.name for daemon in started if daemon.is_running]
    for daemon in started:
        with suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGKILL)
        if daemon.process is not None:
            daemon.process.wait()
            if daemon.process.stdin:
                daemon.process.stdin.close()
    for process in family:  # in groups of their own
        with suppress(psutil.NoSuchProcess):
            process.kill()
    while any(is_alive(process) for process in family):
        time.sleep(0.02)
    return stubborn


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may wait for its parent to take note of it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def children_of(daemon: Daemon) -> list[psutil.Process]:
    """What it started: the SuperLink, or the courier."""
    try:
        return list(psutil.Process(daemon.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def peak_rss_mb_of(pid: int) -> float:
    """Largest resident set of a process so far, in MB (10^6 bytes); off Linux, the present one. 0 if it has ended."""
    status = Path(f"/proc/{pid}/status")
    try:
        if status.exists():
            lines = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines())
            return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
        return float(psutil.Process(pid).memory_info().rss) / 1e6
    except (OSError, KeyError, psutil.NoSuchProcess):
        return 0.0


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _serve(package: str, folder: Path, verbose: bool) -> tuple[str, ...]:
    options = ("--verbose",) if verbose else ()
    return (sys.executable, "-c", PROGRAM.format(package=package), "serve", "--folder", str(folder), *options)


def _family(daemon: Daemon) -> list[psutil.Process]:
    return children_of(daemon) if daemon.is_running else []
