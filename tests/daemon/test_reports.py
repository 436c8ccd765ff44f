"""What happens, as JSON lines: whole lines, from several threads, readable while they are written."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from fedseek.daemon import reports
from fedseek.daemon.reports import STEP_INTERVAL, EventLog, peak_rss_mb, read_events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "新" / "report.jsonl"


def test_an_event_is_there_at_once_with_the_time_and_any_script(path):
    log = EventLog(path)
    before = time.time()
    log.write({"event": "reply", "site": "北岸银行", "text": "a\u2028b\nc"})
    [event] = read_events(path)
    log.close()
    assert before - 0.001 <= event.pop("t") <= time.time() + 0.001
    assert event == {"event": "reply", "site": "北岸银行", "text": "a\u2028b\nc"}
    assert "北岸银行".encode() in path.read_bytes()


def test_a_log_that_is_opened_again_goes_on(path):
    for number in range(3):
        log = EventLog(path)
        log.write({"event": "started", "number": number})
        log.close()
    assert [event["number"] for event in read_events(path)] == [0, 1, 2]


def test_threads_do_not_mix_their_lines(path):
    log = EventLog(path)

    def write(number):
        for count in range(200):
            log.write({"event": "reply", "thread": number, "count": count, "text": "长" * 50})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = list(read_events(path))
    for number in range(4):
        assert [event["count"] for event in events if event["thread"] == number] == list(range(200))


def test_steps_are_thinned_out_and_the_last_one_of_a_round_stays(path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(reports.time, "time", lambda: now[0])
    log = EventLog(path)
    for step in range(1, 101):
        now[0] += STEP_INTERVAL / 10
        log.write({"event": "step", "step": step, "of": 100})
        if step % 50 == 0:
            log.write({"event": "utility", "step": step})
    log.close()
    steps = [event["step"] for event in read_events(path) if event["event"] == "step"]
    assert 8 <= len(steps) <= 12
    assert steps[-1] == 100
    assert [event["step"] for event in read_events(path) if event["event"] == "utility"] == [50, 100]


def test_a_file_that_is_not_there_has_no_events(path):
    assert list(read_events(path)) == []


def test_each_event_is_one_line(path):
    log = EventLog(path)
    log.write({"event": "x", "text": "\r\n\u2029\x85"})
    log.write({"event": "y"})
    log.close()
    assert [json.loads(line)["event"] for line in path.read_bytes().splitlines()] == ["x", "y"]


def test_the_peak_is_of_this_process_and_not_of_its_parent():
    before = peak_rss_mb()
    ballast = bytearray(b"x") * 80_000_000
    assert peak_rss_mb() > before + 50 or before > 80
    del ballast
    code = "from fedseek.daemon.reports import peak_rss_mb; print(peak_rss_mb())"
    child = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 5 < child < 60


def test_where_there_is_no_proc_the_system_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(reports, "PROC_STATUS", tmp_path / "none")
    assert 5 < peak_rss_mb() < 100_000
    (tmp_path / "status").write_text("Name:\tx\n")
    monkeypatch.setattr(reports, "PROC_STATUS", tmp_path / "status")
    assert 5 < peak_rss_mb() < 100_000


def test_a_report_is_for_its_owner_alone(path):
    before = os.umask(0)
    try:
        EventLog(path).close()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
