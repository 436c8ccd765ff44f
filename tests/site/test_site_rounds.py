"""Exchanges A and B at one site: everything a coordinator can get wrong on purpose, and that a refusal changes nothing."""

import pytest
from msgspec.structs import replace

from fedseek.cohort import presence_message
from fedseek.groupkey import make_group_key
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PRESENCE, verify
from fedseek.messages import AggregateDown, SharesRevealed, UpdateReply, digest_message

ME, PEER, OTHER, LAST_SITE = "仁济医院", "北岸银行", "harbour-bank", "st-anna"
DAY = 86_400


@pytest.fixture(scope="module")
def at_round_1(make_desk):
    desk = make_desk()
    return desk, desk.play(until=("round", 1))[ME]


@pytest.fixture(scope="module")
def at_unmask_1(make_desk):
    desk = make_desk()
    return desk, desk.play(until=("unmask", 1))[ME]


@pytest.fixture(scope="module")
def at_closing(make_desk):
    desk = make_desk()
    return desk, desk.play(until=("round", 3))[ME]


@pytest.fixture(scope="module")
def after_closing(make_desk):
    desk = make_desk()
    desk.play(until=("release", 3))
    return desk


def refused(desk, request):
    """The code and the site's own words of a refusal, which must leave the site exactly as it was."""
    before, trained = desk.state(ME).to_bytes(), len(desk.events[ME])
    code = desk.code(ME, request)
    assert desk.state(ME).to_bytes() == before, "a refusal is nothing done"
    later = [event["event"] for event in desk.events[ME][trained:]]
    assert "step" not in later, "what is refused is refused before training"
    return code, desk.text(ME)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def names(desk, *wanted):
    return desk.federation.positions(wanted)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


# --- exchange A: who takes part -----------------------------------------------------------------------------------------

ROUND_1 = {
    "no-such-round": (lambda d, r: replace(r, round=4), "WrongRound", "the run's 3"),
    "a-round-ahead": (lambda d, r: replace(r, round=2), "WrongRound", "has dealt no shares"),
    "without-me": (
        lambda d, r: replace(r, participants=names(d, PEER, OTHER, LAST_SITE)),
        "WrongRound",
        "lack this site",
    ),
    "too-few": (lambda d, r: replace(r, participants=names(d, ME, PEER)), "CohortTooSmall", "2 sites take part"),
    "beyond-the-roster": (lambda d, r: replace(r, participants=(0, 1, 2, 4)), "Malformed", "positions"),
    "twice": (lambda d, r: replace(r, participants=(0, 1, 2, 3, 3)), "Malformed", "positions"),
    "a-box-less": (lambda d, r: replace(r, boxes=without(r.boxes, PEER)), "Malformed", "got boxes of"),
    "my-own-box": (lambda d, r: replace(r, boxes={**r.boxes, ME: r.boxes[PEER]}), "Malformed", "got boxes of"),
    "box-of-another": (lambda d, r: replace(r, boxes={**r.boxes, PEER: r.boxes[OTHER]}), "WrongKey", "does not open"),
    "box-for-another": (
        lambda d, r: replace(r, boxes={**r.boxes, PEER: d.dealt[1][PEER].boxes[OTHER]}),
        "WrongKey",
        "does not open",
    ),
    "box-altered": (
        lambda d, r: replace(r, boxes={**r.boxes, PEER: flipped(r.boxes[PEER])}),
        "WrongKey",
        "does not open",
    ),
    "box-empty": (lambda d, r: replace(r, boxes={**r.boxes, PEER: b""}), "WrongKey", "does not open"),
    "box-of-a-site-away": (
        lambda d, r: replace(r, participants=names(d, ME, OTHER, LAST_SITE)),
        "Malformed",
        "got boxes of",
    ),
    # the key list of the next round
    "a-key-less": (lambda d, r: replace(r, next_keys=r.next_keys[1:]), "Malformed", "got keys of"),
    "a-key-twice": (lambda d, r: replace(r, next_keys=r.next_keys + r.next_keys[:1]), "Malformed", "got keys of"),
    "my-own-key": (
        lambda d, r: replace(r, next_keys=(*r.next_keys, d.keys[2][ME])),
        "Malformed",
        "got keys of",
    ),
    "keys-of-this-round": (
        lambda d, r: replace(r, next_keys=(d.keys[1][r.next_keys[0].site], *r.next_keys[1:])),
        "WrongRound",
        "those of round 1, wanted 2",
    ),
    "key-altered": (
        lambda d, r: replace(
            r, next_keys=(replace(r.next_keys[0], mask_key=d.keys[1][PEER].mask_key), *r.next_keys[1:])
        ),
        "WrongKey",
        "does not verify",
    ),
    "short-key-list": (
        lambda d, r: replace(r, next_listed=names(d, ME, PEER), next_keys=(d.keys[2][PEER],)),
        "CohortTooSmall",
        "2 sites are listed",
    ),
    "keys-and-not-listed": (
        lambda d, r: replace(r, next_listed=names(d, PEER, OTHER, LAST_SITE)),
        "Malformed",
        "which this site is not in",
    ),
    # the group key
    "no-envelope": (lambda d, r: replace(r, envelopes={}), "WrongKey", "the newest held here is of None"),
    "not-an-envelope": (lambda d, r: replace(r, envelopes={0: b"\xc1"}), "WrongKey", "does not parse"),
    "envelope-of-another": (
        lambda d, r: replace(r, envelopes={0: d.group_keys[0].envelopes[PEER]}),
        "WrongKey",
        "is for receiver",
    ),
    "envelope-altered": (lambda d, r: replace(r, envelopes={0: flipped(r.envelopes[0])}), "WrongKey", "verify"),
    "envelope-as-another-epoch": (
        lambda d, r: replace(r, epoch=1, envelopes={1: r.envelopes[0]}),
        "WrongKey",
        "is for epoch",
    ),
    "an-epoch-not-held": (lambda d, r: replace(r, epoch=1), "WrongKey", "of epoch 1, the newest held here is of 0"),
    "a-sum-before-the-first": (
        lambda d, r: replace(r, previous=(AggregateDown(round=1, epoch=0, survivors=(), sums=()),)),
        "WrongRound",
        "got the sums of rounds [1], wanted those of []",
    ),
}


@pytest.mark.parametrize(("alter", "code", "text"), ROUND_1.values(), ids=ROUND_1)
def test_what_a_site_refuses_before_its_first_round(at_round_1, alter, code, text):
    desk, request = at_round_1
    got, words = refused(desk, alter(desk, request))
    assert (got, text in words) == (code, True), words


def test_after_all_those_refusals_the_right_request_is_answered(at_round_1):
    desk, request = at_round_1
    reply = desk.ask(ME, request)
    assert isinstance(reply, UpdateReply)
    entry, everybody = desk.federation.roster.entry(ME), desk.federation.roster.names
    verify(entry, CONTEXT_ADAPTER, digest_message(desk.federation.run, 1, reply.digests), reply.signature)
    vouched = presence_message(desk.federation, desk.graph(1), everybody, epoch=0, digest=reply.digests["global"])
    verify(entry, CONTEXT_PRESENCE, vouched, reply.presence)
    assert (reply.shares.round, reply.keys.round, reply.epoch) == (2, 3, 0)


def test_one_neighbour_away_is_no_reason_to_refuse(make_desk):
    desk = make_desk()
    requests = desk.play(until=("round", 1), away=lambda phase, number, site: (phase, site) == ("shares", LAST_SITE))
    assert LAST_SITE not in desk.taking_part[1]
    assert desk.code(ME, requests[ME]) == "UpdateReply"


def test_a_site_that_is_not_on_the_next_key_list_deals_nothing_for_it(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    reply = desk.ask(ME, replace(request, next_listed=names(desk, PEER, OTHER, LAST_SITE), next_keys=()))
    assert reply.shares is None
    assert not desk.state(ME).rounds[2].listed


def test_no_shares_are_dealt_twice_for_one_round(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    desk.take(ME, desk.ask(ME, desk.share_request(ME, 2)))
    code, words = refused(desk, request)
    assert (code, "were dealt already" in words) == ("WrongRound", True)


# --- exchange A: order --------------------------------------------------------------------------------------------------


def test_a_round_is_played_once_and_the_second_request_is_written_down(make_desk):
    desk = make_desk()
    requests = desk.play(until=("round", 1))
    first = desk.send(ME, requests[ME])
    assert desk.send(ME, requests[ME]) == first, "the same request gets the same bytes"
    trained = desk.state(ME).steps_done
    fewer = replace(
        requests[ME], participants=names(desk, ME, PEER, OTHER), boxes=without(requests[ME].boxes, LAST_SITE)
    )
    code, words = refused(desk, fewer)
    assert (code, "another request" in words) == ("WrongRound", True), "no second masking of a round's update"
    assert desk.state(ME).steps_done == trained
    refusals = desk.services[ME]._journal.refusals(desk.federation.run)
    assert [refusal.step.phase for refusal in refusals] == ["round"]


def test_an_earlier_round_is_not_played_after_a_later_one(make_desk):
    """Away in round 1 with its shares dealt, the site plays 3; round 1 is then over for it, asked for the first time."""
    desk = make_desk(training={"rounds": 3})
    exchanges = desk.exchanges()
    old = None
    for phase, number, requests in exchanges:
        for site, request in requests.items():
            if (phase, number, site) == ("round", 1, ME):
                old = request
            else:
                desk.take(site, desk.ask(site, request))
        if (phase, number) == ("round", 3):
            break
    assert ME in desk.updates[3]
    code, words = refused(desk, old)
    assert (code, "this site's last one is 3" in words) == ("WrongRound", True)
    assert set(desk.state(ME).rounds) == {3, 4}, "what was drawn and dealt for round 1 is gone"


def test_after_an_update_its_secrets_are_gone_and_the_next_ones_are_there(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    drawn = desk.state(ME).rounds
    desk.take(ME, desk.ask(ME, request))
    rounds = desk.state(ME).rounds
    assert (rounds[1].secrets, rounds[1].peers) == (None, {})
    assert set(rounds[1].held) == set(desk.services), "until it has revealed its half"
    assert rounds[2].secrets == drawn[2].secrets
    assert set(rounds[2].held) == {ME}
    assert rounds[3].secrets is not None


# --- the closing round --------------------------------------------------------------------------------------------------

CLOSING = {
    "a-next-round": (lambda d, r: replace(r, next_listed=(0, 1, 2, 3)), "Malformed", "got a key list"),
    "keys-for-it": (lambda d, r: replace(r, next_keys=(d.keys[3][PEER],)), "Malformed", "got a key list"),
    "before-the-last-sum": (lambda d, r: replace(r, previous=()), "WrongRound", "wanted those of [2]"),
}


@pytest.mark.parametrize(("alter", "code", "text"), CLOSING.values(), ids=CLOSING)
def test_what_a_site_refuses_in_the_closing_round(at_closing, alter, code, text):
    desk, request = at_closing
    got, words = refused(desk, alter(desk, request))
    assert (got, text in words) == (code, True), words


def test_the_closing_round_trains_nothing_and_deals_nothing(at_closing):
    desk, request = at_closing
    before = desk.state(ME)
    reply = desk.ask(ME, request)
    assert [scoped.scope for scoped in reply.update] == ["kind/hospital"]
    assert (reply.shares, reply.keys) == (None, None)
    after = desk.state(ME)
    assert (after.steps_done, after.last_sent, after.last_applied) == (before.steps_done, 3, 2)
    assert set(after.rounds) == {3}
    assert (after.rounds[3].secrets, after.rounds[3].held) == (None, {}), "nothing of it is ever revealed"


def test_no_share_is_revealed_of_the_closing_round(after_closing):
    """Everybody survived it and every signature is true: heads need no unmasking, so who asks is up to something."""
    desk = after_closing
    request = desk.unmask_request(ME, 3)
    assert set(request.presence) == {PEER, OTHER, LAST_SITE}
    for asked in (request, replace(request, survivors=names(desk, ME, PEER, OTHER))):
        code, words = refused(desk, asked)
        assert (code, "of the closing round" in words) == ("WrongRound", True), words
    assert 3 not in desk.revealed


# --- the group key ------------------------------------------------------------------------------------------------------


def test_a_second_group_key_of_an_epoch_is_refused(make_desk):
    """Two sites made one, or a coordinator asked two sites for it to split the cohort."""
    desk = make_desk()
    request = desk.play(until=("round", 2))[ME]
    maker = desk.services[OTHER].identity
    second = make_group_key(desk.federation, 0, identity=maker, now=desk.now[0])
    code, words = refused(desk, replace(request, envelopes={0: second.envelopes[ME]}))
    assert (code, "second group key of epoch 0" in words) == ("WrongKey", True)
    assert desk.code(ME, replace(request, envelopes={})) == "UpdateReply", "the key it holds is enough"


def test_once_there_is_a_newer_key_nothing_is_encrypted_under_the_old_one(make_desk):
    desk = make_desk()
    desk.play(until=("round", 2))
    old = desk.round_request(ME, 2)
    desk.rotate(OTHER)
    new = desk.round_request(ME, 2)
    code, words = refused(desk, replace(new, epoch=old.epoch))
    assert (code, "of epoch 0, the newest held here is of 1" in words) == ("WrongKey", True)
    assert desk.ask(ME, new).epoch == 1
    assert set(desk.state(ME).group_keys) == {1}, "the old key opens nothing more and is gone"


@pytest.mark.parametrize(
    ("days", "code"), [(89.9, "UpdateReply"), (90.1, "WrongKey"), (-0.03, "UpdateReply"), (-0.1, "WrongKey")]
)
def test_a_group_key_is_not_encrypted_under_when_it_is_too_old_or_not_made_yet(make_desk, days, code):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    desk.now[0] += days * DAY
    assert desk.code(ME, request) == code


# --- exchange B ---------------------------------------------------------------------------------------------------------


UNMASK_1 = {
    "another-round": (lambda d, r: replace(r, round=2), "WrongRound", "last sent an update of round 1"),
    "without-me": (
        lambda d, r: replace(r, survivors=names(d, PEER, OTHER, LAST_SITE)),
        "WrongRound",
        "lack this site",
    ),
    "too-few": (lambda d, r: replace(r, survivors=names(d, ME, PEER)), "CohortTooSmall", "2 sites survived"),
    "too-few-though-signed": (
        lambda d, r: replace(r, survivors=names(d, ME, LAST_SITE), presence={LAST_SITE: r.presence[LAST_SITE]}),
        "CohortTooSmall",
        "2 sites survived",
    ),
    "no-presence": (lambda d, r: replace(r, presence=without(r.presence, PEER)), "WrongKey", "does not verify"),
    "presence-altered": (
        lambda d, r: replace(r, presence={**r.presence, PEER: flipped(r.presence[PEER])}),
        "WrongKey",
        "does not verify",
    ),
    "presence-of-another": (
        lambda d, r: replace(r, presence={**r.presence, PEER: r.presence[OTHER]}),
        "WrongKey",
        "does not verify",
    ),
    "beyond-the-roster": (lambda d, r: replace(r, survivors=(0, 1, 2, 9)), "Malformed", "positions"),
}


@pytest.mark.parametrize(("alter", "code", "text"), UNMASK_1.values(), ids=UNMASK_1)
def test_what_a_site_does_not_reveal_shares_for(at_unmask_1, alter, code, text):
    desk, request = at_unmask_1
    got, words = refused(desk, alter(desk, request))
    assert (got, text in words) == (code, True), words


def test_shares_are_revealed_once_and_then_forgotten(at_unmask_1):
    desk, request = at_unmask_1
    first = desk.send(ME, request)
    assert isinstance(desk.ask(ME, request), SharesRevealed)
    assert desk.send(ME, request) == first
    told_another_story = replace(request, survivors=names(desk, ME, PEER, OTHER))
    code, words = refused(desk, told_another_story)
    assert (code, "another request" in words) == ("WrongRound", True)
    mine = desk.state(ME).rounds[1]
    assert (mine.held, mine.survivors) == ({}, desk.federation.roster.names)


def test_a_second_story_is_refused_by_the_step_itself_not_only_by_the_journal(at_unmask_1):
    from fedseek_site.rounds import unmask

    desk, request = at_unmask_1
    desk.send(ME, request)
    run, state = desk.services[ME]._held
    with pytest.raises(Exception, match="has revealed its shares"):
        unmask(run, state, replace(request, survivors=names(desk, ME, PEER, OTHER)))


def test_survivors_that_this_site_did_not_mask_with_are_refused(make_desk):
    desk = make_desk()
    desk.play(until=("unmask", 1), away=lambda phase, number, site: (phase, site) == ("shares", LAST_SITE))
    asked = desk.unmask_request(ME, 1)
    code, words = refused(desk, replace(asked, survivors=(0, 1, 2, 3)))
    assert (code, f"hold {LAST_SITE}" in words) == ("WrongRound", True)


def test_no_share_is_revealed_for_a_round_this_site_sent_nothing_of(make_desk):
    desk = make_desk()
    desk.play(until=("unmask", 1), away=lambda phase, number, site: (phase, number, site) == ("round", 1, ME))
    asked = replace(desk.unmask_request(PEER, 1), survivors=(0, 1, 2, 3))
    code, words = refused(desk, asked)
    assert (code, "last sent an update of round 0" in words) == ("WrongRound", True)


def test_a_participant_that_is_not_on_the_key_list_is_refused(make_desk):
    desk = make_desk()
    desk.play(until=("shares", 1), away=lambda phase, number, site: site == LAST_SITE)
    for site in (PEER, OTHER, ME):
        desk.listed[1] = desk.in_order((PEER, OTHER, ME))
        desk.take(site, desk.ask(site, desk.share_request(site, 1)))
    desk.round_requests(1)
    request = desk.round_request(ME, 1)
    code, words = refused(desk, replace(request, participants=(0, 1, 2, 3)))
    assert (code, f"hold {LAST_SITE}, not on the key list" in words) == ("WrongRound", True)
