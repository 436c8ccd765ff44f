"""The courier's worker and its way to the site service, without Flower: what comes out when something fails."""

import os
import signal
import sys
import threading
import time

import pytest
from loopback import turned, until

from fedseek.daemon.bundle import FLOWER_ENVIRONMENT, code_free_bundle
from fedseek.errors import AddressTaken, Unreachable
from fedseek_site import courier
from fedseek_site.courier import CourierSettings, delivery, work
from fedseek_site.gate import Failure
from fedseek_site.socket_service import serve

QUOTED = "patient-42"


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(courier, "RETRY_SECONDS", 0.02)
    return tmp_path / "s.sock"


def settings_in(folder):
    return CourierSettings(folder / "c", "coordinator:1", folder / "ca", folder / "key", folder / "s")


def test_a_message_is_handed_in_and_its_answer_back(path):
    stop = serve(turned, path)
    assert delivery(path)(b"abc") == b"cba"
    stop(0.5)


def test_a_service_that_stays_away_is_told_after_its_time(path):
    started = time.monotonic()
    assert delivery(path, away=0.3)(b"abc") is Failure.AWAY
    assert 0.3 < time.monotonic() - started < 5


def test_a_service_that_comes_back_in_time_gets_the_message(path):
    started = []
    timer = threading.Timer(0.3, lambda: started.append(serve(turned, path)))
    timer.start()
    assert delivery(path, away=20)(b"abc") == b"cba"
    timer.join()
    started[0](0.5)


def test_a_service_that_was_long_at_work_when_it_died_gets_the_whole_time_again(path):
    calls, began = [], threading.Event()

    def handle(request):
        calls.append(request)
        began.set()
        time.sleep(1.2 if len(calls) == 1 else 0)
        return turned(request)

    stops = [serve(handle, path)]

    def restart():
        began.wait(5)
        time.sleep(0.8)
        stops.pop()(0.0)
        time.sleep(0.3)
        stops.append(serve(handle, path))

    thread = threading.Thread(target=restart)
    thread.start()
    assert delivery(path, away=0.5)(b"abc") == b"cba"
    thread.join()
    stops[0](0.5)


def test_a_service_that_fails_is_a_refusal_without_its_text(path, caplog):
    def fail(request):
        raise ValueError(f"{QUOTED} {request!r}")

    stop = serve(fail, path)
    assert delivery(path)(b"abc") is Failure.REFUSED
    stop(0.5)
    told = [record.getMessage() for record in caplog.records if record.name == "fedseek_site.courier"]
    assert told
    assert not [text for text in told if QUOTED in text]


def test_a_message_that_the_service_does_not_take_is_a_refusal(path):
    stop = serve(turned, path, limit=2)
    assert delivery(path)(b"abc") is Failure.REFUSED
    stop(0.5)


def test_the_three_failures_say_nothing_but_what_is_written_there():
    assert {failure.value for failure in Failure} == {
        "the site refused the message",
        "the site service is away",
        "the site runs no such bundle",
    }


# ------------------------------------------------------------------------------------------------------------ the worker
class Enough(BaseException):
    """Ends a worker in a test."""


def test_the_worker_sleeps_until_the_bell_rings_and_then_answers_all_there_is(monkeypatch):
    asked, bell, killed = [], threading.Event(), []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    answers = iter([True, True, False, Unreachable("SuperNode"), False, Enough()])

    def answer_next(deliver):
        asked.append(deliver)
        got = next(answers)
        if isinstance(got, BaseException):
            raise got
        return got

    def run():
        with pytest.raises(Enough):
            work(answer_next, turned, bell)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: len(asked) == 3, 5)
    time.sleep(0.1)
    assert len(asked) == 3
    for count in (4, 5, 6):
        bell.set()
        until(lambda count=count: len(asked) == count, 5)
    thread.join(5)
    assert asked == [turned] * 6
    assert killed == [(os.getpid(), signal.SIGTERM)], "a worker that failed must not leave the SuperNode behind"


# ------------------------------------------------------------------------------------------------------- the process
def test_the_command_carries_no_secret_and_imports_nothing_from_the_working_folder(tmp_path):
    child = courier.courier(settings_in(tmp_path))
    assert child.command[:4] == (sys.executable, "-P", "-m", "fedseek_site.courier")
    assert set(child.environment) == {"HOME", *courier.ALLOCATOR}
    parsed = dict(zip(child.command[4::2], child.command[5::2], strict=True))
    assert parsed == {
        "--state": str(tmp_path / "c"),
        "--coordinator": "coordinator:1",
        "--ca": str(tmp_path / "ca"),
        "--node-key": str(tmp_path / "key"),
        "--service": str(tmp_path / "s"),
    }


def test_a_state_folder_too_deep_for_a_socket_is_told(tmp_path):
    with pytest.raises(AddressTaken, match="at most 100"):
        courier._private_socket(tmp_path / ("x" * 100) / "runtime.sock")


def test_telemetry_and_installs_are_off_before_flower_is_imported(tmp_path, monkeypatch):
    seen = {}

    def run(settings):
        assert settings.state == tmp_path / "c"
        seen.update(os.environ)

    monkeypatch.setattr(courier, "_run", run)
    for name in (*FLOWER_ENVIRONMENT, "FLWR_HOME"):
        monkeypatch.setenv(name, "before")
    with pytest.raises(SystemExit) as caught:
        courier.run_courier(settings_in(tmp_path))
    assert caught.value.code == 1
    assert seen["FLWR_TELEMETRY_ENABLED"] == "0"
    assert seen["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert seen["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert seen["FLWR_HOME"] == str(tmp_path / "c" / "flower")


def test_what_ends_the_courier_is_one_line(tmp_path, monkeypatch):
    def run(settings):
        raise AddressTaken("too long", hint="shorten it")

    monkeypatch.setattr(courier, "_run", run)
    for name in (*FLOWER_ENVIRONMENT, "FLWR_HOME"):
        monkeypatch.setenv(name, "before")
    with pytest.raises(SystemExit) as caught:
        courier.run_courier(settings_in(tmp_path))
    assert caught.value.code == "fedseek-site courier: AddressTaken: too long (shorten it)"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    for name in (*FLOWER_ENVIRONMENT, "FLWR_HOME"):
        monkeypatch.setenv(name, "before")
    (tmp_path / "c").write_text("in the way")
    before = os.umask(0o022)
    with pytest.raises(SystemExit, match=r"^fedseek-site courier: .* File exists"):
        courier.run_courier(settings_in(tmp_path))
    os.umask(before)


def test_the_bundle_is_the_same_everywhere():
    assert courier.bundle_digest(code_free_bundle()) == courier.bundle_digest(code_free_bundle())
