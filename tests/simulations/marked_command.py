"""A ``fedseek`` process whose whole family can be found again, to see that none of it is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

MARK = "FEDSEEK_TEST_MARK"


class Command:
    """One ``fedseek`` process; everything it starts inherits a mark in its environment, by which it is found."""

    def __init__(self, arguments, scratch):
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("fedseek"), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )

    def finish(self, timeout=400):
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def alive(self):
        """Processes with the mark that run now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:120])
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def left_behind(self, patience=5.0):
        """Processes that outlive the command by ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while (found := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found
