"""A scenario on real daemons: folders in a temporary place, processes over TLS on loopback, and the run folder of a simulation.

make_consortium -> start every daemon -> submit the plan -> follow -> collect what they wrote -> end every daemon
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedseek.daemon.reports import read_events
from fedseek.errors import FedseekError, InvalidPlan, PlanRefused, exit_code_of
from fedseek_server.orders import OPEN_STATES, RunFolder, Status, submit
from simulations.daemons import Daemon, coordinator_daemon, end_all, free_port, peak_rss_mb_of, site_daemon
from simulations.enrolling import Member, make_consortium
from simulations.events import coordinator_log, site_log
from simulations.run_folder import synthetic_folder
from simulations.scenario import Scenario, read_site_data

WAIT_SECONDS: Final = 600.0  # that the coordinator waits for every site to be ready: each loads its model first


@dataclass(frozen=True, slots=True)
class Consortium:
    """Daemons on this machine, and where their folders are.

    Attributes:
        scratch: their folders, with keys; ours alone.
        home: the coordinator's folder.
        coordinator: its daemon.
        sites: each site's daemon, by its name.
        folders: each site's folder, by its name.
    """

    scratch: Path
    home: Path
    coordinator: Daemon
    sites: Mapping[str, Daemon] = field(repr=False)
    folders: Mapping[str, Path] = field(repr=False)

    @property
    def daemons(self) -> list[Daemon]:
        """All of them, the coordinator first."""
        return [self.coordinator, *self.sites.values()]

    def check_alive(self) -> None:
        """Raise what a daemon died of, if one has."""
        for daemon in self.daemons:
            if not daemon.is_running:
                raise daemon.failure()


def prepare(scratch: Path, run_folder: Path, scenario: Scenario, *, verbose: bool = False) -> Consortium:
    """The consortium of a scenario, enrolled and not yet started.

    Raises:
        InvalidPlan: the scenario has a site away, which a daemon cannot be told to be.
        FedseekError: a data file, a name or a folder cannot be used.
    """
    away = [f"sites.{site.name}.away: only a simulation plays this" for site in scenario.spec.sites if site.away]
    if away:
        raise InvalidPlan(away, source=scenario.name, hint="fedseek simulate plays it")
    members = [
        Member(
            name=site.name,
            kind=site.kind,
            data=read_site_data(scenario, site, synthetic=synthetic_folder(run_folder)),
            report=site_log(run_folder, site.name),
            release=run_folder / "sites" / site.name / "release",
        )
        for site in scenario.spec.sites
    ]
    home, folders = make_consortium(scratch, scenario.plan, members, port=free_port())
    return Consortium(
        scratch=scratch,
        home=home,
        coordinator=coordinator_daemon(home, run_folder / "coordinator.log", verbose=verbose),
        sites={
            name: site_daemon(name, folder, run_folder / "sites" / name / "daemon.log", verbose=verbose)
            for name, folder in folders.items()
        },
        folders=folders,
    )


@contextmanager
def running(consortium: Consortium) -> Iterator[Consortium]:
    """All daemons, for the block; after it none of them, nor anything they started."""
    try:
        for daemon in consortium.daemons:
            daemon.start()
        yield consortium
    finally:
        end_all(consortium.daemons)


def still_going(consortium: Consortium, run: RunFolder) -> Callable[[], bool]:
    """Says whether the run is still going on.

    What it returns raises PlanRefused as soon as one site refuses the plan, and FedseekError when a daemon has died.
    """

    def look() -> bool:
        consortium.check_alive()
        status = run.status()
        for site, word in status.sites.items():
            if word.startswith("refused"):
                raise PlanRefused(site, word.removeprefix("refused: "), hint=f"see {consortium.sites[site].log}")
        return status.state in OPEN_STATES

    return look


def ask_for_run(consortium: Consortium, scenario: Scenario) -> RunFolder:
    """Have the coordinator play the scenario's plan."""
    return submit(consortium.home, scenario.plan, wait_seconds=WAIT_SECONDS)


def check_released(status: Status) -> None:
    """Raise why a run that is over has not released its adapter."""
    if status.state == "released":
        return
    error = FedseekError(f"the run {status.state}: {status.text}", hint=status.hint)
    error.exit_code = exit_code_of(status.code) if status.code else 1  # of this one instance
    raise error


def collect(consortium: Consortium, run: RunFolder, run_folder: Path) -> None:
    """Bring the coordinator's report and the release to where a simulation has them; daemons still run."""
    site_rss_mb = max(peak_rss_mb_of(daemon.pid) for daemon in consortium.sites.values())
    with coordinator_log(run_folder).open("w", encoding="utf-8") as stream:
        for event in read_events(run.report):
            told = {**event, "site_rss_mb": site_rss_mb} if event["event"] == "finished" else event
            stream.write(json.dumps(told, ensure_ascii=False) + "\n")
    shutil.copytree(run.release, run_folder / "release", dirs_exist_ok=True)


def keep_logs(consortium: Consortium, run_folder: Path) -> None:
    """What the children of the daemons wrote, beside the daemons' own logs."""
    logs = {consortium.home / "superlink.log": run_folder / "superlink.log"}
    logs |= {
        folder / "courier.log": run_folder / "sites" / name / "courier.log"
        for name, folder in consortium.folders.items()
    }
    for found, kept in logs.items():
        if found.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, kept)
