"""Every process is killed in every phase, and the run is released as if nothing had been.

``FEDSEEK_KILLS`` says how often each, ``FEDSEEK_RANDOM_KILLS`` how many more at any moment; before a release 5 and 50:

    FEDSEEK_KILLS=5 FEDSEEK_RANDOM_KILLS=50 pytest -m soak tests/recovery
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from under_fire import PHASES, VICTIMS, under_fire

from fedseek_server.orders import OPEN_STATES

KILLS = int(os.environ.get("FEDSEEK_KILLS", "1"))
RANDOM_KILLS = int(os.environ.get("FEDSEEK_RANDOM_KILLS", "8"))


@pytest.fixture
def scratch():
    """The daemons' folders. Short: sockets have paths of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="k-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def private(write_tiny_scenario, *, rounds):
    return write_tiny_scenario(private=True, training={"rounds": rounds}, cohort={"deadline_seconds": 600})


def test_a_run_comes_through_one_kill_of_each_process(write_tiny_scenario, scratch, tmp_path):
    with under_fire(scratch, tmp_path / "runs", private(write_tiny_scenario, rounds=2), seed=1) as fire:
        run = fire.submit()
        fire.hit_in(run, "superlink", "shares")
        fire.hit_in(run, "coordinator", "round", 1)
        fire.hit_in(run, "courier", "unmask", 1)
        fire.hit_in(run, "site", "round", 2)
        fire.finish(run)
        assert {hit.victim for hit in fire.hits} == set(VICTIMS)
    fire.check()


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_every_process_is_killed_in_every_phase(write_tiny_scenario, scratch, tmp_path):
    with under_fire(scratch, tmp_path / "runs", private(write_tiny_scenario, rounds=2), seed=2) as fire:
        for turn in range(KILLS * len(VICTIMS)):
            run = fire.submit()
            for place, phase in enumerate(PHASES):
                fire.hit_in(run, VICTIMS[(turn + place) % len(VICTIMS)], phase)
            fire.finish(run)
        tally = fire.tally()
        assert [(victim, phase) for victim in VICTIMS for phase in PHASES if tally[victim, phase] < KILLS] == []
    fire.check()


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_kills_at_any_moment(write_tiny_scenario, scratch, tmp_path):
    with under_fire(scratch, tmp_path / "runs", private(write_tiny_scenario, rounds=6), seed=3) as fire:
        while len(fire.hits) < RANDOM_KILLS:
            run = fire.submit()
            while len(fire.hits) < RANDOM_KILLS and run.status().state in OPEN_STATES:
                before = run.status()
                fire.hit(run, fire.rng.choice(VICTIMS), fire.rng.choice(sorted(fire.consortium.sites)))
                until = fire.rng.uniform(0.5, 8)
                fire.wait_a_while(run, before, until)
            fire.finish(run)
    fire.check()
