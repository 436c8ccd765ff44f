"""``fedseek simulate`` as a user runs it: what a run leaves behind, how it fails, and that it ends all it started."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest
from peft import PeftModel
from transformers import AutoModel

from simulations.events import read_events
from simulations.summary import load_summary

pytestmark = pytest.mark.slow

NAMES = ["北岸银行", "harbour-bank", "仁济医院", "st-anna"]
MARK = "FEDSEEK_TEST_MARK"


class Command:
    """One ``fedseek`` process; everything it starts inherits a mark in its environment, by which it is found."""

    def __init__(self, arguments, scratch):
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedseek.cli", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
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


def test_probe(write_tiny_scenario, tmp_path):
    scenario = write_tiny_scenario()
    scratch = tempfile.mkdtemp(prefix="t")
    c = Command(["simulate", scenario, "--out", tmp_path / "runs", "--json"], scratch)
    t = time.time()
    time.sleep(8)
    print(len(c.alive()))
    rc, out, err = c.finish()
    print(rc, time.time() - t, out[:300], err)
    print("ALIVE", c.alive(), os.listdir(scratch))
    (folder,) = (tmp_path / "runs").iterdir()
    for p in sorted(folder.rglob("*")): print(p.relative_to(folder))
    print((folder/"coordinator.jsonl").read_text()[-300:])
    print((folder/"engine.log").read_text()[:1500])
    c = Command(["simulate", scenario, "--out", tmp_path / "runs2", "--json"], scratch)
    t = time.time()
    while not any(e["event"]=="phase" and e["phase"]=="plan" for e in read_events(next(iter((tmp_path/"runs2").glob("*/coordinator.jsonl")), Path("/nope")))): time.sleep(0.05)
    print("phase after", time.time()-t, len(c.alive()))
    os.killpg(c.process.pid, signal.SIGINT)
    t = time.time()
    rc, out, err = c.finish()
    print(rc, time.time() - t, out[:300], err)
    print("ALIVE", c.alive(), os.listdir(scratch)); time.sleep(3); print("ALIVE", c.alive())
