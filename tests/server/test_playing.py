"""One run from the order to its end: real coordinator, driver, record and parcels; the network is a dictionary."""

import json
import threading
import time

import pytest
from enrolled import signed_roster
from msgspec.structs import replace
from played_network import AUTHORITY, FIRST_NODE, READY, RUN, make_world, stand_in_release, until, words
from played_sites import ANNA, BEIAN, FOUR, HARBOUR, RENJI

from fedseek.daemon.parcels import Verdict
from fedseek.daemon.reports import read_events
from fedseek.errors import JournalUnusable
from fedseek.identity.signed_roster import make_signed_roster
from fedseek.messages import Refused, encode_message
from fedseek_server import playing
from fedseek_server.driver import Driver
from fedseek_server.playing import Network, wait_for_sites
from fedseek_server.run_log import RunLog


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "write_release", stand_in_release)
    monkeypatch.setattr(playing, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("fedseek_server.driver.SHORTEST_TICK", 0.001)
    made = make_world(tmp_path)
    yield made
    made.network.mail.audit.close()


# to the end


def test_a_run_goes_through_and_says_how_far_it_is_and_what_must_hold_is_recorded(world, monkeypatch):
    told = []
    write = type(world.ask()).write_status
    monkeypatch.setattr(
        type(world.order), "write_status", lambda self, status: told.append(status) or write(self, status)
    )
    assert world.play().state == "released"
    assert [status.state for status in told] == ["waiting", *["running"] * (len(told) - 2), "released"]
    assert [(status.phase, status.round) for status in told if status.phase][:3] == [
        ("plan", 1),
        ("shares", 1),
        ("round", 1),
    ]
    assert (told[-1].rounds, told[-1].phase) == (2, "release")
    assert json.loads((world.order.release / "signed by").read_text("utf-8")) == sorted(name for name, _ in FOUR)
    [asked], [over] = world.lines("run-asked-for"), world.lines("run-over")
    assert (asked["run"], asked["plan"]) == (RUN, world.order.plan().digest)
    assert over == {"run": RUN, "state": "released"}
    assert [each["round"] for each in world.lines("round-ended")] == [1, 2, 3]
    assert len(world.lines("reply")) > 20
    assert list(read_events(world.order.report))[-1]["event"] == "finished"


# waiting for sites


def test_it_waits_until_every_site_is_ready_and_tells_each_ones_word_meanwhile(world):
    told = []
    world.link.say = lambda site, nth: (
        told.append(words(world)) or Verdict(status="waiting", rule="approval.required: 0 of 1")
        if site == RENJI and nth < 3
        else READY
    )
    world.ask()
    assert world.play().state == "released"
    assert told[1] == {ANNA: "ready", BEIAN: "ready", HARBOUR: "ready", RENJI: "waiting: approval.required: 0 of 1"}
    assert [name for phase, _, name in world.link.asked if phase == "greet"].count(RENJI) == 3


def test_it_waits_until_every_site_has_taken_the_roster(world):
    told = []
    world.link.takes_roster = lambda site, nth: told.append(words(world)) or site != HARBOUR or nth > 2
    world.ask()
    assert world.play().state == "released"
    assert {"waiting: takes the new roster"} == {each[HARBOUR] for each in told if each} - {"ready"}


def test_a_site_that_comes_later_is_waited_for(world):
    node = max(world.link.sites)
    world.link.here = set(world.link.sites) - {node}
    told = []
    world.link.say = lambda site, nth: (told.append(words(world)), nth > 1 and world.link.here.add(node)) and READY
    world.ask()
    assert world.play().state == "released"
    assert any(each.get(world.link.sites[node].name) == "away" for each in told)
    assert ("release", 3, world.link.sites[node].name) in world.link.asked or world.link.asked[-1][0] == "release"


def test_when_the_time_is_over_it_begins_with_those_that_are_ready(world):
    world.link.here.remove(max(world.link.sites))
    world.ask(wait=0.0)
    assert world.play().state == "released"
    gone = world.link.sites[max(world.link.sites)].name
    assert gone not in {name for _, _, name in world.link.asked}


def test_when_the_time_is_over_and_too_few_are_ready_it_fails_and_names_each_ones_word(world):
    world.link.here = {FIRST_NODE}
    world.link.say = lambda site, nth: Verdict(status="waiting", rule="paused by the operator")
    world.ask(wait=0.0)
    told = world.play()
    assert (told.state, told.code) == ("failed", "CohortTooSmall")
    assert "0 sites are ready" in told.text
    waiting = world.link.sites[FIRST_NODE].name
    assert f"{waiting}: waiting: paused by the operator" in told.hint
    assert told.hint.count("away") == 3
    assert world.lines("run-over") == [
        {"run": RUN, "state": "failed", "code": told.code, "text": told.text, "hint": told.hint}
    ]


def test_when_so_many_refuse_that_it_can_never_be_enough_nobody_waits(world):
    rules = {BEIAN: "limits.max_epsilon", ANNA: "tasks.kinds", RENJI: "limits.max_epsilon"}
    world.link.say = lambda site, nth: Verdict(status="refused", rule=rules[site]) if site in rules else READY
    world.ask(wait=3600.0)
    told = world.play()
    assert (told.state, told.code) == ("failed", "CohortTooSmall")
    assert all(f"{site}: refused: {rule}" in told.hint for site, rule in rules.items())
    assert f"{HARBOUR}: ready" in told.hint


def test_when_the_rest_refuse_it_begins_with_those_that_are_ready(world):
    world.link.say = lambda site, nth: Verdict(status="refused", rule="x") if site == ANNA else READY
    world.ask(wait=3600.0)
    roster = wait_for_sites(world.network, world.order, world.order.plan(), threading.Event())
    assert roster == world.network.mail.roster.roster
    assert words(world)[ANNA] == "refused: x"


def test_a_roster_with_expired_keys_is_refused_before_anybody_is_asked(world):
    now = int(time.time())
    members = [
        replace(each, admitted_at=now - 9, expires_at=now - 1) if each.entry.name == ANNA else each
        for each in world.network.mail.roster.members
    ]
    world.network.mail.roster = make_signed_roster(
        AUTHORITY, consortium="x", number=1, members=members, issued_at=now, previous=bytes(32)
    )
    world.ask()
    told = world.play()
    assert (told.state, told.code) == ("failed", "Expired")
    assert ANNA in told.text
    assert HARBOUR not in told.text
    assert world.link.asked == []


def test_a_consortium_without_sites_is_told_what_to_do(world):
    world.network.mail.roster = signed_roster(AUTHORITY)
    world.link.here = set()
    world.ask(wait=0.0)
    told = world.play()
    assert (told.state, told.code) == ("failed", "CustodyError")
    assert "admit one" in told.hint


def test_a_lost_run_that_nobody_knows_is_not_gone_on_from(world):
    world.ask(continues="run-0")
    told = world.play()
    assert (told.state, told.code) == ("failed", "CohortTooSmall")
    assert "'run-0'" in told.text


# stopping


def test_a_run_that_is_stopped_while_it_waits_ends_as_stopped(world):
    world.link.say = lambda site, nth: Verdict(status="waiting", rule="x")
    world.ask()
    with world.playing():
        until(lambda: world.order.status().state == "waiting")
        world.order.ask_to_stop()
    assert world.order.status().state == "stopped"
    assert world.lines("run-over") == [{"run": RUN, "state": "stopped"}]
    assert {phase for phase, _, _ in world.link.asked} == {"greet"}


def silent_in(phase: str, number: int, site: str = ANNA):
    def message(name, request, answer):
        kind = {"RoundRequest": "round", "UnmaskRequest": "unmask"}.get(type(request).__name__)
        return None if (kind, getattr(request, "round", 0), name) == (phase, number, site) else answer

    return message


def test_a_run_that_is_stopped_while_it_runs_ends_as_stopped_and_releases_nothing(world):
    world.link.message = silent_in("round", 2)
    world.ask()
    with world.playing():
        until(lambda: ("round", 2, ANNA) in world.link.asked)
        world.order.ask_to_stop()
    told = world.order.status()
    assert (told.state, told.phase, told.round, told.rounds) == ("stopped", "round", 2, 2)
    assert not world.order.release.exists()


@pytest.mark.parametrize("phase", ["round", "unmask"])
def test_a_process_that_ends_leaves_the_run_open_and_the_next_one_goes_on(world, phase):
    """Played sites fail if they are asked something else than before."""
    world.link.message = silent_in(phase, 1)
    world.ask()
    with world.playing():
        until(lambda: (phase, 1, ANNA) in world.link.asked)
        world.network.stop.set()
    assert world.order.status().state == "running"
    assert world.lines("run-over") == []
    before = len(world.link.asked)
    world.network.stop.clear()
    world.link.message = lambda name, request, answer: answer
    assert world.play().state == "released"
    assert "greet" not in {each for each, _, _ in world.link.asked[before:]}
    assert {(each, name) for each, number, name in world.link.asked[before:] if (each, number) == (phase, 1)} == {
        (phase, ANNA)
    }
    assert len(world.lines("run-asked-for")) == 1


def test_a_process_that_ends_while_it_waits_leaves_the_run_waiting(world):
    world.link.say = lambda site, nth: Verdict(status="waiting", rule="x")
    world.ask()
    with world.playing():
        until(lambda: world.order.status().state == "waiting")
        world.network.stop.set()
    assert world.order.status().state == "waiting"
    world.network.stop.clear()
    world.link.say = lambda site, nth: READY
    assert world.play().state == "released"


def test_a_process_killed_between_the_release_and_its_status_finishes_at_the_next_start(world, monkeypatch):
    def killed(*arguments, **more):
        raise Killed

    world.ask()
    with monkeypatch.context() as patched:
        patched.setattr(playing, "_end", killed)
        with pytest.raises(Killed):
            world.play()
    assert world.order.release.exists()
    assert world.order.status().state == "running"
    assert world.play().state == "released"


# failing


def test_a_run_that_fails_says_why_and_what_to_do(world):
    world.link.message = lambda site, request, answer: encode_message(
        Refused(run=RUN, site=site, code="PlanRefused", rule="limits.max_rounds: plan asks 2, allowed 1")
    )
    world.ask()
    told = world.play()
    assert (told.state, told.code) == ("failed", "CohortTooSmall")
    assert "limits.max_rounds: plan asks 2, allowed 1" in told.hint
    [over] = world.lines("run-over")
    assert (over["code"], over["text"]) == (told.code, told.text)


def test_a_plan_that_was_edited_fails_the_run_and_not_the_daemon(world):
    world.ask()
    (world.order.path / "plan.json").write_bytes(b"{}")
    assert (world.play().state, world.order.status().code) == ("failed", "InvalidPlan")


def test_where_nothing_can_be_written_down_the_run_stays_open_and_the_error_is_told(world, monkeypatch):
    def full(self, *arguments):
        raise JournalUnusable("SQLITE_FULL", hint="make room")

    world.ask()
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "add", full)
        with pytest.raises(JournalUnusable):
            world.play()
        assert world.order.status().state == "running"
        world.order.ask_to_stop()
        assert world.play().state == "stopped", "the way out"
    assert len(world.lines("run-over")) == 1


def test_where_there_is_room_again_the_run_goes_on(world, monkeypatch):
    def full(self, *arguments):
        raise JournalUnusable("SQLITE_FULL", hint="make room")

    world.ask()
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "store", full)
        with pytest.raises(JournalUnusable):
            world.play()
    assert world.play().state == "released"


def test_what_a_site_did_wrong_is_recorded_with_its_node_and_a_text_of_bounded_length(world):
    world.link.message = lambda site, request, answer: (
        b"\xc1" if (site, type(request).__name__) == (ANNA, "RoundRequest") else answer
    )
    world.ask()
    world.play()
    refused = world.lines("reply-refused")
    assert {each["site"] for each in refused} == {ANNA}
    node = next(node for node, site in world.link.sites.items() if site.name == ANNA)
    assert {each["node"] for each in refused} == {str(node)}


def test_a_site_that_does_not_answer_is_recorded_as_a_dropout(world, monkeypatch):
    monkeypatch.setattr(
        Network,
        "driver",
        lambda self, stop, seconds: Driver(self.link, deadline=lambda exchange: 0.5, stop=stop, limit=1 << 20),
    )
    world.link.message = silent_in("round", 1)
    world.ask()
    assert world.play().state == "released"
    assert [(each["site"], each["phase"], each["round"]) for each in world.lines("dropout")] == [(ANNA, "round", 1)]
