"""Children that are kept alive, and that leave nobody behind."""

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedseek.daemon import supervise as module
from fedseek.daemon.supervise import SUPERVISED, Child, repeat, supervise

WAITS = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def python(text: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text, *arguments)


def until(what, seconds=10.0):
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit, "still not"
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@contextmanager
def supervised(child, **options):
    stop = threading.Event()
    keeper = threading.Thread(target=supervise, args=(child, stop), kwargs=options)
    keeper.start()
    try:
        yield stop
    finally:
        stop.set()
        keeper.join(timeout=10)
        assert not keeper.is_alive()


def numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().splitlines() if line.isdigit()] if path.exists() else []


def test_a_child_that_is_killed_is_started_again_and_the_log_says_how_it_ended(tmp_path, caplog):
    log = tmp_path / "日志.log"
    child = Child("courier", python("import os; print(os.getpid(), flush=True); " + WAITS), log_file=log)
    with caplog.at_level(logging.WARNING), supervised(child):
        [first] = until(lambda: numbers(log))
        os.kill(first, signal.SIGKILL)
        _, second = until(lambda: len(numbers(log)) == 2 and numbers(log))
        assert is_alive(second)
    assert not is_alive(second)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "courier ended with -9" in caplog.text
    assert str(log) in caplog.text


def test_a_child_that_dies_at_once_is_tried_ever_more_slowly(monkeypatch):
    pauses = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            if timeout and timeout > 0.2:
                pauses.append(timeout)
                if len(pauses) == 8:
                    self.set()
            return self.is_set()

    supervise(Child("brief", ("/bin/false",)), Stop())
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_child_that_cannot_be_started_is_tried_again(caplog):
    pauses = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            if len(pauses) == 2:
                self.set()
            return self.is_set()

    supervise(Child("none", ("/nowhere/at-all",)), Stop())
    assert pauses == [0.5, 1.0]
    assert "could not be started" in caplog.text


def test_one_that_does_not_listen_is_killed_and_so_are_its_children(tmp_path):
    log = tmp_path / "log"
    family = (
        "import subprocess, sys, os; "
        f"child = subprocess.Popen([sys.executable, '-c', {DEAF!r}]); print(child.pid, flush=True); "
        "print(os.getpid(), flush=True); " + DEAF
    )
    with supervised(Child("deaf", python(family), log_file=log), grace=0.3) as stop:
        pids = until(lambda: log.exists() and log.read_text().count("deaf") == 2 and numbers(log))
        assert all(is_alive(pid) for pid in pids)
        began = time.monotonic()
        stop.set()
        until(lambda: not any(is_alive(pid) for pid in pids))
        assert time.monotonic() - began < 3


def test_a_child_inherits_no_secret_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_PASSWORD", "hunter2")
    log = tmp_path / "log"
    show = "import os; print(sorted(os.environ), os.environ['OWN'], flush=True); " + WAITS
    with supervised(Child("child", python(show), {"OWN": "值"}, log)):
        text = until(lambda: log.exists() and log.read_text())
    assert "DATABASE_PASSWORD" not in text
    assert SUPERVISED in text
    assert "值" in text or "\\u503c" in text or "OWN" in text


ORPHAN = """
import subprocess, sys, threading
from fedseek.daemon.supervise import Child, supervise
child = (sys.executable, "-c", sys.argv[1])
supervise(Child("child", child), threading.Event())
"""
OBEDIENT = """
import os, time
from fedseek.daemon.supervise import die_with_parent
die_with_parent(grace=0.3)
print(os.getpid(), flush=True)
{}
time.sleep(60)
"""


@pytest.mark.parametrize("line", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_child_ends_when_its_parent_is_killed_even_if_it_is_deaf(line):
    words = python(ORPHAN, OBEDIENT.format(line))
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
        parent.wait()
        until(lambda: not is_alive(child), seconds=5)


def test_a_process_started_by_hand_does_not_watch_its_input(monkeypatch):
    monkeypatch.delenv(SUPERVISED, raising=False)
    before = threading.active_count()
    module.die_with_parent()
    assert threading.active_count() == before


def test_repeat_goes_on_until_it_is_stopped():
    calls = []
    stop = repeat(0.02, lambda: calls.append(1), name="ticks")
    until(lambda: len(calls) >= 3)
    stop()
    time.sleep(0.1)
    seen = len(calls)
    time.sleep(0.1)
    assert len(calls) == seen
