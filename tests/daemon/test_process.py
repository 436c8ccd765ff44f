"""One daemon a folder, and one event that says when to end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fedseek.daemon.process import following, only_one, stop_on_signals
from fedseek.errors import AddressTaken, CustodyError

HOLD = "import sys, time\nfrom pathlib import Path\nfrom fedseek.daemon.process import only_one\n" + (
    "with only_one(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def holder(folder):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_daemon_in_a_folder_is_refused_and_a_killed_one_leaves_it_free(tmp_path):
    child = holder(tmp_path)
    try:
        with pytest.raises(AddressTaken, match="running here already"), only_one(tmp_path):
            pass
        child.kill()
        child.wait()
        with only_one(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_the_folder_is_free_again_after_the_block(tmp_path):
    for _ in range(2):
        with only_one(tmp_path):
            pass
    assert (tmp_path / "daemon.lock").stat().st_mode & 0o077 == 0


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CustodyError, match="no-such"), only_one(tmp_path / "no-such"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_event(number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = stop_on_signals()
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_following_sees_the_stop_and_the_other_reason():
    stop, other = threading.Event(), threading.Event()
    with following(stop, other.is_set, every=0.01) as either:
        assert not either.wait(0.05)
        other.set()
        assert either.wait(2)
    with following(stop, lambda: False, every=0.01) as either:
        stop.set()
        assert either.wait(2)


def test_following_ends_its_thread_and_sets_nothing_when_the_block_is_over():
    with following(threading.Event(), lambda: False, every=0.01) as either:
        pass
    time.sleep(0.05)
    assert not either.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "watch-for-stop"]
