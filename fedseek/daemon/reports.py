"""What happens in a daemon or a simulation, as JSON lines: for progress while it runs and for the summary after.

Each process appends to a file of its own. Such a report is for its owner's eyes and proves nothing; what must hold
before others is in the audit chain (``fedseek.daemon.audit``).
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
MAX_TEXT = 2000  # characters of a text in the audit record, of whose lines none is longer than 64 KiB
PROC_STATUS = Path("/proc/self/status")
STEP_INTERVAL = 0.25  # seconds between two progress lines of a site


class EventLog:
    """An append-only JSON-lines file for its owner alone (mode 0600): a site's may quote records.

    Frequent ``step`` events are thinned out. Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._stream = os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)
        self._turn = threading.Lock()
        self._last_step = 0.0

    def write(self, event: Event) -> None:
        """Append one event with the time it happened (seconds since 1970)."""
        now = time.time()
        if event["event"] == "step":
            if now - self._last_step < STEP_INTERVAL and event["step"] != event["of"]:
                return
            self._last_step = now
        with self._turn:
            self._stream.write(json.dumps({"t": round(now, 3), **event}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_events(path: Path) -> Iterator[Event]:
    """Every event of a file; none if it does not exist."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as stream:  # a text may hold other characters that end lines
            for line in stream:
                yield json.loads(line)


def auditable(event: Event) -> Event:
    """What goes into the audit record of an event: no durations, and texts cut, which may quote what a stranger sent.

    Flower's node numbers are larger than a number of JSON may be, and become texts.
    """
    told = {key: value for key, value in event.items() if key not in ("event", "seconds") and value is not None}
    texts = {key: str(value)[:MAX_TEXT] for key, value in told.items() if isinstance(value, str) or key == "node"}
    return told | texts


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes)."""
    if PROC_STATUS.exists():  # on Linux ru_maxrss starts at what the parent held when it started this process
        found = re.search(r"^VmHWM:\s+(\d+) kB", PROC_STATUS.read_text("utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
