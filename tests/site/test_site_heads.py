"""Heads: sent by enough of a kind or not at all, opened whole or not at all (docs/adr/0012), and what a site believes."""

import pytest
from msgspec.structs import replace

from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.cohort import round_graph
from fedseek.deal import advertise, check_dealt, draw_secrets
from fedseek.groupkey import GroupKey
from fedseek.he.ciphertext import ScopedSum
from fedseek.he.keys import decrypt_slots
from fedseek.messages import ShareRequest, UpdateReply

ME, PEER, OTHER, LAST_SITE, THIRD = "仁济医院", "北岸银行", "harbour-bank", "st-anna", "клиника"
HEAD = "kind/hospital"
THREE_CLINICS = ((PEER, "bank"), (ME, "hospital"), (LAST_SITE, "hospital"), (THIRD, "hospital"))


def scopes_of(reply):
    return [scoped.scope for scoped in reply.update]


def waits(desk, site):
    return [(event["round"], event["scopes"]) for event in desk.events[site] if event["event"] == "head-waits"]


def told(request, **changes):
    """The request with another announcement of its last round."""
    *earlier, last = request.previous
    return replace(request, previous=(*earlier, replace(last, **changes)))


def names(desk, *wanted):
    return desk.federation.positions(wanted)


def refused(desk, request):
    before = desk.state(ME).to_bytes()
    code = desk.code(ME, request)
    assert desk.state(ME).to_bytes() == before, "nothing is applied"
    return code, desk.text(ME)


def head_sum(desk, *updates, contributors=None):
    """What a coordinator can make of these updates' heads without anybody's help."""
    aggregate = agg_init(desk.plan.packing.params, {HEAD: 1}, max_sites=4)
    for update in updates:
        agg_update(aggregate, [each for each in update.update if each.scope == HEAD])
    (total,) = agg_finish(aggregate, min_sites=1)
    return ScopedSum(HEAD, contributors or len(updates), total.ciphertexts)


def lose(desk, site, number):
    """The site's update of a round comes too late: it is not in the sum, and the coordinator has it all the same."""
    taken, late = desk.take, {}

    def take(sender, reply):
        if isinstance(reply, UpdateReply) and (sender, reply.round) == (site, number):
            late[sender] = reply
        else:
            taken(sender, reply)

    desk.take = take
    return late


# --- who sends a head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["plan", "shares"])
def test_a_head_whose_kind_is_too_few_this_time_is_not_sent_and_stays_as_it_was(make_desk, phase):
    """The other hospital is not on the key list, or on it and takes no part: this site's head would be read as it is."""
    desk = make_desk(training={"rounds": 3})
    request = desk.play(until=("round", 2), away=lambda now, number, site: (now, number, site) == (phase, 1, LAST_SITE))
    assert (LAST_SITE in desk.listed[1], LAST_SITE in desk.taking_part[1]) == (phase == "shares", False)
    assert scopes_of(desk.updates[1][ME]) == ["global"]
    assert waits(desk, ME) == [(1, ["kind/hospital"])]
    assert scopes_of(desk.updates[1][PEER]) == ["global", "kind/bank"], "the banks are not held up"
    assert waits(desk, PEER) == []

    before = desk.state(ME).scopes
    assert [each.scope for each in request[ME].previous[0].sums] == ["global"]
    desk.take(ME, desk.ask(ME, request[ME]))
    after = desk.state(ME).scopes
    assert after["kind/hospital"] == before["kind/hospital"], "weights, momentum and range"
    assert after["global"].weights != before["global"].weights


def test_a_head_that_waited_goes_on_when_its_kind_is_there_again(make_desk):
    desk = make_desk(training={"rounds": 4})
    desk.play(away=lambda phase, number, site: (phase, number, site) == ("plan", 1, LAST_SITE))
    assert [scopes_of(desk.updates[number][ME]) for number in (1, 2, 3, 4, 5)] == [
        ["global"],
        ["global"],
        ["global", "kind/hospital"],
        ["global", "kind/hospital"],
        ["kind/hospital"],
    ]
    assert desk.approved[ME].digests == desk.approved[LAST_SITE].digests
    starts = {desk.updates[number][ME].digests["kind/hospital"] for number in (1, 2, 3)}
    assert len(starts) == 1, "nothing happened to it until then"
    assert desk.approved[ME].digests["kind/hospital"] not in starts


def test_of_three_hospitals_two_sum_their_heads_while_one_is_away_from_the_start(make_desk):
    desk = make_desk(sites=THREE_CLINICS)
    request = desk.play(until=("round", 2), away=lambda phase, number, site: (phase, site) == ("shares", THIRD))
    assert desk.taking_part[1] == desk.in_order((PEER, ME, LAST_SITE))
    sums = {each.scope: each.contributors for each in request[ME].previous[0].sums}
    assert sums == {"global": 3, "kind/hospital": 2}
    before = desk.state(ME).scopes["kind/hospital"].weights
    for site in (ME, LAST_SITE):
        desk.take(site, desk.ask(site, request[site]))
    after = {desk.state(site).scopes["kind/hospital"].weights for site in (ME, LAST_SITE)}
    assert len(after) == 1
    assert before not in after


def test_a_plan_that_wants_three_in_a_head_has_two_wait(make_desk):
    desk = make_desk(sites=THREE_CLINICS, cohort={"min_contributors": 3})
    desk.play(until=("unmask", 1), away=lambda phase, number, site: (phase, site) == ("shares", THIRD))
    assert scopes_of(desk.updates[1][ME]) == ["global"]
    assert waits(desk, ME) == [(1, ["kind/hospital"])]


def test_in_the_closing_round_a_hospital_alone_sends_nothing(make_desk):
    desk = make_desk()
    request = desk.play(
        until=("round", 3), away=lambda now, number, site: (now, number, site) == ("round", 2, LAST_SITE)
    )
    assert LAST_SITE not in desk.taking_part[3]
    assert scopes_of(desk.ask(ME, request[ME])) == []
    assert waits(desk, ME) == [(3, ["kind/hospital"])]


# --- what is masked, and when it opens ----------------------------------------------------------------------------------


def test_the_masks_of_heads_cancel_in_the_whole_and_in_no_part(make_desk):
    desk = make_desk(sites=THREE_CLINICS)
    desk.play(until=("unmask", 1))
    key = GroupKey.from_bytes(desk.state(ME).group_keys[0], epoch=0, params=desk.plan.packing.params).secret
    updates, modulus = desk.updates[1], desk.plan.packing.params.plain_modulus

    def padding(*sites):
        """The last 1000 slots of a sum: zeros, but for the masks."""
        return decrypt_slots(key, head_sum(desk, *(updates[site] for site in sites)).ciphertexts)[-1000:]

    for part in ((ME,), (LAST_SITE,), (THIRD,), (ME, LAST_SITE), (ME, THIRD), (LAST_SITE, THIRD)):
        slots = padding(*part)
        assert modulus * 0.4 < slots.mean() < modulus * 0.6, f"{part}: uniform"
    assert not padding(ME, LAST_SITE, THIRD).any()


def test_a_site_wants_the_keys_of_its_kind_also_where_they_are_not_its_neighbours(make_desk):
    """Of 24 sites a site has ten neighbours; whom it masks its head with is another matter."""
    sites = (*((f"clinic-{number:02}", "hospital") for number in range(11)), (ME, "hospital"))
    sites += tuple((f"bank-{number:02}", "bank") for number in range(12))
    desk = make_desk(sites=sites, cohort={"max_sites": 24})
    desk.ask(ME, desk.offer(1))
    keys = {
        name: advertise(draw_secrets(), desk.federation, 1, identity=service.identity)
        for name, service in desk.services.items()
    }
    keys[ME] = desk.ask(ME, desk.offer(1)).keys[0]
    graph = round_graph(desk.federation, 1, tuple(keys))
    around, kin = set(graph.neighbours[ME]), set(graph.kin[ME])
    assert (len(around), len(kin), len(kin - around) > 0) == (10, 11, True)

    def asked(names):
        positions = desk.federation.positions(tuple(keys))
        wanted = tuple(keys[name] for name in sorted(names))
        return ShareRequest(run=desk.federation.run, round=1, listed=positions, keys=wanted)

    for names in (around, kin, around | kin - {min(kin - around)}, set(keys) - {ME}):
        code, words = refused(desk, asked(names))
        assert (code, "got keys of" in words) == ("Malformed", True)
    forged = replace(
        asked(around | kin),
        keys=tuple(
            replace(each, share_key=bytes(range(32))) if each.site == min(kin - around) else each
            for each in asked(around | kin).keys
        ),
    )
    assert refused(desk, forged)[0] == "WrongKey", "the coordinator's key for one of its kind"
    shares = desk.ask(ME, asked(around | kin)).shares
    check_dealt(shares, desk.federation, graph, dealer=ME)
    assert set(shares.boxes) == around, "shares go to neighbours alone"


# --- what a site believes of a sum --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_vanished(make_desk):
    """The other hospital's update of round 1 came too late: the head is closed, the adapter is open."""
    desk = make_desk()
    late = lose(desk, LAST_SITE, 1)
    request = desk.play(until=("round", 2))[ME]
    assert [each.scope for each in request.previous[0].sums] == ["global"]
    return desk, request, late[LAST_SITE]


ALTHOUGH_ONE_VANISHED = {
    "of-both": lambda d, late: head_sum(d, d.updates[1][ME], late),
    "of-both-counted-as-one": lambda d, late: head_sum(d, d.updates[1][ME], late, contributors=1),
    "of-this-site": lambda d, late: head_sum(d, d.updates[1][ME]),
    "of-this-site-counted-as-two": lambda d, late: head_sum(d, d.updates[1][ME], contributors=2),
    "of-the-other": lambda d, late: head_sum(d, late),
    "empty": lambda d, late: ScopedSum(HEAD, 2, ()),
}


@pytest.mark.parametrize("forge", ALTHOUGH_ONE_VANISHED.values(), ids=ALTHOUGH_ONE_VANISHED)
def test_a_sum_with_the_head_although_one_of_its_kind_vanished_is_refused(one_vanished, forge):
    """Also the true sum of both, which decrypts and has the right tags: who survived is one story for all."""
    desk, request, late = one_vanished
    sums = (*request.previous[0].sums, forge(desk, late))
    code, words = refused(desk, told(request, sums=sums))
    assert (code, f"got scopes ['global', '{HEAD}'], wanted ['global']" in words) == ("Malformed", True), words


def test_the_head_of_a_round_in_which_one_vanished_stays_as_it_was(one_vanished):
    desk, request, _ = one_vanished
    before = desk.state(ME).scopes
    assert desk.code(ME, request) == "UpdateReply"
    after = desk.state(ME).scopes
    assert after[HEAD] == before[HEAD]
    assert after["global"].weights != before["global"].weights


def test_a_sum_without_the_head_although_all_of_its_kind_survived_is_refused(make_desk):
    """Another site vanished: that is no reason. Left out for some, the head would be another at each."""
    desk = make_desk()
    lose(desk, OTHER, 1)
    request = desk.play(until=("round", 2))[ME]
    alone = tuple(each for each in request.previous[0].sums if each.scope == "global")
    code, words = refused(desk, told(request, sums=alone))
    assert (code, f"got scopes ['global'], wanted ['global', '{HEAD}']" in words) == ("Malformed", True), words
    assert desk.code(ME, request) == "UpdateReply"


def test_a_head_that_waited_has_no_sum(make_desk):
    """Nobody sent one; whatever is handed down as one is not."""
    desk = make_desk()
    request = desk.play(until=("round", 2), away=lambda phase, number, site: (phase, site) == ("shares", LAST_SITE))[ME]
    forged = ScopedSum(HEAD, 2, request.previous[0].sums[0].ciphertexts)
    code, words = refused(desk, told(request, sums=(*request.previous[0].sums, forged)))
    assert (code, "wanted ['global']" in words) == ("Malformed", True), words


def test_a_site_whose_own_update_was_lost_takes_no_head(make_desk):
    """It masked with the two others, so their heads do not open without its own; a sum of all three is another story."""
    desk = make_desk(sites=THREE_CLINICS, training={"rounds": 3})
    late = lose(desk, ME, 1)
    request = desk.play(until=("round", 3))[ME]
    first, second = request.previous
    assert [[each.scope for each in down.sums] for down in (first, second)] == [["global"], ["global", HEAD]]
    others = [desk.updates[1][site] for site in (LAST_SITE, THIRD)]
    for forged in (head_sum(desk, *others), head_sum(desk, late[ME], *others)):
        lie = replace(request, previous=(replace(first, sums=(*first.sums, forged)), second))
        code, words = refused(desk, lie)
        assert (code, "sums of round 1" in words) == ("Malformed", True), words
    assert desk.code(ME, request) == "UpdateReply"


# --- a site that was away -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def returning(make_desk):
    """This site was away when rounds 1 and 2 were played; two of its kind were there."""
    desk = make_desk(sites=THREE_CLINICS, training={"rounds": 3})
    missed = (("shares", 1), ("round", 1))
    request = desk.play(until=("round", 3), away=lambda phase, number, site: site == ME and (phase, number) in missed)[
        ME
    ]
    assert [[each.scope for each in down.sums] for down in request.previous] == [["global", HEAD]] * 2
    return desk, request


RETURNING = {
    "of-one": (lambda d, u: head_sum(d, u[LAST_SITE]), "Tampered"),
    "of-one-counted-as-two": (lambda d, u: head_sum(d, u[LAST_SITE], contributors=2), "Tampered"),
    "of-one-twice": (lambda d, u: head_sum(d, u[LAST_SITE], u[LAST_SITE]), "Tampered"),
    "miscounted": (lambda d, u: head_sum(d, u[LAST_SITE], u[THIRD], contributors=3), "Malformed"),
    "of-another-round": (lambda d, u: head_sum(d, d.updates[1][LAST_SITE], d.updates[1][THIRD]), "Tampered"),
    "of-the-adapter": (lambda d, u: replace(d.downs[2].sums[0], scope=HEAD), "Tampered"),
    "of-banks": (lambda d, u: replace(d.downs[2].sums[1], scope="kind/bank"), "Malformed"),
    "empty": (lambda d, u: ScopedSum(HEAD, 2, ()), "Malformed"),
}


@pytest.mark.parametrize(("forge", "code"), RETURNING.values(), ids=RETURNING)
def test_a_returner_takes_no_head_but_that_of_the_survivors_of_its_kind(returning, forge, code):
    desk, request = returning
    asked = told(request, sums=(request.previous[-1].sums[0], forge(desk, desk.updates[2])))
    got, words = desk.stops(ME, asked) if code == "Tampered" else refused(desk, asked)
    assert (got, HEAD in words or "kind/bank" in words) == (code, True), words


def test_a_returner_does_not_go_without_the_adapter(returning):
    desk, request = returning
    for sums in ((), request.previous[-1].sums[1:], request.previous[-1].sums[1:] * 2):
        code, words = refused(desk, told(request, sums=sums))
        assert (code, "got scopes" in words) == ("Malformed", True), words


def test_a_returner_takes_the_heads_that_are_there(returning):
    desk, request = returning
    reply = desk.ask(ME, request)
    assert isinstance(reply, UpdateReply)
    theirs = desk.ask(LAST_SITE, desk.round_request(LAST_SITE, 3))
    assert reply.digests == theirs.digests, "adapter and head are those of the others"


def test_a_returner_leaves_a_head_as_it_was_in_a_round_that_has_none(make_desk):
    """Two of its kind survived; a third had masked with them and vanished, which this site cannot know."""
    desk = make_desk(
        sites=(*THREE_CLINICS, ("vierte-klinik", "hospital")), cohort={"max_sites": 5}, training={"rounds": 3}
    )
    lose(desk, "vierte-klinik", 2)
    request = desk.play(until=("round", 3), away=lambda phase, number, site: (phase, site) == ("plan", ME))[ME]
    assert request.previous[1].survivors == names(desk, PEER, LAST_SITE, THIRD)
    assert [[each.scope for each in down.sums] for down in request.previous] == [["global", HEAD], ["global"]]
    still_masked = head_sum(desk, desk.updates[2][LAST_SITE], desk.updates[2][THIRD])
    assert desk.stops(ME, told(request, sums=(*request.previous[1].sums, still_masked)))[0] == "Tampered"
    theirs = desk.ask(LAST_SITE, desk.round_request(LAST_SITE, 3))
    assert desk.ask(ME, request).digests == theirs.digests
