"""Where the processes of a simulation report what happens, and how to read along while they do.

In a simulation the researcher owns all reports; a real site's report is its own.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedseek.daemon.reports import Event


def site_log(run_folder: Path, site: str) -> Path:
    """Where a site reports."""
    return run_folder / "sites" / site / "report.jsonl"


def coordinator_log(run_folder: Path) -> Path:
    """Where the coordinator reports."""
    return run_folder / "coordinator.jsonl"


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
