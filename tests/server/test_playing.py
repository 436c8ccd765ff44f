"""One run from the order to its end: real coordinator, driver, record and parcels; the network is a dictionary."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import public_bytes, signed_roster
from msgspec.structs import replace
from played_sites import ANNA, BEIAN, FOUR, HARBOUR, RENJI, PlayedSite, played_plan

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_check import checked_lines
from fedseek.daemon.parcels import ParcelUp, Verdict, decode_parcel_down, encode_parcel
from fedseek.daemon.reports import read_events
from fedseek.errors import JournalUnusable
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signed_roster import make_signed_roster
from fedseek.identity.signing import sign_with
from fedseek.messages import Refused, decode_request, encode_message
from fedseek_server import playing
from fedseek_server.consortium import COORDINATOR
from fedseek_server.driver import Arrival, Driver
from fedseek_server.mail import Mail
from fedseek_server.orders import Status, submit
from fedseek_server.playing import Network, Settled, play_run, wait_for_sites
from fedseek_server.run_log import RunLog

FIRST_NODE = 0xF000_0000_0000_0001  # as large as Flower's: no number of JSON
RUN = "run-1"
READY = Verdict(status="ready")
AUTHORITY = Ed25519PrivateKey.generate()
OWN = Ed25519PrivateKey.generate()


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@dataclass
class Link:
    """Carries parcels to played sites and back at once. ``say`` is what a site answers to a notice, the nth time."""

    mail: Mail
    sites: dict[int, PlayedSite]
    say: Callable[[str, int], Verdict] = lambda site, nth: READY
    takes_roster: Callable[[str, int], bool] = lambda site, nth: True
    message: Callable[[str, Any, bytes], bytes | None] = lambda site, request, answer: answer
    here: set[int] = field(default_factory=set)
    greetings: int = 0
    asked: list[tuple[str, int, str]] = field(default_factory=list)
    mailbox: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.here = set(self.sites)

    def open(self) -> None:
        self.mailbox.clear()

    def close(self) -> None:
        pass

    def nodes(self) -> dict[int, str]:
        return dict.fromkeys(self.here, "stamp")

    def push(self, node: int, data: bytes, phase: str, number: int, *, lifetime: float) -> str:
        name, message_id = self.sites[node].name, f"{node}/{phase}/{number}/{len(self.asked)}"
        self.asked.append((phase, number, name))
        answer = self._answer(name, self.sites[node], decode_parcel_down(data))
        if answer is not None:
            self.mailbox[message_id] = answer
        return message_id

    def _answer(self, name: str, site: PlayedSite, down: Any) -> bytes | None:
        verdict, message = None, None
        nth = sum(phase == "greet" and site == name for phase, _, site in self.asked)
        if down.notice is not None:
            verdict = self.say(name, nth)
        if down.message is not None:
            message = self.message(name, decode_request(down.message), site.handle(down.message))
            if message is None:
                return None
        digest = self.mail.roster.digest() if self.takes_roster(name, nth) else bytes(32)
        return encode_parcel(ParcelUp(site=name, message=message, roster_digest=digest, verdict=verdict))

    def poll(self, message_ids: Any) -> list[Arrival]:
        return [Arrival(each, None, False, each) for each in message_ids if each in self.mailbox]

    def fetch(self, arrival: Arrival, *, limit: int) -> bytes | None:
        return self.mailbox.pop(str(arrival.handle))

    def discard(self, arrival: Arrival) -> None:
        self.mailbox.pop(str(arrival.handle), None)


@dataclass
class World:
    folder: Any
    link: Link
    network: Network
    order: Any

    def ask(self, wait: float = 60.0, **changes: Any) -> Any:
        self.order = submit(self.folder, played_plan(**changes.pop("plan", {})), wait_seconds=wait, run=RUN, **changes)
        return self.order

    def play(self) -> Status:
        play_run(self.network, self.order)
        return self.order.status()

    @contextmanager
    def playing(self):
        """In a thread, as the stop comes from another one."""
        thread = threading.Thread(target=play_run, args=(self.network, self.order))
        thread.start()
        try:
            yield
        finally:
            thread.join(timeout=10)
            assert not thread.is_alive()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        lines = checked_lines(self.folder / COORDINATOR, public_key=public_bytes(OWN), name=COORDINATOR)
        return [line.detail for line in lines if line.kind == kind]


def until(what: Callable[[], Any], seconds: float = 10.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit, "still not"
        time.sleep(0.005)
    return found


def stand_in_release(coordinator: Any, folder: Any) -> None:
    folder.mkdir()
    (folder / "signed by").write_text(json.dumps(sorted(coordinator.approvals)), "utf-8")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(playing, "write_release", stand_in_release)
    monkeypatch.setattr(playing, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("fedseek_server.driver.SHORTEST_TICK", 0.001)
    identities = [SiteIdentity.generate(*site) for site in FOUR]
    sites = {FIRST_NODE + place: PlayedSite(identity) for place, identity in enumerate(identities)}
    names = {node: site.name for node, site in sites.items()}
    audit = AuditChain(
        tmp_path / COORDINATOR, name=COORDINATOR, sign=partial(sign_with, OWN), public_key=public_bytes(OWN)
    )
    roster = signed_roster(AUTHORITY, *sorted(identities, key=lambda each: each.name), at=int(time.time()))
    mail = Mail(roster, names.get, audit)
    link = Link(mail, sites)
    network = Network(link, mail, 1 << 20, 0.0, threading.Event())
    yield World(tmp_path, link, network, None)
    audit.close()


def words(world) -> dict[str, str]:
    return world.order.status().sites


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


# settling


class Clock(threading.Event):
    """Time passes only when somebody waits."""

    def __init__(self):
        super().__init__()
        self.now = 100.0

    def wait(self, timeout=None):
        self.now += timeout or 0.0
        return self.is_set()


@dataclass
class Looks:
    """A run that only looks who is there, as often as it is told to."""

    last_nodes: tuple[int, ...]
    times: int = 1
    seen: list[list[int]] = field(default_factory=list)

    def play(self, nodes):
        for _ in range(self.times):
            self.seen.append(list(nodes()))
            yield None


def settle(monkeypatch, nodes, *, last, seconds=20.0, times=1):
    clock, inner = Clock(), Looks(last, times)
    monkeypatch.setattr(playing.time, "monotonic", lambda: clock.now)
    list(Settled(inner, seconds, clock).play(lambda: nodes(clock.now - 100.0)))
    return inner.seen, clock.now - 100.0


def test_a_node_that_was_there_a_moment_ago_is_waited_for(monkeypatch):
    seen, took = settle(monkeypatch, lambda now: [2, 1] if now > 3 else [2], last=(1, 2))
    assert seen == [[1, 2]]
    assert 3 < took < 4


def test_it_is_not_waited_for_for_ever_and_not_once_more(monkeypatch):
    seen, took = settle(monkeypatch, lambda now: [2], last=(1, 2), times=3)
    assert seen == [[2]] * 3
    assert 20 < took < 21


def test_who_is_new_is_not_waited_for_but_is_there(monkeypatch):
    seen, took = settle(monkeypatch, lambda now: [3, 1], last=(1,))
    assert (seen, took) == ([[1, 3]], 0.0)


def test_a_node_that_goes_between_two_looks_is_waited_for_too(monkeypatch):
    gone = iter([[1, 2], [1], [1], [1, 2]])
    seen, took = settle(monkeypatch, lambda now: next(gone), last=(), times=2)
    assert seen == [[1, 2], [1, 2]]
    assert 0 < took < 1


def test_a_stop_ends_the_waiting():
    stop = threading.Event()
    stop.set()
    with pytest.raises(playing.Stopped):
        list(Settled(Looks((1,)), 60.0, stop).play(list))
