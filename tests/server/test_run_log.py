"""The record of a run as a file: private, locked, and what is damaged is found."""

import hashlib
import os
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import CustodyError, JournalUnusable
from fedseek.he.ciphertext import ScopedSum
from fedseek.messages import AggregateDown, Continuation
from fedseek_server.history import RoundsInMemory
from fedseek_server.run_log import LOCK_FILE, LOG_FILE, Begin, KeyWished, Looked, Over, Replied, RunLog
from fedseek_server.snapshot import Snapshot

BEGIN = Begin(run="试运行-1", plan=b"{}", roster=b"r", continues=Continuation(run="lost", round=0), started=1.5)
EVENTS = (Looked((2**64 - 1, 1), 2.5), Replied(2**63, b"answer"), KeyWished(), Over())


def down(number):
    sums = (ScopedSum("global", 3, (b"sum" * 1000, bytes([number]))),)
    return AggregateDown(round=number, epoch=0, survivors=(0, 2, 3), sums=sums)


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path / "run") as opened:
        opened.begin(BEGIN)
        yield opened


def test_everything_comes_back_as_it_was_also_from_another_process(log, tmp_path):
    for event in EVENTS:
        log.add(event)
    log.close()
    with RunLog(tmp_path / "run") as again:
        assert again.begun() == BEGIN
        assert again.snapshot() is None
        assert [again.event(number) for number in range(1, 6)] == [*EVENTS, None]
        assert again.last_look() == EVENTS[0]


def test_a_snapshot_takes_the_place_of_the_events_that_led_to_it(log):
    for _ in range(3):
        for event in EVENTS:
            log.add(event)
        log.store(b"snapshot")
        assert (log.snapshot(), log.event(1), log.last_look()) == (b"snapshot", None, None)
    log.add(Over())
    assert log.event(1) == Over()


def test_what_ended_is_on_the_disk_with_the_snapshot_and_not_before(log, tmp_path):
    log.append(down(1))
    assert log.read(1) == down(1)
    with pytest.raises(JournalUnusable, match="how round 2 ended"):
        log.read(2)
    log.store(b"one")
    log.append(down(2))
    log.close()
    with RunLog(tmp_path / "run") as again:
        assert again.read(1) == down(1)
        with pytest.raises(JournalUnusable, match="how round 2 ended"):
            again.read(2)


@given(first=st.integers(1, 5), count=st.integers(1, 6))
def test_both_places_for_ended_rounds_give_back_what_was_appended(tmp_path_factory, first, count):
    numbers, memory = range(first, first + count), RoundsInMemory()
    with RunLog(tmp_path_factory.mktemp("log")) as log:
        for number in numbers:
            memory.append(down(number))
            log.append(down(number))
            log.store(b"")
        assert [memory.read(n) for n in numbers] == [log.read(n) for n in numbers] == [down(n) for n in numbers]


def test_a_wish_for_a_key_is_an_event_once(log, tmp_path):
    assert not log.take_wish()
    log.wish_key()
    log.wish_key()
    log.close()
    with RunLog(tmp_path / "run") as again:
        assert again.event(1) is None
        assert again.take_wish()
        assert not again.take_wish()
        assert (again.event(1), again.event(2)) == (KeyWished(), None)


def test_only_its_owner_may_open_it(log, tmp_path):
    for name in (LOG_FILE, LOCK_FILE):
        assert (tmp_path / "run" / name).stat().st_mode & 0o777 == 0o600
    log.close()
    os.chmod(tmp_path / "run" / LOG_FILE, 0o640)
    with pytest.raises(CustodyError, match="open to group or others"):
        RunLog(tmp_path / "run")


def test_a_link_in_its_place_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOG_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CustodyError, match="cannot be opened"):
        RunLog(tmp_path / "run")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("content", [b"no database at all, but a text" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_file_that_is_no_database_is_refused(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOG_FILE).touch(mode=0o600)
    (tmp_path / "run" / LOG_FILE).write_bytes(content)
    with pytest.raises(JournalUnusable, match="cannot be used"):
        RunLog(tmp_path / "run")


def test_another_database_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOG_FILE).touch(mode=0o600)
    with sqlite3.connect(tmp_path / "run" / LOG_FILE) as db:
        db.execute("CREATE TABLE other (x)")
    with pytest.raises(JournalUnusable, match="not a coordinator's record"):
        RunLog(tmp_path / "run")


def test_a_byte_that_the_disk_changed_is_found_before_a_site_sees_it(log, tmp_path):
    log.append(down(1))
    log.store(b"snapshot")
    log.add(Replied(1, b"some answer"))
    log.close()
    path = tmp_path / "run" / LOG_FILE
    whole = path.read_bytes()
    for text, read in ((b"sumsum", lambda log: log.read(1)), (b"some answer", lambda log: log.event(1))):
        path.write_bytes(whole.replace(text, b"\0" + text[1:], 1))
        with RunLog(tmp_path / "run") as again, pytest.raises(JournalUnusable, match="other bytes than were written"):
            read(again)


def test_an_event_of_another_version_is_refused(log):
    with log._transaction() as db:
        db.execute(
            "INSERT INTO events (is_look, sha256, data) VALUES (0, ?, ?)", (hashlib.sha256(b"\x80").digest(), b"\x80")
        )
    with pytest.raises(JournalUnusable, match="another version"):
        log.event(1)


@given(st.binary(max_size=100))
def test_bytes_that_are_no_snapshot_are_refused_in_one_way(data):
    with pytest.raises(JournalUnusable, match="no snapshot of version 1"):
        Snapshot.from_bytes(data)


def test_closing_twice_is_no_error_and_frees_the_lock(log, tmp_path):
    with pytest.raises(JournalUnusable, match="in use by another"):
        RunLog(tmp_path / "run")
    log.close()
    log.close()
    RunLog(tmp_path / "run").close()
