"""Shares that are revealed: false ones are told apart and named, and a sum opens only if enough are true."""

import msgspec
import pytest
from played_sites import ANNA, BEIAN, HARBOUR, RENJI, at, change, federate, lost, played_plan

from fedseek.deal import _dealt_message
from fedseek.identity.signing import CONTEXT_SHARES, CONTEXT_UNMASK, sign
from fedseek.messages import MASK_KEY, SELF_MASK, decode_reply, encode_message
from fedseek.reveal import revealed_message

ALL = (HARBOUR, ANNA, RENJI, BEIAN)


def revealed(federated, data, *, number=1, participants=ALL, survivors=ALL, **fields) -> bytes:
    """Alter revealed shares and sign them again, as a site that lies would."""
    reply = msgspec.structs.replace(decode_reply(data), **fields)
    site = federated.site(reply.site)
    message = revealed_message(site.federation, number, participants, survivors, reply.self_masks, reply.mask_keys)
    return encode_message(msgspec.structs.replace(reply, signature=sign(site.identity, CONTEXT_UNMASK, message)))


def false_about(federated, data, *dealers, number=1):
    """False shares of the self masks of these dealers."""
    told = decode_reply(data).self_masks
    masks = {name: bytes(16) if name in dealers else told[name] for name in told}
    return revealed(federated, data, number=number, self_masks=masks)


def liars(federated, *sites, dealers=(RENJI,)):
    """These sites reveal false shares in round 1."""

    def reply(phase, number, site, data):
        if (phase, number) == ("unmask", 1) and site in sites:
            return false_about(federated, data, *dealers)
        return data

    return reply


def test_false_shares_of_one_site_are_left_out_and_named():
    federated = federate(played_plan())
    federated.play(reply=liars(federated, ANNA))
    assert federated.events("false-shares", "round", "site", "dealers") == [(1, ANNA, [RENJI])]
    assert federated.ended == dict.fromkeys((1, 2, 3), ALL)
    federated.check_adapter(ANNA)


def test_a_site_that_is_silent_about_a_mask_counts_as_not_having_answered():
    federated = federate(played_plan())

    def silent(data):
        told = decode_reply(data).self_masks
        return revealed(federated, data, self_masks={name: share for name, share in told.items() if name != RENJI})

    federated.play(reply=at("unmask", 1, ANNA, silent))
    assert federated.events("rejected", "site", "code") == [(ANNA, "Malformed")]
    assert federated.ended[1] == ALL


def test_with_false_shares_of_too_many_the_round_is_given_up_and_the_next_one_works():
    federated = federate(played_plan(rounds=3))
    federated.play(reply=liars(federated, ANNA, HARBOUR, dealers=ALL))
    assert sorted(federated.events("false-shares", "site")) == [(HARBOUR,), (ANNA,)]
    assert federated.events("round-failed", "round", "code") == [(1, "CohortTooSmall")]
    assert federated.ended == {1: (), 2: ALL, 3: ALL, 4: ALL}
    federated.check_adapter(ANNA)


def test_false_shares_of_a_vanished_sites_mask_key_are_found_too():
    federated = federate(played_plan(rounds=3))
    others = tuple(name for name in ALL if name != BEIAN)

    def lie(phase, number, site, data):
        if (phase, number, site) == ("round", 1, BEIAN):
            return b""
        if (phase, number, site) == ("unmask", 1, ANNA):
            return revealed(federated, data, survivors=others, mask_keys={BEIAN: bytes(16)})
        return data

    federated.play(reply=lie)
    assert federated.events("false-shares", "site", "dealers") == [(ANNA, [BEIAN])]
    ((number, text),) = federated.events("round-failed", "round", "text")
    assert number == 1
    assert f"2 sites revealed a true share of {MASK_KEY!r} of site '北岸银行', wanted 3" in text
    assert federated.ended[2] == others


@pytest.mark.parametrize("spoilt", ["secret_digests", "share_digests"])
def test_a_dealer_that_vouched_for_another_secret_costs_the_round_and_is_named(spoilt):
    federated = federate(played_plan(rounds=3))

    def misdeal(data):
        site, shares = federated.site(ANNA), decode_reply(data).shares
        other = bytes(32)
        digests = {
            "secret_digests": {**shares.secret_digests, SELF_MASK: other},
            "share_digests": {name: {**each, SELF_MASK: other} for name, each in shares.share_digests.items()},
        }
        shares = msgspec.structs.replace(shares, **{spoilt: digests[spoilt]})
        message = _dealt_message(site.federation, ANNA, 1, shares.boxes, shares.share_digests, shares.secret_digests)
        signature = sign(site.identity, CONTEXT_SHARES, message)
        return change(data, shares=msgspec.structs.replace(shares, signature=signature))

    federated.play(reply=at("shares", 1, ANNA, misdeal))
    ((number, code, text),) = federated.events("round-failed", "round", "code", "text")
    assert (number, code) == (1, "Malformed" if spoilt == "secret_digests" else "CohortTooSmall")
    assert "site 'st-anna'" in text
    accused = federated.events("false-shares", "dealers")
    assert accused == ([] if spoilt == "secret_digests" else [([ANNA],)] * 4), "all accuse the same dealer"
    assert federated.ended == {1: (), 2: ALL, 3: ALL, 4: ALL}


REFUSED = {
    "signature": (lambda f, d: change(d, signature=bytes(64)), "WrongKey"),
    "survivors": (lambda f, d: revealed(f, d, survivors=ALL[:3]), "WrongKey"),
    "participants": (lambda f, d: revealed(f, d, participants=ALL[:3]), "WrongKey"),
    "round": (lambda f, d: revealed(f, d, number=2, round=2), "WrongRound"),
    "sender": (lambda f, d: change(d, site=HARBOUR), "WrongRound"),
    "run": (lambda f, d: change(d, run="another"), "WrongRound"),
    "kind": (lambda f, d: f.site(ANNA).done["RoundRequest", 1][1], "WrongRound"),
    "too-few": (lambda f, d: revealed(f, d, self_masks={ANNA: decode_reply(d).self_masks[ANNA]}), "Malformed"),
    "both-halves": (lambda f, d: revealed(f, d, mask_keys={RENJI: bytes(16)}), "Malformed"),
    "a-stranger": (
        lambda f, d: revealed(f, d, self_masks={**decode_reply(d).self_masks, "陌生人": bytes(16)}),
        "Malformed",
    ),
    "size": (lambda f, d: d + bytes(5 << 20), "TooLarge"),
}


@pytest.mark.parametrize(("alter", "code"), REFUSED.values(), ids=list(REFUSED))
def test_shares_that_are_not_those_asked_for_are_refused_and_the_site_counts_as_silent(alter, code):
    federated = federate(played_plan())
    federated.play(reply=at("unmask", 1, ANNA, lambda data: alter(federated, data)))
    assert federated.events("rejected", "phase", "round", "site", "code") == [("unmask", 1, ANNA, code)]
    assert federated.events("dropout", "phase", "round", "site") == [("unmask", 1, ANNA)]
    assert federated.ended == dict.fromkeys((1, 2, 3), ALL), "three of four are enough"
    federated.check_adapter(ANNA)


def test_what_an_old_announcement_got_opens_nothing_new():
    """Shares revealed in round 1, sent again in round 2."""
    federated = federate(played_plan())
    federated.play(reply=at("unmask", 2, ANNA, lambda data: federated.site(ANNA).done["UnmaskRequest", 1][1]))
    assert federated.events("rejected", "round", "code") == [(2, "WrongRound")]
    assert federated.ended[2] == ALL


def test_a_survivor_is_asked_only_about_its_neighbours_and_told_who_signed():
    federated = federate(played_plan())
    federated.play(reply=lost(("round", 1, BEIAN)))
    request = next(each for each in federated.site(ANNA).log if type(each).__name__ == "UnmaskRequest")
    assert request.survivors == (0, 1, 2)
    assert list(request.presence) == [HARBOUR, RENJI]


# --- many sites: a sparse graph -------------------------------------------------------------------------------------

MANY = [(f"医院-{number:02d}", "hospital") for number in range(24)]


def test_24_sites_on_a_sparse_graph_with_two_that_vanish():
    """22 of 24 is what the graph allows for; a third one less, and the round is given up."""
    federated = federate(played_plan(kinds=["hospital"], max_sites=24), MANY)
    names = [name for name, _ in MANY]
    federated.play(reply=lost(("round", 2, names[3]), ("round", 2, names[17])))
    graph = federated.sites[100].graphs[2]
    assert len(graph.neighbours[names[0]]) < 23
    assert graph.min_survivors == 22
    assert {number: len(survivors) for number, survivors in federated.ended.items()} == {1: 24, 2: 22, 3: 22}
    assert len(federated.coordinator.approvals) == 24
    for name in (names[0], names[3], names[23]):
        federated.check_adapter(name)
    request = next(each for each in federated.sites[100].log if type(each).__name__ == "RoundRequest")
    assert sorted(request.boxes) == sorted(federated.sites[100].graphs[1].neighbours[names[0]])


def test_24_sites_of_which_three_vanish_give_the_round_up():
    federated = federate(played_plan(kinds=["hospital"], rounds=3, max_sites=24), MANY)
    gone = [("round", 1, MANY[place][0]) for place in (1, 8, 20)]
    federated.play(reply=lost(*gone))
    assert {number: len(survivors) for number, survivors in federated.ended.items()} == {1: 0, 2: 0, 3: 24, 4: 24}
    federated.check_adapter(MANY[8][0])
