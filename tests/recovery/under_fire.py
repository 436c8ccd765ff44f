"""A consortium of real daemons on a tiny model, whose processes are killed while it plays runs; and what must hold after.

The test does what systemd would do: it starts a daemon of ours that died. The SuperLink and the couriers are started
again by their daemons.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedseek.daemon.audit_check import checked_lines, heads_kept_by, verify_audit
from fedseek.daemon.reports import read_events
from fedseek_server.config import CONFIG_FILE as COORDINATOR_FILE
from fedseek_server.consortium import open_consortium
from fedseek_server.orders import OPEN_STATES, RunFolder, Status, submit
from fedseek_site.ledger import read_ledger
from fedseek_site.ledger_entries import Spent
from simulations.consortium import Consortium, prepare, running
from simulations.daemons import Daemon, children_of, free_port
from simulations.run_folder import create_run_folder
from simulations.scenario import Scenario, load_scenario

VICTIMS = ("coordinator", "superlink", "site", "courier")
PHASES = ("greet", "plan", "shares", "round", "unmask", "close", "release")
RESTART_SECONDS = 0.2  # systemd's RestartSec is 0.1 s
PATIENCE = 240.0  # seconds without progress before a test fails; the machine may be busy
LOOK_SECONDS = 0.01
MOST_SPENT = 1000.0  # epsilon of all runs together that the policies permit here


@dataclass(frozen=True, slots=True)
class Hit:
    """One kill: what died, and in which phase of which round."""

    victim: str
    phase: str
    round: int


@dataclass(slots=True)
class UnderFire:
    """The consortium, and what was done to it.

    Attributes:
        consortium: its daemons.
        scenario: whose plan is played.
        results: the run folder; sites report and release into it.
        rng: chooses victims and moments.
        cable: what sites reach the coordinator through; None: they reach it directly.
        hits: the kills so far.
        runs: those that were released.
    """

    consortium: Consortium
    scenario: Scenario
    results: Path
    rng: random.Random = field(repr=False)
    cable: Cable | None = None
    hits: list[Hit] = field(default_factory=list)
    runs: list[RunFolder] = field(default_factory=list, repr=False)

    # ------------------------------------------------------------------------------------------------------- runs
    def submit(self) -> RunFolder:
        """Ask for a run."""
        number = len(self.runs) + 1
        return submit(self.consortium.home, self.scenario.plan, wait_seconds=PATIENCE, run=f"run-{number}")

    def finish(self, run: RunFolder) -> None:
        """Wait for the release of a run; every site's adapter is then the same."""
        self.wait(run, lambda status: status.state not in OPEN_STATES)
        status = run.status()
        assert status.state == "released", (status, self.consortium.coordinator.tail(30))
        self.runs.append(run)
        adapters = [self.results / "sites" / name / "release" for name in self.consortium.sites]
        digests = {digest_of(folder / "adapter_model.safetensors") for folder in (*adapters, run.release)}
        assert len(digests) == 1, "the coordinator and all sites release the same adapter"

    def wait(self, run: RunFolder, until: Callable[[Status], bool]) -> Status:
        """Wait until the status is as wanted; fails after a time without any progress."""
        seen, limit = "", time.monotonic() + PATIENCE
        while not until(status := run.status()):
            told = f"{status.state} {status.phase} {status.round} {status.sites}"
            if told != seen:
                seen, limit = told, time.monotonic() + PATIENCE
            assert time.monotonic() < limit, (status, self.consortium.coordinator.tail(30), self.hits[-3:])
            time.sleep(LOOK_SECONDS)
        return status

    def wait_a_while(self, run: RunFolder, before: Status, seconds: float) -> None:
        """Wait until an exchange has ended since ``before``, and then so long, or until the run is over."""
        here = (before.state, before.phase, before.round)
        self.wait(run, lambda status: (status.state, status.phase, status.round) != here)
        limit = time.monotonic() + seconds
        self.wait(run, lambda status: status.state not in OPEN_STATES or time.monotonic() > limit)

    # ------------------------------------------------------------------------------------------------------- kills
    def hit_in(self, run: RunFolder, victim: str, phase: str, number: int = 0) -> None:
        """Kill ``victim`` while ``phase`` is under way, which one held courier keeps from ending."""
        name, held = self.rng.sample(sorted(self.consortium.sites), 2)
        if phase == "greet":
            self.hit(run, victim, name)
            return
        self.wait(run, lambda status: is_in(status, phase, number))
        with paused(self.courier_of(held)):
            time.sleep(self.rng.uniform(0, 0.5))
            self.hit(run, victim, name)

    def hit(self, run: RunFolder, victim: str, name: str) -> None:
        """Kill ``victim``; of site ``name``, where it belongs to one."""
        status = run.status()
        phase = "greet" if status.state in ("queued", "waiting") else status.phase
        if status.state in OPEN_STATES:
            self.hits.append(Hit(victim, phase, status.round))
        daemon = self.consortium.coordinator if victim in ("coordinator", "superlink") else self.consortium.sites[name]
        if victim in ("superlink", "courier"):
            if (child := child_of(daemon)) is not None:
                kill(child)
            return
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        time.sleep(RESTART_SECONDS)
        daemon.start()

    def courier_of(self, name: str) -> psutil.Process | None:
        return child_of(self.consortium.sites[name])

    # ------------------------------------------------------------------------------------------------ what must hold
    def check(self) -> None:
        """Audit chains are whole and agree, no site answered twice otherwise, and each run was spent once."""
        keys = self.public_keys()
        folders = {name: folder / "audit" for name, folder in self.consortium.folders.items()}
        folders["coordinator"] = self.consortium.home / "audit"
        for name, folder in folders.items():
            heads = [head for other in keys if other != name for head in heads_kept_by(folders[other], name)]
            report = verify_audit(folder, public_key=keys[name], name=name, others=keys, heads=heads)
            assert report.forks == ()
            assert report.unchecked == ()
            assert heads, "the others keep heads of every record"
        for name in self.consortium.sites:
            self.check_site(name, [*checked_lines(folders[name], public_key=keys[name], name=name)])

    def check_site(self, name: str, lines: list[Any]) -> None:
        answers: dict[tuple[str, str, int], set[str]] = defaultdict(set)
        epsilons: dict[tuple[str, int], set[float]] = defaultdict(set)
        for line in lines:
            if line.kind == "answered":
                answers[line.detail["run"], line.detail["phase"], line.detail["round"]].add(line.detail["answer"])
        assert answers
        assert {step: len(each) for step, each in answers.items() if len(each) > 1} == {}, name
        for event in read_events(self.results / "sites" / name / "report.jsonl"):
            if event["event"] == "round":
                epsilons["", event["round"]].add(event["epsilon"])
        # trained again after a kill, a round costs what it did: the first try never left the building
        assert {step: each for step, each in epsilons.items() if len(each) > 1} == {}, name
        self.check_ledger(name, {(run, number) for run, phase, number in answers if phase == "round"})

    def check_ledger(self, name: str, answered: set[tuple[str, int]]) -> None:
        """Each round that was answered was spent, once, and nothing else was."""
        entries = [noted.entry for noted in read_ledger(self.consortium.folders[name] / "ledger.sqlite3")]
        spent = Counter((entry.run, entry.round) for entry in entries if isinstance(entry, Spent))
        assert set(spent.values()) == {1}
        training = self.scenario.plan.spec.training
        assert {step for step in answered if step[1] <= training.rounds} <= set(spent), name
        assert len(spent) <= len(self.runs) * training.rounds

    def public_keys(self) -> dict[str, bytes]:
        consortium = open_consortium(self.consortium.home)
        return {**consortium.signed_roster.signing_keys, "coordinator": consortium.about.coordinator_key}

    def missed(self) -> set[tuple[str, str]]:
        """Which process was not killed in which phase yet."""
        return {(victim, phase) for victim in VICTIMS for phase in PHASES} - {(h.victim, h.phase) for h in self.hits}

    def tally(self) -> Counter[tuple[str, str]]:
        return Counter((hit.victim, hit.phase) for hit in self.hits)


@contextmanager
def under_fire(
    scratch: Path, results: Path, scenario_file: Path, *, seed: int, cabled: bool = False
) -> Iterator[UnderFire]:
    """The consortium of a scenario, all daemons running; none of them after."""
    scenario = load_scenario(scenario_file)
    run_folder = create_run_folder(scenario_file, scenario, results, rounds=None)
    consortium = prepare(scratch, run_folder, scenario)
    for folder in consortium.folders.values():
        permit_many_runs(folder / "policy.toml")
    cable = lay_cable(consortium.home / COORDINATOR_FILE) if cabled else None
    with running(consortium):
        yield UnderFire(consortium, scenario, run_folder, random.Random(seed), cable)
    if cable is not None:
        cable.close()
    left = [process for daemon in consortium.daemons for process in children_of(daemon)]
    assert left == []


def lay_cable(settings: Path) -> Cable:
    """Have the coordinator listen elsewhere, and a cable where the sites dial."""
    dialled = int(re.findall(r"^port = (\d+)$", settings.read_text("utf-8"), re.MULTILINE)[0])
    port = free_port()
    settings.write_text(settings.read_text("utf-8").replace(f"port = {dialled}", f"port = {port}"), "utf-8")
    return Cable(dialled, port)


def permit_many_runs(policy: Path) -> None:
    """The policy of ``consortium up`` permits one run; these play many."""
    lines = policy.read_text("utf-8").splitlines()
    changed = [f"max_epsilon_total = {MOST_SPENT}" if line.startswith("max_epsilon_total") else line for line in lines]
    policy.write_text("\n".join(changed) + "\n", "utf-8")


def is_in(status: Status, phase: str, number: int) -> bool:
    assert status.state in OPEN_STATES, status
    return status.state == "running" and status.phase == phase and status.round >= number


def child_of(daemon: Daemon, *, patience: float = 30.0) -> psutil.Process | None:
    """The SuperLink or courier of a daemon, once there is one; None if there is none so long."""
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        if found := children_of(daemon):
            return found[0]
        time.sleep(0.05)
    return None


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@contextmanager
def paused(process: psutil.Process | None) -> Iterator[None]:
    """The process stands still for the block, as on a machine without power or network."""
    try:
        if process is not None:
            process.suspend()
    except psutil.NoSuchProcess:
        process = None
    try:
        yield
    finally:
        try:
            if process is not None:
                process.resume()
        except psutil.NoSuchProcess:
            pass


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Cable:
    """A TCP connection to the coordinator that can be cut and mended."""

    def __init__(self, dialled: int, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", dialled))
        self._is_cut = threading.Event()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="cable", daemon=True).start()

    def cut(self) -> None:
        """Whatever is under way is lost; nobody gets through."""
        self._is_cut.set()
        for each in list(self._open):
            hang_up(each)

    def mend(self) -> None:
        self._is_cut.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut.is_set():
                hang_up(near)
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                hang_up(near)
                continue
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            hang_up(each)
            self._open.discard(each)


def hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
