"""Waiting for approvals of a release: who is asked again, when there are enough, and when the wait is over."""

import contextlib
import json
import threading

import pytest
from played_network import RUN, make_world, stand_in_release, until
from played_sites import ANNA, BEIAN, FOUR, HARBOUR, RENJI, Federated, away, federate, lost, played_plan
from recorded_plays import Killed, Story, dies_after

from fedseek.errors import ReleaseRefused, SiteRefused
from fedseek.messages import Refused, decode_request, encode_message
from fedseek_server import approving, playing
from fedseek_server.approving import FIRST_PAUSE, LONGEST_PAUSE
from fedseek_server.cli import _line
from fedseek_server.run_log import RunLog
from fedseek_server.snapshot import Snapshot

NAMES = (HARBOUR, ANNA, RENJI, BEIAN)
WAIT = {"wait_hours": 24}
RULE = "approval.releases: 0 of 1 people have approved"


def refusal(site: str, code: str = "NotNow", rule: str = RULE, run: str = "试运行-1") -> bytes:
    return encode_message(Refused(run=run, site=site, code=code, rule=rule))


def later(**asks: int):
    """Sites say "not now" so many times before their people have approved."""
    left = dict(asks)

    def reply(phase: str, number: int, site: str, data: bytes) -> bytes:
        if phase != "release" or not left.get(site):
            return data
        left[site] -= 1
        return refusal(site)

    return reply


def asked(federated: Federated) -> list[set[str]]:
    """Whom each exchange of the release asked."""
    return [
        {federated.sites[node].name for node in exchange.requests}
        for exchange in federated.exchanges
        if exchange.phase == "release"
    ]


def test_sites_that_put_it_off_are_asked_again_and_the_others_are_not():
    federated = federate(played_plan(release=WAIT))
    federated.play(reply=later(**{ANNA: 2, RENJI: 1}))
    assert asked(federated) == [set(NAMES), {ANNA, RENJI}, {ANNA}]
    assert set(federated.coordinator.approvals) == set(NAMES)


def test_whoever_is_asked_again_is_asked_the_same():
    """A site answers no two different requests: a played one fails the test."""
    federated = federate(played_plan(release={**WAIT, "min_approvals": 3}))
    federated.play(reply=later(**dict.fromkeys((HARBOUR, ANNA), 3)))
    seen: dict[int, set[bytes]] = {}
    for exchange in federated.exchanges:
        if exchange.phase == "release":
            for node, data in exchange.requests.items():
                seen.setdefault(node, set()).add(data)
    assert {len(each) for each in seen.values()} == {1}


def test_the_same_word_again_is_told_once():
    federated = federate(played_plan(release=WAIT))
    federated.play(reply=later(**{ANNA: 5}))
    assert federated.events("declined", "site", "rule") == [(ANNA, RULE)]
    assert federated.events("dropout", "site") == []


def test_pauses_grow_within_bounds_and_end_with_the_wait():
    federated = federate(played_plan(release={"wait_hours": 2}))
    with pytest.raises(ReleaseRefused):
        federated.play(reply=later(**{ANNA: 1000}))
    waited = federated.waited
    assert waited[:3] == [FIRST_PAUSE, FIRST_PAUSE, 2 * FIRST_PAUSE]
    assert max(waited) == LONGEST_PAUSE
    assert sum(waited) == 2 * 3600
    assert waited[-1] == 0.0


def test_a_site_that_is_away_is_asked_when_it_is_back():
    federated = federate(played_plan(release=WAIT))
    node = federated.node(ANNA)
    run = federated.start()
    for exchange in run:
        federated.exchanges.append(exchange)
        federated.waited.append(exchange.pause_seconds)
        if exchange.phase == "close":
            for each in exchange.requests:
                federated.deliver(exchange, each)
            federated.here.discard(node)
            continue
        if len(federated.waited) and exchange.pause_seconds and len(asked(federated)) > 3:
            federated.here.add(node)
        for each in exchange.requests:
            federated.deliver(exchange, each)
    assert set(federated.coordinator.approvals) == set(NAMES)
    assert {"st-anna"} == asked(federated)[-1]


def test_how_far_it_is_is_told_after_each_ask():
    federated = federate(played_plan(release=WAIT))
    federated.play(reply=later(**{ANNA: 2}), away=away())
    told = [event for event in federated.told if event["event"] == "approvals"]
    assert [event["sites"][ANNA] for event in told] == [RULE, RULE, "approved"]
    assert {event["wanted"] for event in told} == {4}
    assert {event["sites"][BEIAN] for event in told} == {"approved"}


# how many


def test_when_as_many_as_the_plan_asks_have_approved_the_others_are_asked_once_more():
    federated = federate(played_plan(release={**WAIT, "min_approvals": 3}))
    federated.play(reply=later(**{ANNA: 1000, RENJI: 2}))
    assert asked(federated) == [set(NAMES), {ANNA, RENJI}, {ANNA, RENJI}, {ANNA}]
    assert set(federated.coordinator.approvals) == {HARBOUR, RENJI, BEIAN}


def test_one_that_is_only_slow_is_not_left_out():
    federated = federate(played_plan(release={**WAIT, "min_approvals": 3}))
    federated.play(reply=later(**{ANNA: 1}))
    assert set(federated.coordinator.approvals) == set(NAMES)


@pytest.mark.parametrize(
    ("wanted", "silent"),
    [(None, []), (3, [HARBOUR]), (3, [BEIAN])],
    ids=["all have to", "the first is silent", "the last is silent"],
)
def test_whichever_sites_approve_one_of_them_has_sent_the_adapter(wanted, silent):
    federated = federate(played_plan(release={**WAIT, **({"min_approvals": wanted} if wanted else {})}))
    federated.play(reply=later(**dict.fromkeys(silent, 1000)))
    approvals = federated.coordinator.approvals
    assert set(approvals) == set(NAMES) - set(silent)
    assert any(reply.adapter for reply in approvals.values())
    release = next(each for each in federated.exchanges if each.phase == "release")
    assert sum(decode_request(data).send_adapter for data in release.requests.values()) == len(silent) + 1


def test_a_plan_that_wants_more_approvals_than_there_are_sites_in_it_is_refused_before_anybody_is_asked():
    federated = federate(played_plan(release={**WAIT, "min_approvals": 4}))
    with pytest.raises(ReleaseRefused, match=r"wants 4 approvals \(release.min_approvals\), updates of 3 sites"):
        federated.play(reply=lost(("round", 1, ANNA), ("round", 2, ANNA)), away=away(("close", 3, ANNA)))
    assert asked(federated) == []


# the end of it


def test_when_the_time_is_over_it_is_refused_by_the_names_of_those_that_are_missing():
    federated = federate(played_plan(release={**WAIT, "min_approvals": 3}))
    with pytest.raises(ReleaseRefused) as caught:
        federated.play(reply=later(**{ANNA: 1000, RENJI: 1000}))
    assert (
        "2 of 4 sites in the adapter have approved, wanted 3; no approval from st-anna, 仁济医院"
        in caught.value.message
    )
    assert f"st-anna: {RULE}; 仁济医院: {RULE}" in caught.value.hint


@pytest.mark.parametrize("code", ["ReleaseRefused", "WrongRound", "InternalError"])
def test_a_contributor_that_refuses_outright_ends_the_release(code):
    federated = federate(played_plan(release={**WAIT, "min_approvals": 3}))

    def reply(phase, number, site, data):
        return refusal(site, code, code) if (phase, site) == ("release", ANNA) else data

    with pytest.raises(SiteRefused, match=f"'st-anna' refused: {code}"):
        federated.play(reply=reply)


def test_a_site_that_is_not_in_the_adapter_cannot_refuse_it():
    federated = federate(played_plan(release=WAIT))
    gone = lost(("round", 1, ANNA), ("round", 2, ANNA))

    def reply(phase, number, site, data):
        told = refusal(site, "ReleaseRefused", "ReleaseRefused")
        return told if (phase, site) == ("release", ANNA) else gone(phase, number, site, data)

    federated.play(reply=reply, away=away(("close", 3, ANNA)))
    assert set(federated.coordinator.approvals) == {HARBOUR, RENJI, BEIAN}


# crashes


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return Story.told(tmp_path_factory.mktemp("told") / "run", rounds=2, release={"wait_hours": 24})


class Waiting:
    """A story whose sites put the release off so many times, counted over all processes."""

    def __init__(self, story, times):
        self.story, self.left = story, {(node, times) for node in list(story.sites)[:2]}
        self.times = dict(self.left)

    def drive(self, recorded):
        for exchange in self.story.exchanges(recorded):
            for node in exchange.requests:
                if exchange.phase == "release" and self.times.get(node):
                    self.times[node] -= 1
                    recorded.receive(node, refusal(self.story.sites[node].name))
                else:
                    self.story.deliver(recorded, exchange, node)


def check(story, recorded):
    assert recorded.coordinator.approvals == story.approvals
    assert len(story.approvals) == 4


def test_a_wait_that_dies_after_every_single_event_ends_in_the_same_release(story, tmp_path, monkeypatch):
    folder, deaths, recorded = tmp_path / "run", 0, None
    monkeypatch.setattr(approving, "ASKS_A_SNAPSHOT", 3)
    waiting = Waiting(story, 8)
    while recorded is None:
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            dies_after(patched, 1)
            opened = story.reopen(folder) if deaths else story.begin(folder)
            waiting.drive(opened)
            recorded = opened
        deaths += 1
    recorded.close()
    check(story, recorded)
    assert deaths > 60


def test_the_record_of_a_long_wait_does_not_grow_without_end(story, tmp_path, monkeypatch):
    monkeypatch.setattr(approving, "ASKS_A_SNAPSHOT", 4)
    recorded, counts = story.begin(tmp_path / "run"), []
    add = RunLog.add

    def counted(self, event):
        add(self, event)
        counts.append(self._db.execute("SELECT count(*) FROM events").fetchone()[0])

    monkeypatch.setattr(RunLog, "add", counted)
    Waiting(story, 14).drive(recorded)
    assert len(recorded.coordinator.approvals) == 4
    assert max(counts) < 25
    stored = Snapshot.from_bytes(recorded._log.snapshot())
    assert {reply.site for reply in stored.approvals} == {site.name for site in list(story.sites.values())[2:]}
    recorded.close()


def refused_for_want_of_approvals(story, folder, waiting):
    ticks = iter(range(1, 10**9))
    story.times, before = (1_000_000.0 + 6 * 3600 * n for n in ticks), story.times
    try:
        recorded = story.begin(folder)
        with pytest.raises(ReleaseRefused, match="no approval from"):
            waiting.drive(recorded)
        recorded.close()
        with pytest.raises(ReleaseRefused, match="no approval from"):  # the same once more, from the record alone
            waiting.drive(reopened := story.reopen(folder))
        reopened.close()
    finally:
        story.times = before


@pytest.mark.parametrize("snapshots", [1, 64])
def test_asked_again_the_wait_begins_anew_also_after_a_crash(story, tmp_path, monkeypatch, snapshots):
    monkeypatch.setattr(approving, "ASKS_A_SNAPSHOT", snapshots)
    waiting = Waiting(story, 1000)
    refused_for_want_of_approvals(story, tmp_path / "run", waiting)
    monkeypatch.setattr(story, "times", (2_000_000.0 + n for n in range(10**9)))
    recorded = story.reopen(tmp_path / "run")
    recorded.ask_again()
    recorded.ask_again()
    recorded.close()  # killed before it asked anybody
    recorded = story.reopen(tmp_path / "run")
    waiting.times.clear()
    waiting.drive(recorded)
    check(story, recorded)
    recorded.close()


# a daemon


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "write_release", stand_in_release)
    monkeypatch.setattr(playing, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(approving, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(approving, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr("fedseek_server.driver.SHORTEST_TICK", 0.001)
    made = make_world(tmp_path)
    yield made
    made.network.mail.audit.close()


def puts_off(approved: threading.Event, site: str):
    def message(name, request, answer):
        if type(request).__name__ != "ReleaseRequest" or name != site or approved.is_set():
            return answer
        return refusal(name, run=RUN)

    return message


def is_waiting(world):
    return world.order.status().sites.get(ANNA) == RULE


def test_a_daemon_waits_is_killed_and_goes_on_when_people_have_approved(world):
    approved = threading.Event()
    world.link.message = puts_off(approved, ANNA)
    world.ask(plan={"release": WAIT})
    with world.playing():
        until(lambda: is_waiting(world))
        told = _line(world.order.status())
        world.network.stop.set()
    assert told == f"waiting for approvals: 3 of 4 (st-anna: {RULE})"
    assert (world.order.status().state, world.order.status().approvals_wanted) == ("running", 4)
    assert not world.order.release.exists()
    before = len(world.link.asked)
    world.network.stop.clear()
    with world.playing():
        until(lambda: len(world.link.asked) > before + 2)
        approved.set()
    assert world.order.status().state == "released"
    assert {(phase, name) for phase, _, name in world.link.asked[before:]} == {("release", ANNA)}
    assert json.loads((world.order.release / "signed by").read_text("utf-8")) == sorted(name for name, _ in FOUR)
    assert [each["site"] for each in world.lines("declined")] in ([ANNA], [ANNA, ANNA]), "once a process"


def test_a_run_is_stopped_while_it_waits_for_approvals(world):
    world.link.message = puts_off(threading.Event(), ANNA)
    world.ask(plan={"release": WAIT})
    with world.playing():
        until(lambda: is_waiting(world))
        world.order.ask_to_stop()
    assert world.order.status().state == "stopped"


def test_a_release_that_was_refused_for_want_of_approvals_is_asked_for_once_more(world):
    approved = threading.Event()
    world.link.message = puts_off(approved, ANNA)
    world.ask(plan={"release": {"wait_hours": 0}})
    told = world.play()
    assert (told.state, told.code, told.sites[ANNA]) == ("failed", "ReleaseRefused", RULE)
    assert "--ask-again" in told.hint
    approved.set()
    world.order.ask_again()
    assert world.order.status().state == "queued"
    assert world.play().state == "released"
    assert world.lines("release-asked-again") == [{"run": RUN}]
    assert not world.order.is_to_ask_again


def test_heads_of_records_go_round_with_the_first_ask_and_not_with_each(world):
    counts, approved = [], threading.Event()
    world.link.message = puts_off(approved, ANNA)
    world.ask(plan={"release": WAIT})
    opened = type(world.network.mail).open_exchange
    world.network.mail.__class__.open_exchange = lambda self, phase: counts.append(phase) or opened(self, phase)
    try:
        with world.playing():
            until(lambda: len([phase for phase in counts if phase == "again"]) > 3)
            approved.set()
    finally:
        world.network.mail.__class__.open_exchange = opened
    assert counts.count("release") == 1
