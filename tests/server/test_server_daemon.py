"""Between runs: who is registered, who is greeted, whose keys are renewed. The consortium is real, the network a dictionary."""

import threading
import time
from dataclasses import dataclass, field

import pytest
from enrolled import node_public_key

from fedseek.daemon.audit_check import checked_lines
from fedseek.daemon.audit_lines import COORDINATOR
from fedseek.daemon.parcels import ParcelUp, decode_parcel_down, encode_parcel
from fedseek.errors import NotAdmitted, Unreachable
from fedseek.identity.enrolment import make_renewal, make_request
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signed_roster import parse_signed_roster
from fedseek_server import daemon as module
from fedseek_server.config import CoordinatorConfig, ListenSettings
from fedseek_server.consortium import create_consortium
from fedseek_server.daemon import RETRY_SECONDS, Daemon, greet
from fedseek_server.driver import Arrival
from fedseek_server.orders import RunFolder

BEIAN, RENJI = "北岸银行", "仁济医院"


@dataclass
class Link:
    """Registered nodes by key, and a site behind each that is connected."""

    keys: dict[bytes, int] = field(default_factory=dict)
    revoked: set[bytes] = field(default_factory=set)
    behind: dict[bytes, object] = field(default_factory=dict)
    mailbox: dict[str, bytes] = field(default_factory=dict)
    away: bool = False

    def enrolled(self):
        return dict(self.keys)

    def names(self):
        return {}

    def enrol(self, public_key, name):
        if public_key in self.revoked:
            raise NotAdmitted("revoked once")
        self.keys[public_key] = (1 << 63) + len(self.keys) + len(self.revoked)
        return self.keys[public_key]

    def revoke(self, node):
        [key] = [key for key, each in self.keys.items() if each == node]
        del self.keys[key]
        self.revoked.add(key)

    def open(self):
        if self.away:
            raise Unreachable("away")

    def close(self):
        pass

    def nodes(self):
        return {self.keys[key]: "stamp" for key in self.behind if key in self.keys}

    def push(self, node, data, phase, number, *, lifetime):
        [site] = [site for key, site in self.behind.items() if self.keys.get(key) == node]
        self.mailbox[f"{node}"] = site.answer(decode_parcel_down(data))
        return f"{node}"

    def poll(self, message_ids):
        return [Arrival(each, None, False, each) for each in message_ids if each in self.mailbox]

    def fetch(self, arrival, *, limit):
        return self.mailbox.pop(arrival.handle)

    def discard(self, arrival):
        pass


@dataclass
class Site:
    """Tells which roster it has, and offers ``renewal``."""

    identity: SiteIdentity
    authority: bytes
    node_key: bytes = field(default_factory=node_public_key)
    digest: bytes = bytes(32)
    renewal: bytes | None = None
    takes_rosters: bool = True

    def answer(self, down):
        if down.roster is not None and self.takes_rosters:
            self.digest = parse_signed_roster(down.roster, authority=self.authority).digest()
        return encode_parcel(ParcelUp(site=self.identity.name, roster_digest=self.digest, renewal=self.renewal))

    def renew(self):
        """Offer new keys; returns what the site is once it has them."""
        new = Site(SiteIdentity.generate(self.identity.name, self.identity.kind), self.authority)
        request = make_request(new.identity, new.node_key, int(time.time()))
        self.renewal = make_renewal(self.identity, request).to_bytes()
        return new


@dataclass
class World:
    daemon: Daemon
    link: Link
    sites: dict[str, Site]

    def register(self):
        module._register(self.daemon, self.link, module._wanted(self.daemon.consortium))

    def lines(self, *kinds):
        key = self.daemon.consortium.about.coordinator_key
        lines = checked_lines(self.daemon.folder / "audit", public_key=key, name=COORDINATOR)
        return [(line.kind, line.detail.get("site")) for line in lines if line.kind in kinds]

    def admit(self, name):
        site = Site(SiteIdentity.generate(name, "bank"), self.daemon.consortium.about.authority)
        self.daemon.consortium.admit(make_request(site.identity, site.node_key, int(time.time())), time.time())
        self.sites[name] = site
        self.link.behind[site.node_key] = site
        return site


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("fedseek_server.driver.SHORTEST_TICK", 0.001)
    consortium = create_consortium(
        tmp_path / "联合体", name="华东联合", hosts=["localhost"], address="localhost:9443", now=time.time()
    )
    link, config = Link(), CoordinatorConfig(version=1, listen=ListenSettings(host="localhost", port=9443))
    audit = consortium.audit_chain(retention_days=400)
    made = World(Daemon(consortium.folder, config, consortium, audit, link, threading.Event()), link, {})
    for name in (BEIAN, RENJI):
        made.admit(name)
    made.register()
    yield made
    audit.close()


def by_site(world):
    return sorted(world.daemon.nodes.values())


# registration


def test_exactly_the_nodes_of_the_roster_are_registered_and_that_is_recorded(world):
    assert by_site(world) == [RENJI, BEIAN]
    world.admit("新银行")
    world.daemon.consortium.revoke(RENJI, time.time())
    world.register()
    assert by_site(world) == [BEIAN, "新银行"]
    assert len(world.link.keys) == 2
    told = world.lines("node-registered", "node-removed")
    assert sorted(told[:2]) == [("node-registered", RENJI), ("node-registered", BEIAN)]
    assert ("node-registered", "新银行") in told[2:]
    assert [kind for kind, _ in told[2:]].count("node-removed") == 1


def test_a_change_of_nodes_makes_the_daemon_greet_at_once_and_no_change_does_not(world):
    world.daemon.greet_at = 1e12
    world.register()
    assert world.daemon.greet_at == 1e12
    world.admit("新银行")
    world.register()
    assert world.daemon.greet_at == 0.0


def test_mail_that_is_out_already_knows_a_site_that_comes_meanwhile(world):
    mail = world.daemon.network().mail
    site = world.admit("新银行")
    world.register()
    assert mail.site_of(world.link.keys[site.node_key]) == "新银行"


@pytest.mark.parametrize("name", [f"{BEIAN} (former)", f"{BEIAN} former"])
def test_no_name_makes_a_site_pass_for_another(world, name):
    site = world.admit(name)
    world.register()
    assert world.daemon.nodes[world.link.keys[site.node_key]] == name


# greeting


def test_a_greeting_brings_the_roster_and_then_there_is_peace_for_a_day(world):
    greet(world.daemon)
    roster = world.daemon.consortium.signed_roster
    assert {site.digest for site in world.sites.values()} == {roster.digest()}
    assert world.daemon.greet_at > time.monotonic() + 86_000


@pytest.mark.parametrize("why", ["is away", "does not take it"])
def test_while_a_site_has_not_got_the_roster_it_is_greeted_again_soon(world, why):
    if why == "is away":
        del world.link.behind[world.sites[RENJI].node_key]
    else:
        world.sites[RENJI].takes_rosters = False
    greet(world.daemon)
    assert time.monotonic() < world.daemon.greet_at <= time.monotonic() + RETRY_SECONDS


def test_renewed_keys_come_on_the_roster_and_the_site_is_let_in_under_both_until_it_is_seen_with_the_new_ones(world):
    old = world.sites[BEIAN]
    new = old.renew()
    greet(world.daemon)
    consortium = world.daemon.consortium
    assert consortium.signed_roster.member(BEIAN).entry == new.identity.public()
    assert world.lines("renewed", "renewal-refused") == [("renewed", BEIAN)]
    assert world.daemon.greet_at <= time.monotonic() + RETRY_SECONDS, "the others have to hear of it"
    world.register()
    assert by_site(world) == [RENJI, BEIAN, BEIAN]
    old.renewal = None
    greet(world.daemon)
    assert consortium.former_node_keys() == {BEIAN: old.node_key}, "it was seen with the old one alone"
    assert old.digest == consortium.signed_roster.digest(), "it heard of its renewal under the old one"
    del world.link.behind[old.node_key]
    world.link.behind[new.node_key] = new
    greet(world.daemon)
    assert consortium.former_node_keys() == {}
    assert world.lines("former-key-dropped") == [("former-key-dropped", BEIAN)]
    world.register()
    assert by_site(world) == [RENJI, BEIAN]
    assert set(world.link.keys) == {new.node_key, world.sites[RENJI].node_key}


def test_a_renewal_that_is_none_is_recorded_and_spoils_nothing_for_others(world):
    new = world.sites[BEIAN].renew()
    world.sites[RENJI].renewal = world.sites[BEIAN].renewal[:-9]
    greet(world.daemon)
    assert sorted(world.lines("renewed", "renewal-refused")) == [("renewal-refused", RENJI), ("renewed", BEIAN)]
    assert world.daemon.consortium.signed_roster.member(BEIAN).entry == new.identity.public()


def test_no_site_renews_the_keys_of_another(world):
    world.sites[BEIAN].renew()
    world.sites[RENJI].renewal, world.sites[BEIAN].renewal = world.sites[BEIAN].renewal, None
    before = world.daemon.consortium.signed_roster
    greet(world.daemon)
    assert world.daemon.consortium.signed_roster == before
    assert world.lines("renewed", "renewal-refused") == [("renewal-refused", RENJI)]


def test_a_superlink_that_is_away_holds_up_no_stop(world):
    world.link.away = True
    world.daemon.stop.set()
    greet(world.daemon)
    assert world.daemon.greet_at == 0.0


# the loop


def test_runs_are_played_one_after_another_and_sites_greeted_between(world, monkeypatch):
    told, queue = [], [RunFolder(world.daemon.folder / "runs" / name) for name in ("a", "b")]
    monkeypatch.setattr(module, "next_run", lambda folder: queue[0] if queue else None)
    monkeypatch.setattr(module, "play_run", lambda network, run: told.append(queue.pop(0).path.name))
    monkeypatch.setattr(module, "greet", lambda daemon: (told.append("greeted"), daemon.stop.set()))
    module._serve(world.daemon)
    assert told == ["a", "b", "greeted"]
