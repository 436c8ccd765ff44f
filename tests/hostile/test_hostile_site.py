"""A hostile site: each test is one attack on the real coordinator and the other sites, and what they say to it.

A reply that the coordinator refuses leaves its books as they were; the site counts as missing, the others' round is
complete, and the run ends in a release (``spoil``). What the coordinator cannot see, because it is inside a ciphertext
shows later: each test says where, and what it costs the others. Shares and late answers are in
test_hostile_site_shares.py.

``test_open_...`` are attacks that succeed, or are noticed later than one would wish.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from attacks import (
    ANNA,
    BEIAN,
    EVERYBODY,
    HARBOUR,
    RENJI,
    RUN,
    at,
    change,
    check_rejected,
    check_released,
    ended,
    federation,
    group_key,
    holdings,
    nobody_applies,
    node_of,
    presence_over,
    rejected,
    replies,
    spoil,
    with_update,
)
from msgspec.structs import replace

from fedseek.deal import advertise, draw_secrets
from fedseek.errors import AdapterDiverged, SiteRefused
from fedseek.groupkey import make_group_key
from fedseek.he.ciphertext import save_ciphertext, seal_context
from fedseek.he.keys import SecretKey, encrypt_slots
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_ROUND_KEYS, sign
from fedseek.messages import (
    Refused,
    SharesRevealed,
    UpdateReply,
    decode_reply,
    digest_message,
    encode_message,
)

MALLORY = BEIAN  # a bank; on the first node, and so the one that makes the group key
HONEST = (HARBOUR, ANNA, RENJI)


def identity(cohort, site=MALLORY):
    return cohort.site(site).identity


def redigested(cohort, answer, site):
    """Other digests of the tensors, signed by the site itself wherever they stand."""
    reply = decode_reply(answer)
    reply = replace(reply, digests=dict.fromkeys(reply.digests, os.urandom(32)))
    signature = sign(identity(cohort, site), CONTEXT_ADAPTER, digest_message(RUN, reply.round, reply.digests))
    presence = presence_over(cohort, site, reply.round, EVERYBODY, reply)
    return encode_message(replace(reply, signature=signature, presence=presence))


def ciphertext(cohort, key=None):
    """Of made-up numbers, under this key or one of its own."""
    params = cohort.coordinator.plan.packing.params
    return encrypt_slots(key or SecretKey.generate(params), np.arange(4096, dtype=np.uint64))[0]


# --- keys ---------------------------------------------------------------------------------------------------------------


def test_round_keys_that_are_unsigned_or_wrongly_signed_are_refused(begin):
    """Not signed; signed by another site; another key under a true signature; keys no secret can be agreed with."""
    cohort = begin(3)

    def forge(answer):
        admitted = decode_reply(answer)
        first, second = admitted.keys
        other = advertise(draw_secrets(), federation(cohort), 1, identity=identity(cohort, HARBOUR))
        low = federation(cohort).bind_round(1, MALLORY.encode(), bytes(32), first.share_key)
        for keys in (
            replace(first, signature=bytes(64)),
            replace(other, site=MALLORY),
            replace(first, mask_key=second.mask_key),
            other,
            replace(first, mask_key=bytes(32), signature=sign(identity(cohort), CONTEXT_ROUND_KEYS, low)),
        ):
            yield change(answer, keys=(keys, second))

    found = spoil(cohort, ("plan", 1), MALLORY, forge)
    check_rejected(
        found,
        *[("WrongKey", "round-keys")] * 3,
        ("WrongKey", "sent round keys of site"),
        ("WrongKey", "low order"),
    )
    assert ended(cohort) == {1: HONEST, 2: HONEST, 3: EVERYBODY, 4: EVERYBODY}


def test_round_keys_for_the_wrong_round_are_refused(begin):
    """When it enters, and those that ride on an update: of another round, as such and relabelled."""
    cohort = begin(3)

    def forge(answer):
        first, second = decode_reply(answer).keys
        yield change(answer, keys=(second, first))
        yield change(answer, keys=(replace(second, round=1), first))
        yield change(answer, round=2)

    wanted = (("WrongRound", "got those of round 2, wanted 1"), ("WrongKey", "round-keys"), ("WrongRound", "round 2"))
    check_rejected(spoil(cohort, ("plan", 1), MALLORY, forge, then_true=True), *wanted)
    assert set(ended(cohort).values()) == {EVERYBODY}


def test_second_round_keys_for_one_round_are_refused(begin):
    """It was away, is offered the plan again, and later sends others than it sent for that round then."""
    cohort = begin(3)

    def forge(answer):
        fresh = advertise(draw_secrets(), federation(cohort), 4, identity=identity(cohort))
        return change(answer, keys=fresh)

    found = spoil(cohort, ("round", 2), MALLORY, forge, then_true=True, silent=("shares", 1))
    check_rejected(found, ("WrongKey", "got others for round 4 than it sent before"))
    assert ended(cohort) == {1: HONEST, 2: EVERYBODY, 3: EVERYBODY, 4: EVERYBODY}


# --- updates that are refused -------------------------------------------------------------------------------------------

MISSING_AT_FIRST = {1: HONEST, 2: HONEST, 3: EVERYBODY, 4: EVERYBODY}  # what a refused update of round 1 costs


def test_an_update_of_the_wrong_round_is_refused(begin):
    """Last round's, as it was; and under this round's number."""
    cohort = begin()

    def forge(answer):
        old = next(each for each in replies(cohort, UpdateReply) if (each.site, each.round) == (MALLORY, 1))
        yield encode_message(old)
        yield encode_message(replace(old, round=2))

    found = spoil(cohort, ("round", 2), MALLORY, forge, then_true=True)
    check_rejected(found, ("WrongRound", "answered for round 1, wanted 2"), ("WrongKey", "adapter-digest"))
    assert set(ended(cohort).values()) == {EVERYBODY}


def test_too_many_or_too_few_bytes_are_refused(begin):
    """The message, the list of ciphertexts, one ciphertext."""
    cohort = begin(3)

    def forge(answer):
        yield answer + bytes(16 << 20)
        yield answer[:-1]
        yield answer + b"\0"
        yield with_update(answer, lambda scope, ciphertexts: ciphertexts * 2)
        yield with_update(answer, lambda scope, ciphertexts: ())
        yield with_update(answer, lambda scope, ciphertexts: [ciphertexts[0][:-1]])
        yield with_update(answer, lambda scope, ciphertexts: [ciphertexts[0] + b"\0"])

    found = spoil(cohort, ("round", 1), MALLORY, forge)
    check_rejected(
        found,
        ("TooLarge", "wanted at most"),
        ("Malformed", "refused"),
        ("Malformed", "refused"),
        ("Malformed", "got 2 ciphertexts; wanted 1"),
        ("Malformed", "got 0 ciphertexts; wanted 1"),
        *[("Malformed", "SEAL object")] * 2,
    )
    assert ended(cohort) == MISSING_AT_FIRST


def test_plain_numbers_for_a_ciphertext_are_refused(begin):
    """Packed slots as bytes; and a SEAL ciphertext that hides nothing."""
    from tenseal import sealapi

    cohort = begin(3)

    def forge(answer):
        context = seal_context(cohort.coordinator.plan.packing.params)
        transparent = sealapi.Ciphertext(context)
        transparent.resize(context, context.first_parms_id(), 2)
        for plain in (np.arange(4096, dtype="<u8").tobytes(), save_ciphertext(transparent)):
            yield with_update(answer, lambda scope, ciphertexts, plain=plain: [plain])

    check_rejected(spoil(cohort, ("round", 1), MALLORY, forge), *[("Malformed", "SEAL object")] * 2)
    assert ended(cohort) == MISSING_AT_FIRST


def test_other_scopes_than_its_own_are_refused(begin):
    """Another kind's head, one scope less, one twice."""
    cohort = begin(3)

    def forge(answer):
        adapter, head = decode_reply(answer).update
        yield change(answer, update=(adapter, type(head)("kind/hospital", head.ciphertexts)))
        yield change(answer, update=(adapter,))
        yield change(answer, update=(adapter, adapter))

    check_rejected(spoil(cohort, ("round", 1), MALLORY, forge), *[("Malformed", "sent scopes")] * 3)
    assert ended(cohort) == MISSING_AT_FIRST


def test_an_answer_as_another_site_is_refused(begin):
    """Before its node was admitted, with a signature that is not the other's; and after that."""
    cohort = begin()

    def forge(answer):
        return [change(answer, site=name) for name in (HARBOUR, "陌生人")]

    found = spoil(cohort, [("plan", 1), ("round", 1)], MALLORY, forge, then_true=True)
    stranger = ("WrongKey", "not on the roster")
    as_another = ("WrongRound", "was admitted as '北岸银行' and now answers as 'harbour-bank'")
    check_rejected(found, ("WrongKey", "plan-admitted"), stranger, as_another, stranger)
    assert set(ended(cohort).values()) == {EVERYBODY}


def test_a_word_on_other_participants_is_refused(begin):
    """Signed by itself: over fewer, over those of another round, over another key list; and by somebody else."""
    cohort, fewer = begin(3), EVERYBODY[1:]

    def forge(answer):
        update = decode_reply(answer)
        yield change(answer, presence=presence_over(cohort, MALLORY, 1, fewer, update))
        yield change(answer, presence=presence_over(cohort, MALLORY, 2, EVERYBODY, update))
        yield change(answer, presence=presence_over(cohort, MALLORY, 1, EVERYBODY, update, listed=fewer))
        yield change(answer, presence=presence_over(cohort, ANNA, 1, EVERYBODY, update))
        other = replace(update, epoch=1)
        yield change(answer, presence=presence_over(cohort, MALLORY, 1, EVERYBODY, other))

    check_rejected(spoil(cohort, ("round", 1), MALLORY, forge), *[("WrongKey", "signature does not verify")] * 5)
    assert ended(cohort) == MISSING_AT_FIRST


def test_a_second_update_with_other_bytes_is_not_added(begin):
    cohort = begin()

    def twice(answer):
        cohort.coordinator.receive(node_of(cohort, MALLORY), answer)
        other = with_update(answer, lambda scope, ciphertexts: [ciphertext(cohort)])
        for data in (answer, other):
            assert rejected(cohort, MALLORY, data)[0] == "WrongRound"
        return b""

    cohort.play(reply=at("round", 1, MALLORY, twice))
    assert set(ended(cohort).values()) == {EVERYBODY}
    check_released(cohort)


# --- updates that nobody can tell from true ones ------------------------------------------------------------------------


def test_a_ciphertext_under_another_key_is_applied_by_nobody(begin):
    """The coordinator cannot see it. The sum decrypts for nobody: every honest site says so and stops the run.

    Noticed after the others have trained the round, and nobody can say who it was.
    """
    cohort = begin()
    spoilt = at("round", 1, MALLORY, lambda answer: with_update(answer, lambda scope, _: [ciphertext(cohort)]))
    with pytest.raises(SiteRefused, match="Tampered"):
        cohort.play(reply=spoilt)
    assert {code for code, _ in nobody_applies(cohort, HONEST)} == {"Tampered"}
    check_nothing_more_was_revealed(cohort)


def test_an_update_without_true_tags_is_applied_by_nobody(begin):
    """Under the right key, with numbers of its own in place of masked and tagged ones. As above."""
    cohort = begin()

    def spoilt(answer):
        return with_update(answer, lambda scope, _: [ciphertext(cohort, group_key(cohort, MALLORY))])

    with pytest.raises(SiteRefused, match="Tampered"):
        cohort.play(reply=at("round", 1, MALLORY, spoilt))
    assert {code for code, _ in nobody_applies(cohort, HONEST)} == {"Tampered"}
    check_nothing_more_was_revealed(cohort)


def check_nothing_more_was_revealed(cohort):
    """Of each site the shares of its self masks, as in any round; of none its mask key."""
    assert len(replies(cohort, SharesRevealed)) == len(EVERYBODY)
    assert not any(each.mask_keys for each in replies(cohort, SharesRevealed))


def test_different_group_keys_sealed_to_different_sites_open_nothing(begin):
    """The site that makes the key gives two of them out. No sum decrypts for anybody; noticed after round 1."""
    cohort = begin()

    def split(answer):
        first = decode_reply(answer).group_key
        second = make_group_key(federation(cohort), 0, identity=identity(cohort), now=time.time())
        return change(answer, group_key=replace(first, envelopes={**first.envelopes, ANNA: second.envelopes[ANNA]}))

    with pytest.raises(SiteRefused, match="Tampered"):
        cohort.play(reply=at("plan", 1, MALLORY, split))
    assert ended(cohort) == {1: EVERYBODY}
    assert {code for code, _ in nobody_applies(cohort, HONEST)} == {"Tampered"}
    check_nothing_more_was_revealed(cohort)


def test_false_digests_end_the_run_before_anything_is_mixed(begin):
    cohort = begin()
    with pytest.raises(
        AdapterDiverged, match="site '北岸银行' holds other values of 'global' than site 'harbour-bank'"
    ):
        cohort.play(reply=at("round", 2, MALLORY, lambda answer: redigested(cohort, answer, MALLORY)))
    assert ended(cohort) == {1: EVERYBODY}
    assert MALLORY not in holdings(cohort).playing.presence


# --- what succeeds, or is noticed late ----------------------------------------------------------------------------------


def test_open_whoever_answers_first_has_the_next_one_blamed(begin):
    """Succeeds: the coordinator takes the first answer for the true one; the run ends with an honest site's name."""
    cohort = begin()
    with pytest.raises(AdapterDiverged, match="site 'st-anna' holds other values of 'global' than site 'harbour-bank'"):
        cohort.play(reply=at("round", 2, HARBOUR, lambda answer: redigested(cohort, answer, HARBOUR)))


def test_open_one_site_ends_the_run_for_all_with_a_word(begin):
    """Succeeds: any refusal but CohortTooSmall is a "no" to the run, and the coordinator respects it."""
    cohort = begin()
    no = encode_message(Refused(run=RUN, site=MALLORY, code="InternalError", rule="internal error"))
    with pytest.raises(SiteRefused, match="'北岸银行' refused"):
        cohort.play(reply=at("round", 2, MALLORY, lambda answer: no))
