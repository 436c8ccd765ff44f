"""The audit record as its writer has it: what is on the disk when, who may write, what a crash leaves."""

import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from audit_records import DAY, HOSPITAL_KEY, KEY, NAME, NEW_KEY, NOVEMBER, Clock, open_chain, public, write_months
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.daemon import audit_files
from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_check import checked_lines, verify_audit
from fedseek.daemon.audit_lines import MAX_LINE_BYTES, parse_line
from fedseek.errors import (
    AuditBroken,
    CustodyError,
    InvalidConfig,
    JournalUnusable,
    Malformed,
    TooLarge,
    WrongKey,
)
from fedseek.identity.signing import sign_with

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "audit"


def kinds(folder: Path, key: Ed25519PrivateKey = KEY) -> list[str]:
    return [line.kind for line in checked_lines(folder, public_key=public(key), name=NAME)]


def verified(folder: Path, key: Ed25519PrivateKey = KEY, **more):
    return verify_audit(folder, public_key=public(key), name=NAME, **more)


# recording


def test_an_entry_is_on_the_disk_when_record_returns(folder):
    with open_chain(folder) as chain:
        head = chain.record(
            "plan-refused", rule="epsilon 3 of 患者 exceeds 2", kind="plan", epsilon=3.0, sites=[1, {"a": True}]
        )
        raw = (folder / "2026-11.jsonl").read_bytes()
    line = parse_line(raw.splitlines()[-1])
    assert (line.number, line.kind, line.at) == (2, "plan-refused", "2026-11-22T18:49:25.123Z")
    assert line.detail == {
        "rule": "epsilon 3 of 患者 exceeds 2",
        "kind": "plan",
        "epsilon": 3.0,
        "sites": [1, {"a": True}],
    }
    assert "患者".encode() in raw, "a person can read it"
    assert (head.name, head.number) == (NAME, 2)
    report = verified(folder)
    assert (report.lines, report.last_digest) == (2, head.digest.hex())


def test_a_line_follows_the_one_before_as_sha256sum_has_it(folder):
    with open_chain(folder) as chain:
        chain.record("started")
    first, second = (folder / "2026-11.jsonl").read_bytes().splitlines()
    done = subprocess.run(["sha256sum"], input=first, capture_output=True, check=True)
    assert parse_line(second).previous == done.stdout.split()[0].decode()
    assert parse_line(first).previous == "0" * 64


def test_files_are_for_their_owner_only(folder):
    with open_chain(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    (folder / "2026-11.jsonl").chmod(0o640)
    with pytest.raises(CustodyError, match="open to group"):
        open_chain(folder)


def test_it_goes_on_after_reopening(folder):
    with open_chain(folder) as chain:
        first = chain.record("started")
    with open_chain(folder) as chain:
        assert chain.head() == first
        assert chain.record("stopped").number == 3
    assert kinds(folder) == ["begun", "started", "stopped"]


def test_a_month_begins_a_segment_and_a_clock_set_back_does_not(folder):
    clock = Clock()
    with open_chain(folder, clock=clock) as chain:
        clock.now += 10 * DAY
        chain.record("december")
        clock.now -= 10 * DAY
        chain.record("set-back")
    assert sorted(file.name for file in folder.glob("*.jsonl")) == ["2026-11.jsonl", "2026-12.jsonl"]
    assert len((folder / "2026-12.jsonl").read_bytes().splitlines()) == 2
    assert verified(folder).lines == 3
    with open_chain(folder, clock=clock) as chain:
        chain.record("set-back")
    assert verified(folder).files == 2


json_values = st.recursive(
    st.text(max_size=20)
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,  # at most six in one another: as deep as a detail may be
)


@settings(max_examples=60, deadline=None)
@given(detail=st.dictionaries(st.sampled_from(["规则", "run", "kind", "self"]), json_values, max_size=3))
def test_whatever_may_be_recorded_is_read_back_as_it_was(tmp_path_factory, detail):
    folder = tmp_path_factory.mktemp("audit")
    with open_chain(folder) as chain:
        chain.record("anything", **detail)
    *_, last = checked_lines(folder, public_key=public(KEY), name=NAME)
    assert last.detail == detail


@pytest.mark.parametrize(
    ("detail", "error", "match"),
    [
        ({"key": b"secret"}, TypeError, "detail.key: got bytes"),
        ({"a": [{"b": b"secret"}]}, TypeError, "detail.a.b: got bytes"),
        ({"a": bytearray(b"s")}, TypeError, "got bytearray"),
        ({"a": None}, TypeError, "got NoneType"),
        ({"a": {1: "x"}}, TypeError, "got int as a key"),
        ({"a": float("nan")}, ValueError, "does not fit"),
        ({"a": float("inf")}, ValueError, "does not fit"),
        ({"a": 2**53}, ValueError, "does not fit"),
        ({"a": [[[[[[1]]]]]]}, ValueError, "more than 6"),
        ({"a": "\ud800"}, Malformed, "surrogate"),
        ({"a": "x" * MAX_LINE_BYTES}, TooLarge, "wanted less than 65536"),
    ],
)
def test_what_must_not_be_recorded_is_refused_and_nothing_is_written(folder, detail, error, match):
    with open_chain(folder) as chain:
        before = (folder / "2026-11.jsonl").read_bytes()
        with pytest.raises(error, match=match) as told:
            chain.record("sent", **detail)
        assert "secret" not in str(told.value)
        assert (folder / "2026-11.jsonl").read_bytes() == before
        assert chain.record("sent").number == 2


@pytest.mark.parametrize(
    "kind", ["", "Sent", "a b", "a\n", "x" * 49, "heads", "begun", "fork", "key-announced", "pruned"]
)
def test_a_kind_that_is_none_or_the_record_s_own_is_refused(folder, kind):
    with open_chain(folder) as chain, pytest.raises(ValueError, match="kind"):
        chain.record(kind)


def test_threads_append_one_after_the_other(folder):
    with open_chain(folder) as chain, ThreadPoolExecutor(8) as pool:
        heads = list(pool.map(lambda n: chain.record("sent", number=n), range(100)))
    assert sorted(head.number for head in heads) == list(range(2, 102))
    assert verified(folder).lines == 101


# who may write


def test_a_second_writer_is_refused_until_the_first_is_gone(folder):
    with open_chain(folder), pytest.raises(JournalUnusable, match="another process"):
        open_chain(folder)
    open_chain(folder).close()


def test_a_closed_record_takes_nothing(folder):
    chain = open_chain(folder)
    chain.close()
    chain.close()
    with pytest.raises(JournalUnusable, match="closed"):
        chain.record("sent")


def test_a_line_that_somebody_else_wrote_meanwhile_stops_the_writer(folder):
    with open_chain(folder) as chain:
        with (folder / "2026-11.jsonl").open("ab") as stream:
            stream.write(b"{}\n")
        with pytest.raises(AuditBroken, match="somebody else"):
            chain.record("sent")


def test_a_segment_put_in_place_of_the_open_one_stops_the_writer(folder):
    with open_chain(folder) as chain:
        file = folder / "2026-11.jsonl"
        copy = file.read_bytes()
        file.rename(folder / "moved")
        file.write_bytes(copy)
        with pytest.raises(AuditBroken, match="somebody else"):
            chain.record("sent")
        file.unlink()
        with pytest.raises(JournalUnusable, match="cannot be opened"):
            chain.record("sent")


def test_another_owner_another_key_and_a_key_that_does_not_fit_are_refused(folder):
    open_chain(folder).close()
    with pytest.raises(AuditBroken, match="is the record of '北岸银行'"):
        open_chain(folder, name="仁济医院")
    with pytest.raises(AuditBroken, match="goes on with the key"):
        open_chain(folder, NEW_KEY)
    with pytest.raises(WrongKey):
        AuditChain(folder, name=NAME, sign=partial(sign_with, NEW_KEY), public_key=public(KEY))
    open_chain(folder).close()


def test_less_than_180_days_of_retention_are_refused(folder):
    with pytest.raises(InvalidConfig, match="got 179, wanted at least 180"):
        open_chain(folder, retention_days=179)
    assert not folder.exists()


# a crash


TORN_TAILS = [b"{", b'{"number":3,"at":"2026-11-22T18:49:25.123Z"', b"\0" * 700, "北".encode()[:2]]


@pytest.mark.parametrize("tail", TORN_TAILS)
def test_a_torn_last_line_is_moved_aside_and_noted(folder, tail):
    with open_chain(folder) as chain:
        chain.record("started")
    with (folder / "2026-11.jsonl").open("ab") as stream:
        stream.write(tail)
    assert verified(folder).unfinished == "2026-11.jsonl line 3"
    with open_chain(folder) as chain:
        assert chain.head().number == 3
    (torn,) = folder.glob("torn-*.jsonl")
    assert torn.name == "torn-2026-11-22T184925-123Z.jsonl"
    assert torn.read_bytes() == tail
    assert kinds(folder) == ["begun", "started", "torn"]
    assert verified(folder).unfinished == ""
    open_chain(folder).close()
    assert kinds(folder) == ["begun", "started", "torn"], "noted once"


def test_a_line_that_lacks_nothing_but_its_end_was_not_recorded(folder):
    with open_chain(folder) as chain:
        chain.record("started")
    file = folder / "2026-11.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    open_chain(folder).close()
    assert kinds(folder) == ["begun", "torn"]


def test_a_crash_in_the_very_first_line_or_before_it_leaves_a_record_that_can_begin(folder):
    for content in (b"", b'{"number":1'):
        folder.mkdir(exist_ok=True)
        (folder / "2026-11.jsonl").write_bytes(content)
        (folder / "2026-11.jsonl").chmod(0o600)
        open_chain(folder).close()
        assert kinds(folder)[0] == "begun"
        (folder / "2026-11.jsonl").unlink()


def test_a_torn_line_noted_only_after_a_second_crash_is_noted_all_the_same(folder):
    open_chain(folder).close()
    torn = folder / "torn-2026-11-22T000000-000Z.jsonl"
    torn.write_bytes(b"{")
    torn.chmod(0o600)
    open_chain(folder).close()
    assert kinds(folder) == ["begun", "torn"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: [*lines[:2], b"{}", *lines[2:]], "2026-11.jsonl line 3: line of 2 bytes does not parse"),
        (lambda lines: [*lines[:1], *lines[2:]], "line 2: got entry 3, wanted 2"),
        (lambda lines: lines[1:], "line 1: got entry 2 .*the beginning was cut"),
        (
            lambda lines: [*lines[:1], lines[1].replace(b'"number":0', b'"number":9'), *lines[2:]],
            "line 2: entry 2 is not signed",
        ),
        (
            lambda lines: [*lines[:-1], lines[-1].replace(b'"number":2', b'"number":9', 1)],
            "line 4: entry 4 is not signed",
        ),
        (lambda lines: [b"" for _ in lines], "line 1: line of 0 bytes"),
    ],
)
def test_every_other_damage_is_named_and_nothing_is_appended(folder, change, match):
    with open_chain(folder) as chain:
        for number in range(3):
            chain.record("sent", number=number)
    file = folder / "2026-11.jsonl"
    damaged = b"".join(line + b"\n" for line in change(file.read_bytes().splitlines()))
    file.write_bytes(damaged)
    with pytest.raises(AuditBroken, match=match):
        open_chain(folder)
    assert file.read_bytes() == damaged
    assert sorted(each.name for each in folder.iterdir()) == ["2026-11.jsonl", "audit.lock"]


CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/daemon")!r})
from pathlib import Path
from audit_records import open_chain
chain = open_chain(Path(sys.argv[1]))
while True:
    print(chain.record("sent", text="样" * 700).number, flush=True)
"""


def test_a_writer_killed_at_any_moment_has_lost_nothing_that_it_said_was_recorded(folder):
    waits = random.Random(4)
    for lines in (1, 2, 5, 11):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(lines)]
        time.sleep(waits.uniform(0, 0.005))
        child.send_signal(signal.SIGKILL)
        told += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        whole = [int(number) for number in told if number.endswith("\n")]
        with open_chain(folder) as chain:
            assert chain.head().number >= whole[-1]
    assert verified(folder).last >= whole[-1] >= 20


# a full or failing disk


def fail_writes(monkeypatch, *, after: int, also: tuple[str, ...] = ()) -> None:
    real = os.write

    def write(descriptor, data):
        if after:
            real(descriptor, bytes(data[:after]))
        raise OSError(28, "No space left on device")

    def refuse(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(audit_files.os, "write", write)
    for name in also:
        monkeypatch.setattr(audit_files.os, name, refuse)


@pytest.mark.parametrize("after", [0, 1, 100])
def test_a_full_disk_is_told_and_nothing_half_written_counts(folder, monkeypatch, after):
    with open_chain(folder) as chain:
        head = chain.head()
        with monkeypatch.context() as patch:
            fail_writes(patch, after=after)
            with pytest.raises(JournalUnusable, match=r"No space left(.|\n)*make room"):
                chain.record("sent")
        assert chain.head() == head
        assert chain.record("sent").number == 2, "room again: it goes on"
    assert kinds(folder) == ["begun", "sent"]


def test_a_disk_that_fails_altogether_ends_the_writer_and_not_the_record(folder, monkeypatch):
    chain = open_chain(folder)
    with monkeypatch.context() as patch:
        fail_writes(patch, after=10, also=("ftruncate",))
        with pytest.raises(JournalUnusable, match="No space left"):
            chain.record("sent")
    with pytest.raises(JournalUnusable, match=r"takes no more lines: .*Input/output error"):
        chain.record("sent")
    chain.close()
    open_chain(folder).close()
    assert kinds(folder) == ["begun", "torn"]


def test_a_line_that_could_not_be_synced_is_taken_back(folder, monkeypatch):
    with open_chain(folder) as chain:
        calls = iter([OSError(5, "Input/output error"), None])

        def fsync(_descriptor):
            if error := next(calls):
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(audit_files.os, "fsync", fsync)
            with pytest.raises(JournalUnusable, match="Input/output error"):
                chain.record("lost")
        chain.record("kept")
    assert kinds(folder) == ["begun", "kept"]


# keys


def test_a_new_key_takes_over_and_either_key_verifies(folder):
    with open_chain(folder) as chain:
        chain.record("started")
        head = chain.change_key(partial(sign_with, NEW_KEY), public(NEW_KEY))
        assert chain.change_key(partial(sign_with, NEW_KEY), public(NEW_KEY)) == head
        chain.record("stopped")
    with pytest.raises(AuditBroken, match="goes on with the key"):
        open_chain(folder)
    open_chain(folder, NEW_KEY).close()
    for key in (KEY, NEW_KEY):
        assert verified(folder, key).keys == (public(KEY).hex(), public(NEW_KEY).hex())
    assert kinds(folder) == ["begun", "started", "key-announced", "key-taken", "stopped"]
    with pytest.raises(AuditBroken, match="no line is signed with the key"):
        verify_audit(folder, public_key=bytes(32))


def test_a_key_that_does_not_sign_is_not_changed_to(folder):
    with open_chain(folder) as chain:
        with pytest.raises(WrongKey):
            chain.change_key(partial(sign_with, KEY), public(NEW_KEY))
        chain.record("sent")
    assert kinds(folder) == ["begun", "sent"]


def test_an_announced_key_can_open_the_record_and_takes_over(folder):
    with open_chain(folder) as chain:
        chain.announce_key(public(HOSPITAL_KEY))
        for _ in range(2):
            chain.announce_key(public(NEW_KEY))
            chain.announce_key(public(KEY))
    with open_chain(folder) as chain:
        chain.record("still-the-old-one")
    with pytest.raises(AuditBroken, match="goes on with the key"):
        open_chain(folder, HOSPITAL_KEY)
    open_chain(folder, NEW_KEY).close()
    with pytest.raises(AuditBroken, match="goes on with the key"):
        open_chain(folder)
    open_chain(folder, NEW_KEY).close()
    assert kinds(folder, NEW_KEY) == ["begun", "key-announced", "key-announced", "still-the-old-one", "key-taken"]


def test_a_key_change_that_fails_half_way_goes_on_with_the_old_key(folder, monkeypatch):
    with open_chain(folder) as chain:
        chain.announce_key(public(NEW_KEY))
        with monkeypatch.context() as patch:
            fail_writes(patch, after=5)
            with pytest.raises(JournalUnusable):
                chain.change_key(partial(sign_with, NEW_KEY), public(NEW_KEY))
        chain.record("sent")
    open_chain(folder).close()
    assert kinds(folder) == ["begun", "key-announced", "sent"]


# retention


def test_segments_past_their_time_are_dropped_with_a_word_and_the_rest_verifies(folder):
    clock = write_months(folder, 20)
    whole = verified(folder)
    torn = folder / "torn-2025-03-01T000000-000Z.jsonl"
    torn.write_bytes(b"{")
    torn.chmod(0o600)
    with open_chain(folder, clock=clock) as chain:
        files = len(list(folder.glob("2*.jsonl")))
        dropped = chain.prune()
        assert dropped == files - len(list(folder.glob("2*.jsonl"))) > 3
        assert chain.prune() == 0
        chain.record("later")
    assert not torn.exists()
    report = verified(folder)
    assert report.dropped == report.first - 1 >= 5
    assert report.last == whole.last + 3  # torn, pruned, later
    assert clock.now - report.first_at / 1000 > 365 * DAY, "nothing younger was dropped"
    open_chain(folder, clock=clock).close()


def test_pruning_again_and_changing_the_key_in_between_keeps_verifying(folder):
    clock = write_months(folder, 9, retention_days=180)
    with open_chain(folder, clock=clock, retention_days=180) as chain:
        assert chain.prune()
        chain.change_key(partial(sign_with, NEW_KEY), public(NEW_KEY))
        for _ in range(9):
            clock.now += 30.5 * DAY
            chain.record("sent")
        assert chain.prune()
    assert verified(folder, NEW_KEY).keys == (public(NEW_KEY).hex(),)
    with pytest.raises(AuditBroken, match="no line is signed with the key"):
        verified(folder, KEY)
    open_chain(folder, NEW_KEY, clock=clock).close()


def test_a_key_announced_in_a_line_that_was_dropped_can_take_over(folder):
    clock = Clock(NOVEMBER - 500 * DAY)
    with open_chain(folder, clock=clock) as chain:
        chain.announce_key(public(NEW_KEY))
        clock.now = NOVEMBER
        chain.record("sent")
        assert chain.prune() == 1
    open_chain(folder, NEW_KEY).close()
    assert kinds(folder, NEW_KEY) == ["sent", "pruned", "key-taken"]
    assert verified(folder).keys == (public(KEY).hex(), public(NEW_KEY).hex())


def test_nothing_is_dropped_before_its_time(folder):
    clock = write_months(folder, 12)
    with open_chain(folder, clock=clock) as chain:
        assert chain.prune() == 0
    assert not (folder / "anchor.json").exists()


def test_a_crash_while_pruning_is_finished_on_opening(folder, monkeypatch):
    clock = write_months(folder, 20)
    unlink, count = Path.unlink, iter(range(10))

    def crash(path, **settings):
        if path.suffix == ".jsonl" and next(count) == 2:
            raise KeyboardInterrupt
        unlink(path, **settings)

    with open_chain(folder, clock=clock) as chain, monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            chain.prune()
    report = verified(folder)
    assert report.dropped > 3
    files = len(list(folder.glob("2*.jsonl")))
    open_chain(folder, clock=clock).close()
    assert len(list(folder.glob("2*.jsonl"))) < files
    assert verified(folder).last_digest == report.last_digest


def test_a_crash_before_the_anchor_is_written_leaves_everything(folder, monkeypatch):
    clock = write_months(folder, 20)
    with open_chain(folder, clock=clock) as chain, monkeypatch.context() as patch:
        patch.setattr("fedseek.daemon.audit.write_secret_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chain.prune()
    assert verified(folder).first == 1
    with open_chain(folder, clock=clock) as chain:
        assert chain.prune() > 3


def test_the_lock_file_is_the_lock(folder):
    with open_chain(folder):
        descriptor = os.open(folder / audit_files.LOCK_FILE, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
