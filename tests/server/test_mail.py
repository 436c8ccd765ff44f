"""What the coordinator puts around messages and takes from around them; its record and those of the sites are real."""

import logging
from dataclasses import dataclass
from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import NOW, public_bytes, signed_roster

from fedseek.daemon.audit import AuditChain
from fedseek.daemon.audit_check import checked_lines, verify_audit
from fedseek.daemon.audit_lines import COORDINATOR, sign_head
from fedseek.daemon.parcels import ParcelUp, Verdict, decode_parcel_down, encode_parcel
from fedseek.errors import Malformed
from fedseek.evidence import parse_heads
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import sign, sign_with
from fedseek.messages import Standing
from fedseek.verification import check_heads
from fedseek_server.exchange import Exchange
from fedseek_server.mail import GREET, Greeting, Mail, Parcels, Posted
from fedseek_server.releasing import audit_heads

BEIAN, HARBOUR, RENJI = "北岸银行", "harbour-bank", "仁济医院"
NODES = {11: BEIAN, 12: HARBOUR, 13: RENJI}
RUN = "试运行-1"
AUTHORITY = Ed25519PrivateKey.generate()
OWN = Ed25519PrivateKey.generate()


@dataclass
class Site:
    """Enough of a site to talk: its keys, its record, the roster it has."""

    identity: SiteIdentity
    audit: AuditChain
    roster_digest: bytes = bytes(32)

    def answer(self, data, keys, **fields):
        """Take a parcel as an honest site does, and make up the one that goes back."""
        down = decode_parcel_down(data)
        if down.countersignatures:
            self.audit.note_countersignatures(down.seen, down.countersignatures, keys)
        countersignature = None
        if down.heads:
            self.audit.note_heads(down.heads, keys)
            countersignature = self.audit.countersign(down.heads)
        return self.parcel(**{"countersignature": countersignature, **fields})

    def parcel(self, **fields):
        told = {"site": self.identity.name, "roster_digest": self.roster_digest, "head": self.audit.head()}
        return encode_parcel(ParcelUp(**{**told, **fields}))


@dataclass
class World:
    folder: object
    mail: Mail
    sites: dict
    keys: dict

    def round(self, phase="round", *, between=lambda: None, **by_node):
        """One exchange with every site; ``by_node`` replaces fields of the parcel of a node (``n12={...}``)."""
        self.mail.open_exchange(phase)
        down = {node: self.mail.parcel(node, b"m", run=RUN) for node in NODES}
        between()
        for node, name in NODES.items():
            self.mail.take(node, self.sites[name].answer(down[node], self.keys, **by_node.get(f"n{node}", {})))
        return {node: decode_parcel_down(data) for node, data in down.items()}

    def restarted(self):
        """The mail of a process that began anew."""
        return Mail(self.mail.roster, NODES.get, self.mail.audit)

    def verify(self, folder, name):
        return verify_audit(self.folder / folder, public_key=self.keys[name], name=name, others=self.keys)

    def lines(self, kind):
        lines = checked_lines(self.folder / COORDINATOR, public_key=self.keys[COORDINATOR], name=COORDINATOR)
        return [line for line in lines if line.kind == kind]


def chain(folder, name, key, public):
    return AuditChain(folder, name=name, sign=key, public_key=public, clock=lambda: NOW)


@pytest.fixture
def world(tmp_path):
    identities = {name: SiteIdentity.generate(name, "bank") for name in NODES.values()}
    keys = {name: identity.public().signing_key for name, identity in identities.items()}
    sites = {
        name: Site(identity, chain(tmp_path / name, name, partial(sign, identity), keys[name]))
        for name, identity in identities.items()
    }
    keys[COORDINATOR] = public_bytes(OWN)
    audit = chain(tmp_path / COORDINATOR, COORDINATOR, partial(sign_with, OWN), keys[COORDINATOR])
    mail = Mail(signed_roster(AUTHORITY, *sorted(identities.values(), key=lambda each: each.name)), NODES.get, audit)
    yield World(tmp_path, mail, sites, keys)
    audit.close()
    for site in sites.values():
        site.audit.close()


# the roster


def test_the_roster_is_sent_until_the_site_says_that_it_holds_it(world):
    def sent():
        return {node: decode_parcel_down(world.mail.parcel(node, None, run=None)).roster for node in NODES}

    whole = world.mail.roster.to_bytes()
    assert sent() == dict.fromkeys(NODES, whole)
    world.mail.take(11, world.sites[BEIAN].parcel())
    assert sent()[11] == whole, "it holds another"
    assert not world.mail.holds_roster(BEIAN)
    world.mail.take(11, world.sites[BEIAN].parcel(roster_digest=world.mail.roster.digest()))
    assert sent() == {11: None, 12: whole, 13: whole}
    assert world.mail.holds_roster(BEIAN)
    world.mail.take(11, world.sites[BEIAN].parcel())
    assert sent()[11] == whole, "a copy from before was put back there"


# who speaks


@pytest.mark.parametrize(("node", "speaks_for"), [(11, HARBOUR), (14, BEIAN), (11, COORDINATOR)])
def test_a_node_speaks_for_its_own_site_alone(world, node, speaks_for):
    told = encode_parcel(
        ParcelUp(site=speaks_for, roster_digest=bytes(32), verdict=Verdict(status="ready"), renewal=b"keys")
    )
    with pytest.raises(Malformed, match=speaks_for):
        world.mail.take(node, told)
    assert (world.mail.verdicts, world.mail.renewals, world.mail.standings) == ({}, {}, {})


@pytest.mark.parametrize("data", [b"", b"\xc1", encode_parcel(ParcelUp(site="x", roster_digest=bytes(32)))[:-1]])
def test_what_is_no_parcel_is_refused(world, data):
    with pytest.raises(Malformed):
        world.mail.take(11, data)


def test_what_a_site_tells_is_kept_until_it_tells_otherwise(world):
    standing = Standing(
        site=BEIAN,
        runs=(RUN,),
        plan_digest="0" * 64,
        roster_digest=bytes(32),
        adapters={1: {"global": bytes(32)}},
        contributors={1: (BEIAN,)},
    )
    waiting, ready = Verdict(status="waiting", rule="两人批准"), Verdict(status="ready")
    world.mail.take(11, world.sites[BEIAN].parcel(verdict=waiting, standing=standing, renewal=b"new keys"))
    world.mail.take(11, world.sites[BEIAN].parcel())
    assert (world.mail.verdicts, world.mail.renewals) == ({BEIAN: waiting}, {BEIAN: b"new keys"})
    assert world.mail.standings == {BEIAN: standing}
    world.mail.take(11, world.sites[BEIAN].parcel(verdict=ready))
    assert world.mail.verdicts == {BEIAN: ready}


# heads and countersignatures


def test_heads_go_around_and_each_party_keeps_what_the_others_signed(world):
    world.round(GREET)  # nobody has told its head yet
    world.round("round")
    second = world.round("round")
    third = world.round("close")
    assert {head.name for head in second[11].heads} == {*NODES.values(), COORDINATOR}
    assert third[11].seen == second[11].heads
    assert set(third[11].countersignatures) == {*NODES.values(), COORDINATOR}
    report = world.verify(COORDINATOR, COORDINATOR)
    assert set(report.heads_seen) == set(NODES.values())
    for name in NODES.values():
        report = world.verify(name, name)
        others = {*NODES.values(), COORDINATOR} - {name}
        assert set(report.heads_seen) == others
        assert set(report.countersigned) >= others
        assert (report.forks, report.unchecked) == ((), ())


def test_the_coordinators_own_record_keeps_what_the_sites_countersigned(world):
    world.round(GREET)
    world.round("round")
    world.round("round")
    assert set(world.verify(COORDINATOR, COORDINATOR).countersigned) >= set(NODES.values())


def test_the_heads_that_went_around_with_the_release_can_be_verified_by_whoever_has_the_roster(world):
    world.round(GREET)
    world.round("release")
    heads, countersignatures = world.mail.heads_seen()
    assert {head.name for head in heads} == {*NODES.values(), COORDINATOR}
    assert set(countersignatures) == set(NODES.values()), "the coordinator's key is on no roster"
    written = audit_heads(world.mail.roster.roster, heads, countersignatures)
    assert "countersigned by" in check_heads(parse_heads(written), world.mail.roster.roster)


@pytest.mark.parametrize("phase", ["plan", "shares", "unmask", "key"])
def test_heads_go_around_once_a_round_and_not_with_every_exchange(world, phase):
    world.round("round")
    before = len(world.lines("heads"))
    downs = world.round(phase)
    assert {down.heads for down in downs.values()} == {()}
    assert len(world.lines("heads")) == before


def test_within_an_exchange_every_site_gets_the_same_list(world):
    world.round(GREET)
    down = world.round("round", between=lambda: world.mail.audit.record("started"))
    assert len({each.heads for each in down.values()}) == 1
    assert {head.name for head in down[11].heads} == {*NODES.values(), COORDINATOR}


def forged(world, name, **fields):
    """A head in the name of a site, signed by a key that is not its own."""
    head = world.sites[name].audit.head()
    wrong = partial(sign, SiteIdentity.generate(name, "bank"))
    return sign_head(wrong, name, fields.get("number", head.number), head.digest, head.at)


def test_a_head_signed_by_another_key_is_dropped_and_the_list_stays_good_for_others(world, caplog):
    world.round("round")
    good = world.sites[HARBOUR].audit.head()
    with caplog.at_level(logging.WARNING):
        world.round("round", n12={"head": forged(world, HARBOUR, number=99)})
    assert HARBOUR in caplog.text
    heads = {head.name: head for head in world.round("round")[11].heads}
    assert heads[HARBOUR].number < 99
    assert heads[HARBOUR].number >= good.number
    assert set(world.verify(BEIAN, BEIAN).countersigned) >= {RENJI, COORDINATOR}


def test_a_head_in_anothers_name_is_dropped(world):
    world.round("round", n12={"head": world.sites[BEIAN].audit.head()})
    assert {head.name for head in world.round("round")[11].heads} == {BEIAN, RENJI, COORDINATOR}


@pytest.mark.parametrize("false", [bytes(64), b"\x01" * 64])
def test_a_false_countersignature_is_dropped_and_the_others_travel(world, false):
    world.round("round")
    world.round("round", n12={"countersignature": false})
    down = world.round("round")
    assert set(down[11].countersignatures) == {BEIAN, RENJI, COORDINATOR}
    assert set(world.verify(BEIAN, BEIAN).countersigned) >= {RENJI, COORDINATOR}


def test_countersignatures_reach_a_site_that_was_not_in_the_next_exchange(world):
    world.round("round")
    lists = world.round("round")[11].heads
    world.mail.open_exchange("key")  # asked of one site alone
    decode_parcel_down(world.mail.parcel(13, None, run=RUN))
    world.mail.open_exchange("round")
    down = decode_parcel_down(world.mail.parcel(11, None, run=RUN))
    assert down.seen == lists
    assert set(down.countersignatures) == {*NODES.values(), COORDINATOR}


def test_a_countersignature_of_an_earlier_list_is_dropped(world):
    world.round("round")
    old = world.sites[HARBOUR].audit.countersign(world.sites[HARBOUR].audit.noted_heads())
    world.round("round", n12={"countersignature": old})
    assert HARBOUR not in world.round("round")[11].countersignatures


def test_a_record_with_two_histories_is_noted_and_left_out_for_the_others(world, caplog):
    world.round("round")
    world.round("round")
    forger = world.sites[HARBOUR]
    noted = next(head for head in world.mail.audit.noted_heads() if head.name == HARBOUR)
    fork = sign_head(partial(sign, forger.identity), HARBOUR, noted.number, b"\x07" * 32, NOW)
    forking = world.restarted()
    forking.open_exchange("round")
    forking.take(12, forger.parcel(head=fork))
    for node, name in ((11, BEIAN), (13, RENJI)):
        forking.take(node, world.sites[name].parcel())
    with caplog.at_level(logging.ERROR):
        forking.open_exchange("round")
    down = decode_parcel_down(forking.parcel(11, None, run=RUN))
    assert {head.name for head in down.heads} == {BEIAN, RENJI, COORDINATOR}
    assert "was at line" in caplog.text
    [line] = world.lines("fork")
    assert line.detail["shown"]["digest"] == fork.digest.hex()
    assert world.verify(COORDINATOR, COORDINATOR).forks
    forking.take(12, forger.parcel(head=fork))
    forking.open_exchange("round")
    assert HARBOUR not in {head.name for head in decode_parcel_down(forking.parcel(11, None, run=RUN)).heads}
    assert len(world.lines("fork")) == 1, "written down once"


def test_a_record_that_went_back_is_left_out(world):
    """Its number is lower, so what it showed before is what goes around: the fork shows at whoever compares."""
    world.round("round")
    early = world.sites[HARBOUR].audit.head()
    world.round("round")
    late = world.sites[HARBOUR].audit.head()
    assert late.number > early.number
    down = world.round("round", n12={"head": early})
    assert next(head for head in down[11].heads if head.name == HARBOUR) == late
    down = world.round("round", n12={"head": early})
    assert next(head for head in down[11].heads if head.name == HARBOUR).number >= late.number


def test_a_site_named_as_the_coordinator_does_not_spoil_the_list(world):
    impostor = SiteIdentity.generate(COORDINATOR, "bank")
    members = [world.sites[name].identity for name in NODES.values()]
    world.mail.roster = signed_roster(AUTHORITY, *sorted([*members, impostor], key=lambda each: each.name))
    world.mail.site_of = {**NODES, 14: COORDINATOR}.get
    head = sign_head(partial(sign, impostor), COORDINATOR, 50, bytes(32), NOW)
    world.mail.take(14, encode_parcel(ParcelUp(site=COORDINATOR, roster_digest=bytes(32), head=head)))
    down = world.round("round")
    assert [head.number for head in down[11].heads if head.name == COORDINATOR] != [50]
    assert world.round("round")[11].heads


def test_after_a_restart_the_record_goes_on_and_a_new_mail_begins_with_nothing_seen(world):
    world.round("round")
    world.round("round")
    mail = world.restarted()
    mail.open_exchange("round")
    down = decode_parcel_down(mail.parcel(11, None, run=None))
    assert (down.seen, down.countersignatures) == ((), {})
    assert [head.name for head in down.heads] == [COORDINATOR]


# parcels


def test_parcels_are_made_one_at_a_time(world, monkeypatch):
    made = []
    parcel = Mail.parcel
    monkeypatch.setattr(
        Mail, "parcel", lambda mail, node, *rest, **more: made.append(node) or parcel(mail, node, *rest, **more)
    )
    parcels = Parcels(world.mail, dict.fromkeys(NODES, b"request"), RUN, b"plan")
    assert (len(parcels), list(parcels), made) == (3, list(NODES), [])
    down = decode_parcel_down(parcels[12])
    assert (made, down.message, down.run, down.notice) == ([12], b"request", RUN, b"plan")
    with pytest.raises(KeyError):
        parcels[99]


class Conductor:
    """Asks for one exchange; refuses ``bad``."""

    def __init__(self):
        self.received, self.rejected, self.seen = [], [], None

    def play(self, nodes):
        self.seen = nodes()
        yield Exchange("round", 1, {11: b"to 11", 12: b"to 12"})

    def receive(self, node, data):
        if data == b"bad":
            raise Malformed("bad")
        self.received.append((node, data))

    def reject(self, node, error):
        self.rejected.append((node, error.code))


def test_a_runs_messages_travel_in_parcels(world):
    inner = Conductor()
    posted = Posted(RUN, inner, world.mail)
    [exchange] = posted.play(lambda: [11, 12])
    assert (exchange.phase, exchange.round, inner.seen) == ("round", 1, [11, 12])
    assert {node: decode_parcel_down(data).message for node, data in exchange.requests.items()} == {
        11: b"to 11",
        12: b"to 12",
    }
    posted.receive(11, world.sites[BEIAN].parcel(message=b"reply", verdict=Verdict(status="ready")))
    assert inner.received == [(11, b"reply")]
    assert BEIAN in world.mail.verdicts
    with pytest.raises(Malformed, match="without a message"):
        posted.receive(12, world.sites[HARBOUR].parcel())
    with pytest.raises(Malformed, match="speaks for"):
        posted.receive(12, world.sites[BEIAN].parcel(message=b"reply"))
    with pytest.raises(Malformed, match=r"^bad"):
        posted.receive(12, world.sites[HARBOUR].parcel(message=b"bad"))
    assert inner.received == [(11, b"reply")]
    posted.reject(12, Malformed("x"))
    assert inner.rejected == [(12, "Malformed")]


def test_a_greeting_goes_to_enrolled_nodes_that_are_there_and_carries_the_plan(world):
    [exchange] = Greeting(world.mail, RUN, b"plan").play(lambda: [12, 99, 11])
    assert (exchange.phase, list(exchange.requests)) == (GREET, [12, 11])
    down = decode_parcel_down(exchange.requests[11])
    assert (down.message, down.notice, down.run) == (None, b"plan", RUN)
    assert list(Greeting(world.mail).play(lambda: [99])) == []


def test_a_greeting_that_is_refused_ends_nothing(world, caplog):
    greeting = Greeting(world.mail)
    greeting.receive(11, world.sites[BEIAN].parcel(verdict=Verdict(status="ready")))
    with caplog.at_level(logging.WARNING):
        greeting.reject(12, Malformed("不懂"))
    assert "不懂" in caplog.text
    assert set(world.mail.verdicts) == {BEIAN}
