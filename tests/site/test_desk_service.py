"""The desk with the site's real service behind it: what it answers, and what its audit record says of that."""

import hashlib
import json

import pytest
from joined import OPEN_POLICY, join_all
from msgspec.structs import replace

from fedseek.daemon.parcels import ParcelDown
from fedseek.daemon.reports import MAX_TEXT, EventLog, read_events
from fedseek.messages import PlanOffer, Refused, decode_reply, encode_message
from fedseek_site.desk import Desk

BEIAN, HARBOUR, THIRD = "北岸银行", "harbour-bank", "第三银行"
RUN = "试运行-1"
DAY = 86_400


def carrying(roster, **fields):
    return ParcelDown(run=RUN, roster=roster.to_bytes(), **fields)


@pytest.fixture
def real(tmp_path, tiny_data):
    """Two banks and two hospitals with their real services."""

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

    sites = ((BEIAN, "bank"), (HARBOUR, "bank"), ("仁济医院", "hospital"), ("st-anna", "hospital"))
    made = join_all(tmp_path, sites, open_desk=open_desk)
    yield made
    made.close()


def offer(joined, admitted, **changes):
    roster = joined.roster.roster
    asked = PlanOffer(
        run=RUN, round=1, plan=admitted.canonical(), roster=roster.canonical_bytes(), make_key=False, continues=None
    )
    return encode_message(replace(asked, **changes))


def test_what_leaves_the_building_is_in_the_audit_record_with_its_digest(real, tiny_plan):
    seat, request = real.seats[BEIAN], offer(real, tiny_plan())
    first, second = (seat.send(ParcelDown(run=RUN, message=request)).message for _ in range(2))
    assert first == second
    before, again = seat.lines("answered")
    assert before.detail == {
        "run": RUN,
        "phase": "plan",
        "round": 1,
        "again": False,
        "bytes_in": len(request),
        "bytes_out": len(first),
        "request": hashlib.sha256(request).hexdigest(),
        "answer": hashlib.sha256(first).hexdigest(),
    }
    assert again.detail == {**before.detail, "again": True}
    assert [line.kind for line in seat.lines()].index("permitted") < before.number


def test_a_refusal_is_in_both_records_and_only_its_rule_leaves(real, tiny_plan):
    seat = real.seats[BEIAN]
    seat.write_policy(OPEN_POLICY.replace("max_epsilon = 8\n", "max_epsilon = 8\nmax_rounds = 1\n"))
    told = decode_reply(seat.send(ParcelDown(run=RUN, message=offer(real, tiny_plan()))).message)
    assert (told.code, told.rule) == ("PlanRefused", "limits.max_rounds: plan asks 2, allowed 1")
    [line] = seat.lines("refused")
    assert line.detail["code"] == "PlanRefused"
    assert "limits.max_rounds" in line.detail["text"]
    assert [event["code"] for event in read_events(seat.folder / "report.jsonl") if event["event"] == "refused"] == [
        "PlanRefused"
    ]


def test_a_plan_with_thousands_of_problems_still_fits_the_record(real, tiny_plan, tiny_plan_document):
    document = {**tiny_plan_document(), **{f"unknown-{n}-{'长' * 40}": 1 for n in range(1000)}}
    plan = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    seat = real.seats[BEIAN]
    request = offer(real, tiny_plan(), plan=plan)
    told = decode_reply(seat.send(ParcelDown(run=RUN, message=request)).message)
    assert isinstance(told, Refused)
    assert told.code == "InvalidPlan"
    [line] = seat.lines("refused")
    assert len(line.detail["text"]) == MAX_TEXT


def test_a_run_that_is_on_goes_on_only_with_the_roster_it_began_with(real, tiny_plan):
    seat, plan = real.seats[BEIAN], tiny_plan()
    seat.send(ParcelDown(run=RUN, message=offer(real, plan)))
    other = real.next_roster(*real.entries("st-anna"))
    up = seat.send(carrying(other, message=offer(real, plan, round=2)))
    assert decode_reply(up.message).code == "PlanRefused"
    seat.desk.service.trust(None)
    up = seat.send(ParcelDown(run=RUN, message=offer(real, plan, round=3)))
    assert decode_reply(up.message).code == "PlanRefused"
