"""What happens in a run, as JSON lines in the run folder: for progress while it runs and for the summary after.

Each process appends to a file of its own. A site's file is the site's own report; in a simulation the researcher owns
all of them.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]
PROC_STATUS = Path("/proc/self/status")
STEP_INTERVAL = 0.25  # seconds between two progress lines of a site


class EventLog:
    """An append-only JSON-lines file. Frequent ``step`` events are thinned out."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8", buffering=1)
        self._last_step = 0.0

    def write(self, event: Event) -> None:
        """Append one event with the time it happened (seconds since 1970)."""
        now = time.time()
        if event["event"] == "step":
            if now - self._last_step < STEP_INTERVAL and event["step"] != event["of"]:
                return
            self._last_step = now
        self._stream.write(json.dumps({"t": round(now, 3), **event}, ensure_ascii=False) + "\n")


def site_log(run_folder: Path, site: str) -> Path:
    """Where a site reports."""
    return run_folder / "sites" / site / "report.jsonl"


def coordinator_log(run_folder: Path) -> Path:
    """Where the coordinator reports."""
    return run_folder / "coordinator.jsonl"


def read_events(path: Path) -> Iterator[Event]:
    """Every event of a file; none if it does not exist."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as stream:  # a text may hold other characters that end lines
            for line in stream:
                yield json.loads(line)


class EventTail:
    """Reads what was added to a growing file since the last look; a half-written line waits for the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> list[Event]:
        """Events added since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        whole, newline, _ = data.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes)."""
    if PROC_STATUS.exists():  # on Linux ru_maxrss starts at what the parent held when it started this process
        found = re.search(r"^VmHWM:\s+(\d+) kB", PROC_STATUS.read_text("utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
