"""A coordinator that is stopped at any instant goes on as if nothing had been."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
from played_sites import ANNA
from recorded_plays import RUN, SITES, Killed, Story, dies_after, every_event

from fedseek.errors import JournalUnusable, Malformed, SiteRefused, TooLarge, WrongRound
from fedseek.messages import KeyRequest, PlanOffer, Refused, RoundRequest, encode_message
from fedseek_server.recorded import RecordedRun
from fedseek_server.run_log import Over, RunLog


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Three rounds of four sites: one is away and comes back, one is not heard in the unmasking of round 2, which is
    therefore given up, and the group key is changed.
    """
    return Story.told(tmp_path_factory.mktemp("told") / "run", rounds=3)


def check(story, recorded):
    assert recorded.coordinator.approvals == story.approvals
    assert len(story.approvals) == 4


def test_the_story_has_a_dropout_a_returner_and_a_new_group_key(story):
    anna = next(site for site in story.sites.values() if site.name == ANNA)
    assert [each.round for each in anna.log if isinstance(each, PlanOffer)] == [1, 3]
    assert [each.round for each in anna.log if isinstance(each, RoundRequest)] == [1, 3, 4][1:]
    assert [each.epoch for site in story.sites.values() for each in site.log if isinstance(each, KeyRequest)] == [1]


def test_a_run_that_dies_after_every_single_event_ends_in_the_same_release(story, tmp_path, monkeypatch):
    """Each process writes one event, dies before it acts on it, and the next one goes on from the disk."""
    folder, deaths, told = tmp_path / "run", 0, []
    recorded = None
    while recorded is None:
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            dies_after(patched, 1)
            opened = story.reopen(folder, observe=told.append) if deaths else story.begin(folder, observe=told.append)
            story.drive(opened)
            recorded = opened
        deaths += 1
    recorded.close()
    check(story, recorded)
    assert deaths > 60
    ended = [(event["round"], tuple(event["survivors"])) for event in told if event["event"] == "unmasked"]
    assert {number for number, _ in ended} == {1, 3, 4}, "what a dead process had no time to tell is told"
    assert len(set(ended)) == 3, "and never anything else"
    assert {event["round"] for event in told if event["event"] == "round-failed"} == {2}


def instants(story, folder, keep):
    """Play the run, and copy its folder after each event is on the disk."""
    with pytest.MonkeyPatch.context() as patched:
        kept = []

        def copying(name):
            method = getattr(RunLog, name)

            def write(self, *arguments):
                result = method(self, *arguments)
                copy = folder / f"copy-{len(kept)}"
                shutil.copytree(folder / "run", copy)
                kept.append(copy)
                return result

            patched.setattr(RunLog, name, write)

        for name in ("begin", "add", "store", "wish_key"):
            copying(name)
        recorded = story.begin(folder / "run")
        story.drive(recorded)
        recorded.close()
    for place, copy in enumerate(kept):
        if place % keep:
            shutil.rmtree(copy)
    return kept[::keep]


@pytest.mark.parametrize("keep", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_from_any_instant_a_fresh_process_ends_in_the_same_release(story, tmp_path, keep):
    for copy in instants(story, tmp_path, keep):
        recorded = story.reopen(copy)
        story.drive(recorded)
        recorded.close()
        check(story, recorded)


def play_in_child(story, folder, done):
    recorded = story.reopen(folder) if RecordedRun.exists(folder) else story.begin(folder)
    story.drive(recorded)
    recorded.close()
    done.write_bytes(b"".join(sorted(encode_message(each) for each in recorded.coordinator.approvals.values())))
    os._exit(0)


@pytest.mark.parametrize("kills", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_kill_9_of_a_real_process_at_any_moment_loses_nothing(story, tmp_path, kills):
    folder, done = tmp_path / "run", tmp_path / "done"
    context, chance, killed = multiprocessing.get_context("fork"), random.Random(7), 0
    while killed < kills:
        child = context.Process(target=play_in_child, args=(story, folder, done))
        child.start()
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), "it asked another thing than before"
        killed += child.exitcode != 0
        if child.exitcode == 0:
            check_done(story, done)
            shutil.rmtree(folder)
            done.unlink()
    child = context.Process(target=play_in_child, args=(story, folder, done))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    check_done(story, done)


def check_done(story, done):
    assert done.read_bytes() == b"".join(sorted(encode_message(each) for each in story.approvals.values()))


def pause(story, folder, where, **observing):
    """A run in which ``where`` is under way and the first node of it has answered."""
    recorded = story.begin(folder, **observing)
    for exchange in story.exchanges(recorded):
        nodes = list(exchange.requests)
        if (exchange.phase, exchange.round) == where:
            story.deliver(recorded, exchange, nodes[0])
            recorded.close()
            return exchange
        for node in nodes:
            story.deliver(recorded, exchange, node)
    raise AssertionError


def test_only_those_who_have_not_answered_are_asked_again_and_the_same(story, tmp_path):
    exchange = pause(story, tmp_path / "run", ("round", 1))
    again = next(story.reopen(tmp_path / "run").play(list))
    assert (again.phase, again.round) == ("round", 1)
    assert list(again.requests) == list(exchange.requests)[1:]
    for node in again.requests:
        assert again.requests[node] == exchange.requests[node]


def test_nothing_of_the_past_is_told_again_but_what_the_last_event_led_to(story, tmp_path):
    told = []
    pause(story, tmp_path / "run", ("round", 1), observe=told.append)
    again = []
    run = story.reopen(tmp_path / "run", observe=again.append).play(list)
    next(run)
    assert again == told[-1:]
    assert again[0]["event"] == "reply"


def test_the_nodes_that_were_there_are_known_before_the_run_goes_on(story, tmp_path):
    pause(story, tmp_path / "run", ("plan", 1))
    reopened = story.reopen(tmp_path / "run")
    assert reopened.last_nodes == (100, 101, 102, 103)
    reopened.close()
    pause(story, tmp_path / "later", ("round", 2))
    with RunLog(tmp_path / "later") as log:
        assert log.snapshot() is not None
        assert log.last_look() is not None
    assert story.reopen(tmp_path / "later").last_nodes == (100, 101, 102, 103)


def test_of_replies_no_more_than_one_rounds_is_kept(story, tmp_path, monkeypatch):
    counts = []
    store = RunLog.store

    def counted(self, snapshot):
        counts.append(self._db.execute("SELECT count(*) FROM events").fetchone()[0])
        store(self, snapshot)
        assert self._db.execute("SELECT count(*) FROM events").fetchone()[0] == 0

    monkeypatch.setattr(RunLog, "store", counted)
    recorded = story.begin(tmp_path / "run")
    story.drive(recorded)
    assert len(counts) == 5, "before each of three rounds, the closing round, and the release"
    assert max(counts) < 25


def test_a_refusal_that_ended_the_run_ends_it_again(story, tmp_path):
    recorded = story.begin(tmp_path / "run")
    no = encode_message(Refused(run=RUN, site=ANNA, code="GuardTripped", rule="too little delta"))
    exchange = next(recorded.play(lambda: list(story.sites)))
    node = next(node for node in exchange.requests if story.sites[node].name == ANNA)
    with pytest.raises(SiteRefused, match="too little delta"):
        recorded.receive(node, no)
    recorded.close()
    with pytest.raises(SiteRefused, match="too little delta"):
        list(story.reopen(tmp_path / "run").play(lambda: list(story.sites)))


def test_a_site_that_refuses_the_plan_is_not_in_the_run_and_ends_nobody_elses(story, tmp_path):
    told = []
    recorded = story.begin(tmp_path / "run", observe=told.append)
    no = encode_message(Refused(run=RUN, site=ANNA, code="PlanRefused", rule="limits.max_rounds"))
    exchanges = recorded.play(lambda: list(story.sites))
    for node, request in next(exchanges).requests.items():
        site = story.sites[node]
        recorded.receive(node, no if site.name == ANNA else site.handle(request))
    assert [event["rule"] for event in told if event["event"] == "declined"] == ["limits.max_rounds"]
    following = next(exchanges)
    assert [event["sites"] for event in told if event["event"] == "absent"] == [[ANNA]]
    assert following.phase == "shares"
    assert {story.sites[node].name for node in following.requests} == {name for name, _ in SITES} - {ANNA}


def test_a_reply_that_was_refused_is_refused_again_and_a_right_one_is_taken(story, tmp_path):
    recorded = story.begin(tmp_path / "run")
    exchange = next(recorded.play(lambda: list(story.sites)))
    with pytest.raises(Malformed):
        recorded.receive(100, b"no message")
    recorded.close()
    told = []
    reopened = story.reopen(tmp_path / "run", observe=told.append)
    again = next(reopened.play(list))
    assert list(again.requests) == list(exchange.requests)
    assert [(event["event"], event["node"]) for event in told] == [("rejected", 100)]
    story.deliver(reopened, again, 100)
    assert told[-1]["event"] == "reply"


def test_what_nobody_asked_for_or_is_too_large_is_not_even_written_down(story, tmp_path, monkeypatch):
    recorded = story.begin(tmp_path / "run")
    next(recorded.play(lambda: list(story.sites)))
    before = len(every_event(recorded))
    with pytest.raises(WrongRound, match="unasked"):
        recorded.receive(7, b"x")
    monkeypatch.setattr("fedseek_server.replies.SETUP_REPLY_BYTES", 10)
    with pytest.raises(TooLarge, match="wanted at most 10"):
        recorded.receive(100, b"x" * 11)
    assert len(every_event(recorded)) == before


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(story, tmp_path):
    """SQLite's own limit on a file's pages stands for the disk; a process that starts again finds a little more room."""
    folder, errors = tmp_path / "run", []
    recorded = story.begin(folder)
    while not recorded.coordinator.approvals:
        (pages,) = recorded._log._db.execute("PRAGMA page_count").fetchone()
        recorded._log._db.execute(f"PRAGMA max_page_count = {pages + 75}")
        try:
            story.drive(recorded)
        except JournalUnusable as error:
            errors.append(error)
            assert len(errors) < 50, "no headway"
            recorded.close()
            recorded = story.reopen(folder)
    check(story, recorded)
    assert len(errors) > 1
    assert all("SQLITE_FULL" in error.message and "make room" in error.hint for error in errors)


def test_a_failing_disk_is_a_clear_error(story, tmp_path):
    recorded = story.begin(tmp_path / "run")
    recorded._log._db.execute("PRAGMA query_only = ON")
    with pytest.raises(JournalUnusable, match="SQLITE_READONLY"):
        next(recorded.play(lambda: [100]))


def test_a_record_of_another_order_is_refused(story, tmp_path):
    recorded = story.begin(tmp_path / "run")
    next(recorded.play(lambda: [100, 101]))
    with recorded._log._transaction() as db:
        db.execute("DELETE FROM events")
    recorded._log.add(Over())
    recorded.close()
    with pytest.raises(JournalUnusable, match="got Over, wanted Looked"):
        next(story.reopen(tmp_path / "run").play(list))


def test_two_processes_do_not_play_one_run(story, tmp_path):
    recorded = story.begin(tmp_path / "run")
    with pytest.raises(JournalUnusable, match="another coordinator process"):
        story.reopen(tmp_path / "run")
    with pytest.raises(JournalUnusable, match="another coordinator process"):
        story.begin(tmp_path / "run")
    recorded.close()
    with pytest.raises(JournalUnusable, match="has begun"):
        story.begin(tmp_path / "run")
    assert RecordedRun.exists(tmp_path / "run")
    assert not RecordedRun.exists(tmp_path / "nothing")
    with pytest.raises(JournalUnusable, match="no run that has begun"):
        story.reopen(tmp_path / "empty")
    assert not RecordedRun.exists(tmp_path / "empty"), "a process that died before it began leaves none"
