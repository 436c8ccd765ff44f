"""Coordinator and sites talk for a whole run in one process: what travels around the messages, and who keeps what."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from enrolled import NOW, public_bytes
from joined import COORDINATOR, Joined, join_all

from fedseek.daemon.audit_check import heads_kept_by, verify_audit
from fedseek.daemon.parcels import decode_parcel_up
from fedseek.daemon.reports import EventLog
from fedseek.errors import AuditBroken, CustodyError, MessageError
from fedseek.identity.enrolment import parse_renewal
from fedseek_server.coordinator import Coordinator
from fedseek_server.mail import Greeting, Mail, Posted
from fedseek_site.desk import Desk

SITES = (("北岸银行", "bank"), ("harbour-bank", "bank"), ("仁济医院", "hospital"), ("st-anna", "hospital"))
RUN = "试运行-1"
Away = Callable[[str, int, str], bool]


@dataclass
class Network:
    """Carries parcels between a conductor and the desks, as the driver and the couriers do."""

    joined: Joined
    mail: Mail = field(init=False)

    def __post_init__(self) -> None:
        self.nodes = {100 + place: name for place, name in enumerate(self.joined.seats)}
        self.new_mail()

    def new_mail(self) -> None:
        self.mail = Mail(self.joined.roster, self.nodes.get, self.joined.audit)

    def drive(self, conductor, away: Away = lambda phase, number, site: False) -> None:
        for exchange in conductor.play(lambda: list(self.nodes)):
            for node in exchange.requests:
                name = self.nodes[node]
                if away(exchange.phase, exchange.round, name):
                    continue
                answer = self.joined.seats[name].desk.handle(exchange.requests[node])
                decode_parcel_up(answer)
                try:
                    conductor.receive(node, answer)
                except (MessageError, CustodyError) as error:
                    conductor.reject(node, error)

    def greet(self, plan=None) -> None:
        self.drive(Greeting(self.mail, RUN, plan.canonical()) if plan else Greeting(self.mail))

    def keys(self) -> dict[str, bytes]:
        keys = {name: seat.desk.site.identity.public().signing_key for name, seat in self.joined.seats.items()}
        return {**keys, COORDINATOR: public_bytes(self.joined.coordinator_key)}

    def folder(self, name: str):
        return self.joined.folder / (f"{name}/audit" if name in self.joined.seats else "coordinator-audit")

    def verify(self) -> dict:
        """Every record, checked with all keys, and against the heads that all others keep of it."""
        keys = self.keys()
        return {
            name: verify_audit(
                self.folder(name),
                public_key=keys[name],
                name=name,
                others=keys,
                heads=[head for other in keys if other != name for head in heads_kept_by(self.folder(other), name)],
            )
            for name in keys
        }


@pytest.fixture
def real_desks(tmp_path, tiny_data):
    def open_desk(site, permission, audit, changed):
        folder = site.folder
        return Desk.open(
            site,
            permission,
            audit,
            changed,
            report=EventLog(folder / "report.jsonl"),
            data=tiny_data(site.identity.kind),
            state=folder / "state",
            release=folder / "release",
        )

    made = join_all(tmp_path, SITES, open_desk=open_desk)
    yield Network(made)
    made.close()


@pytest.fixture
def desks(tmp_path):
    made = join_all(tmp_path, SITES)
    yield Network(made)
    made.close()


def test_a_whole_run_is_in_all_records_and_everybody_keeps_everybodys_heads(real_desks, tiny_plan):
    network, plan = real_desks, tiny_plan(training={"rounds": 3})
    names = {name for name, _ in SITES}
    network.greet(plan)
    assert {name: verdict.status for name, verdict in network.mail.verdicts.items()} == dict.fromkeys(names, "ready")
    assert all(network.mail.holds_roster(name) for name in names)
    told: list[dict] = []
    coordinator = Coordinator(plan, network.mail.roster.roster, run=RUN, observe=told.append)
    network.drive(
        Posted(RUN, coordinator, network.mail),
        away=lambda phase, number, site: (phase, number, site) == ("round", 1, "st-anna"),
    )
    assert set(coordinator.approvals) == names
    assert [event["site"] for event in told if event["event"] == "dropout"] == ["st-anna"]
    for name, report in network.verify().items():
        assert set(report.heads_seen) == {*names, COORDINATOR} - {name}
        assert set(report.countersigned) >= {*names, COORDINATOR} - {name}, name
        assert (report.forks, report.unchecked) == ((), ()), name
    for name, seat in network.joined.seats.items():
        kinds = [line.kind for line in seat.lines()]
        assert kinds.count("spent") == (1 if name == "st-anna" else 3), name  # it is back in round 3
        assert {"permitted", "answered", "applied", "released"} <= set(kinds)
        assert "refused" not in kinds
        assert kinds.count("ledger") == kinds.count("spent"), name  # nothing was entered when these daemons started
        account = seat.desk.permission.ledger.account()
        assert (sum(1 for _ in account.spends()), account.ended) == (kinds.count("spent"), {RUN}), name
    standings = network.mail.standings
    assert {each.runs[0] for each in standings.values()} == {RUN}


def test_a_record_that_is_cut_is_found_by_what_the_others_keep(desks):
    network = desks
    for _ in range(3):
        network.greet()
    [file] = network.folder("st-anna").glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    file.write_bytes(b"".join(lines[:2]))
    with pytest.raises(AuditBroken, match="the end was cut"):
        network.verify()


def test_keys_are_renewed_over_the_parcels_and_nobody_does_anything_by_hand(desks):
    network, joined = desks, desks.joined
    network.greet()
    joined.now = NOW + 61 * 86_400
    network.greet()
    assert set(network.mail.renewals) == set(joined.seats)
    entries = [parse_renewal(renewal).request.entry for renewal in network.mail.renewals.values()]
    joined.roster = joined.next_roster(*entries)
    network.new_mail()
    network.greet()
    assert all(seat.changed == [name] for name, seat in joined.seats.items())
    for name, seat in list(joined.seats.items()):
        seat.close()
        joined.sit(name)
    for _ in range(3):
        network.greet()
    assert network.mail.renewals == {}
    reports = network.verify()
    for name in joined.seats:
        assert len(reports[name].keys) == 2
        assert set(reports[name].countersigned) >= {*joined.seats, COORDINATOR} - {name}
        assert reports[name].forks == ()


def test_a_site_whose_record_began_anew_is_told_so_by_what_the_others_keep(desks):
    network, joined = desks, desks.joined
    for _ in range(3):
        network.greet()
    seat = joined.seats["st-anna"]
    seat.close()
    for file in (seat.folder / "audit").glob("*"):
        file.unlink()
    again = joined.sit("st-anna")
    network.greet()
    assert len(again.lines("fork")) == 1
    assert all(joined.seats[name].lines("fork") == [] for name, _ in SITES[:3]), "an older head goes to nobody"
    with pytest.raises(AuditBroken, match="there are two records"):
        network.verify()
