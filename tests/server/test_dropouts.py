"""Sites that vanish, at every step of a run, and how they come back."""

import itertools
import random

import pytest
from played_sites import (
    ANNA,
    BEIAN,
    HARBOUR,
    RENJI,
    PlayedSite,
    away,
    federate,
    lost,
    played_plan,
)

from fedseek.errors import CohortTooSmall
from fedseek.messages import PlanOffer, RoundRequest, ShareRequest, UnmaskRequest, decode_request

ALL = (HARBOUR, ANNA, RENJI, BEIAN)
OTHERS = (HARBOUR, RENJI, BEIAN)
PAST_4 = {1: ALL, 2: ALL, 3: ALL, 4: ALL, 5: ALL}  # a run of four rounds in which nobody is ever missing


def asked(federated, name):
    """What a site was asked, as (request, round); a RoundRequest also with the rounds it brought."""
    return [
        (type(each).__name__, each.round, *([[down.round for down in each.previous]] if hasattr(each, "boxes") else []))
        for each in federated.site(name).log
        if hasattr(each, "round")
    ]


# --- one site, one step ---------------------------------------------------------------------------------------------

MISSED = {
    # when and how it is missing: in which rounds its update is not in the sum
    ("plan", 1): {1, 2},
    ("shares", 1): {1},
    ("round", 1): {1, 2},
    ("round", 2): {2, 3},
    ("unmask", 1): set(),
    ("round", 3): {3, 4},
    ("round", 4): {4, 5},
    ("unmask", 4): set(),
    ("close", 5): {5},
}


@pytest.mark.parametrize("miss", [away, lost], ids=["not-reached", "answer-lost"])
@pytest.mark.parametrize(("where", "missing"), MISSED.items(), ids=[f"{phase}-{n}" for phase, n in MISSED])
def test_a_site_that_misses_one_exchange_is_back_as_soon_as_may_be(where, missing, miss):
    federated = federate(played_plan(rounds=4))
    place = (*where, ANNA)
    federated.play(**{"away" if miss is away else "reply": miss(place)})
    assert federated.ended == {n: OTHERS if n in missing else ALL for n in PAST_4}
    assert federated.events("dropout", "phase", "round", "node") == [(*where, federated.node(ANNA))]
    assert len(federated.coordinator.approvals) == 4, "it has applied every sum, also of rounds it was away in"
    federated.check_adapter(ANNA)
    federated.check_adapter(HARBOUR)


def test_a_site_that_missed_a_round_is_asked_what_a_new_one_is_asked():
    federated = federate(played_plan(rounds=4))
    federated.play(away=away(("round", 2, ANNA)))
    assert asked(federated, ANNA) == [
        ("PlanOffer", 1),
        ("ShareRequest", 1),
        ("RoundRequest", 1, []),
        ("UnmaskRequest", 1),
        ("PlanOffer", 4),
        ("ShareRequest", 4),
        ("RoundRequest", 4, [1, 2, 3]),
        ("UnmaskRequest", 4),
        ("RoundRequest", 5, [4]),
    ]


def test_a_site_that_was_away_for_two_rounds_comes_back_with_all_it_missed():
    federated = federate(played_plan(rounds=5))
    gone = {("round", 2), ("unmask", 2), ("round", 3)}
    federated.play(away=lambda phase, number, site: site == ANNA and (phase, number) in gone)
    assert federated.ended == {1: ALL, 2: OTHERS, 3: OTHERS, 4: OTHERS, 5: ALL, 6: ALL}
    assert ("RoundRequest", 5, [1, 2, 3, 4]) in asked(federated, ANNA)
    federated.check_adapter(ANNA)


def test_a_site_whose_answer_got_lost_is_told_again_what_it_may_have_applied():
    """The coordinator cannot know whether the request arrived, so it repeats; the site leaves out what it has."""
    federated = federate(played_plan(rounds=4))
    federated.play(reply=lost(("round", 2, ANNA)))
    assert ("RoundRequest", 2, [1]) in asked(federated, ANNA)
    assert ("RoundRequest", 4, [1, 2, 3]) in asked(federated, ANNA)
    federated.check_adapter(ANNA)


def test_a_vanished_sites_pairwise_masks_are_taken_off():
    federated = federate(played_plan())
    federated.play(reply=lost(("round", 2, ANNA)))  # its masked update exists, and is not in the sum
    assert federated.events("unmasked", "round", "survivors", "vanished")[1] == (2, list(OTHERS), [ANNA])
    reply = federated.coordinator._state.history.ended[1]
    assert [(each.scope, each.contributors) for each in reply.sums] == [("global", 3), ("kind/bank", 2)]
    federated.check_adapter(HARBOUR)


def test_a_head_whose_sites_vanish_stays_masked_and_as_it_was():
    federated = federate(played_plan())
    federated.play(reply=lost(("round", 1, ANNA)))
    first, second = federated.coordinator._state.history.ended[:2]
    assert [each.scope for each in first.sums] == ["global", "kind/bank"], "one hospital is no sum"
    assert [each.scope for each in second.sums] == ["global", "kind/bank"]
    assert not federated.site(RENJI).states["kind/hospital"].weights.any()
    assert federated.site(HARBOUR).states["kind/bank"].weights.any()


def test_a_site_that_reveals_nothing_is_in_the_sum_all_the_same():
    federated = federate(played_plan())
    federated.play(away=away(("unmask", 1, ANNA), ("unmask", 2, RENJI), ("unmask", 3, BEIAN)))
    assert federated.ended == dict.fromkeys((1, 2, 3), ALL)
    federated.check_adapter(ANNA)


def test_one_vanishes_and_another_reveals_nothing():
    """Of four sites three must reveal: then two remain, and the round is given up; the next one works."""
    federated = federate(played_plan(rounds=3))
    federated.play(away=away(("round", 1, ANNA), ("unmask", 1, RENJI)))
    assert federated.ended == {1: (), 2: OTHERS, 3: ALL, 4: ALL}
    ((number, text),) = federated.events("round-failed", "round", "text")
    assert number == 1
    assert "sites revealed a true share" in text
    federated.check_adapter(ANNA)


def test_every_site_is_missing_once():
    federated = federate(played_plan(rounds=9))
    turns = {1: HARBOUR, 3: ANNA, 5: RENJI, 7: BEIAN}
    federated.play(away=lambda phase, number, site: phase == "round" and turns.get(number) == site)
    gone = {number + later: name for number, name in turns.items() for later in (0, 1)}
    assert federated.ended == {n: tuple(name for name in ALL if name != gone.get(n)) for n in range(1, 11)}
    assert federated.coordinator.contributors == ALL
    federated.check_adapter()


# --- too few --------------------------------------------------------------------------------------------------------


def test_a_round_with_too_few_updates_is_given_up_with_nothing_revealed():
    federated = federate(played_plan(rounds=4))
    federated.play(away=away(("round", 2, ANNA), ("round", 2, RENJI)))
    assert federated.ended[1] == ALL
    assert federated.ended[2] == ()
    survivors = [each for name in (HARBOUR, BEIAN) for each in federated.site(name).log]
    assert not [each for each in survivors if isinstance(each, UnmaskRequest) and each.round == 2]
    assert federated.events("round-failed", "round", "code")[0] == (2, "CohortTooSmall")
    down = next(each for each in survivors if isinstance(each, RoundRequest) and 2 in {d.round for d in each.previous})
    assert [(each.survivors, each.sums) for each in down.previous if each.round == 2] == [((), ())]


def test_when_too_few_can_take_part_nobody_trains_and_all_enter_again():
    """Two of four are away in round 2, so two have dealt for round 3: no privacy is spent on it. Round 4 has all four."""
    federated = federate(played_plan(rounds=4))
    federated.play(away=away(("round", 2, ANNA), ("round", 2, RENJI)))
    assert federated.ended == {1: ALL, 2: (), 3: (), 4: ALL, 5: ALL}
    for name in ALL:
        assert not [each for each in federated.site(name).log if isinstance(each, RoundRequest) and each.round == 3]
        assert [each for each in federated.site(name).log if isinstance(each, ShareRequest) and each.round == 4]
    texts = [text for number, text in federated.events("round-failed", "round", "text") if number == 3]
    assert texts == ["round 3: too few sites could take part"]
    federated.check_adapter(ANNA)
    federated.check_adapter(BEIAN)


def test_a_run_survives_that_nobody_is_there_for_a_while():
    federated = federate(played_plan(rounds=6))
    federated.play(away=lambda phase, number, site: number in (2, 3) and phase in ("round", "unmask"))
    assert federated.ended == {1: ALL, 2: (), 3: (), 4: (), 5: (), 6: ALL, 7: ALL}
    trained = [each.round for each in federated.site(ANNA).log if isinstance(each, RoundRequest)]
    assert trained == [1, 6, 7], "no privacy is spent on a round that cannot take place"
    federated.check_adapter()


def test_a_run_needs_as_many_sites_as_its_plan_says():
    federated = federate(played_plan())
    with pytest.raises(CohortTooSmall, match="2 sites admitted the plan, wanted at least 3") as caught:
        federated.play(away=away(("plan", 1, ANNA), ("plan", 1, RENJI)))
    assert ANNA in caught.value.hint
    assert RENJI in caught.value.hint


def test_a_run_with_nobody_there_says_so():
    federated = federate(played_plan())
    federated.here = set()
    with pytest.raises(CohortTooSmall, match="0 sites admitted the plan"):
        federated.play()


def test_who_is_absent_at_the_start_is_on_record():
    federated = federate(played_plan())
    federated.play(away=away(("plan", 1, ANNA)))
    assert federated.events("absent", "sites") == [([ANNA],)]


# --- not connected, or connected late -------------------------------------------------------------------------------


def test_a_site_that_connects_in_the_midst_of_a_run_takes_part():
    federated = federate(played_plan(rounds=4))
    late = federated.node(ANNA)
    federated.here.discard(late)
    for exchange in federated.start():
        for node in exchange.requests:
            federated.deliver(exchange, node)
        if (exchange.phase, exchange.round) == ("round", 1):
            federated.here.add(late)
    assert asked(federated, ANNA)[:3] == [("PlanOffer", 3), ("ShareRequest", 3), ("RoundRequest", 3, [1, 2])]
    assert federated.ended == {1: OTHERS, 2: OTHERS, 3: ALL, 4: ALL, 5: ALL}
    federated.check_adapter(ANNA)


def test_a_site_that_connects_too_late_to_take_part_is_not_asked():
    federated = federate(played_plan(rounds=2))
    late = federated.node(ANNA)
    federated.here.discard(late)
    for exchange in federated.start():
        for node in exchange.requests:
            federated.deliver(exchange, node)
        if (exchange.phase, exchange.round) == ("round", 2):
            federated.here.add(late)
    assert not federated.site(ANNA).log
    assert federated.coordinator.contributors == OTHERS
    assert set(federated.coordinator.approvals) == set(OTHERS)


def test_nobody_masks_with_a_site_that_is_known_to_be_gone():
    federated = federate(played_plan(rounds=3))
    for exchange in federated.start():
        if exchange.phase == "release":
            break  # for which it would be waited
        for node in exchange.requests:
            federated.deliver(exchange, node)
        if (exchange.phase, exchange.round) == ("unmask", 1):
            federated.here.discard(federated.node(ANNA))
    request = next(each for each in federated.site(BEIAN).log if isinstance(each, RoundRequest) and each.round == 2)
    names = federated.coordinator._state.federation.names
    assert names(request.participants) == OTHERS
    assert names(request.next_listed) == OTHERS
    assert federated.events("unmasked", "round", "vanished")[1] == (2, [])
    assert federated.ended[3] == OTHERS


def test_a_site_may_come_back_as_another_node():
    federated = federate(played_plan(rounds=4))
    old = federated.node(ANNA)
    for exchange in federated.start():
        for node in exchange.requests:
            federated.deliver(exchange, node)
        if (exchange.phase, exchange.round) == ("unmask", 1):
            federated.here.discard(old)
            federated.sites[777] = federated.sites.pop(old)
            federated.here.add(777)
    assert federated.ended == {1: ALL, 2: OTHERS, 3: OTHERS, 4: ALL, 5: ALL}
    assert asked(federated, ANNA)[4:6] == [("PlanOffer", 4), ("ShareRequest", 4)]
    federated.check_adapter(ANNA)


def test_a_second_node_may_not_take_the_place_of_a_site_that_is_there():
    federated = federate(played_plan(rounds=3))
    other = PlayedSite(federated.site(ANNA).identity)
    for exchange in federated.start():
        for node in exchange.requests:
            federated.deliver(exchange, node)
        if (exchange.phase, exchange.round) == ("shares", 1):
            federated.sites[50] = other
            federated.here.add(50)
    assert set(federated.events("rejected", "node", "code")) == {(50, "WrongRound")}
    assert federated.ended == dict.fromkeys((1, 2, 3, 4), ALL)


# --- late, early and twice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [("plan", 1), ("shares", 1), ("round", 1), ("unmask", 1), ("close", 4)])
def test_a_reply_that_comes_when_its_exchange_is_over_changes_nothing(where):
    federated = federate(played_plan(rounds=3))
    run = federated.start()
    for exchange in run:
        for node in exchange.requests:
            federated.deliver(exchange, node, lost((*where, ANNA)))
        if federated.late and (exchange.phase, exchange.round) != where:
            federated.give(*federated.late.pop())
    assert federated.events("rejected", "site", "code")[0][1] == "WrongRound"
    missing = {"plan": {1, 2}, "shares": {1}, "round": {1, 2}, "close": {4}}.get(where[0], set())
    assert federated.ended == {n: OTHERS if n in missing else ALL for n in (1, 2, 3, 4)}


def test_a_late_update_is_refused_though_its_site_is_being_asked_something_else():
    """The node is asked for the plan again when its update of round 1 comes after all: nothing is added behind the
    back of the sites that have been told it vanished."""
    federated = federate(played_plan(rounds=3))
    for exchange in federated.start():
        if (exchange.phase, exchange.round) == ("unmask", 1):
            ((node, data),) = federated.late
            assert isinstance(decode_request(exchange.requests[node]), PlanOffer)
            federated.give(node, data)
        for node in exchange.requests:
            federated.deliver(exchange, node, lost(("round", 1, ANNA)))
    ((text,),) = federated.events("rejected", "text")
    assert text == "site 'st-anna' answered a PlanOffer with UpdateReply"
    assert federated.ended[1] == OTHERS
    federated.check_adapter(ANNA)


@pytest.mark.parametrize("phase", ["plan", "shares", "round", "unmask", "close", "release"])
def test_an_answer_given_twice_counts_once(phase):
    federated = federate(played_plan(rounds=1))
    for exchange in federated.start():
        for node in exchange.requests:
            federated.deliver(exchange, node)
            if exchange.phase == phase:
                federated.deliver(exchange, node)
    assert federated.events("rejected", "phase", "code") == [(phase, "WrongRound")] * 4
    assert federated.ended == dict.fromkeys((1, 2), ALL)
    federated.check_adapter()


# --- many ways to be away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_whatever_one_site_misses_the_others_go_on(seed):
    """One site is away in half of all exchanges: it never harms a sum, and the end is what was summed."""
    federated = federate(played_plan(rounds=6))
    draw = random.Random(seed)
    missed = {place for place in itertools.product(("round", "unmask"), range(1, 7)) if draw.random() < 0.5}
    federated.play(away=lambda phase, number, site: site == RENJI and (phase, number) in missed)
    without = tuple(name for name in ALL if name != RENJI)
    assert set(federated.ended.values()) == {ALL, without}
    assert len(federated.coordinator.approvals) == 4
    for name in ALL:
        federated.check_adapter(name)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_all_sites_miss_nobody_is_left_behind(seed):
    """Every site is away in some exchanges: rounds fail and sites enter again; who is there at the end agrees."""
    federated = federate(played_plan(rounds=10))
    draw = random.Random(seed)
    missed = {place for place in itertools.product(("round", "unmask"), range(1, 8), ALL) if draw.random() < 0.2}
    federated.play(away=lambda *place: place in missed)
    assert len(federated.coordinator.approvals) == 4
    assert () in federated.ended.values()
    assert any(federated.ended[number] for number in range(1, 8))
    federated.check_adapter(ANNA)
    federated.check_adapter(BEIAN)
