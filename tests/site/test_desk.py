"""What a site does with what comes around a message, and what it tells back; its folder, policy and record are real."""

import hashlib
import logging
from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolled import NOW, public_bytes
from joined import COORDINATOR, OPEN_POLICY, REFUSAL, join_all
from msgspec.structs import replace

from fedseek.daemon.audit_check import verify_audit
from fedseek.daemon.audit_lines import heads_digest, sign_head, verify_head
from fedseek.daemon.parcels import ParcelDown, encode_parcel
from fedseek.errors import AuditBroken, JournalUnusable, Malformed, NotNow, PlanRefused
from fedseek.identity.enrolment import check_renewal, parse_renewal
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signed_roster import parse_signed_roster
from fedseek.identity.signing import CONTEXT_HEADS_SEEN, sign, sign_with, verify_with

BEIAN, HARBOUR, THIRD = "北岸银行", "harbour-bank", "第三银行"
RUN = "试运行-1"
DAY = 86_400


@pytest.fixture
def joined(tmp_path):
    made = join_all(tmp_path)
    yield made
    made.close()


@pytest.fixture
def seat(joined):
    return joined.seats[BEIAN]


def carrying(roster, **fields):
    return ParcelDown(run=RUN, roster=roster.to_bytes(), **fields)


# messages


def test_a_message_goes_to_the_service_and_its_answer_comes_back_with_where_the_site_stands(joined, seat):
    up = seat.send(ParcelDown(run=RUN, message=b"request"))
    assert up.message == f"{BEIAN} answers request".encode()
    assert (up.site, up.roster_digest) == (BEIAN, joined.roster.digest())
    assert (up.verdict, up.renewal, up.countersignature) == (None, None, None)
    assert up.head == seat.desk.audit.head()
    verify_head(up.head, seat.desk.site.identity.public().signing_key)


def test_a_greeting_asks_the_service_nothing_and_drops_what_is_old(seat, monkeypatch):
    pruned = []
    monkeypatch.setattr(type(seat.desk.audit), "prune", lambda audit: pruned.append(1))
    assert seat.send(ParcelDown(run=RUN, message=b"m")).message is not None
    assert pruned == []
    assert seat.send(ParcelDown()).message is None
    assert (seat.desk.service.asked, pruned) == ([b"m"], [1])


@pytest.mark.parametrize("data", [b"", b"\xc1", encode_parcel(ParcelDown(message=b"m"))[:-1]])
def test_what_is_no_parcel_is_refused_before_anything_is_done(seat, data):
    before = seat.desk.audit.head()
    with pytest.raises(Malformed):
        seat.desk.handle(data)
    assert (seat.desk.service.asked, seat.desk.audit.head()) == ([], before)


# rosters


def test_a_newer_roster_of_the_authority_is_trusted_and_what_changed_is_written_down(joined, seat):
    new_site, renewed = (SiteIdentity.generate(name, "bank").public() for name in ("新银行", HARBOUR))
    roster = joined.next_roster(*joined.entries(HARBOUR, THIRD), new_site, renewed)
    up = seat.send(carrying(roster, message=b"m"))
    assert up.roster_digest == roster.digest()
    assert up.message is not None
    assert seat.desk.service.trusted == seat.desk.site.trusted == roster.roster
    assert seat.changed == []
    [line] = seat.lines("roster-taken")
    assert line.detail == {
        "number": 2,
        "digest": roster.digest().hex(),
        "added": ["新银行"],
        "removed": [THIRD],
        "renewed": [HARBOUR],
    }
    assert parse_signed_roster((seat.folder / "roster.json").read_bytes(), authority=public_bytes(joined.key)) == roster


def test_the_roster_that_is_held_changes_nothing(joined, seat):
    before = seat.desk.audit.head()
    assert seat.send(carrying(joined.roster)).roster_digest == joined.roster.digest()
    assert seat.desk.audit.head() == before


REFUSED = {
    "signed by another key": (
        lambda joined: joined.next_roster(*joined.entries(), key=Ed25519PrivateKey.generate()).to_bytes(),
        "WrongKey",
    ),
    "older": (lambda joined: joined.next_roster(*joined.entries(), number=-1).to_bytes(), "WrongRound"),
    "another of the same number": (
        lambda joined: joined.next_roster(*joined.entries(), number=0).to_bytes(),
        "CustodyError",
    ),
    "altered": (
        lambda joined: replace(joined.next_roster(*joined.entries()), number=9).to_bytes(),
        "WrongKey",
    ),
    "keys that this site never made": (
        lambda joined: joined.next_roster(
            *joined.entries(BEIAN), SiteIdentity.generate(BEIAN, "bank").public()
        ).to_bytes(),
        "WrongKey",
    ),
    "no roster": (lambda joined: b"{}", "Malformed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_roster_is_refused_written_down_and_the_message_answered_all_the_same(joined, seat, case):
    make, code = REFUSED[case]
    offered = make(joined)
    up = seat.send(ParcelDown(run=RUN, roster=offered, message=b"m"))
    assert up.roster_digest == joined.roster.digest()
    assert up.message is not None
    assert seat.desk.service.trusted == joined.roster.roster
    [line] = seat.lines("roster-refused")
    assert (line.detail["code"], line.detail["sha256"]) == (code, hashlib.sha256(offered).hexdigest())
    assert seat.lines("roster-taken") == []
    seat.close()
    assert joined.sit(BEIAN).desk.site.signed_roster == joined.roster


def test_a_site_taken_off_the_roster_takes_part_in_nothing_from_the_same_parcel_on(joined, seat, caplog):
    roster = joined.next_roster(*joined.entries(BEIAN))
    with caplog.at_level(logging.ERROR):
        up = seat.send(carrying(roster, message=b"m"))
    assert seat.desk.service.trusted is None
    assert up.message == REFUSAL, "the message that came with it, too"
    assert seat.changed == [BEIAN]
    assert (seat.desk.site.member, up.renewal) == (None, None)
    assert "taken off the roster" in caplog.text
    assert seat.lines("roster-taken")[0].detail["removed"] == [BEIAN]
    seat.close()
    assert joined.sit(BEIAN).desk.service.trusted is None


# renewal of keys


def due(joined):
    joined.now = NOW + 60 * DAY


def test_new_keys_are_offered_when_a_third_of_their_life_is_left_and_the_same_ones_again(joined, seat):
    joined.now = NOW + 60 * DAY - 1
    assert seat.send(ParcelDown()).renewal is None
    due(joined)
    first, second = (parse_renewal(seat.send(ParcelDown()).renewal) for _ in range(2))
    assert first.request.entry == second.request.entry
    assert first.request.entry != seat.desk.site.identity.public()
    check_renewal(first, joined.roster.member(BEIAN).entry)
    [line] = seat.lines("key-announced")
    assert line.detail == {"public_key": first.request.entry.signing_key.hex()}


def test_once_the_roster_lists_the_new_keys_the_site_starts_over_with_them_and_its_record_goes_on(joined, seat):
    due(joined)
    old = seat.desk.site.identity.public()
    new = parse_renewal(seat.send(ParcelDown()).renewal).request.entry
    roster = joined.next_roster(*joined.entries(BEIAN), new)
    up = seat.send(carrying(roster, message=b"m"))
    assert seat.changed == [BEIAN]
    assert up.renewal is None
    assert up.message == REFUSAL, "nothing is done with the old keys any more"
    seat.close()
    again = joined.sit(BEIAN)
    assert again.desk.site.identity.public() == new
    assert again.desk.service.trusted == roster.roster
    assert again.send(ParcelDown()).renewal is None
    report = verify_audit(again.folder / "audit", public_key=new.signing_key, name=BEIAN)
    assert report.keys == (old.signing_key.hex(), new.signing_key.hex())
    assert [line.kind for line in again.lines()] == ["begun", "key-announced", "roster-taken", "key-taken", "ledger"]


def test_a_roster_with_anothers_new_keys_does_not_make_this_site_start_over(joined, seat):
    due(joined)
    entry = parse_renewal(joined.seats[HARBOUR].send(ParcelDown()).renewal).request.entry
    seat.send(carrying(joined.next_roster(*joined.entries(HARBOUR), entry)))
    assert seat.changed == []
    assert seat.desk.service.trusted is not None


# what the site will say to a plan


def ask(seat, plan, run=RUN):
    return seat.send(ParcelDown(run=run, notice=plan.canonical())).verdict


def test_a_plan_announced_is_ready_waits_for_people_or_is_refused_by_a_rule(seat, tiny_plan):
    plan = tiny_plan(kinds={"bank": {"labels": ["欺诈", "正常"]}})
    assert (ask(seat, plan).status, ask(seat, plan).rule) == ("ready", "")
    seat.desk.permission.pause()
    assert (ask(seat, plan).status, ask(seat, plan).rule) == ("waiting", "paused by the operator")
    seat.desk.permission.resume()
    seat.write_policy(OPEN_POLICY.replace("allow_without_privacy = true", "allow_without_privacy = false"))
    told = ask(seat, plan)
    assert told.status == "refused"
    assert told.rule.startswith("limits.allow_without_privacy")
    assert [each.plan for each in seat.desk.permission.approvals.noticed()] == [plan], "to be looked at by people"


def test_a_plan_that_cannot_be_read_is_refused_without_a_word_of_what_is_in_it(seat):
    told = seat.send(ParcelDown(run=RUN, notice=b'{"name":"geheim"}')).verdict
    assert (told.status, told.rule) == ("refused", "the plan cannot be used here (InvalidPlan)")


def test_a_roster_with_expired_keys_is_refused_by_name(joined, seat, tiny_plan):
    joined.now = NOW + 90 * DAY
    told = ask(seat, tiny_plan())
    assert told.status == "refused"
    assert told.rule == f"roster: keys of {HARBOUR}, {BEIAN}, {THIRD} have expired"


def test_a_rule_is_cut_to_what_a_parcel_takes(joined, seat, tiny_plan):
    entries = [SiteIdentity.generate(f"{n}" + "长" * 60, "bank").public() for n in range(5)]
    seat.send(carrying(joined.next_roster(*joined.entries(), *entries)))
    joined.now = NOW + 90 * DAY
    assert len(ask(seat, tiny_plan()).rule) == 200


def test_before_a_run_expired_keys_refuse_and_between_rounds_they_do_not_end_it(joined, seat, tiny_plan):
    plan, roster = tiny_plan(), joined.roster.roster
    seat.desk.permit(RUN, "plan", plan, roster)
    joined.now = NOW + 90 * DAY
    with pytest.raises(PlanRefused, match="have expired") as refused:
        seat.desk.permit("another", "plan", plan, roster)
    assert refused.value.rule.startswith("roster: keys of")
    seat.desk.permit(RUN, "round", plan, roster)


def test_a_run_or_a_round_is_permitted_by_the_policy_or_not(joined, seat, tiny_plan):
    plan, roster = tiny_plan(), joined.roster.roster
    seat.write_policy(OPEN_POLICY.replace("min_sites = 2", "min_sites = 9"))
    with pytest.raises(PlanRefused) as refused:
        seat.desk.permit(RUN, "plan", plan, roster)
    assert refused.value.rule.startswith("required.min_sites")
    seat.write_policy(OPEN_POLICY)
    seat.desk.permit(RUN, "plan", plan, roster)
    seat.desk.permission.pause()
    with pytest.raises(NotNow) as later:
        seat.desk.permit(RUN, "round", plan, roster)
    assert later.value.rule == "paused by the operator"
    assert [line.kind for line in seat.lines()] == ["begun", "refused-by-policy", "permitted", "paused", "put-off"]


# heads of audit records


def heads_of(joined):
    return (*(seat.desk.audit.head() for seat in joined.seats.values()), joined.audit.head())


def test_heads_are_written_down_and_countersigned(joined, seat):
    heads = heads_of(joined)
    up = seat.send(ParcelDown(run=RUN, heads=heads))
    noted = seat.desk.audit.noted_heads()
    assert sorted(noted, key=lambda head: head.name) == sorted(heads, key=lambda head: head.name)
    key = seat.desk.site.identity.public().signing_key
    verify_with(key, CONTEXT_HEADS_SEEN, heads_digest(heads), up.countersignature, who=BEIAN)


def test_what_others_countersigned_is_kept_and_what_is_false_is_not(joined, seat):
    heads = heads_of(joined)
    countersignatures = {
        name: each.send(ParcelDown(run=RUN, heads=heads)).countersignature for name, each in joined.seats.items()
    }
    seat.send(ParcelDown(run=RUN, seen=heads, countersignatures={**countersignatures, HARBOUR: bytes(64)}))
    assert seat.lines("countersigned") == []
    seat.send(ParcelDown(run=RUN, seen=heads, countersignatures=countersignatures))
    [line] = seat.lines("countersigned")
    assert set(line.detail["signatures"]) == set(joined.seats)


def test_countersignatures_of_a_list_that_this_site_never_saw_are_passed_over(joined, seat):
    heads = heads_of(joined)
    told = {HARBOUR: joined.seats[HARBOUR].send(ParcelDown(run=RUN, heads=heads)).countersignature}
    assert seat.send(ParcelDown(run=RUN, message=b"m", seen=heads, countersignatures=told)).message is not None
    assert seat.send(ParcelDown(run=RUN, message=b"m", seen=(), countersignatures=told)).message is not None
    assert seat.lines("countersigned") == []


def test_a_contradiction_is_written_down_and_not_countersigned(joined, seat, caplog):
    seat.send(ParcelDown(run=RUN, heads=heads_of(joined)))
    own = partial(sign_with, joined.coordinator_key)
    forked = sign_head(own, COORDINATOR, joined.audit.head().number, b"\x07" * 32, NOW)
    up = seat.send(ParcelDown(run=RUN, heads=(forked,), message=b"m"))
    assert up.countersignature is None
    assert up.message is not None, "the run is not the place to stop it"
    assert seat.lines("fork")[0].detail["shown"]["digest"] == forked.digest.hex()


@pytest.mark.parametrize("who", [COORDINATOR, HARBOUR, "a stranger"])
def test_heads_signed_by_others_than_they_name_are_not_countersigned(joined, seat, who):
    false = sign_head(partial(sign, SiteIdentity.generate("x", "bank")), who, 1, bytes(32), NOW)
    before = seat.desk.audit.head()
    assert seat.send(ParcelDown(run=RUN, heads=(false,))).countersignature is None
    assert seat.desk.audit.head() == before


# a record that cannot be written


def test_where_nothing_can_be_written_down_nothing_happens(joined, seat):
    file = next((seat.folder / "audit").glob("*.jsonl"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises((AuditBroken, JournalUnusable)):
        seat.send(carrying(joined.next_roster(*joined.entries(THIRD)), message=b"m"))
    assert seat.desk.service.asked == []
