"""Before a site's first round: plans, rosters, group keys, shares."""

import pytest
from msgspec.structs import replace

from fedseek.cohort import round_graph
from fedseek.deal import check_dealt, check_keys
from fedseek.groupkey import open_group_key
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.signing import CONTEXT_PLAN, join_fields, verify
from fedseek.messages import KeyRequest, PlanAdmitted

ME, PEER, OTHER, LAST_SITE = "仁济医院", "北岸银行", "harbour-bank", "st-anna"


@pytest.fixture(scope="module")
def at_shares(make_desk):
    desk = make_desk()
    return desk, desk.play(until=("shares", 1))[ME]


def refused(desk, request):
    before = desk.state(ME).to_bytes()
    code = desk.code(ME, request)
    assert desk.state(ME).to_bytes() == before, "a refusal is nothing done"
    return code, desk.text(ME)


def names(desk, *wanted):
    return desk.federation.positions(wanted)


# --- admission ----------------------------------------------------------------------------------------------------------


def test_a_site_signs_the_plan_with_the_run_and_the_roster_it_is_bound_to(make_desk):
    desk = make_desk()
    reply = desk.ask(ME, desk.offer(1))
    assert isinstance(reply, PlanAdmitted)
    roster = desk.federation.roster
    bound = join_fields(desk.federation.run.encode(), desk.plan.digest.encode(), roster.digest())
    verify(roster.entry(ME), CONTEXT_PLAN, bound, reply.signature)
    # lora_B of query and value in two layers, 16 x 2 each; a head of 3 labels
    assert reply.num_values == {"global": 128, "kind/hospital": 51}
    assert reply.ciphertexts == {"global": 1, "kind/hospital": 1}
    assert [keys.round for keys in reply.keys] == [1, 2]
    for keys in reply.keys:
        check_keys(keys, desk.federation, keys.round)
    assert reply.group_key is None
    assert [event["event"] for event in desk.events[ME]] == ["adapter", "layout", "answered"]


def test_a_site_that_is_offered_the_plan_in_the_midst_of_a_run_enters_there(make_desk):
    desk = make_desk(training={"rounds": 5})
    reply = desk.ask(ME, desk.offer(4))
    assert (reply.round, [keys.round for keys in reply.keys]) == (4, [4, 5])


def test_keys_are_drawn_once_for_a_round_and_sent_again(make_desk):
    desk = make_desk(training={"rounds": 3})
    first, again, later = (desk.ask(ME, desk.offer(number)) for number in (1, 2, 3))
    assert again.keys[0] == first.keys[1]
    assert later.keys[0] == again.keys[1]
    assert len({keys.mask_key for reply in (first, again, later) for keys in reply.keys}) == 4


@pytest.mark.parametrize("number", [0, 1, 4, 5])
def test_a_round_that_is_over_or_that_the_run_does_not_have_is_not_entered(make_desk, number):
    desk = make_desk()
    desk.play(until=("round", 2))
    wanted = "Malformed" if number == 0 else "WrongRound"
    assert refused(desk, desk.offer(number, make_key=number == 1))[0] == wanted


def test_the_closing_round_can_be_entered(make_desk):
    desk = make_desk()
    assert [keys.round for keys in desk.ask(ME, desk.offer(3)).keys] == [3, 4], "the second pair goes unused"


def test_a_run_does_not_change_its_plan_or_its_roster(make_desk, tiny_plan):
    desk = make_desk()
    assert desk.code(ME, desk.offer(1)) == "PlanAdmitted"
    other_plan = tiny_plan(training={"learning_rate": 0.5}).canonical()
    smaller = Roster.of(entry for entry in desk.federation.roster.entries if entry.name != PEER).canonical_bytes()
    for offer in (desk.offer(2, plan=other_plan), desk.offer(2, roster=smaller)):
        code, words = refused(desk, offer)
        assert (code, "began at this site with another plan or roster" in words) == ("PlanRefused", True)


def test_a_plan_that_is_not_canonical_or_not_valid_is_refused(make_desk):
    desk = make_desk()
    canonical, roster = desk.plan.canonical(), desk.federation.roster.canonical_bytes()
    for plan in (canonical + b" ", canonical.replace(b'"rounds":2', b'"rounds":0'), b"{}", b"", b"\xff"):
        assert desk.code(ME, desk.offer(1, plan=plan)) == "InvalidPlan"
    for altered in (b"", roster[:-1], roster + b"\0"):
        assert desk.code(ME, desk.offer(1, roster=altered)) == "Malformed"
    assert desk.code(ME, desk.offer(1)) == "PlanAdmitted"


# --- the roster ---------------------------------------------------------------------------------------------------------


def test_a_roster_with_swapped_keys_is_refused_though_it_lists_this_site_rightly(make_desk):
    """The man in the middle: keys of his own under the name of another site."""
    desk = make_desk()
    mine = {entry.name: entry for entry in desk.federation.roster.entries}
    false = SiteIdentity.generate(PEER, "bank").public()
    roster = Roster.of([*(entry for name, entry in mine.items() if name != PEER), false])
    answer = desk.ask(ME, desk.offer(1, roster=roster.canonical_bytes()))
    assert (answer.code, answer.rule) == (
        "PlanRefused",
        "the roster offered is not the one that is trusted at this site",
    )
    assert roster.digest().hex() in desk.text(ME)


def test_without_a_trusted_roster_every_offer_is_refused(make_desk):
    desk = make_desk()
    desk.services[ME]._roster = None
    answer = desk.ask(ME, desk.offer(1))
    assert (answer.code, answer.rule) == ("PlanRefused", "no roster is trusted at this site yet")
    desk.services[ME].trust(desk.federation.roster)
    assert desk.code(ME, desk.offer(1)) == "PlanAdmitted"


def test_a_roster_that_is_no_longer_trusted_ends_a_run_that_has_begun(make_desk):
    desk = make_desk()
    request = desk.play(until=("round", 1))[ME]
    roster = desk.federation.roster
    desk.services[ME].trust(Roster.of(entry for entry in roster.entries if entry.name != PEER))
    assert desk.code(ME, request) == "PlanRefused"
    desk.services[ME].trust(roster)
    assert desk.code(ME, request) == "UpdateReply"


# --- the group key ------------------------------------------------------------------------------------------------------


def test_the_group_key_opens_for_each_site_and_nothing_of_it_stays_with_its_maker(make_desk):
    desk = make_desk()
    sealed = desk.ask(ME, desk.offer(1, make_key=True)).group_key
    assert (sealed.epoch, set(sealed.envelopes)) == (0, set(desk.services))
    opened = [
        open_group_key(sealed.envelopes[name], desk.federation, 0, identity=service.identity)
        for name, service in desk.services.items()
    ]
    assert len({key.secret.fingerprint() for key in opened}) == 1
    assert {key.made_at for key in opened} == {int(desk.now[0])}
    assert desk.state(ME).group_keys == {}


@pytest.mark.parametrize("epoch", [1, 2, 2**31 - 1, 2**32 - 1])
def test_a_group_key_is_made_for_the_next_epoch_only(make_desk, epoch):
    desk = make_desk()
    desk.play(until=("shares", 1))
    assert refused(desk, KeyRequest(run=desk.federation.run, epoch=epoch))[0] == "WrongRound"
    assert desk.code(ME, KeyRequest(run=desk.federation.run, epoch=0)) == "KeysSealed"


def test_once_a_key_is_held_its_epoch_is_not_made_again(make_desk):
    desk = make_desk()
    desk.play(until=("round", 2))
    assert refused(desk, KeyRequest(run=desk.federation.run, epoch=0))[0] == "WrongRound"
    assert refused(desk, desk.offer(3, make_key=True))[0] == "WrongRound"
    assert desk.ask(ME, KeyRequest(run=desk.federation.run, epoch=1)).group_key.epoch == 1


# --- shares -------------------------------------------------------------------------------------------------------------

SHARES_1 = {
    "a-round-without-keys": (lambda d, r: replace(r, round=3), "WrongRound", "has sent no keys"),
    "not-listed": (
        lambda d, r: replace(r, listed=names(d, PEER, OTHER, LAST_SITE), keys=()),
        "WrongRound",
        "does not have this site",
    ),
    "too-short-a-list": (
        lambda d, r: replace(r, listed=names(d, ME, PEER), keys=(d.keys[1][PEER],)),
        "CohortTooSmall",
        "2 sites are listed",
    ),
    "beyond-the-roster": (lambda d, r: replace(r, listed=(0, 1, 2, 3, 4)), "Malformed", "positions"),
    "out-of-order": (lambda d, r: replace(r, listed=(1, 0, 2, 3)), "Malformed", "positions"),
    "a-key-less": (lambda d, r: replace(r, keys=r.keys[1:]), "Malformed", "got keys of"),
    "a-key-twice": (lambda d, r: replace(r, keys=(*r.keys, r.keys[0])), "Malformed", "got keys of"),
    "keys-of-another-round": (
        lambda d, r: replace(r, keys=tuple(d.keys[2][each.site] for each in r.keys)),
        "WrongRound",
        "those of round 2, wanted 1",
    ),
    "keys-the-coordinator-made": (
        lambda d, r: replace(r, keys=(replace(r.keys[0], share_key=bytes(range(32))), *r.keys[1:])),
        "WrongKey",
        "does not verify",
    ),
    "keys-under-anothers-name": (
        lambda d, r: replace(r, keys=(replace(r.keys[1], site=r.keys[0].site), *r.keys[1:])),
        "WrongKey",
        "does not verify",
    ),
}


@pytest.mark.parametrize(("alter", "code", "text"), SHARES_1.values(), ids=SHARES_1)
def test_what_a_site_deals_no_shares_for(at_shares, alter, code, text):
    desk, request = at_shares
    got, words = refused(desk, alter(desk, request))
    assert (got, text in words) == (code, True), words


def test_shares_are_dealt_once_over_one_key_list(at_shares):
    desk, request = at_shares
    first = desk.send(ME, request)
    assert desk.send(ME, request) == first
    shares = desk.ask(ME, request).shares
    check_dealt(shares, desk.federation, round_graph(desk.federation, 1, desk.federation.roster.names), dealer=ME)
    shorter = replace(
        request, listed=names(desk, ME, PEER, OTHER), keys=tuple(k for k in request.keys if k.site != LAST_SITE)
    )
    code, words = refused(desk, shorter)
    assert (code, "another request" in words) == ("WrongRound", True)


def test_shares_that_were_dealt_ahead_are_not_dealt_again_on_request(make_desk):
    """In exchange A the site dealt for round 2; a ShareRequest for it is a step of its own, and is refused too."""
    desk = make_desk()
    desk.play(until=("unmask", 1))
    code, words = refused(desk, desk.share_request(ME, 2))
    assert (code, "were dealt already" in words) == ("WrongRound", True)


def test_no_shares_are_dealt_for_a_round_that_is_over(make_desk):
    desk = make_desk()
    desk.play(until=("unmask", 2))
    for number in (1, 2):
        again = replace(desk.share_request(ME, number), keys=desk.peers_keys(ME, number)[::-1])
        assert refused(desk, again)[0] == "WrongRound"
