"""Child processes that are restarted when they die and that die when their parent does.

A daemon of ours owns one child (the coordinator its SuperLink, a site its courier). The child holds the reading end of
a pipe as its standard input; the kernel closes the pipe when the parent goes, even by ``kill -9``, and the child then
ends itself. So no process is left behind, on any Unix, and a restart by systemd finds ports and sockets free.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between restarts; doubled each time
HEALTHY_AFTER = 60.0  # seconds; a child that lived this long starts over at the shortest pause
GRACE: Final = 4.0  # seconds from SIGTERM to SIGKILL
SUPERVISED: Final = "FEDSEEK_SUPERVISED"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Child:
    """A process to keep alive.

    Attributes:
        name: for the log.
        command: program and arguments. No secret goes here: every local user can read it.
        environment: added to a minimal one (PATH, language, Python's own); nothing else is inherited.
        log_file: receives standard output and error; None: the parent's.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    log_file: Path | None = None


def supervise(child: Child, stop: threading.Event, *, grace: float = GRACE) -> None:
    """Keep ``child`` running until ``stop`` is set; then end it. Blocks: give it a thread.

    Guarantees: on return the child and everything it started have ended. A child that dies at once is tried again ever
    more slowly, at most every ``LONGEST_PAUSE`` seconds.
    """
    pause = FIRST_PAUSE
    while not stop.is_set():
        started = time.monotonic()
        ended = _run_once(child, stop, grace)
        if stop.is_set():
            return
        pause = FIRST_PAUSE if time.monotonic() - started > HEALTHY_AFTER else pause
        log_file = f" (see {child.log_file})" if child.log_file else ""
        _log.warning("%s %s%s; started again in %.1f s", child.name, ended, log_file, pause)
        stop.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _run_once(child: Child, stop: threading.Event, grace: float) -> str:
    """Run it until it ends or ``stop`` is set; returns how it ended."""
    try:
        process = _start(child)
    except OSError as error:  # no memory, no process left: may pass
        return f"could not be started: {error.strerror}"
    try:
        while not _has_ended(process) and not stop.wait(0.1):
            pass
    finally:
        _end(process, grace)
    return f"ended with {process.returncode}"


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without taking note of it: until somebody does, no other process gets its number, nor that of its group."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _start(child: Child) -> subprocess.Popen[bytes]:
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "TMPDIR") if key in os.environ}
    environment = {**kept, **child.environment, SUPERVISED: "1"}
    output = os.open(child.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if child.log_file else None
    try:
        return subprocess.Popen(  # noqa: S603  (the command is ours)
            child.command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
    finally:
        if output is not None:
            os.close(output)


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM, then SIGKILL to the whole process group: a grandchild must not outlive us."""
    os.kill(process.pid, signal.SIGTERM)
    limit = time.monotonic() + grace
    while not _has_ended(process) and time.monotonic() < limit:
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def die_with_parent(*, grace: float = GRACE) -> None:
    """In a supervised child: end this process when its parent is gone. Does nothing in a process started by hand."""
    if os.environ.get(SUPERVISED) == "1":
        threading.Thread(target=_wait_for_orphanhood, args=(grace,), name="parent", daemon=True).start()


def _wait_for_orphanhood(grace: float) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(1)


def repeat(seconds: float, action: Callable[[], object], *, name: str) -> Callable[[], None]:
    """Call ``action`` every ``seconds`` in a thread, from now on. Returns what stops it.

    ``action`` must not raise: whatever it raises ends the repetition, with a traceback in the log.
    """
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            action()
            stop.wait(seconds)

    threading.Thread(target=run, name=name, daemon=True).start()
    return stop.set
