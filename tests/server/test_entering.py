"""How a run begins: who is let in, and whose group key is taken."""

import msgspec
import pytest
from played_sites import ANNA, BEIAN, FOUR, HARBOUR, RENJI, RUN, at, away, change, federate, lost, played_plan

from fedseek.errors import CohortTooSmall, WrongModel
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, join_fields, sign
from fedseek.messages import KeyRequest, RoundRequest, decode_reply, decode_request
from fedseek_server.replies import SETUP_REPLY_BYTES

ALL = (HARBOUR, ANNA, RENJI, BEIAN)
FIRST = FOUR[0][0]  # the lowest node, and so the one that is asked for the key


def signed_for(federated, *fields, context=CONTEXT_PLAN, signer=ANNA):
    return sign(federated.site(signer).identity, context, join_fields(*fields))


def with_keys(data, place, **fields):
    keys = list(decode_reply(data).keys)
    keys[place] = msgspec.structs.replace(keys[place], **fields)
    return change(data, keys=tuple(keys))


REFUSED = {
    "another run": (lambda f, d: change(d, run="another"), "WrongRound"),
    "another round": (lambda f, d: change(d, round=2), "WrongRound"),
    "no signature": (lambda f, d: change(d, signature=bytes(64)), "WrongKey"),
    "another purpose": (
        lambda f, d: change(
            d, signature=sign(f.site(ANNA).identity, CONTEXT_ADAPTER, f.coordinator._state.federation.bound)
        ),
        "WrongKey",
    ),
    "another plan": (
        lambda f, d: change(d, signature=signed_for(f, RUN.encode(), b"0" * 64, f.coordinator.roster.digest())),
        "WrongKey",
    ),
    "another roster": (
        lambda f, d: change(d, signature=signed_for(f, RUN.encode(), f.coordinator.plan.digest.encode(), bytes(32))),
        "WrongKey",
    ),
    "a name that is taken": (lambda f, d: f.site(FIRST).done["PlanOffer", 1][1], "WrongRound"),
    "another's name": (lambda f, d: change(d, site=HARBOUR), "WrongKey"),
    "a stranger's name": (lambda f, d: change(d, site="陌生人"), "WrongKey"),
    "too few scopes": (lambda f, d: change(d, ciphertexts={"global": 1}), "Malformed"),
    "scopes of another kind": (lambda f, d: change(d, num_values={"global": 5, "kind/bank": 3}), "Malformed"),
    "a key nobody asked for": (
        lambda f, d: change(d, group_key=decode_reply(f.site(FIRST).done["PlanOffer", 1][1]).group_key),
        "Malformed",
    ),
    "keys of another round": (lambda f, d: with_keys(d, 0, round=2), "WrongRound"),
    "keys in the wrong order": (lambda f, d: change(d, keys=decode_reply(d).keys[::-1]), "WrongRound"),
    "another site's keys": (
        lambda f, d: change(d, keys=decode_reply(f.site(FIRST).done["PlanOffer", 1][1]).keys),
        "WrongKey",
    ),
    "altered keys": (lambda f, d: with_keys(d, 1, share_key=bytes(32)), "WrongKey"),
    "unsigned keys": (lambda f, d: with_keys(d, 1, signature=bytes(64)), "WrongKey"),
    "too large": (lambda f, d: bytes(SETUP_REPLY_BYTES + 1), "TooLarge"),
    "truncated": (lambda f, d: d[:-1], "Malformed"),
}


@pytest.mark.parametrize(("alter", "code"), REFUSED.values(), ids=list(REFUSED))
def test_a_site_that_is_not_let_in_keeps_nobody_waiting(alter, code):
    """It is offered the plan again, and takes part from round 3 on."""
    federated = federate(played_plan(rounds=3))
    federated.play(reply=at("plan", 1, ANNA, lambda data: alter(federated, data)))
    assert federated.events("rejected", "phase", "node", "code") == [("plan", federated.node(ANNA), code)]
    assert federated.events("absent", "sites") == [([ANNA],)]
    assert {number: ANNA in names for number, names in federated.ended.items()} == {
        1: False,
        2: False,
        3: True,
        4: True,
    }
    federated.check_adapter(ANNA)


def test_all_those_refusals_change_nothing():
    federated = federate(played_plan(rounds=1))

    def refuse_first(data):
        for alter, _ in REFUSED.values():
            federated.give(federated.node(ANNA), alter(federated, data))
        return data

    federated.play(reply=at("plan", 1, ANNA, refuse_first))
    assert federated.events("rejected", "code") == [(code,) for _, code in REFUSED.values()]
    assert federated.ended == dict.fromkeys((1, 2), ALL)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model_sha256": "0" * 64}, "holds base model 0000"),
        ({"num_values": {"global": 6, "kind/hospital": 4}}, "trains 6 values of 'global' in 1 ciphertexts"),
        ({"ciphertexts": {"global": 2, "kind/hospital": 1}}, "trains 5 values of 'global' in 2 ciphertexts"),
    ],
)
def test_a_site_with_another_model_ends_the_run(fields, text):
    federated = federate(played_plan())
    with pytest.raises(WrongModel, match=text):
        federated.play(reply=at("plan", 1, ANNA, lambda data: change(data, **fields)))


# --- the group key --------------------------------------------------------------------------------------------------


def makers(federated):
    """Who was asked for a group key in an exchange of its own, and for which epoch."""
    return [
        (federated.sites[node].name, decode_request(data).epoch, exchange.round)
        for exchange in federated.exchanges
        for node, data in exchange.requests.items()
        if isinstance(decode_request(data), KeyRequest)
    ]


def test_one_node_is_asked_for_the_key_with_the_plan():
    federated = federate(played_plan())
    federated.play()
    offers = {node: decode_request(data).make_key for node, data in federated.exchanges[0].requests.items()}
    assert offers == {100: True, 101: False, 102: False, 103: False}
    assert makers(federated) == []


def with_group_key(data, **fields):
    return change(data, group_key=msgspec.structs.replace(decode_reply(data).group_key, **fields))


def with_envelopes(data, alter):
    return with_group_key(data, envelopes=alter(decode_reply(data).group_key.envelopes))


BAD_KEYS = {
    "lost": lambda data: b"",
    "none": lambda data: change(data, group_key=None),
    "another epoch": lambda data: with_group_key(data, epoch=1),
    "too few": lambda data: with_envelopes(data, lambda sealed: dict(list(sealed.items())[:3])),
    "too many": lambda data: with_envelopes(data, lambda sealed: {**sealed, "陌生人": b"x"}),
    "no such site": lambda data: with_envelopes(
        data, lambda sealed: {("陌生人" if name == ANNA else name): box for name, box in sealed.items()}
    ),
}


@pytest.mark.parametrize("alter", BAD_KEYS.values(), ids=list(BAD_KEYS))
def test_if_that_node_makes_no_good_key_another_site_is_asked(alter):
    federated = federate(played_plan(rounds=3))
    federated.play(reply=at("plan", 1, FIRST, alter))
    assert makers(federated) == [(HARBOUR, 0, 1)], "the first of the roster that was admitted"
    assert federated.ended == {1: ALL[:3], 2: ALL[:3], 3: ALL, 4: ALL}
    federated.check_adapter(FIRST)


def sealed_alike(data, **fields):
    return change(data, group_key=msgspec.structs.replace(decode_reply(data).group_key, **fields))


@pytest.mark.parametrize(
    ("alter", "code"),
    [
        (lambda f, d: b"", None),
        (lambda f, d: sealed_alike(d, epoch=1), "Malformed"),
        (lambda f, d: sealed_alike(d, envelopes={}), "Malformed"),
        (lambda f, d: change(d, site=ANNA), "WrongRound"),
        (lambda f, d: f.site(HARBOUR).done["PlanOffer", 1][1], "WrongRound"),
    ],
    ids=["lost", "epoch", "envelopes", "sender", "kind"],
)
def test_and_if_that_one_fails_the_next(alter, code):
    federated = federate(played_plan(rounds=3))
    changes = {("plan", FIRST): lambda f, d: b"", ("key", HARBOUR): alter}

    def reply(phase, number, site, data):
        return changes.get((phase, site), lambda f, d: d)(federated, data)

    federated.play(reply=reply)
    assert makers(federated) == [(HARBOUR, 0, 1), (ANNA, 0, 1)]
    assert federated.events("rejected", "phase", "code") == ([] if code is None else [("key", code)])
    assert federated.ended[1] == ALL[:3]
    federated.check_adapter(HARBOUR)


def test_without_a_group_key_no_run_begins():
    federated = federate(played_plan())
    with pytest.raises(CohortTooSmall, match="no site made a group key"):
        federated.play(reply=lambda phase, number, site, data: b"" if phase == "key" or site == FIRST else data)
    assert [name for name, _, _ in makers(federated)] == list(ALL[:3])


# --- its rotation ---------------------------------------------------------------------------------------------------


def epochs(federated):
    """By round, the epoch its updates were encrypted under."""
    return {down.round: down.epoch for down in federated.coordinator._state.history.ended}


def rotate_after(federated, *numbers, **options):
    """Ask for a new group key when these rounds are over."""

    def reply(phase, number, site, data):
        if phase == "unmask" and number in numbers and site == BEIAN:
            federated.coordinator.request_rotation()
        alter = options.get("reply")
        return alter(phase, number, site, data) if alter else data

    federated.play(reply=reply, away=options.get("away"))


def test_a_key_that_is_wanted_is_made_before_the_next_round():
    federated = federate(played_plan(rounds=3))
    rotate_after(federated, 1)
    assert makers(federated) == [(HARBOUR, 1, 2)]
    assert epochs(federated) == {1: 0, 2: 1, 3: 1, 4: 1}
    assert federated.ended == dict.fromkeys((1, 2, 3, 4), ALL)
    fingerprints = {site.group_keys[1].secret.fingerprint() for site in federated.sites.values()}
    assert len(fingerprints) == 1
    assert fingerprints != {federated.site(ANNA).group_keys[0].secret.fingerprint()}
    federated.check_adapter(ANNA)


def test_a_key_gets_old_by_the_coordinators_clock():
    now = [1_000_000.0]
    federated = federate(played_plan(rounds=4, key_days=30), clock=lambda: now[0])

    def tick(phase, number, site):
        if (phase, number, site) == ("unmask", 2, BEIAN):
            now[0] += 30 * 86_400 - 7_000  # two hours before it is 30 days old, sites begin to refuse soon
        return False

    federated.play(away=tick)
    assert makers(federated) == [(HARBOUR, 1, 3)]
    assert epochs(federated) == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}


def test_if_the_asked_site_does_not_make_it_the_next_is_asked():
    federated = federate(played_plan(rounds=3))
    rotate_after(federated, 1, away=away(("key", 2, HARBOUR), ("key", 2, ANNA)))
    assert makers(federated) == [(HARBOUR, 1, 2), (ANNA, 1, 2), (RENJI, 1, 2)]
    assert epochs(federated) == {1: 0, 2: 1, 3: 1, 4: 1}


def test_if_nobody_makes_it_the_old_one_stays_and_they_are_asked_again():
    federated = federate(played_plan(rounds=3))
    rotate_after(federated, 1, reply=lambda phase, number, site, data: b"" if (phase, number) == ("key", 2) else data)
    assert federated.events("rotation-postponed", "round", "epoch") == [(2, 1)]
    assert epochs(federated) == {1: 0, 2: 0, 3: 1, 4: 1}
    assert federated.ended == dict.fromkeys((1, 2, 3, 4), ALL)


def test_a_site_without_the_newest_key_is_not_asked_for_the_next():
    """It would take the next epoch for another one, and refuse."""
    federated = federate(played_plan(rounds=3))
    federated.coordinator.request_rotation()  # before any site has opened the first
    federated.play()
    assert makers(federated) == [(HARBOUR, 1, 2)]
    assert federated.events("rotation-postponed", "round") == [(1,)]


def test_a_returner_gets_every_key_it_needs():
    """Away in round 2, before two rotations: it gets both keys, and reads the sums it missed under each."""
    federated = federate(played_plan(rounds=5))
    rotate_after(federated, 1, 2, away=away(("round", 2, ANNA)))
    assert epochs(federated) == {1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2}
    back = next(each for each in federated.site(ANNA).log if isinstance(each, RoundRequest) and each.round == 4)
    assert (list(back.envelopes), back.epoch) == ([1, 2], 2)
    assert [(down.round, down.epoch) for down in back.previous] == [(1, 0), (2, 1), (3, 2)]
    federated.check_adapter(ANNA)


def test_a_site_that_is_away_until_the_release_gets_them_there():
    federated = federate(played_plan(rounds=3))
    rotate_after(federated, 2, away=lambda phase, number, site: site == ANNA and number >= 2 and phase != "release")
    request = federated.site(ANNA).log[-1]
    assert (list(request.envelopes), [down.round for down in request.previous]) == ([1], [1, 2, 3])
    assert ANNA in federated.coordinator.approvals
    federated.check_adapter(ANNA)


def test_an_update_under_the_old_key_is_refused_and_names_both_epochs():
    federated = federate(played_plan(rounds=4))
    rotate_after(federated, 1, reply=at("round", 2, ANNA, lambda data: change(data, epoch=0)))
    ((text,),) = federated.events("rejected", "text")
    assert text == "update of site 'st-anna': encrypted under the key of epoch 0, wanted epoch 1"
    assert ANNA not in federated.ended[2]
    federated.check_adapter(ANNA)


def test_two_copies_of_one_answer_make_one_key():
    federated = federate(played_plan())
    federated.coordinator.request_rotation()
    federated.play(reply=lost(("key", 2, HARBOUR)))
    keys = {site.group_keys[1].secret.fingerprint() for site in federated.sites.values()}
    assert len(keys) == 1
