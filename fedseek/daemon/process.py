"""What a process of ours does first and last: be the only one in its folder, write its log, end when it is told to."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedseek.errors import AddressTaken, CustodyError
from fedseek.identity.secret_files import locked

LOCK_FILE = "daemon.lock"
LONGEST_SOCKET_PATH = 100  # bytes; the kernel's limit is 108


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the block; the kernel lets go of it when the process ends, however it ends.

    Raises:
        AddressTaken: another process of this machine has it.
        CustodyError: the folder does not exist, or this account may not write to it.
    """
    path = folder / LOCK_FILE
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, wait=False))
        except BlockingIOError:
            raise AddressTaken(
                f"{folder}: a daemon is running here already", hint="stop it first, or use another folder"
            ) from None
        except OSError as error:
            raise CustodyError(
                f"{path} cannot be opened: {error.strerror}", hint="is this the right folder?"
            ) from error
        yield


def check_socket_path(path: Path) -> None:
    """Check that a Unix socket can have this path.

    Raises:
        AddressTaken: it is too long for one.
    """
    if (length := len(os.fsencode(path))) > LONGEST_SOCKET_PATH:
        raise AddressTaken(
            f"{path}: got {length} bytes, wanted at most {LONGEST_SOCKET_PATH} for a socket",
            hint="choose a folder with a shorter path",
        )


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set. Called from the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextmanager
def following(stop: threading.Event, also: Callable[[], bool], *, every: float = 0.2) -> Iterator[threading.Event]:
    """For the block, an event that is set once ``stop`` is, or once ``also()`` is true; looked at ``every`` so often."""
    either, left = threading.Event(), threading.Event()

    def watch() -> None:
        while not (stop.is_set() or also()):
            if left.wait(every):
                return
        either.set()

    thread = threading.Thread(target=watch, name="watch-for-stop", daemon=True)
    thread.start()
    try:
        yield either
    finally:
        left.set()
        thread.join()


def start_log(*, verbose: bool = False) -> None:
    """Log to standard error, a line an event, as systemd and Docker like it."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.DEBUG if verbose else logging.INFO
    )
    for chatty in ("httpx", "httpcore", "asyncio", "urllib3", "alembic", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
