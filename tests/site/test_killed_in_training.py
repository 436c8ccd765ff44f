"""SIGKILL in the middle of a round's training: the round goes on with the steps that are left, under the spend it had.

Two sites are killed in one round: one in a step, one after its last step and before its answer. A third gives up in a step,
and its checkpoint is then damaged. The fourth is left alone, and the run is played to its release.
"""

import json
import os
import signal
import time
from collections import Counter
from multiprocessing import get_context

import pytest
from conftest import BANK, CLINIC, RUN, SITES
from killed_site import play_until

from fedseek.dp.guards import TRAINING_GUARDS
from fedseek.messages import ReleaseApproved, UpdateReply, encode_message
from fedseek_site.checkpoints import CHECKPOINT_FILE
from fedseek_site.ledger import Ledger, read_ledger
from fedseek_site.ledger_entries import Spent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Full backward hook"),
]

STEPS, ROUND = 5, 2
DAMAGED = "st-anna"
KILLED = {
    BANK: {"event": "step", "round": ROUND, "step": 3},  # the step is done, and in no checkpoint yet
    CLINIC: {"event": "round", "round": ROUND},  # the update is made, and in no journal yet
}
PATIENCE = 240.0


class GivenUp(BaseException):
    """Not an error of the site's: it gets past the site's outer edge, as the end of the process does."""


def give_up_in_training(desk, request):
    """The same within this process, which then has no checkpoint that opens."""
    events, path = desk.events[DAMAGED], desk.folder / DAMAGED / "state" / CHECKPOINT_FILE

    class GivesUp(list):
        def append(self, event):
            super().append(event)
            if event["event"] == "step" and event["step"] == 3:
                raise GivenUp

    desk.services[DAMAGED].close()
    desk.events[DAMAGED] = stopping = GivesUp()
    desk.services[DAMAGED] = desk.reopen(DAMAGED, checkpoint_seconds=0.0)
    with pytest.raises(GivenUp):
        desk.send(DAMAGED, request)
    desk.events[DAMAGED] = events
    desk.gave_up = [event["step"] for event in stopping if event["event"] == "step"]
    desk.left[DAMAGED] = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    desk.restart(DAMAGED)


def kill_in_training(desk, requests):
    """Play the sites' part of the round in processes of their own, until they are killed."""
    started = {}
    for site, wanted in KILLED.items():
        service = desk.services[site]
        key = service._journal._key._key
        service.close()
        desk.ledgers[site].close()
        options = {
            "folder": str(desk.folder / site),
            "key": key,
            "identity": service.identity.to_bytes(),
            "roster": desk.federation.roster.canonical_bytes(),
            "data": service.data,
            "clock": desk.now[0],
            "request": encode_message(requests[site]),
        }
        started[site] = get_context("spawn").Process(target=play_until, args=(wanted,), kwargs=options)
        started[site].start()
    limit = time.monotonic() + PATIENCE
    for site, process in started.items():
        while not (desk.folder / site / "still").exists():
            assert process.is_alive(), "it ended by itself"
            assert time.monotonic() < limit
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL


def start_again(desk, site):
    key = desk.services[site]._journal._key
    desk.ledgers[site] = Ledger(desk.folder / site / "ledger.sqlite3", key, dataset="记录")
    desk.services[site] = desk.reopen(site)


@pytest.fixture(scope="module")
def played(make_desk):
    """The desk after the run; ``left`` are the files the killed processes left behind."""
    desk = make_desk(private=True, training={"rounds": 2, "steps_per_round": STEPS})
    desk.left = {}
    for phase, number, requests in desk.exchanges():
        if (phase, number) == ("round", ROUND):
            kill_in_training(desk, requests)
            for site in KILLED:
                desk.left[site] = (desk.folder / site / "state" / CHECKPOINT_FILE).stat().st_size
                start_again(desk, site)
                desk.events[site].clear()
            give_up_in_training(desk, requests[DAMAGED])
        for site, request in requests.items():
            desk.take(site, desk.ask(site, request))
    return desk


def events_of(desk, site, kind):
    """Of the process that went on."""
    return [event for event in desk.events[site] if event["event"] == kind and event.get("round") == ROUND]


def steps_before(desk, site):
    lines = (desk.folder / site / "events.jsonl").read_text("utf-8").splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["event"] == "step"]


def steps_after(desk, site):
    return [event["step"] for event in events_of(desk, site, "step")]


def test_only_the_steps_that_are_left_are_taken(played):
    assert steps_before(played, BANK) == [1, 2, 3]
    assert [event["step"] for event in events_of(played, BANK, "resumed")] == [2]
    assert steps_after(played, BANK) == [3, 4, 5]


def test_a_site_killed_before_its_answer_trains_no_step_again(played):
    assert steps_before(played, CLINIC) == [1, 2, 3, 4, 5]
    assert [event["step"] for event in events_of(played, CLINIC, "resumed")] == [5]
    assert steps_after(played, CLINIC) == []


def test_a_damaged_checkpoint_is_told_and_the_round_begins_anew(played):
    assert played.gave_up == [1, 2, 3]
    assert len(events_of(played, DAMAGED, "checkpoint-ignored")) == 1
    assert events_of(played, DAMAGED, "resumed") == []
    assert steps_after(played, DAMAGED) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("site", [name for name, _ in SITES])
def test_each_round_was_spent_once_and_every_step_is_accounted(played, site):
    entries = [noted.entry for noted in read_ledger(played.folder / site / "ledger.sqlite3")]
    spent = Counter((entry.run, entry.round, entry.steps) for entry in entries if isinstance(entry, Spent))
    assert spent == {(RUN, 1, STEPS): 1, (RUN, ROUND, STEPS): 1}
    state = played.state(site)
    assert sum(state.steps_done) == sum(state.steps_accounted) == 2 * STEPS
    assert set(TRAINING_GUARDS) <= set(state.guards_passed)


@pytest.mark.parametrize("site", [name for name, _ in SITES])
def test_the_run_is_released_as_if_nothing_had_been(played, site):
    assert isinstance(played.updates[ROUND][site], UpdateReply)
    assert isinstance(played.approved[site], ReleaseApproved)


@pytest.mark.parametrize("site", [BANK, CLINIC, DAMAGED])
def test_no_checkpoint_is_left_once_the_round_is_answered(played, site):
    assert played.left[site] > 0
    assert not (played.folder / site / "state" / CHECKPOINT_FILE).exists()
