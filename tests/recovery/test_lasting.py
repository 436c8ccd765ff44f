"""What lasts seconds and not milliseconds: a site that stays away, a network that is cut, and the end of a daemon."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from under_fire import child_of, paused, under_fire

from fedseek.daemon.reports import read_events
from fedseek_server.orders import OPEN_STATES
from simulations.daemons import is_alive

pytestmark = [pytest.mark.slow, pytest.mark.soak]

DEADLINE = 12  # seconds
NAMES = ["北岸银行", "harbour-bank", "仁济医院", "st-anna"]


@pytest.fixture
def scratch():
    with tempfile.TemporaryDirectory(prefix="k-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def survivors(run):
    """By round, the sites whose updates are in its sum."""
    return {e["round"]: set(e["survivors"]) for e in read_events(run.report) if e["event"] == "unmasked"}


def test_a_site_that_stays_away_is_missing_from_one_round_and_rejoins(write_tiny_scenario, scratch, tmp_path):
    scenario = write_tiny_scenario(private=True, training={"rounds": 6}, cohort={"deadline_seconds": DEADLINE})
    with under_fire(scratch, tmp_path / "runs", scenario, seed=4) as fire:
        run = fire.submit()
        fire.wait(run, lambda status: status.phase == "round" and status.round == 2)
        with paused(fire.courier_of("st-anna")):
            fire.wait(
                run, lambda status: status.phase in ("unmask", "round") and (status.round, status.phase) > (2, "round")
            )
        fire.finish(run)  # with one adapter everywhere: the site got the sums that it missed
        seen = survivors(run)
        assert seen[1] == set(NAMES)
        assert seen[2] == set(NAMES) - {"st-anna"}
        assert seen[6] == set(NAMES)
        reasons = [e for e in read_events(run.report) if e["event"] in ("dropout", "absent", "missing")]
        assert reasons, "the coordinator says who was missing"
    fire.check()


def test_a_cut_network_costs_time_and_nothing_else(write_tiny_scenario, scratch, tmp_path):
    scenario = write_tiny_scenario(private=True, training={"rounds": 4}, cohort={"deadline_seconds": 600})
    with under_fire(scratch, tmp_path / "runs", scenario, seed=5, cabled=True) as fire:
        run = fire.submit()
        for number in (1, 3):
            fire.wait(run, lambda status, wanted=number: status.phase == "round" and status.round >= wanted)
            fire.cable.cut()
            time.sleep(4)
            fire.cable.mend()
        fire.finish(run)
        assert survivors(run) == {number: set(NAMES) for number in survivors(run)}
    fire.check()


def test_sigterm_ends_each_daemon_within_seconds_and_the_run_goes_on(write_tiny_scenario, scratch, tmp_path):
    scenario = write_tiny_scenario(private=True, training={"rounds": 4}, cohort={"deadline_seconds": 600})
    with under_fire(scratch, tmp_path / "runs", scenario, seed=6) as fire:
        run = fire.submit()
        for number, name in enumerate(("coordinator", "st-anna"), start=1):
            fire.wait(run, lambda status, wanted=number: status.phase == "round" and status.round >= wanted)
            daemon = fire.consortium.coordinator if name == "coordinator" else fire.consortium.sites[name]
            child = child_of(daemon)
            os.kill(daemon.pid, signal.SIGTERM)
            assert daemon.process.wait(timeout=10) == 0
            assert not is_alive(child)
            daemon.start()
        fire.finish(run)
    fire.check()


def test_all_daemons_end_together_and_leave_nothing(write_tiny_scenario, scratch, tmp_path):
    scenario = write_tiny_scenario(private=True, training={"rounds": 50}, cohort={"deadline_seconds": 600})
    with under_fire(scratch, tmp_path / "runs", scenario, seed=7) as fire:
        run = fire.submit()
        fire.wait(run, lambda status: status.phase == "round")
        daemons = fire.consortium.daemons
        family = [process for daemon in daemons for process in psutil.Process(daemon.pid).children(recursive=True)]
        assert len(family) >= len(daemons)
        for daemon in daemons:
            os.kill(daemon.pid, signal.SIGTERM)
        assert [daemon.process.wait(timeout=15) for daemon in daemons] == [0] * len(daemons)
        assert [process for process in family if is_alive(process)] == []
        assert run.status().state in OPEN_STATES  # to be taken up at the next start
