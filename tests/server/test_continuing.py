"""A coordinator is lost with its disk: a new run goes on from the last adapter that the sites have in common."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fedseek.errors import AdapterDiverged, CohortTooSmall, InvalidPlan, PlanRefused
from fedseek.identity.roster import Roster, RosterEntry
from fedseek.messages import Continuation, PlanOffer, Refused, Standing, decode_reply, decode_request, encode_message
from fedseek_server.continuing import last_common
from fedseek_server.coordinator import Coordinator
from fedseek_site.continuing import continue_run, standing_of
from fedseek_site.service import stop

LOST, NEW = "试运行-1", "接续-1"
ANNA, RENJI, HARBOUR, BEIAN = "st-anna", "仁济医院", "harbour-bank", "北岸银行"
EXCHANGES = [
    ("plan", 1),
    ("shares", 1),
    ("round", 1),
    ("unmask", 1),
    ("round", 2),
    ("unmask", 2),
    ("close", 3),
    ("release", 3),
]
SOONEST = 2  # in rounds: a new run begins at most this far behind what a site has trained


class Lost(Exception):
    """The coordinator is gone, and its disk with it."""


def lose(cohort, where, *, half):
    """The coordinator is lost in the exchange ``where``, when half of the sites have answered, or all."""
    answered = []

    def count(phase, number, site, answer):
        answered.extend([site] if (phase, number) == where else [])
        if len(answered) == (2 if half else 4):
            raise Lost
        return answer

    with pytest.raises(Lost):
        cohort.play(reply=count)


def last_applied_by_all(phase, number, *, half):
    """By hand: the sum of a round comes with the update of the next."""
    if phase in ("round", "close"):
        return max(number - (2 if half else 1), 0)
    return {"plan": 0, "shares": 0, "unmask": number - 1, "release": 2}[phase]


def standings(cohort):
    found = {service.identity.name: service.standing() for service in cohort.services.values()}
    return {name: standing for name, standing in found.items() if standing is not None}


def go_on(cohort, *, run=NEW, of=LOST, plan=None):
    """A new coordinator, with an empty disk, takes the run up."""
    lost = cohort.coordinator
    continues = last_common(standings(cohort), of, lost.roster)
    told = cohort.events["coordinator"].append
    cohort.coordinator = Coordinator(plan or lost.plan, lost.roster, run=run, observe=told, continues=continues)
    return continues


def statements(cohort):
    return {site: json.loads(each.statement) for site, each in cohort.coordinator.approvals.items()}


def check_release(cohort):
    assert sorted(cohort.coordinator.approvals) == sorted((ANNA, RENJI, HARBOUR, BEIAN))
    assert len({each.digests["global"] for each in cohort.coordinator.approvals.values()}) == 1
    assert {each.run for each in cohort.coordinator.approvals.values()} == {NEW}
    for statement in statements(cohort).values():
        assert statement["run"] == NEW


WHERE = [(where, half) for where in EXCHANGES for half in (False, True) if (where, half) != (("plan", 1), True)]
FAST = {(("round", 1), True), (("round", 2), True), (("close", 3), True), (("release", 3), True)}


@pytest.mark.parametrize(
    ("where", "half"), [pytest.param(*each, marks=[] if each in FAST else [pytest.mark.slow]) for each in WHERE]
)
def test_wherever_the_coordinator_is_lost_the_run_goes_on_and_releases(make_cohort, where, half):
    cohort = make_cohort(private=True)
    lose(cohort, where, half=half)
    before = {name: cohort.events[name].copy() for name in cohort.events}
    for name in (ANNA, RENJI):
        cohort.restart(name)
    continues = go_on(cohort)
    assert continues == Continuation(run=LOST, round=last_applied_by_all(*where, half=half))
    cohort.play()
    check_release(cohort)
    assert cohort.coordinator.contributors == tuple(cohort.coordinator.roster.names)
    for name, statement in statements(cohort).items():
        trained = [event for event in before[name] if event["event"] == "round"]
        again = [event for event in cohort.events[name][len(before[name]) :] if event["event"] == "round"]
        resting = [event for event in cohort.events[name] if event["event"] == "plan-spent"]
        assert statement["stages"][0]["num_steps"] == 2 * (len(trained) + len(again) - len(resting)) == 4
        assert statement["epsilon"] <= 8.0, "what was trained stays spent, and no more is trained than the plan has"
        assert len(resting) <= SOONEST


def test_a_continued_run_is_lost_too_and_goes_on_from_there(make_cohort):
    cohort = make_cohort()
    lose(cohort, ("round", 2), half=True)
    assert go_on(cohort, run="second").round == 0
    cohort.play(until=("round", 2))
    assert go_on(cohort, of=LOST) == Continuation(run=LOST, round=0), "named by any run before it"
    cohort.play(until=("close", 3))
    assert standings(cohort)[ANNA].runs == (NEW, "second", LOST)
    assert go_on(cohort, run="fourth", of="second") == Continuation(run="second", round=1)
    cohort.play()
    assert len(cohort.coordinator.approvals) == 4


def test_sites_that_went_on_no_longer_answer_in_the_run_that_was_lost(make_cohort):
    cohort = make_cohort()
    exchange = cohort.play(until=("unmask", 1))
    go_on(cohort)
    cohort.play(until=("shares", 1))
    for node, service in cohort.services.items():
        reply = decode_reply(service.handle(exchange.requests[node]))
        assert (type(reply), reply.code) == (Refused, "WrongRound")


def test_nothing_of_the_lost_run_is_used_again(make_cohort):
    """Each key, share, box and envelope of the new run is another one than in the old run for the same round."""
    cohort = make_cohort()
    lose(cohort, ("round", 2), half=True)
    old = {reply.keys for reply in map(decode_reply, cohort.seen[1::2]) if hasattr(reply, "model_sha256")}
    cohort.seen.clear()
    go_on(cohort)
    cohort.play()
    new = {reply.keys for reply in map(decode_reply, cohort.seen[1::2]) if hasattr(reply, "model_sha256")}
    assert len(old) == len(new) == 4
    assert not {each.mask_key for keys in old for each in keys} & {each.mask_key for keys in new for each in keys}


def test_a_site_that_holds_another_round_or_plan_refuses_with_the_rule(make_cohort):
    cohort = make_cohort()
    lose(cohort, ("unmask", 2), half=False)
    offer = decode_request(encode_message(offer_of(cohort, Continuation(run=LOST, round=1))))
    cases = {
        "asked to go on from round 2, this site holds the adapter after [0, 1]": Continuation(run=LOST, round=2),
        "this site is not in the run that is to be gone on from": Continuation(run="another", round=1),
    }
    for rule, continues in cases.items():
        assert rule_of(cohort, replace(offer, continues=continues, round=continues.round + 1)) == rule
    rule = "the run to be gone on from has another plan or roster"
    assert rule_of(cohort, replace(offer, plan=offer.plan.replace(b'"tiny"', b'"tinz"'))) == rule
    assert rule_of(cohort, offer) is None


def offer_of(cohort, continues):
    plan, roster = cohort.coordinator.plan, cohort.coordinator.roster
    return PlanOffer(
        run=NEW,
        round=continues.round + 1,
        plan=plan.canonical(),
        roster=roster.canonical_bytes(),
        make_key=False,
        continues=continues,
    )


def rule_of(cohort, offer):
    reply = decode_reply(cohort.site(ANNA).handle(encode_message(offer)))
    return reply.rule if isinstance(reply, Refused) else None


def test_a_site_where_a_sum_did_not_pass_offers_nothing_and_does_not_go_on(make_cohort):
    cohort = make_cohort()
    lose(cohort, ("unmask", 2), half=False)
    run, state = cohort.site(ANNA)._latest()
    assert standing_of(ANNA, run, state) == cohort.site(ANNA).standing()
    assert standing_of(ANNA, run, stop(state)) is None
    with pytest.raises(PlanRefused, match="was stopped at this site: a sum did not pass"):
        continue_run(ANNA, offer_of(cohort, Continuation(run=LOST, round=1)), run, stop(state))


def test_a_contributor_that_is_not_there_stops_the_new_run_before_anything_is_trained(make_cohort):
    cohort = make_cohort()
    lose(cohort, ("close", 3), half=False)
    go_on(cohort)
    with pytest.raises(CohortTooSmall, match=f"updates of {ANNA} are in the adapter"):
        cohort.play(away=lambda phase, number, site: site == ANNA)


def test_a_site_that_cannot_go_on_and_is_in_no_sum_is_left_out(make_cohort):
    cohort = make_cohort()
    cohort.play(until=("close", 3), away=lambda phase, number, site: site == ANNA)
    assert ANNA not in standings(cohort)
    assert go_on(cohort).round == 1
    cohort.play()
    declined = [event for event in cohort.events["coordinator"] if event["event"] == "declined"]
    assert {(event["site"], event["rule"]) for event in declined} == {
        (ANNA, "this site is not in the run that is to be gone on from")
    }
    assert sorted(cohort.coordinator.approvals) == sorted((RENJI, HARBOUR, BEIAN))


def test_a_run_cannot_go_on_from_beyond_its_plan(make_cohort):
    cohort = make_cohort()
    with pytest.raises(InvalidPlan, match="goes on from round 3"):
        Coordinator(
            cohort.coordinator.plan,
            cohort.coordinator.roster,
            run=NEW,
            observe=print,
            continues=Continuation(run=LOST, round=3),
        )


# --- which adapter -------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")
ROSTER = Roster.of(
    RosterEntry(name, "bank", bytes([place]) * 32, bytes([place]) * 1216) for place, name in enumerate(NAMES)
)


def stands(site, newest, *, contributors=NAMES, runs=(LOST,), digest=b"", roster=ROSTER):
    rounds = [newest, newest - 1] if newest else [0]
    return Standing(
        site=site,
        runs=runs,
        plan_digest="ab" * 32,
        roster_digest=roster.digest(),
        adapters={number: {"global": (digest or bytes([number])) * 32} for number in rounds},
        contributors={number: contributors if number else () for number in rounds},
    )


def common(*each, run=LOST):
    return last_common({standing.site: standing for standing in each}, run, ROSTER)


@given(st.integers(0, 9), st.lists(st.booleans(), min_size=4, max_size=4))
def test_with_sites_one_round_apart_the_lower_one_is_common(base, ahead):
    found = common(*(stands(name, base + is_ahead) for name, is_ahead in zip(NAMES, ahead, strict=True)))
    assert found.round == base + all(ahead)


def test_a_contributor_that_is_behind_or_away_is_named():
    with pytest.raises(CohortTooSmall, match="a holds that after round 5, b holds that after round 5, c holds"):
        common(stands("a", 5), stands("b", 5), stands("c", 5), stands("d", 3))
    with pytest.raises(CohortTooSmall, match="d is not there"):
        common(stands("a", 5), stands("b", 5), stands("c", 5))


def test_a_site_that_is_behind_and_in_no_sum_is_left_out():
    in_it = ("a", "b", "c")
    found = common(*(stands(name, 5, contributors=in_it) for name in in_it), stands("d", 1, contributors=in_it))
    assert found.round == 5


def test_nobody_knows_the_run_or_all_have_another_roster():
    with pytest.raises(CohortTooSmall, match="no site that is connected is in run 'other'"):
        common(stands("a", 5), run="other")
    other = Roster.of(RosterEntry(name, "bank", b"o" * 32, b"s" * 1216) for name in NAMES[:1])
    with pytest.raises(CohortTooSmall, match="with this roster"):
        common(stands("a", 5, roster=other))


def test_tensors_that_differ_are_refused_with_two_names():
    with pytest.raises(AdapterDiverged, match="after round 5 site 'c' holds other values of 'global' than site 'a'"):
        common(stands("a", 5), stands("b", 5), stands("c", 5, digest=b"x"), stands("d", 5))
