"""Replies of a round that must be refused: each says why, changes nothing, and a right one may follow."""

import msgspec
import numpy as np
import pytest
from played_sites import ANNA, BEIAN, HARBOUR, RENJI, at, change, federate, played_plan

from fedseek.cohort import participants_message
from fedseek.deal import _dealt_message, advertise, draw_secrets
from fedseek.errors import AdapterDiverged, FedseekError, Malformed, TooLarge, WrongKey, WrongRound
from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.he.keys import SecretKey, encrypt_slots
from fedseek.he.packing import choose_packing
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PRESENCE, CONTEXT_RELEASE, CONTEXT_SHARES, sign
from fedseek.messages import PlanOffer, decode_reply, digest_message, encode_message

ALL = (HARBOUR, ANNA, RENJI, BEIAN)


def resigned(federated, signer, data, *, context=CONTEXT_ADAPTER, sender=None, **fields) -> bytes:
    """Alter an update and sign its digests again, as a site that lies would."""
    reply = decode_reply(data)
    reply = msgspec.structs.replace(reply, site=sender or reply.site, **fields)
    signed = digest_message(reply.run, reply.round, reply.digests)
    signature = sign(federated.site(signer).identity, context, signed)
    return encode_message(msgspec.structs.replace(reply, signature=signature))


def presence_over(federated, data, *, names=ALL, number=2, signer=ANNA, context=CONTEXT_PRESENCE) -> bytes:
    message = participants_message(federated.site(ANNA).federation, number, names)
    return change(data, presence=sign(federated.site(signer).identity, context, message))


def redealt(federated, data, *, signer=ANNA, **fields) -> bytes:
    """Alter the shares in an update and sign them again."""
    site, reply = federated.site(ANNA), decode_reply(data)
    shares = msgspec.structs.replace(reply.shares, **fields)
    parts = (shares.boxes, shares.share_digests, shares.secret_digests)
    message = _dealt_message(site.federation, ANNA, shares.round, *parts)
    signature = sign(federated.site(signer).identity, CONTEXT_SHARES, message)
    return change(data, shares=msgspec.structs.replace(shares, signature=signature))


def with_keys(federated, data, **fields) -> bytes:
    return change(data, keys=msgspec.structs.replace(decode_reply(data).keys, **fields))


def with_first_ciphertext(data: bytes, replace) -> bytes:
    first, *rest = decode_reply(data).update
    ciphertexts = (replace(bytes(first.ciphertexts[0])), *first.ciphertexts[1:])
    return change(data, update=(ScopedCiphertexts(first.scope, ciphertexts), *rest))


def foreign_ciphertext(value_bits, max_sites) -> bytes:
    params = choose_packing(value_bits, max_sites).params
    return encrypt_slots(SecretKey.generate(params), np.arange(8, dtype=np.uint64))[0]


def a_sum(federated) -> bytes:
    return federated.coordinator._state.history.ended[0].sums[0].ciphertexts[0]


def with_raw_field(data: bytes, name: str, value: object) -> bytes:
    document = msgspec.msgpack.decode(data)
    assert name == "note" or name in document
    return msgspec.msgpack.encode({**document, name: value})


def shares_of(data):
    return decode_reply(data).shares


REFUSED = {
    "another run": (lambda f, d: change(d, run="another"), WrongRound, "answered for run 'another'"),
    "an earlier round": (lambda f, d: resigned(f, ANNA, d, round=1), WrongRound, "round 1, wanted 2"),
    "a later round": (lambda f, d: resigned(f, ANNA, d, round=3), WrongRound, "round 3, wanted 2"),
    "another epoch": (lambda f, d: change(d, epoch=1), WrongKey, "the key of epoch 1, wanted epoch 0"),
    "another sender": (lambda f, d: resigned(f, HARBOUR, d, sender=HARBOUR), WrongRound, "admitted as 'st-anna'"),
    "a stranger": (lambda f, d: change(d, site="陌生人"), WrongKey, "not on the roster"),
    "another signer": (lambda f, d: resigned(f, HARBOUR, d), WrongKey, "key of site 'st-anna'"),
    "another purpose": (lambda f, d: resigned(f, ANNA, d, context=CONTEXT_RELEASE), WrongKey, "adapter-digest"),
    "no signature": (lambda f, d: change(d, signature=bytes(64)), WrongKey, "signature does not verify"),
    "another message": (lambda f, d: f.site(ANNA).done["PlanOffer", 1][1], WrongRound, "RoundRequest with PlanAdm"),
    # whom it masked with
    "no presence": (lambda f, d: change(d, presence=bytes(64)), WrongKey, "round-participants"),
    "fewer participants": (lambda f, d: presence_over(f, d, names=ALL[:3]), WrongKey, "round-participants"),
    "participants of another round": (lambda f, d: presence_over(f, d, number=1), WrongKey, "round-participants"),
    "presence of another": (lambda f, d: presence_over(f, d, signer=HARBOUR), WrongKey, "round-participants"),
    # shares for the next round
    "no shares": (lambda f, d: change(d, shares=None), Malformed, "for round 3: got none, wanted some"),
    "shares of the last round": (
        lambda f, d: change(d, shares=decode_reply(f.site(ANNA).done["ShareRequest", 1][1]).shares),
        WrongRound,
        "round 1, wanted 3",
    ),
    "shares dealt by another": (lambda f, d: redealt(f, d, signer=HARBOUR), WrongKey, "shares-dealt"),
    "an altered box": (
        lambda f, d: change(
            d, shares=msgspec.structs.replace(shares_of(d), boxes={**shares_of(d).boxes, HARBOUR: b"x"})
        ),
        WrongKey,
        "shares-dealt",
    ),
    "a box too few": (
        lambda f, d: redealt(f, d, boxes={name: box for name, box in shares_of(d).boxes.items() if name != HARBOUR}),
        Malformed,
        "not one of each secret",
    ),
    "a digest too few": (
        lambda f, d: redealt(f, d, secret_digests={"global": bytes(32)}),
        Malformed,
        "not one of each secret",
    ),
    # keys for the round after that
    "no keys": (lambda f, d: change(d, keys=None), Malformed, "keys of 0 rounds to come, wanted 1"),
    "keys of another round": (lambda f, d: with_keys(f, d, round=5), WrongRound, "round 5, wanted 4"),
    "keys of another site": (lambda f, d: with_keys(f, d, site=HARBOUR), WrongKey, "round keys of site 'harbour"),
    "altered keys": (lambda f, d: with_keys(f, d, mask_key=bytes(32)), WrongKey, "round-keys"),
    # the update itself
    "no update": (lambda f, d: change(d, update=()), Malformed, "sent scopes"),
    "too few scopes": (lambda f, d: change(d, update=decode_reply(d).update[:1]), Malformed, "sent scopes"),
    "a scope twice": (lambda f, d: change(d, update=decode_reply(d).update * 2), Malformed, "each once"),
    "too few digests": (lambda f, d: resigned(f, ANNA, d, digests={"global": bytes(32)}), Malformed, "signed digests"),
    "too few ciphertexts": (
        lambda f, d: change(d, update=tuple(ScopedCiphertexts(each.scope, ()) for each in decode_reply(d).update)),
        Malformed,
        "got 0 ciphertexts",
    ),
    "a truncated ciphertext": (lambda f, d: with_first_ciphertext(d, lambda one: one[:-1]), Malformed, "SEAL object"),
    "a bit flipped": (
        lambda f, d: with_first_ciphertext(d, lambda one: one[:20] + bytes([one[20] ^ 1]) + one[21:]),
        Malformed,
        "SEAL object",
    ),
    "an empty ciphertext": (lambda f, d: with_first_ciphertext(d, lambda one: b""), Malformed, "SEAL object"),
    "a ciphertext of other parameters": (
        lambda f, d: with_first_ciphertext(d, lambda one: foreign_ciphertext(8, 4)),
        Malformed,
        "SEAL object",
    ),
    "a sum for an update": (lambda f, d: with_first_ciphertext(d, lambda one: a_sum(f)), Malformed, "SEAL object"),
    # the bytes
    "truncated": (lambda f, d: d[:-1], Malformed, "refused"),
    "nothing": (lambda f, d: b"", Malformed, "refused"),
    "not MessagePack": (lambda f, d: b"\xc1" * 100, Malformed, "refused"),
    "trailing bytes": (lambda f, d: d + b"\0", Malformed, "refused"),
    "an unknown field": (lambda f, d: with_raw_field(d, "note", "x"), Malformed, "unknown field"),
    "another version": (lambda f, d: with_raw_field(d, "version", 2), Malformed, "refused"),
    "another kind": (lambda f, d: with_raw_field(d, "type", "Note"), Malformed, "refused"),
    "a request": (lambda f, d: next(iter(f.exchanges[0].requests.values())), Malformed, "refused"),
    "too large": (lambda f, d: d + bytes(8 << 20), TooLarge, "wanted at most"),
}


def test_an_update_that_is_refused_changes_nothing():
    """Each refusal says what is wrong; after all of them the site's real answer is taken and the sum is right."""
    federated = federate(played_plan(rounds=3))
    outcomes = {}

    def refuse_first(data):
        for case, (alter, _, text) in REFUSED.items():
            try:
                federated.coordinator.receive(federated.node(ANNA), alter(federated, data))
            except FedseekError as error:
                outcomes[case] = (type(error), text if text in str(error) else str(error))
        return data

    federated.play(reply=at("round", 2, ANNA, refuse_first))
    assert outcomes == {case: (error, text) for case, (_, error, text) in REFUSED.items()}
    assert federated.ended == dict.fromkeys((1, 2, 3, 4), ALL)
    federated.check_adapter(ANNA)
    assert len(federated.coordinator.approvals) == 4


@pytest.mark.parametrize("case", ["another epoch", "no presence", "an altered box", "a bit flipped", "truncated"])
def test_a_site_whose_update_is_refused_is_missing_from_the_round_and_no_other(case):
    federated = federate(played_plan(rounds=4))
    alter, error, _ = REFUSED[case]
    federated.play(reply=at("round", 2, ANNA, lambda data: alter(federated, data)))
    assert federated.events("rejected", "phase", "round", "site", "code") == [("round", 2, ANNA, error.__name__)]
    assert federated.events("dropout", "phase", "round", "site") == [("round", 2, ANNA)]
    assert {number: ANNA in names for number, names in federated.ended.items()} == {
        1: True,
        2: False,
        3: False,
        4: True,
        5: True,
    }
    federated.check_adapter(ANNA)


def test_a_site_sends_one_set_of_keys_for_a_round():
    """It was offered the plan again and sent keys for rounds 3 and 4; those for round 4 in its update must be the same."""
    federated = federate(played_plan(rounds=4))

    def from_a_second_copy(data):
        site, secrets = federated.site(ANNA), draw_secrets()
        return change(data, keys=advertise(secrets, site.federation, 4, identity=site.identity))

    alter = at("round", 2, ANNA, from_a_second_copy)
    federated.play(reply=lambda *where: alter(*where) if where[:3] != ("shares", 1, ANNA) else b"")
    assert [each.round for each in federated.site(ANNA).log if isinstance(each, PlanOffer)] == [1, 3, 5]
    ((code, text),) = federated.events("rejected", "code", "text")
    assert code == "WrongKey"
    assert "got others for round 4 than it sent before" in text
    assert {number: ANNA in names for number, names in federated.ended.items()} == {
        1: False,
        2: False,
        3: False,
        4: True,
        5: True,
    }


def test_a_site_that_is_not_on_the_next_key_list_deals_nothing_and_may_not():
    """Its shares for round 1 and its keys for round 3 were lost: it masks in round 2 and nobody can mask with it in 3."""
    federated = federate(played_plan(rounds=4))
    seen = []

    def refuse_first(phase, number, site, data):
        if (phase, number, site) == ("round", 2, ANNA):
            stray = decode_reply(federated.site(ANNA).done["ShareRequest", 2][1]).shares
            with pytest.raises(Malformed, match="for round 3: got some, wanted none"):
                federated.coordinator.receive(federated.node(ANNA), change(data, shares=stray))
            seen.append(decode_reply(data).shares)
        return b"" if (phase, number, site) in {("shares", 1, ANNA), ("unmask", 1, ANNA)} else data

    federated.play(reply=refuse_first)
    assert seen == [None]
    assert {number: ANNA in names for number, names in federated.ended.items()} == {
        1: False,
        2: True,
        3: False,
        4: True,
        5: True,
    }
    federated.check_adapter(ANNA)


# --- shares for the round a site enters at --------------------------------------------------------------------------


def entering(federated, data, **fields):
    reply = decode_reply(data)
    return change(data, shares=msgspec.structs.replace(reply.shares, **fields))


@pytest.mark.parametrize(
    ("alter", "code"),
    [
        (lambda f, d: entering(f, d, round=2), "WrongRound"),
        (lambda f, d: entering(f, d, signature=bytes(64)), "WrongKey"),
        (lambda f, d: entering(f, d, boxes={}), "WrongKey"),
        (lambda f, d: change(d, site=HARBOUR), "WrongRound"),
        (lambda f, d: f.site(ANNA).done["PlanOffer", 1][1], "WrongRound"),
        (lambda f, d: d + bytes(5 << 20), "TooLarge"),
    ],
    ids=["round", "signature", "boxes", "sender", "kind", "size"],
)
def test_a_site_whose_shares_are_refused_enters_a_round_later(alter, code):
    federated = federate(played_plan(rounds=3))
    federated.play(reply=at("shares", 1, ANNA, lambda data: alter(federated, data)))
    assert federated.events("rejected", "phase", "site", "code") == [("shares", ANNA, code)]
    assert {number: ANNA in names for number, names in federated.ended.items()} == {1: False, 2: True, 3: True, 4: True}


# --- the same tensors everywhere ------------------------------------------------------------------------------------


def drift(federated, scope, name=ANNA):
    """A site's tensors come to differ by one value, a little."""
    federated.site(name).states[scope].weights[1] += np.float32(2**-10)


def test_a_site_with_another_adapter_is_named_and_its_update_is_not_mixed_in():
    federated = federate(played_plan())
    for exchange in federated.start():
        if (exchange.phase, exchange.round) == ("round", 2):
            drift(federated, "global")
            break
        for node in exchange.requests:
            federated.deliver(exchange, node)
    federated.deliver(exchange, federated.node(BEIAN))
    with pytest.raises(
        AdapterDiverged, match=r"round 2: site 'st-anna' holds other values of 'global' than site '北岸"
    ):
        federated.deliver(exchange, federated.node(ANNA))
    assert federated.coordinator._state.playing.aggregate.contributors["global"] == 1
    assert federated.coordinator._state.playing.survivors == (BEIAN,)


def test_a_head_is_compared_only_within_its_kind():
    federated = federate(played_plan())
    for exchange in federated.start():
        if (exchange.phase, exchange.round) == ("round", 2):
            drift(federated, "kind/hospital", RENJI)
            break
        for node in exchange.requests:
            federated.deliver(exchange, node)
    for name in (HARBOUR, BEIAN, ANNA):
        federated.deliver(exchange, federated.node(name))
    with pytest.raises(AdapterDiverged, match=r"'仁济医院' holds other values of 'kind/hospital' than site 'st-anna'"):
        federated.deliver(exchange, federated.node(RENJI))


def test_a_returner_must_hold_what_the_others_hold():
    federated = federate(played_plan(rounds=4))

    def forget(phase, number, site):
        if (phase, number, site) == ("round", 4, ANNA):
            drift(federated, "global")
        return (phase, number, site) == ("round", 2, ANNA)

    with pytest.raises(AdapterDiverged, match="round 4: site"):
        federated.play(away=forget)
