"""What a site is told of the rounds before: announcements and sums that differ from what it knows are not applied."""

import pytest
from msgspec.structs import replace

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.he.ciphertext import ScopedSum
from fedseek.messages import AggregateDown, UpdateReply

ME, PEER, OTHER, LAST_SITE = "仁济医院", "北岸银行", "harbour-bank", "st-anna"
SITES_OF_FIVE = ((PEER, "bank"), (OTHER, "bank"), ("third-bank", "bank"), (ME, "hospital"), (LAST_SITE, "hospital"))


@pytest.fixture(scope="module")
def at_round_2(make_desk):
    """All four took part in round 1; this site is about to get its sum."""
    desk = make_desk()
    return desk, desk.play(until=("round", 2))[ME]


@pytest.fixture(scope="module")
def dropped_once(make_desk):
    """This site's update of round 1 was lost on its way, so that the sum is that of the other three."""
    desk = make_desk(training={"rounds": 3})
    taken = desk.take

    def lose_one(site, reply):
        if not (isinstance(reply, UpdateReply) and (site, reply.round) == (ME, 1)):
            taken(site, reply)

    desk.take = lose_one
    return desk, desk.play(until=("round", 3))[ME]


def refused(desk, request):
    before = desk.state(ME).to_bytes()
    code = desk.code(ME, request)
    assert desk.state(ME).to_bytes() == before, "nothing is applied"
    return code, desk.text(ME)


def told(request, **changes):
    """The request with another announcement of its last round."""
    *earlier, last = request.previous
    return replace(request, previous=(*earlier, replace(last, **changes)))


def names(desk, *wanted):
    return desk.federation.positions(wanted)


def with_sum(request, scope, alter):
    return told(request, sums=tuple(alter(each) if each.scope == scope else each for each in request.previous[-1].sums))


def of_sites(desk, *sites):
    """The sum of round 1 over some of its updates, still masked: what a coordinator has without anybody's help."""
    expected = {"global": 1, "kind/hospital": 1, "kind/bank": 1}
    aggregate = agg_init(desk.plan.packing.params, expected, max_sites=4)
    for site in sites:
        agg_update(aggregate, desk.updates[1][site].update)
    return agg_finish(aggregate, min_sites=1, scopes=["global", "kind/hospital"])


ROUND_2 = {
    "no-sum": (lambda d, r: replace(r, previous=()), "WrongRound", "got the sums of rounds [], wanted those of [1]"),
    "the-wrong-round": (lambda d, r: told(r, round=2), "WrongRound", "wanted those of [1]"),
    "twice": (lambda d, r: replace(r, previous=r.previous * 2), "WrongRound", "wanted those of [1]"),
    "ahead": (
        lambda d, r: replace(r, previous=(*r.previous, replace(r.previous[0], round=2))),
        "WrongRound",
        "rounds [1, 2], wanted those of [1]",
    ),
    "too-few-survivors": (lambda d, r: told(r, survivors=names(d, ME, PEER)), "CohortTooSmall", "2 sites are in it"),
    "other-survivors-than-revealed-for": (
        lambda d, r: told(r, survivors=names(d, ME, PEER, LAST_SITE)),
        "WrongRound",
        "this site revealed shares for",
    ),
    "survivors-beyond-the-roster": (lambda d, r: told(r, survivors=(0, 1, 2, 4)), "Malformed", "positions"),
    "old-epoch": (
        lambda d, r: told(r, epoch=7),
        "WrongKey",
        "epoch 7, this site encrypted under that of epoch 0",
    ),
    "given-up-with-sums": (lambda d, r: told(r, survivors=()), "Malformed", "comes with sums"),
    "a-scope-less": (
        lambda d, r: told(r, sums=r.previous[0].sums[:1]),
        "Malformed",
        "wanted ['global', 'kind/hospital']",
    ),
    "no-scopes": (lambda d, r: told(r, sums=()), "Malformed", "got scopes []"),
    "a-scope-twice": (lambda d, r: told(r, sums=r.previous[0].sums * 2), "Malformed", "got scopes"),
    "anothers-scope": (lambda d, r: told(r, sums=d.downs[1].sums), "Malformed", "kind/bank"),
    "a-count-less": (
        lambda d, r: with_sum(r, "global", lambda s: ScopedSum(s.scope, 3, s.ciphertexts)),
        "Malformed",
        "announced 4 sites and counted 3, it holds 4",
    ),
    "no-ciphertexts": (
        lambda d, r: with_sum(r, "global", lambda s: ScopedSum(s.scope, 4, ())),
        "Malformed",
        "got 0 ciphertexts",
    ),
    "cut-short": (
        lambda d, r: with_sum(r, "global", lambda s: ScopedSum(s.scope, 4, (s.ciphertexts[0][:-1],))),
        "Malformed",
        "",
    ),
    "still-masked": (lambda d, r: told(r, sums=of_sites(d, ME, PEER, OTHER, LAST_SITE)[:2]), "Tampered", "its tags"),
    "one-site-alone": (
        lambda d, r: told(
            r,
            sums=tuple(ScopedSum(s.scope, len(d.federation.members(s.scope)), s.ciphertexts) for s in of_sites(d, ME)),
        ),
        "Tampered",
        "its tags",
    ),
    "scopes-swapped": (
        lambda d, r: told(
            r,
            sums=tuple(
                ScopedSum(s.scope, s.contributors, t.ciphertexts)
                for s, t in zip(r.previous[0].sums, reversed(r.previous[0].sums), strict=True)
            ),
        ),
        "Tampered",
        "its tags",
    ),
}


@pytest.mark.parametrize(("alter", "code", "text"), ROUND_2.values(), ids=ROUND_2)
def test_a_sum_that_is_not_what_it_should_be_is_not_applied(at_round_2, alter, code, text):
    desk, request = at_round_2
    asked = alter(desk, request)
    got, words = desk.stops(ME, asked) if code == "Tampered" else refused(desk, asked)
    assert (got, text in words) == (code, True), words


def test_after_all_those_refusals_the_true_sum_is_applied(at_round_2):
    desk, request = at_round_2
    before = desk.state(ME)
    assert desk.code(ME, request) == "UpdateReply"
    after = desk.state(ME)
    assert (before.last_applied, after.last_applied) == (0, 1)
    assert all(after.scopes[scope].weights != before.scopes[scope].weights for scope in before.scopes)


DROPPED = {
    "given-up-but-not-in-order": (
        lambda d, r: replace(r, previous=tuple(reversed(r.previous))),
        "WrongRound",
        "rounds [2, 1], wanted those of [1, 2]",
    ),
    "a-survivor-that-sent-nothing": (
        lambda d, r: told(r, survivors=(0, 1, 2, 3)),
        "WrongRound",
        "announced as a survivor, it sent no update",
    ),
    "an-epoch-it-lacks": (lambda d, r: told(r, epoch=3), "WrongKey", "of epoch 3, which this site lacks"),
    "one-of-the-two-missing": (
        lambda d, r: replace(r, previous=r.previous[1:]),
        "WrongRound",
        "wanted those of [1, 2]",
    ),
    "two-are-not-enough": (
        lambda d, r: told(r, survivors=names(d, PEER, OTHER)),
        "CohortTooSmall",
        "wanted at least 3",
    ),
}


@pytest.mark.parametrize(("alter", "code", "text"), DROPPED.values(), ids=DROPPED)
def test_what_a_site_that_was_dropped_and_then_away_refuses(dropped_once, alter, code, text):
    desk, request = dropped_once
    got, words = refused(desk, alter(desk, request))
    assert (got, text in words) == (code, True), words


def test_a_site_that_was_dropped_applies_the_sum_of_the_others(dropped_once):
    desk, request = dropped_once
    reply = desk.ask(ME, request)
    others = {desk.state(site).scopes["global"].weights for site in (PEER, OTHER, LAST_SITE)}
    assert reply.digests["global"] == desk.ask(PEER, desk.round_request(PEER, 3)).digests["global"]
    assert len(others) == 1


@pytest.fixture(scope="module")
def answer_lost(make_desk):
    """This site's update of round 2 was lost, and with it the word that it has applied round 1: it is sent again."""
    desk = make_desk(training={"rounds": 4})
    taken = desk.take

    def lose_one(site, reply):
        if not (isinstance(reply, UpdateReply) and (site, reply.round) == (ME, 2)):
            taken(site, reply)

    desk.take = lose_one
    request = desk.play(until=("round", 4))[ME]
    assert ([down.round for down in request.previous], desk.state(ME).last_applied) == ([1, 2, 3], 1)
    return desk, request


@pytest.mark.parametrize("places", [(), (0,), (0, 1), (0, 2), (2,), (1, 1, 2), (0, 2, 1), (1, 2, 2)])
def test_of_the_rounds_not_applied_yet_none_is_left_out_or_comes_twice(answer_lost, places):
    desk, request = answer_lost
    code, words = refused(desk, replace(request, previous=tuple(request.previous[place] for place in places)))
    assert (code, "wanted those of [2, 3]" in words) == ("WrongRound", True), words


def test_a_sum_that_was_applied_is_passed_over_whatever_it_says_now(answer_lost):
    desk, request = answer_lost
    first, *fresh = request.previous
    lie = replace(first, survivors=(0, 9), epoch=7, sums=(ScopedSum("global", 4, (b"no ciphertext",)),))
    reply = desk.ask(ME, replace(request, previous=(lie, first, *fresh)))
    assert reply.digests == desk.ask(LAST_SITE, desk.round_request(LAST_SITE, 4)).digests
    assert [event["round"] for event in desk.events[ME] if event["event"] == "applied"] == [1, 2, 3], "each once"


def test_survivors_outside_of_those_it_masked_with_are_refused(make_desk):
    """A site that dealt no shares in time is announced as a survivor of a round it had no part in."""
    desk = make_desk()
    request = desk.play(until=("round", 2), away=lambda phase, number, site: (phase, site) == ("shares", LAST_SITE))[ME]
    code, words = refused(desk, told(request, survivors=(0, 1, 2, 3)))
    assert (code, f"{LAST_SITE} announced" in words) == ("WrongRound", True)


def test_a_round_that_is_announced_as_given_up_leaves_everything_as_it_was(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 2))[ME]
    before = desk.state(ME).scopes
    given_up = AggregateDown(round=1, epoch=0, survivors=(), sums=())
    assert desk.code(ME, replace(request, previous=(given_up,))) == "UpdateReply"
    assert desk.state(ME).scopes == before
    assert desk.state(ME).last_applied == 1


def test_the_floor_follows_the_key_list_where_that_asks_for_more_than_the_plan(make_desk):
    """Six sites on the key list need four survivors, the plan alone would do with three."""
    sites = (*((f"site-{number}", "bank") for number in range(5)), (ME, "bank"))
    desk = make_desk(sites=sites, cohort={"max_sites": 6})
    request = desk.play(until=("round", 2))[ME]
    assert desk.graph(1).min_survivors == 4
    code, words = refused(desk, told(request, survivors=names(desk, ME, "site-0", "site-1")))
    assert (code, "wanted at least 4" in words) == ("CohortTooSmall", True)


def test_a_site_does_not_take_part_with_fewer_than_a_sum_must_have(make_desk):
    """Five sites need four survivors; this plan wants all five in every sum."""
    desk = make_desk(sites=SITES_OF_FIVE, cohort={"max_sites": 5, "min_contributors": 5})
    request = desk.play(until=("round", 1))[ME]
    there = (PEER, OTHER, LAST_SITE)
    boxes = {name: box for name, box in request.boxes.items() if name in there}
    code, words = refused(desk, replace(request, participants=names(desk, ME, *there), boxes=boxes))
    assert (code, "4 sites take part, wanted at least 5" in words) == ("CohortTooSmall", True), words


def test_a_site_that_was_away_takes_no_sum_of_fewer_than_a_sum_must_have(make_desk):
    """It knows of no key list; the plan alone tells it the floor."""
    desk = make_desk(sites=SITES_OF_FIVE, cohort={"max_sites": 5, "min_contributors": 4}, training={"rounds": 3})
    request = desk.play(until=("round", 3), away=lambda phase, number, site: (phase, site) == ("plan", ME))[ME]
    assert ME not in desk.listed[1]
    code, words = refused(desk, told(request, survivors=names(desk, PEER, OTHER, LAST_SITE)))
    assert (code, "3 sites are in it, wanted at least 4" in words) == ("CohortTooSmall", True), words
