"""A hostile site that spoils what opens the sum, or plays with time: false shares, late answers, and what they cost."""

from __future__ import annotations

import os

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
    check_released,
    ended,
    federation,
    lost,
    rejected,
    replies,
    state,
    told,
)
from msgspec.structs import replace

from fedseek.cohort import round_graph
from fedseek.deal import _dealt_message, _seal_box, share_digest
from fedseek.identity.signing import CONTEXT_SHARES, CONTEXT_UNMASK, sign
from fedseek.messages import (
    SharesRevealed,
    SharesSealed,
    decode_reply,
    encode_message,
)
from fedseek.reveal import revealed_message

MALLORY = BEIAN  # a bank; on the first node, and so the one that makes the group key
HONEST = (HARBOUR, ANNA, RENJI)


def identity(cohort, site=MALLORY):
    return cohort.site(site).identity


# --- shares -------------------------------------------------------------------------------------------------------------


def false_shares(cohort, answer):
    """Random shares of everybody's self masks, signed by the site that gives them."""
    reply = decode_reply(answer)
    masks = {dealer: os.urandom(16) for dealer in reply.self_masks}
    message = revealed_message(federation(cohort), reply.round, EVERYBODY, EVERYBODY, masks, {})
    return change(answer, self_masks=masks, signature=sign(identity(cohort, reply.site), CONTEXT_UNMASK, message))


def liars(cohort, *sites):
    def reply(phase, number, site, answer):
        return false_shares(cohort, answer) if (phase, number) == ("unmask", 1) and site in sites else answer

    return reply


def test_false_shares_of_less_than_half_the_sites_do_no_harm_and_are_named(begin):
    cohort = begin()
    cohort.play(reply=liars(cohort, MALLORY))
    assert told(cohort, "false-shares", "round", "site") == [(1, MALLORY)]
    assert set(ended(cohort).values()) == {EVERYBODY}
    check_released(cohort)


def test_false_shares_of_more_sites_cost_the_round_and_not_the_next(begin):
    cohort = begin()
    cohort.play(reply=liars(cohort, MALLORY, ANNA))
    assert sorted(told(cohort, "false-shares", "site")) == [(ANNA,), (MALLORY,)]
    assert told(cohort, "round-failed", "round", "code") == [(1, "CohortTooSmall")]
    assert ended(cohort) == {1: (), 2: EVERYBODY, 3: EVERYBODY}
    check_released(cohort)


def misdealt(cohort, answer, *, owned):
    """Random shares for all holders; ``owned``: with digests that fit them."""
    sealed = decode_reply(answer)
    mine, run, shares = state(cohort, MALLORY).rounds[1], federation(cohort), sealed.shares
    graph = round_graph(run, 1, mine.listed)
    boxes, digests = {}, dict(shares.share_digests)
    for holder in graph.neighbours[MALLORY]:
        dealt = {secret: os.urandom(16) for secret in shares.secret_digests}
        boxes[holder] = _seal_box(dealt, mine.secrets, run, 1, sender=MALLORY, receiver=mine.peers[holder])
        if owned:
            digests[holder] = {
                secret: share_digest(run, 1, dealer=MALLORY, holder=holder, secret=secret, share=share)
                for secret, share in dealt.items()
            }
    message = _dealt_message(run, MALLORY, 1, boxes, digests, shares.secret_digests)
    signature = sign(identity(cohort), CONTEXT_SHARES, message)
    return encode_message(
        SharesSealed(
            run=RUN,
            site=MALLORY,
            shares=replace(shares, boxes=boxes, share_digests=digests, signature=signature),
        )
    )


@pytest.mark.parametrize(("owned", "code"), [(False, "CohortTooSmall"), (True, "Malformed")])
def test_inconsistent_shares_cost_the_round_and_name_their_dealer(begin, owned, code):
    """Shares other than their digests: all holders accuse one dealer. Digests that fit them: the seed does not."""
    cohort = begin()
    cohort.play(reply=at("shares", 1, MALLORY, lambda answer: misdealt(cohort, answer, owned=owned)))
    ((number, got, text),) = told(cohort, "round-failed", "round", "code", "text")
    assert (number, got) == (1, code)
    assert f"site {MALLORY!r}" in text
    assert told(cohort, "false-shares", "dealers") == ([] if owned else [([MALLORY],)] * 3)
    assert ended(cohort) == {1: (), 2: EVERYBODY, 3: EVERYBODY}
    check_released(cohort)


# --- time ---------------------------------------------------------------------------------------------------------------


def test_a_site_that_claims_to_have_vanished_and_comes_back_is_not_added_to_that_round(begin):
    """Its update comes when the others have given away its mask key. It waits until its next round, as others do."""
    cohort, late = begin(3), []

    def reply(phase, number, site, answer):
        if (phase, number, site) == ("round", 1, MALLORY):
            late.append(answer)
            return b""
        if (phase, number) == ("unmask", 1) and late:
            assert rejected(cohort, MALLORY, late.pop())[0] == "WrongRound"
        return answer

    cohort.play(reply=reply)
    assert {name for each in replies(cohort, SharesRevealed) for name in each.mask_keys} == {MALLORY}
    assert ended(cohort) == {1: HONEST, 2: HONEST, 3: EVERYBODY, 4: EVERYBODY}
    check_released(cohort)


def test_an_answer_to_an_exchange_that_moved_on_is_refused(begin):
    """Shares for round 1, its update and its revealed shares, each one exchange later."""
    cohort, held, found = begin(3), {}, []

    def reply(phase, number, site, answer):
        if site == MALLORY and (phase, number) in {("shares", 1), ("unmask", 2)}:
            held[phase] = answer
            return b""
        if site == HARBOUR:
            found.extend(rejected(cohort, MALLORY, held.pop(name)) for name in list(held))
        return answer

    cohort.play(reply=reply)
    assert [code for code, _ in found] == ["WrongRound"] * 2
    assert ended(cohort) == {1: HONEST, 2: EVERYBODY, 3: EVERYBODY, 4: EVERYBODY}
    check_released(cohort)


@pytest.mark.parametrize("where", [("round", 2), ("close", 3)], ids=["round", "close"])
def test_an_answer_that_is_lost_costs_the_others_nothing(begin, where):
    """Its request was answered at the site, so the last sum is applied there. The coordinator cannot know, tells the
    same sum again, and the site passes over it.
    """
    cohort = begin(3 if where == ("round", 2) else 2)
    cohort.play(reply=lost(*where, MALLORY))
    check_released(cohort)
