"""Presence: a site reveals shares only to those who started from the same adapter, under one key, in one round.

A coordinator that tells sites different stories leads them apart; each of them follows the rules and signs what it was
told. What it signs shows the others, and none of them reveals a share.
"""

import pytest
from msgspec.structs import replace

from fedseek.cohort import presence_message, round_graph
from fedseek.identity.signing import CONTEXT_PRESENCE, sign
from fedseek.messages import AggregateDown

ME, PEER, OTHER, LAST_SITE = "仁济医院", "北岸银行", "harbour-bank", "st-anna"


@pytest.fixture(scope="module")
def at_unmask_1(make_desk):
    desk = make_desk()
    return desk, desk.play(until=("unmask", 1))[ME]


def with_presence(desk, request, **changes):
    """The request with what PEER would have signed, had its round 1 been another in these things."""
    right = {
        "graph": desk.graph(1),
        "participants": desk.taking_part[1],
        "epoch": 0,
        "digest": desk.updates[1][PEER].digests["global"],
    }
    vouched = presence_message(desk.federation, **{**right, **changes})
    signed = sign(desk.services[PEER].identity, CONTEXT_PRESENCE, vouched)
    return replace(request, presence={**request.presence, PEER: signed})


def test_the_presence_that_is_wanted_is_the_one_that_the_next_tests_alter(at_unmask_1):
    desk, request = at_unmask_1
    assert with_presence(desk, request) == request


OTHER_STORIES = {
    "another-adapter": lambda desk: {"digest": bytes(32)},
    "another-epoch": lambda desk: {"epoch": 1},
    "other-participants": lambda desk: {"participants": (ME, PEER, OTHER)},
    "another-key-list": lambda desk: {"graph": round_graph(desk.federation, 1, (ME, PEER, OTHER))},
    "another-round": lambda desk: {"graph": round_graph(desk.federation, 2, desk.listed[1])},
}


@pytest.mark.parametrize("story", OTHER_STORIES.values(), ids=OTHER_STORIES)
def test_nothing_is_revealed_where_a_neighbour_signed_another_story(at_unmask_1, story):
    desk, request = at_unmask_1
    before = desk.state(ME).to_bytes()
    assert desk.code(ME, with_presence(desk, request, **story(desk))) == "WrongKey"
    assert f"of site '{PEER}'" in desk.text(ME)
    assert desk.state(ME).to_bytes() == before, "every share is held as before"


def test_after_all_those_stories_the_true_one_is_answered(at_unmask_1):
    desk, request = at_unmask_1
    assert desk.code(ME, request) == "SharesRevealed"


def led_apart_by_adapter(desk, requests):
    """One site is told that round 1 was given up; it starts round 2 from the adapter before."""
    given_up = AggregateDown(round=1, epoch=0, survivors=(), sums=())
    return {**requests, PEER: replace(requests[PEER], previous=(given_up,))}


def led_apart_by_epoch(desk, requests):
    """One site is kept from the new group key, and encrypts under the old one."""
    desk.rotate(OTHER)
    told = {site: desk.round_request(site, 2) for site in requests}
    return {**told, PEER: requests[PEER]}


@pytest.mark.parametrize("lead_apart", [led_apart_by_adapter, led_apart_by_epoch])
def test_nothing_is_revealed_for_a_neighbour_that_was_led_apart(make_desk, lead_apart):
    desk = make_desk()
    for site, request in lead_apart(desk, desk.play(until=("round", 2))).items():
        desk.take(site, desk.ask(site, request))
    assert len(desk.updates[2]) == 4, "each of them follows the rules"
    assert len({(reply.epoch, reply.digests["global"]) for reply in desk.updates[2].values()}) == 2
    for site in desk.services:
        before = desk.state(site).to_bytes()
        assert desk.code(site, desk.unmask_request(site, 2)) == "WrongKey"
        assert desk.state(site).to_bytes() == before
    assert set(desk.state(ME).rounds[2].held) == set(desk.services), "all its shares are still its own"
    without_it = replace(desk.unmask_request(ME, 2), survivors=desk.federation.positions((ME, OTHER, LAST_SITE)))
    assert desk.code(ME, without_it) == "SharesRevealed", "those that agree go on"
