"""One party in a process of its own, fed one message at a time, so that its memory and its seconds are its own.

Messages go through a file: a pipe would put its own buffers into that memory.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Steps = Mapping[str, Callable[[bytes], bytes]]


def rss_mb(field: str = "VmRSS") -> float:
    """Memory of this process alone: now, or with "VmHWM" the most since ``reset_peak``.

    Where there is no /proc, the most since the process began; ru_maxrss would also count what a parent had when it
    started us.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_rss_mb() -> float:
    """Peak memory of this process since it began, or since ``reset_peak``."""
    return rss_mb("VmHWM")


def reset_peak() -> None:
    """Let the peak begin anew from what is there now (proc(5), clear_refs); where that is not allowed it goes on."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


class Party:
    """The process, seen from the others.

    Attributes:
        seconds: CPU seconds of each call, by step.
        peaks: its peak memory in each call, by step.
        idle_mb: its peak memory before the first message.
        peak_mb: its peak memory so far.
        held_mb: what it has now.
    """

    def __init__(self, start: Callable[..., Steps], *arguments: object) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.peaks: defaultdict[str, list[float]] = defaultdict(list)
        self._folder = tempfile.TemporaryDirectory()
        self._pipe, far = multiprocessing.Pipe()
        work = (far, Path(self._folder.name), start, arguments)
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=work)
        self._process.start()
        far.close()
        self.idle_mb = self.peak_mb = self.held_mb = self._pipe.recv()

    def ask(self, step: str, message: bytes = b"") -> bytes:
        """Have one step done; returns its answer. EOFError: the process died, its traceback is on stderr."""
        Path(self._folder.name, "asked").write_bytes(message)
        self._pipe.send(step)
        seconds, peak, self.held_mb = self._pipe.recv()
        self.seconds[step].append(seconds)
        self.peaks[step].append(peak)
        self.peak_mb = max(self.peak_mb, peak)
        return Path(self._folder.name, "answer").read_bytes()

    def __enter__(self) -> Party:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # which ends the process
        self._process.join()
        self._folder.cleanup()


def serve(pipe: Connection, folder: Path, start: Callable[..., Steps], arguments: tuple[Any, ...]) -> None:
    """The process: one step at a time, nothing of a message kept but what the party keeps."""
    steps = start(*arguments)
    pipe.send(peak_rss_mb())
    while True:
        try:
            step = pipe.recv()
        except EOFError:
            return
        reset_peak()
        pipe.send(_played(steps[step], folder))


def _played(step: Callable[[bytes], bytes], folder: Path) -> tuple[float, float, float]:
    """CPU seconds, peak and what is held after it; message and answer are let go of."""
    message = (folder / "asked").read_bytes()
    started = time.process_time()
    answer = step(message)
    seconds = time.process_time() - started
    (folder / "answer").write_bytes(answer)
    peak = peak_rss_mb()
    del message, answer
    return seconds, peak, rss_mb()
