import hashlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedseek.errors import CustodyError, FedseekError, JournalUnusable, TooLarge, WrongKey, WrongRound
from fedseek.identity.vault import StorageKey, open_at_rest, seal_at_rest
from fedseek_site import journal as journal_module
from fedseek_site.journal import JOURNAL_FILE, Journal, Refusal, Step

RUN = "试运行/1"
KEY = StorageKey(bytes(range(32)))
ROOT = Path(__file__).resolve().parents[2]


def step(number: int, *, phase: str = "round", run: str = RUN) -> Step:
    return Step(run, phase, number)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "北岸银行"


@pytest.fixture
def journal(folder):
    with Journal(folder, KEY) as opened:
        yield opened


def outside(folder: Path) -> sqlite3.Connection:
    """The file as somebody else's SQLite sees it, while no journal is open."""
    return sqlite3.connect(folder / JOURNAL_FILE, isolation_level=None)


def alter(folder: Path, statement: str, *values: object) -> None:
    db = outside(folder)
    assert db.execute(statement, values).rowcount == 1
    db.close()


# once


def test_a_step_not_done_is_not_recalled(journal):
    assert journal.recall(step(1), b"request") is None
    assert journal.state(RUN) is None
    assert journal.latest_run() is None
    assert journal.refusals(RUN) == []


def test_the_same_request_gets_the_same_bytes_also_after_reopening(folder):
    reply, state = os.urandom(100_000), os.urandom(50_000)
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", reply, state)
        assert journal.recall(step(1), b"request") == reply
    with Journal(folder, KEY) as journal:
        assert journal.recall(step(1), b"request") == reply
        assert journal.state(RUN) == state
        assert journal.latest_run() == RUN
        assert journal.refusals(RUN) == []


def test_empty_requests_replies_and_states_are_kept_as_such(journal):
    journal.record(step(0, phase="plan"), b"", b"", b"")
    assert journal.recall(step(0, phase="plan"), b"") == b""
    assert journal.state(RUN) == b""


def test_another_request_for_a_step_done_is_refused_and_written_down_durably(folder):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", b"reply", b"state")
        before = time.time()
        with pytest.raises(WrongRound, match="on another request"):
            journal.recall(step(1), b"other request")
        seen = journal.refusals(RUN)
        assert seen == [Refusal(step(1), hashlib.sha256(b"other request").digest(), seen[0].at)]
        assert before <= seen[0].at <= time.time()
    with Journal(folder, KEY) as journal:
        assert journal.refusals(RUN) == seen
        assert journal.recall(step(1), b"request") == b"reply"
        with pytest.raises(WrongRound, match="on another request"):
            journal.recall(step(1), b"other request")
        assert len(journal.refusals(RUN)) == 2
        assert journal.refusals("another run") == []


def test_a_refusal_that_cannot_be_written_down_is_a_refusal_still(journal):
    journal.record(step(1), b"request", b"reply", None)
    fill(journal, spare_pages=0)
    raised = set()
    for number in range(200):
        with pytest.raises(FedseekError) as caught:
            journal.recall(step(1), b"other %d" % number)
        raised.add("full" if "SQLITE_FULL" in str(caught.value) else type(caught.value))
    assert raised == {WrongRound, "full"}


def test_a_hostile_coordinator_cannot_fill_the_disk_with_refusals(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_REFUSALS_KEPT", 3)
    journal.record(step(1), b"request", b"reply", None)
    for number in range(5):
        with pytest.raises(WrongRound):
            journal.recall(step(1), b"other %d" % number)
    kept = [refusal.request_digest for refusal in journal.refusals(RUN)]
    assert kept == [hashlib.sha256(b"other %d" % number).digest() for number in range(3)]


def test_phases_rounds_and_runs_are_steps_of_their_own(journal):
    steps = [Step(run, phase, number) for run in ("a", "b") for phase in ("round", "unmask") for number in (1, 2)]
    for number, each in enumerate(steps):
        assert journal.recall(each, b"request") is None
        journal.record(each, b"request", b"reply %d" % number, b"state %d" % number)
    assert [journal.recall(each, b"request") for each in steps] == [b"reply %d" % number for number in range(8)]
    assert (journal.state("a"), journal.state("b"), journal.latest_run()) == (b"state 3", b"state 7", "b")


@pytest.mark.parametrize("request_now", [b"request", b"other"])
def test_a_second_record_of_a_step_is_refused_and_the_first_stands(journal, request_now):
    journal.record(step(1), b"request", b"reply", b"state")
    with pytest.raises(WrongRound, match="must not leave"):
        journal.record(step(1), request_now, b"second reply", b"second state")
    assert journal.recall(step(1), b"request") == b"reply"
    assert journal.state(RUN) == b"state"


def test_of_many_threads_with_one_step_one_records(journal):
    def play(number: int) -> bool:
        try:
            journal.record(step(1), b"request", b"reply %d" % number, b"state %d" % number)
        except WrongRound:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(play, range(40)))
    winner = won.index(True)
    assert sum(won) == 1
    assert journal.recall(step(1), b"request") == b"reply %d" % winner
    assert journal.state(RUN) == b"state %d" % winner


def test_no_state_leaves_the_last_one(journal):
    journal.record(step(1), b"request", b"reply", b"state 1")
    journal.record(step(2), b"request", b"reply", None)
    assert journal.state(RUN) == b"state 1"
    journal.record(step(3), b"request", b"reply", b"state 3")
    assert journal.state(RUN) == b"state 3"


@pytest.mark.parametrize(
    ("run", "phase", "number"),
    [
        ("", "round", 1),
        ("x" * 129, "round", 1),
        ("run", "", 1),
        ("run", "a/b", 1),
        ("run", "Round", 1),
        ("run", "round\n", 1),
        ("run", "x" * 33, 1),
        ("run", "round", -1),
        ("run", "round", 2**31),
    ],
)
def test_a_step_out_of_bounds_is_a_mistake(run, phase, number):
    with pytest.raises(ValueError, match="out of bounds"):
        Step(run, phase, number)


# old answers


def test_old_replies_are_dropped_and_what_they_answered_is_not_forgotten(journal):
    for number in range(1, 6):
        journal.record(step(number), b"request %d" % number, b"reply %d" % number, None)
        journal.record(step(number, phase="unmask"), b"unmask %d" % number, b"shares %d" % number, None)
    journal.record(step(1, run="another"), b"request", b"reply", None)
    for number in (3, 4, 5):
        assert journal.recall(step(number), b"request %d" % number) == b"reply %d" % number
        assert journal.recall(step(number, phase="unmask"), b"unmask %d" % number) == b"shares %d" % number
    for number in (1, 2):
        with pytest.raises(WrongRound, match="done, its answer is no longer kept"):
            journal.recall(step(number), b"request %d" % number)
        with pytest.raises(WrongRound, match="no longer kept"):
            journal.recall(step(number, phase="unmask"), b"unmask %d" % number)
        with pytest.raises(WrongRound, match="on another request"):
            journal.recall(step(number), b"other")
        with pytest.raises(WrongRound, match="recorded already"):
            journal.record(step(number), b"request %d" % number, b"reply", None)
    assert [refusal.step.round for refusal in journal.refusals(RUN)] == [1, 2]


def test_the_file_does_not_grow_with_the_rounds(folder):
    with Journal(folder, KEY) as journal:
        sizes = []
        for number in range(1, 21):
            journal.record(step(number), b"request", os.urandom(100_000), os.urandom(100_000))
            sizes.append((folder / JOURNAL_FILE).stat().st_size)
    assert sizes[-1] < 1.1 * sizes[5]


# forgetting


def test_a_forgotten_run_leaves_no_reply_and_no_state_but_is_not_begun_again(folder):
    reply, state = os.urandom(20_000), os.urandom(20_000)
    with Journal(folder, KEY) as journal:
        journal.record(step(1, run="old"), b"request", b"old reply", b"old state")
        journal.record(step(1), b"request", reply, state)
        with pytest.raises(WrongRound):
            journal.recall(step(1), b"other")
    db = outside(folder)
    (sealed_reply,) = db.execute("SELECT reply FROM steps WHERE run = ?", (RUN,)).fetchone()
    (sealed_state,) = db.execute("SELECT sealed FROM states WHERE run = ?", (RUN,)).fetchone()
    db.close()
    assert sealed_reply[-500:] in (folder / JOURNAL_FILE).read_bytes()
    with Journal(folder, KEY) as journal:
        journal.forget(RUN)
    content = (folder / JOURNAL_FILE).read_bytes()
    assert not any(part in content for part in pieces(sealed_reply) + pieces(sealed_state))
    with Journal(folder, KEY) as journal:
        assert journal.state(RUN) is None
        assert journal.latest_run() is None  # not the one before: a site does not go back
        assert len(journal.refusals(RUN)) == 1
        for again in (step(1), step(2), step(0, phase="plan")):
            with pytest.raises(WrongRound, match="forgotten"):
                journal.recall(again, b"request")
        with pytest.raises(WrongRound, match="forgotten"):
            journal.record(step(2), b"request", b"reply", b"state")
        with pytest.raises(WrongRound, match="on another request"):
            journal.recall(step(1), b"other again")
        assert len(journal.refusals(RUN)) == 2
        assert journal.state("old") == b"old state"
        assert journal.recall(step(1, run="old"), b"request") == b"old reply"
        journal.forget(RUN)


def test_a_run_that_is_not_here_cannot_be_forgotten(journal):
    with pytest.raises(JournalUnusable, match="got run '没有' to forget"):
        journal.forget("没有")


# what is on the disk


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + 16] for start in range(0, len(data) - 16, 16)]


def test_the_disk_shows_nothing_of_replies_and_states(folder):
    secret, reply = os.urandom(50_000), os.urandom(50_000)
    with Journal(folder, KEY) as journal:
        for number in range(1, 5):
            journal.record(step(number), b"the request itself", reply, secret)
            content = b"".join(path.read_bytes() for path in folder.iterdir())
            assert len(content) > 100_000
            assert not any(piece in content for piece in (*pieces(secret), *pieces(reply), b"the request itself"))
    assert not any(piece in (folder / JOURNAL_FILE).read_bytes() for piece in pieces(secret))


def test_a_replaced_state_is_overwritten_even_in_its_sealed_form(folder):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", b"reply", os.urandom(20_000))
    db = outside(folder)
    (old,) = db.execute("SELECT sealed FROM states").fetchone()
    db.close()
    with Journal(folder, KEY) as journal:
        journal.record(step(2), b"request", b"reply", b"short")
    assert not any(piece in (folder / JOURNAL_FILE).read_bytes() for piece in pieces(old))


def test_files_are_for_their_owner_only(folder):
    before = os.umask(0)
    try:
        with Journal(folder, KEY) as journal:
            journal.record(step(1), b"request", b"reply", b"state")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {folder.name: 0o700, "site.sqlite3": 0o600, "site.lock": 0o600}


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o666])
def test_a_journal_open_to_others_is_refused(folder, open_to):
    Journal(folder, KEY).close()
    (folder / JOURNAL_FILE).chmod(open_to)
    with pytest.raises(CustodyError, match=f"mode {open_to:04o}"):
        Journal(folder, KEY)


@pytest.mark.parametrize("name", ["site.sqlite3", "site.lock"])
def test_a_journal_behind_a_link_is_refused(folder, name):
    folder.mkdir()
    (folder / name).symlink_to(folder / "elsewhere")
    with pytest.raises(CustodyError, match="cannot be opened"):
        Journal(folder, KEY)
    assert not (folder / "elsewhere").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(CustodyError, match=r"站点.*No such file"):
        Journal(tmp_path / "没有" / "站点", KEY)


def test_sqlite_is_set_to_lose_nothing(journal):
    settings = {
        name: journal._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "fullfsync", "secure_delete", "temp_store")
    }
    assert settings == {"journal_mode": "delete", "synchronous": 3, "fullfsync": 1, "secure_delete": 1, "temp_store": 2}


# keys


def test_another_storage_key_is_refused_at_once(folder):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", b"reply", b"state")
    with pytest.raises(WrongKey, match="wrong passphrase or key file"):
        Journal(folder, StorageKey.generate())
    with Journal(folder, KEY) as journal:
        assert journal.state(RUN) == b"state"


def test_another_storage_key_is_refused_before_anything_is_recorded(folder):
    Journal(folder, KEY).close()
    with pytest.raises(WrongKey):
        Journal(folder, StorageKey.generate())


def test_the_state_is_sealed_for_its_run(folder):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", b"reply", b"state")
        journal.record(step(1, run="another"), b"request", b"reply", b"of another")
    db = outside(folder)
    (sealed,) = db.execute("SELECT sealed FROM states WHERE run = ?", (RUN,)).fetchone()
    db.close()
    assert open_at_rest(KEY, sealed, purpose=f"site-state/{RUN}") == b"state"
    alter(folder, "UPDATE states SET sealed = ? WHERE run = 'another'", sealed)
    with Journal(folder, KEY) as journal, pytest.raises(WrongKey):
        journal.state("another")


@pytest.mark.parametrize(
    ("column", "value", "moved_to", "request_now"),
    [
        ("phase", "unmask", Step(RUN, "unmask", 1), b"request"),
        ("round", 2, step(2), b"request"),
        ("run", "another", step(1, run="another"), b"request"),
        ("request", hashlib.sha256(b"other").digest(), step(1), b"other"),
    ],
    ids=["phase", "round", "run", "request"],
)
def test_a_reply_is_sealed_for_its_step_and_request(folder, column, value, moved_to, request_now):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", b"reply", None)
    alter(folder, f"UPDATE steps SET {column} = ?", value)  # noqa: S608
    with Journal(folder, KEY) as journal, pytest.raises(WrongKey, match="altered"):
        journal.recall(moved_to, request_now)


# one process


def test_a_second_journal_on_the_folder_is_refused_until_the_first_is_closed(folder):
    first = Journal(folder, KEY)
    with pytest.raises(JournalUnusable, match="another process"):
        Journal(folder, KEY)
    first.record(step(1), b"request", b"reply", None)
    first.close()
    first.close()
    with Journal(folder, KEY) as second:
        assert second.recall(step(1), b"request") == b"reply"


def test_a_journal_that_did_not_open_leaves_no_lock(folder):
    Journal(folder, KEY).close()
    with pytest.raises(WrongKey) as caught:
        Journal(folder, StorageKey.generate())
    assert caught.traceback  # the frames, and what they hold, are alive: the lock is gone nevertheless
    Journal(folder, KEY).close()


def test_a_closed_journal_is_a_mistake_to_use(folder):
    journal = Journal(folder, KEY)
    journal.close()
    with pytest.raises(sqlite3.ProgrammingError):
        journal.recall(step(1), b"request")


CHILD = """
import sys, hashlib
from pathlib import Path
from fedseek.identity.vault import StorageKey
from fedseek_site.journal import Journal, Step

folder, run, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
journal = Journal(folder, StorageKey(bytes(range(32))))
print("open", flush=True)
for number in range(1, 10_000):
    filler = hashlib.shake_256(b"%d" % number).digest(size)
    journal.record(Step(run, "round", number), b"request %d" % number, b"reply %d " % number + filler,
                   b"state %d " % number + filler)
    print(number, flush=True)
"""


def start_child(folder: Path, run: str, size: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients")])}
    command = [sys.executable, "-c", CHILD, str(folder), run, str(size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def test_a_folder_in_use_by_another_process_is_refused_and_free_when_that_is_killed(folder):
    child = start_child(folder, RUN, 10)
    assert child.stdout.readline() == b"open\n"
    with pytest.raises(JournalUnusable, match="another process"):
        Journal(folder, KEY)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    Journal(folder, KEY).close()


def test_a_process_killed_at_any_moment_leaves_reply_and_state_together(folder):
    size, left_a_transaction = 400_000, 0
    chance = random.Random(7)
    for trial in range(30):
        run = f"{RUN}-{trial}"
        child = start_child(folder, run, size)
        assert child.stdout.readline() == b"open\n"
        time.sleep(chance.uniform(0.0, 0.06))
        child.kill()
        told = child.stdout.read().split(b"\n")[:-1]
        child.wait()
        child.stdout.close()
        rollback = folder / f"{JOURNAL_FILE}-journal"
        if rollback.exists():
            left_a_transaction += 1
            assert stat.S_IMODE(rollback.stat().st_mode) == 0o600
        with Journal(folder, KEY) as journal:
            check_whole(journal, run, size, told=int(told[-1]) if told else 0)
    assert left_a_transaction >= 3, "the kills missed the moments that matter"


def check_whole(journal: Journal, run: str, size: int, *, told: int) -> None:
    """State and reply are of one step, the last one; it is the one told or the one after; nothing is beyond it."""
    state = journal.state(run)
    done = int(state.split(b" ", 2)[1]) if state is not None else 0
    assert told <= done <= told + 1
    for number in range(1, done + 1):
        filler = hashlib.shake_256(b"%d" % number).digest(size)
        if number == done:
            assert state == b"state %d " % number + filler
        if number >= done - 2:
            assert journal.recall(Step(run, "round", number), b"request %d" % number) == b"reply %d " % number + filler
        else:
            with pytest.raises(WrongRound, match="no longer kept"):
                journal.recall(Step(run, "round", number), b"request %d" % number)
    assert journal.recall(Step(run, "round", done + 1), b"request") is None


# damage and full disks


@pytest.mark.parametrize("start", [0, 16, 100, 4096, 12288])
def test_a_damaged_file_is_refused_clearly(folder, start):
    with Journal(folder, KEY) as journal:
        for number in range(1, 50):
            journal.record(step(number), b"request", b"reply" * 100, b"state" * 100)
    with (folder / JOURNAL_FILE).open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xa5" * 2000)
    with pytest.raises(JournalUnusable, match=JOURNAL_FILE):
        Journal(folder, KEY)


def test_a_truncated_file_is_refused_clearly(folder):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", os.urandom(50_000), os.urandom(50_000))
    os.truncate(folder / JOURNAL_FILE, 60_000)
    with pytest.raises(JournalUnusable, match="cannot be used"):
        Journal(folder, KEY)


def test_a_flipped_bit_in_a_blob_is_seen_when_it_is_read(folder):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request", b"reply" * 5000, b"state" * 5000)
    db = outside(folder)
    sealed = [bytearray(db.execute(f"SELECT {at}").fetchone()[0]) for at in ("reply FROM steps", "sealed FROM states")]
    db.close()
    for blob in sealed:
        blob[10_000] ^= 1
    alter(folder, "UPDATE steps SET reply = ?", sealed[0])
    alter(folder, "UPDATE states SET sealed = ?", sealed[1])
    with Journal(folder, KEY) as journal:
        with pytest.raises(WrongKey, match="altered"):
            journal.recall(step(1), b"request")
        with pytest.raises(WrongKey, match="altered"):
            journal.state(RUN)


@pytest.mark.parametrize("statement", ["CREATE TABLE steps (x)", "PRAGMA application_id = 7"])
def test_a_database_of_something_else_is_refused_and_left_alone(folder, statement):
    folder.mkdir()
    db = outside(folder)
    db.execute(statement)
    db.execute("PRAGMA user_version = 1")
    db.close()
    (folder / JOURNAL_FILE).chmod(0o600)
    before = (folder / JOURNAL_FILE).read_bytes()
    with pytest.raises(JournalUnusable, match="not a site's journal"):
        Journal(folder, KEY)
    assert (folder / JOURNAL_FILE).read_bytes() == before


def test_a_file_left_empty_by_a_crash_at_the_first_opening_is_begun(folder):
    folder.mkdir()
    (folder / JOURNAL_FILE).touch(0o600)
    with Journal(folder, KEY) as journal:
        assert journal.latest_run() is None


def fill(journal: Journal, *, spare_pages: int) -> None:
    """As if the disk had room for so many pages more."""
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages + spare_pages}")


@pytest.mark.parametrize("spare_pages", [0, 1, 10, 30, 45])
def test_a_full_disk_is_told_and_what_was_there_stays(folder, spare_pages):
    with Journal(folder, KEY) as journal:
        journal.record(step(1), b"request 1", b"reply 1", b"state 1")
        fill(journal, spare_pages=spare_pages)
        with pytest.raises(JournalUnusable, match=r"SQLITE_FULL.*\n.*make room"):
            journal.record(step(2), b"request 2", os.urandom(100_000), os.urandom(100_000))
        check_first_step_only(journal)
        journal._db.execute("PRAGMA max_page_count = 1000000")
        journal.record(step(3), b"request 3", b"reply 3", b"state 3")
    with Journal(folder, KEY) as journal:
        assert journal.recall(step(1), b"request 1") == b"reply 1"
        assert journal.recall(step(2), b"request 2") is None
        assert journal.state(RUN) == b"state 3"


def check_first_step_only(journal: Journal) -> None:
    assert journal.state(RUN) == b"state 1"
    assert journal.recall(step(1), b"request 1") == b"reply 1"
    assert journal.recall(step(2), b"request 2") is None


# sizes


def test_replies_and_states_of_a_hundred_megabytes_are_kept(journal):
    reply, state = os.urandom(1 << 20) * 100, os.urandom(1 << 20) * 100
    journal.record(step(1), b"request", reply, state)
    assert journal.recall(step(1), b"request") == reply
    assert journal.state(RUN) == state


def test_the_bound_fits_the_rows_that_sqlite_takes(journal):
    rest = len(seal_at_rest(KEY, b"", purpose="p")) + 10_000  # of a row: run, phase, round, digest
    assert journal._db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) >= journal_module.MAX_KEPT_BYTES + rest


@pytest.mark.parametrize(("reply", "state"), [(b"x" * 11, b""), (b"", b"x" * 11), (b"x" * 11, None)])
def test_what_is_too_large_is_refused_and_nothing_is_kept(journal, monkeypatch, reply, state):
    monkeypatch.setattr(journal_module, "MAX_KEPT_BYTES", 10)
    journal.record(step(1), b"request 1" * 10, b"x" * 10, b"y" * 10)
    with pytest.raises(TooLarge, match="got 11 bytes, wanted at most 10"):
        journal.record(step(2), b"request 2", reply, state)
    assert journal.recall(step(2), b"request 2") is None
    assert journal.state(RUN) == b"y" * 10


def test_a_row_too_large_for_this_sqlite_is_told_as_such_and_nothing_is_kept(journal):
    journal._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
    with pytest.raises(TooLarge):
        journal.record(step(1), b"request", b"reply", bytes(60_000))
    assert journal.recall(step(1), b"request") is None
