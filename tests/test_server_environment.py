"""A coordinator's environment, made as the runbook says: no training library in it, and it serves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ("torch", "transformers", "opacus", "peft", "sklearn")
GROUPS = ("server", "courier")


def run(*command, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module", params=GROUPS)
def environment(request, tmp_path_factory) -> tuple[str, Path]:
    """Name of the extra, and the folder of the programs that pip installed for it."""
    folder = tmp_path_factory.mktemp(request.param) / "venv"
    made = run(sys.executable, "-m", "venv", folder)
    assert made.returncode == 0, made.stderr
    install = ("-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{ROOT}[{request.param}]")
    installed = run(folder / "bin/python", *install)
    assert installed.returncode == 0, installed.stderr
    return request.param, folder / "bin"


@pytest.fixture
def coordinator(environment) -> Path:
    extra, programs = environment
    if extra != "server":
        pytest.skip("of the coordinator")
    return programs


def in_folder(folder: Path) -> dict[str, str]:
    """An environment in which nothing of the checkout is found."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}


def mapped(pid: int) -> str:
    """Files that a process has in its memory."""
    return Path(f"/proc/{pid}/maps").read_text("utf-8", errors="replace")


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # by the thread that started them
    return [int(word) for each in lists for word in each.read_text("utf-8").split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_so, *, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.1)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_no_training_library_is_there_and_nothing_is_missing(environment, tmp_path):
    _, programs = environment
    look = f"import importlib.util as u; print([n for n in {TRAINING!r} if u.find_spec(n)])"
    done = run(programs / "python", "-c", look, cwd=tmp_path, env=in_folder(tmp_path))
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
    assert run(programs / "python", "-m", "pip", "check").returncode == 0


def test_what_is_installed_are_the_pinned_versions(environment):
    _, programs = environment
    frozen = run(programs / "python", "-m", "pip", "freeze", "--exclude", "fedseek").stdout.lower().split()
    pinned = set((ROOT / "constraints.txt").read_text("utf-8").lower().split())
    assert len(frozen) > 20
    assert [line for line in frozen if line not in pinned] == []


def test_a_courier_can_be_run_from_its_own_environment(environment, tmp_path):
    extra, programs = environment
    if extra != "courier":
        pytest.skip("of the courier")
    command = (programs / "fedseek-site", "courier", "--folder", tmp_path, "--state", tmp_path / "own")
    done = run(*command, cwd=tmp_path, env=in_folder(tmp_path))
    assert done.returncode == 6, done.stderr  # nothing is lent to it: it got as far as to look
    assert "join.json cannot be read" in done.stderr
    imported = run(
        programs / "python", "-c", "import fedseek_site.courier, fedseek_site.flower", env=in_folder(tmp_path)
    )
    assert imported.returncode == 0, imported.stderr


def test_every_command_of_the_coordinator_has_its_help(coordinator, tmp_path):
    told = run(coordinator / "fedseek-server", "--help", cwd=tmp_path, env=in_folder(tmp_path))
    names = re.findall(r"^  ([a-z-]+)  ", told.stdout.split("Commands:")[1], re.M)
    assert {"init", "serve", "run", "status"} <= set(names)
    for name in names:
        done = run(coordinator / "fedseek-server", name, "--help", cwd=tmp_path, env=in_folder(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "Example:" in done.stdout


def test_a_coordinator_serves_from_it_and_ends_when_told(coordinator, tmp_path):
    folder, port = tmp_path / "c", free_port()
    make = ("init", "--folder", folder, "--name", "华东联合", "--host", "127.0.0.1", "--port", port, "--json")
    made = run(coordinator / "fedseek-server", *make, cwd=tmp_path, env=in_folder(tmp_path))
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["name"] == "华东联合"
    (folder / "coordinator.toml").write_text(f'version = 1\n[listen]\nhost = "127.0.0.1"\nport = {port}\n', "utf-8")
    daemon = subprocess.Popen(
        [coordinator / "fedseek-server", "serve", "--folder", folder], cwd=tmp_path, env=in_folder(tmp_path)
    )
    try:
        wait_until(lambda: answers(port))
        (child,) = children(daemon.pid)
        for pid in (daemon.pid, child):
            assert not re.search("/(torch|transformers|opacus|peft)/", mapped(pid))
        told = run(coordinator / "fedseek-server", "status", "--folder", folder, "--json", env=in_folder(tmp_path))
        assert json.loads(told.stdout) == []
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=15) == 0
        wait_until(lambda: not Path(f"/proc/{child}").exists(), seconds=5)
    finally:
        daemon.kill()
        daemon.wait()
    assert not answers(port)
