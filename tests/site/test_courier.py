"""The courier before a real SuperLink: bytes pass, code does not, and whatever dies comes back."""

import dataclasses
import datetime
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import flwr.supernode.node_auth_http_interceptor as node_auth_http_interceptor
import pytest
from loopback import ask, gate_at, kept_alive, make_node_key, pids, service_process, site_at, turned, until

from fedseek.daemon.bundle import _DESCRIPTION
from fedseek.errors import NotAdmitted
from fedseek_site import flower
from fedseek_site.courier import courier
from fedseek_site.gate import Credentials, load_authority, load_node_key
from fedseek_site.socket_service import serve

QUOTED = "patient-42"
INVALID_FAB = 7


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    with gate_at(folder) as gate:
        yield gate
    assert not pids(folder), "left behind"


@pytest.fixture(scope="module")
def node(gate):
    return gate.enrolled_site("北岸银行")


@pytest.fixture(scope="module")
def site(gate, node):
    settings, number = node

    def handle(request):
        if request == b"fail":
            raise RuntimeError(QUOTED)
        return turned(request)

    with site_at(settings, handle):
        yield settings, number


def hostile_bundle(marker):
    code = f"open({str(marker)!r}, 'a').write('ran\\n')\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", _DESCRIPTION.replace("fedseek_carries_no_code:none", "evil:app"))
        for name in ("evil.py", "fedseek/__init__.py", "fedseek_site/__init__.py", "sitecustomize.py"):
            archive.writestr(name, code)
    return buffer.getvalue()


def other_bundle():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", _DESCRIPTION.replace('version = "1"', 'version = "2"'))
    return buffer.getvalue()


def error_of(gate, link, number, request):
    """The error that the SuperLink got for this request."""
    link.open()
    until(lambda: number in link.nodes(), 40)
    sent = link.push(number, request, "round", 1, lifetime=60)
    arrivals = until(lambda: link.poll([sent]), 20)
    link.close()
    return arrivals[0].error


@pytest.mark.parametrize("size", [1, 3_000_000, 11_000_000])
def test_bytes_pass_both_ways(gate, site, size):
    request = os.urandom(size)
    asked = ask(gate.link(), site[1], request)
    assert asked.reply == turned(request)
    assert asked.rejected is None


@pytest.mark.parametrize("kind", ["hostile", "other"])
def test_a_bundle_other_than_ours_is_neither_run_nor_written_and_the_next_message_is_served(gate, site, kind):
    marker = gate.folder / "marker"
    bundle = hostile_bundle(marker) if kind == "hostile" else other_bundle()
    assert error_of(gate, gate.link(bundle), site[1], b"asked under it") == INVALID_FAB
    courier_files = list(site[0].state.rglob("*"))
    assert {path.name for path in courier_files} <= {"node", "runtime.sock", "flower"}
    assert not marker.exists()
    assert not list(gate.folder.rglob("*.py"))
    assert ask(gate.link(), site[1], b"honest").reply == turned(b"honest")


def test_of_an_exception_at_the_site_nothing_but_a_code_leaves(gate, site):
    from flwr.common.constant import ErrorCode

    assert error_of(gate, gate.link(), site[1], b"fail") == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    written = [path for path in gate.folder.rglob("*") if path.is_file()]
    assert (gate.folder / "state" / "state.db") in written
    assert not [path for path in written if QUOTED.encode() in path.read_bytes()]


def test_it_runs_as_one_process_that_imports_no_data_or_key_code(gate, site):
    (pid,) = pids("fedseek_site.courier", site[0].state)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in maps
    assert "tenseal" not in maps


@pytest.mark.slow
def test_a_site_that_is_not_registered_is_told_so_once_and_let_in_when_it_is(gate):
    settings = gate.site("仁济医院")
    with site_at(settings) as log:
        text = until(lambda: "NotAdmitted" in log.read_text() and log.read_text(), 20, OSError)
        assert text.count("\n") == 1
        assert "not a registered site" in text
        assert "roster" in text
        number = gate.enrol(make_node_key(settings.node_key), "仁济医院")
        assert ask(gate.link(), number, b"now").reply == b"won"
        assert log.read_text().count("NotAdmitted") == 1
        gate.link().revoke(number)
        until(lambda: log.read_text().count("NotAdmitted") == 2, 60)


@pytest.mark.parametrize(("minutes", "says"), [(10, "ahead of"), (-10, "behind")])
def test_a_clock_that_is_minutes_off_is_named(gate, node, monkeypatch, minutes, says):
    skewed = datetime.timedelta(minutes=minutes)
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: datetime.datetime.now(datetime.UTC) + skewed)
    settings, _ = node
    credentials = Credentials(gate.address, load_authority(settings.ca), load_node_key(settings.node_key))
    with pytest.raises(NotAdmitted, match=f"clock is .* s {says} the coordinator's") as caught:
        flower.take_place(credentials, settings.state.with_name("node-of-a-test"))
    assert caught.value.hint == "set this machine's clock"


def test_a_site_enrolled_anew_gets_its_new_number(gate):
    settings, number = gate.enrolled_site("anew")
    credentials = Credentials(gate.address, load_authority(settings.ca), load_node_key(settings.node_key))
    memory = settings.state.with_name("node")
    assert flower.take_place(credentials, memory) == number
    assert flower.take_place(credentials, memory) == number
    assert memory.read_text() == str(number)
    assert memory.stat().st_mode & 0o777 == 0o600
    gate.link().revoke(number)
    again = gate.enrol(make_node_key(settings.node_key), "anew")
    credentials = Credentials(gate.address, load_authority(settings.ca), load_node_key(settings.node_key))
    assert flower.take_place(credentials, memory) == again != number


@pytest.mark.slow
def test_killed_in_the_middle_of_a_message_it_is_started_again_and_serves(gate):
    settings, number = gate.enrolled_site("killed")
    killed = []

    def slow(request):
        if not killed:
            (pid,) = pids("fedseek_site.courier", settings.state)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            time.sleep(0.5)
        return turned(request)

    with site_at(settings, slow):
        started = time.monotonic()
        assert ask(gate.link(), number, b"through it").reply == b"ti hguorht"
        assert killed
        assert time.monotonic() - started < 40


@pytest.mark.slow
def test_while_the_site_service_is_away_it_waits_and_then_delivers(gate):
    settings, number = gate.enrolled_site("away")
    begun = settings.state.with_name("begun")
    with site_at(settings, None), kept_alive(service_process(settings.service, begun)):

        def kill():
            until(lambda: begun.read_text(), 40, OSError)
            (pid,) = pids("loopback.py", settings.service)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        assert ask(gate.link(), number, b"persist").reply == b"tsisrep"
        killer.join()
        assert begun.read_text() == "7\n7\n"


def test_sigterm_ends_it_within_seconds_and_nothing_is_left(gate):
    settings, number = gate.enrolled_site("ended")
    with site_at(settings):
        link = gate.link()
        assert ask(link, number, b"at work").reply == b"krow ta"
        link.open()
        until(lambda: number in link.nodes(), 40)
        started = time.monotonic()
    assert time.monotonic() - started < 4
    assert not pids("fedseek_site.courier", settings.state)
    assert number not in link.nodes()
    link.close()


def peak(pid):
    """Most memory a process had resident, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


@pytest.mark.slow
def test_200_megabytes_pass_both_ways_in_bounded_memory(gate, record_property):
    settings, number = gate.enrolled_site("large")
    size = 200_000_000
    with site_at(settings):
        assert ask(gate.link(), number, b"small").reply == b"llams"
        (pid,) = pids("fedseek_site.courier", settings.state)
        before = peak(pid)
        started = time.monotonic()
        request = os.urandom(size)
        reply = ask(gate.link(), number, request, seconds=200).reply
        assert reply == turned(request)
        grown, seconds = peak(pid) - before, time.monotonic() - started
        del request, reply
        assert ask(gate.link(), number, b"small again").reply == b"niaga llams"
        assert pids("fedseek_site.courier", settings.state) == [pid]
    record_property("courier_peak", f"{before / 1e6:.0f} MB + {grown / 1e6:.0f} MB for 200 MB, {seconds:.0f} s")
    print(f"courier: {before / 1e6:.0f} MB, and {grown / 1e6:.0f} MB more for 200 MB; {seconds:.0f} s")  # noqa: T201
    assert grown < 4 * size


STRANGER = 65534


def paths_for_strangers():
    """Where packages are found, but for what is in this account's home."""
    return ":".join(
        path for path in sys.path if path and Path(path).is_dir() and not Path(path).is_relative_to(Path.home())
    )


def python_for_strangers():
    """An interpreter of this version that another account may run with our code; either may lie where it may not go."""
    for program in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        code = f"import sys, fedseek_site.courier; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        found = {"PYTHONPATH": paths_for_strangers(), "PATH": "/usr/bin:/bin"}
        try:
            if program and not subprocess.run(
                [program, "-P", "-c", code], user=STRANGER, group=STRANGER, extra_groups=[], cwd="/", env=found,
                stderr=subprocess.DEVNULL, check=False,
            ).returncode:  # fmt: skip
                return program
        except OSError:
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or python_for_strangers() is None,
    reason="becomes another account, which must be able to read this checkout",
)
def test_it_runs_under_another_account_that_reaches_nothing_of_the_site_but_the_socket(gate):
    folder = Path(tempfile.mkdtemp(prefix="fs."))
    settings, number = gate.enrolled_site("account")
    try:
        folder.chmod(0o711)
        key, ca, socket_path = folder / "node.key", folder / "ca.pem", folder / "service.sock"
        shutil.copyfile(settings.node_key, key)
        shutil.copyfile(settings.ca, ca)
        (folder / "courier").mkdir(mode=0o700)
        (folder / "keys").mkdir(mode=0o700)
        for path in (key, folder / "courier"):
            os.chown(path, STRANGER, STRANGER)
        key.chmod(0o600)
        ca.chmod(0o644)
        own = dataclasses.replace(settings, state=folder / "courier", ca=ca, node_key=key, service=socket_path)
        command = [python_for_strangers(), *courier(own).command[1:]]
        stop = serve(turned, socket_path, mode=0o660, group=STRANGER)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, user=STRANGER, group=STRANGER, extra_groups=[], stderr=log, cwd="/",
                env={"PYTHONPATH": paths_for_strangers(), "HOME": str(own.state), "PATH": "/usr/bin:/bin"},
            )  # fmt: skip
        try:
            assert ask(gate.link(), number, b"as nobody").reply == b"ydobon sa"
            assert Path(f"/proc/{process.pid}").stat().st_uid == STRANGER
        finally:
            process.terminate()
            assert process.wait(timeout=8) == 0
            stop(0.5)
    finally:
        shutil.rmtree(folder)
