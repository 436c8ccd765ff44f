"""A ``fedseek`` process whose whole family can be found again, to see that none of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

MARK = "FEDSEEK_TEST_MARK"


class Command:
    """One ``fedseek`` process; everything it starts inherits a mark in its environment, by which it is found.

    A daemon gives its own child a fresh environment, without the mark; the folder for temporary files is the same.
    """

    def __init__(self, arguments, scratch):
        self.mark, self.scratch = uuid.uuid4().hex, str(scratch)
        environment = {**os.environ, MARK: self.mark, "TMPDIR": self.scratch, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("fedseek"), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            # a shell that runs the tests in the background has them, and their children, ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            text=True,
            encoding="utf-8",
        )

    def finish(self, timeout=240):
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def alive(self):
        """Processes with the mark that run now."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                is_ours = environment.get(MARK) == self.mark or environment.get("TMPDIR") == self.scratch
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
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
