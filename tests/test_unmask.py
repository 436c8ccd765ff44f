from dataclasses import replace
from functools import reduce
from itertools import chain, combinations

import msgspec
import numpy as np
import pytest
from masked_round import federate, flip, make_identities, play_round

from fedseek import deal
from fedseek.aggregate import agg_finish, agg_init, agg_update
from fedseek.deal import check_dealt, deal_shares, draw_secrets, open_box
from fedseek.encrypt import encrypt_update
from fedseek.errors import CohortTooSmall, Malformed, WrongKey
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.messages import MASK_KEY, SELF_MASK
from fedseek.secagg.shamir import split
from fedseek.unmask import check_revealed, rebuild_seeds, unmask_sum

SIX = make_identities(6)  # three banks, three hospitals; four shares rebuild a secret
BANK, PEER, HOSPITAL = "北岸银行", "harbour-bank", "仁济医院"
SLOTS = 4096


@pytest.fixture(scope="module")
def plan(tiny_plan):
    return tiny_plan(cohort={"max_sites": 24})


@pytest.fixture(scope="module")
def six(plan):
    return play_round(federate(plan, SIX), SIX)


@pytest.fixture(scope="module")
def key(plan):
    return SecretKey.generate(plan.packing.params)


@pytest.fixture(scope="module")
def masked(six, key):
    """Updates of all six sites over one ciphertext a scope, and the same masked and encrypted."""
    updates = six.updates(size=SLOTS)
    return updates, {name: encrypt_update(key, mine) for name, mine in six.mask(updates).items()}


def without(names, *gone):
    return tuple(name for name in names if name not in gone)


def fold(played, encrypted, survivors):
    params = played.federation.plan.packing.params
    aggregate = agg_init(params, dict.fromkeys(played.federation.scopes(), 1), max_sites=24)
    for name in survivors:
        agg_update(aggregate, encrypted[name])
    return aggregate


def answers(played, survivors, *, participants=None, who=None):
    """What the survivors reveal, as the coordinator keeps it."""
    taking_part = participants or played.names
    record = played.record(taking_part, survivors)
    return {
        name: check_revealed(played.reveal(name, taking_part, survivors), record, played.federation)
        for name in who or survivors
    }


def content(aggregate):
    return {scope: list(sums) for scope, sums in aggregate.sums.items()}


def plain_sum(played, updates, scope, survivors):
    members = [name for name in survivors if scope in updates[name]]
    return reduce(np.add, [updates[name][scope].astype(object) for name in members]) % played.modulus


def check_unmasked(played, key, masked, survivors, revealed, record):
    updates, encrypted = masked
    aggregate = fold(played, encrypted, survivors)
    before = content(aggregate)
    assert unmask_sum(aggregate, revealed, record, played.federation) is None
    opened = played.federation.open_scopes(record.participants, survivors)
    for scope in played.federation.scopes():
        if scope != "global":
            assert content(aggregate)[scope] == before[scope]  # nothing is done to a head
        if scope in opened:
            assert opened[scope] == tuple(name for name in survivors if scope in updates[name])
            got = decrypt_slots(key, content(aggregate)[scope])
            assert got.tolist() == plain_sum(played, updates, scope, survivors).tolist()
        elif aggregate.contributors[scope]:  # masked for good
            got = decrypt_slots(key, content(aggregate)[scope])
            assert (got.astype(object) == plain_sum(played, updates, scope, survivors)).mean() < 0.001
    return aggregate


# --- the honest path


def test_masks_come_off_for_every_set_of_survivors_that_is_large_enough(six, key, masked):
    for survivors in chain.from_iterable(combinations(six.names, size) for size in (4, 5, 6)):
        record = six.record(six.names, survivors)
        check_unmasked(six, key, masked, survivors, answers(six, survivors), record)


def test_masks_come_off_in_a_sparse_graph(plan, key):
    identities = make_identities(24)
    sparse = play_round(federate(plan, identities), identities)
    updates = sparse.updates(size=SLOTS)
    participants = without(sparse.names, "st-anna")
    survivors = without(participants, BANK)
    sent = {name: encrypt_update(key, mine) for name, mine in sparse.mask(updates, participants).items()}
    record = sparse.record(participants, survivors)
    revealed = answers(sparse, survivors, participants=participants)
    check_unmasked(sparse, key, (updates, sent), survivors, revealed, record)


def test_seeds_that_are_rebuilt_are_the_dealers_own_and_one_kind_of_each(six):
    survivors = without(six.names, BANK)
    record = six.record(six.names, survivors)
    self_seeds, mask_seeds = rebuild_seeds(answers(six, survivors), record, six.federation)
    assert mask_seeds == {BANK: six.secrets[BANK].mask_seed}
    assert self_seeds == {name: six.secrets[name].self_seed for name in survivors}


def test_any_threshold_of_the_survivors_answers_is_enough_and_one_fewer_is_not(six, key, masked):
    survivors = without(six.names, BANK)
    record = six.record(six.names, survivors)
    for who in combinations(survivors, 4):
        check_unmasked(six, key, masked, survivors, answers(six, survivors, who=who), record)
    aggregate = fold(six, masked[1], survivors)
    before = content(aggregate)
    for who in combinations(survivors, 3):
        with pytest.raises(CohortTooSmall, match=f"3 sites revealed a true share of '{SELF_MASK}'"):
            unmask_sum(aggregate, answers(six, survivors, who=who), record, six.federation)
        assert content(aggregate) == before


@pytest.mark.parametrize("gone", [1, 2])
def test_a_head_of_whose_sites_one_vanished_stays_masked_however_many_are_left(six, key, masked, gone):
    banks = six.federation.members("kind/bank")
    survivors = without(six.names, *banks[:gone])
    record = six.record(six.names, survivors)
    aggregate = check_unmasked(six, key, masked, survivors, answers(six, survivors), record)
    opened = six.federation.open_scopes(six.names, survivors)
    assert [each.scope for each in agg_finish(aggregate, min_sites=2, scopes=list(opened))] == [
        "global",
        "kind/hospital",
    ]
    for name in banks[gone:]:  # by a holder of the group key that gets hold of one of them
        alone = fold(six, masked[1], [name])
        read = decrypt_slots(key, content(alone)["kind/bank"])
        assert (read == masked[0][name]["kind/bank"]).sum() < 3


def test_heads_of_all_their_sites_open_without_an_answer(six, key, masked):
    """As in the closing round, in which nothing is revealed."""
    heads = {name: tuple(each for each in sent if each.scope != "global") for name, sent in masked[1].items()}
    aggregate = fold(six, heads, six.names)
    for scope in ("kind/bank", "kind/hospital"):
        wanted = plain_sum(six, masked[0], scope, six.names).tolist()
        assert decrypt_slots(key, content(aggregate)[scope]).tolist() == wanted
    assert aggregate.sums["global"] == []


def test_a_longer_vector_is_unmasked_ciphertext_by_ciphertext(six, key):
    updates = six.updates(size=2 * SLOTS)
    sent = {name: encrypt_update(key, mine) for name, mine in six.mask(updates).items()}
    params = six.federation.plan.packing.params
    aggregate = agg_init(params, dict.fromkeys(six.federation.scopes(), 2), max_sites=24)
    for update in sent.values():
        agg_update(aggregate, update)
    unmask_sum(aggregate, answers(six, six.names), six.record(six.names, six.names), six.federation)
    for scope in six.federation.scopes():
        got = decrypt_slots(key, content(aggregate)[scope])
        assert got.tolist() == plain_sum(six, updates, scope, six.names).tolist()


# --- false shares


def with_false(six, name, survivors, *, dealer, secret):
    """An answer that the site signed with one of its shares altered."""
    answer, record = six.reveal(name, six.names, survivors), six.record(six.names, survivors)
    if secret == MASK_KEY:
        return six.resign(answer, record, mask_keys={**answer.mask_keys, dealer: flip(answer.mask_keys[dealer], 3)})
    return six.resign(answer, record, self_masks={**answer.self_masks, dealer: flip(answer.self_masks[dealer], 3)})


FALSE = pytest.mark.parametrize(("dealer", "secret"), [(PEER, SELF_MASK), (HOSPITAL, SELF_MASK), (BANK, MASK_KEY)])


@FALSE
def test_a_false_share_is_dropped_and_no_other(six, dealer, secret):
    survivors = without(six.names, BANK)
    record = six.record(six.names, survivors)
    honest = six.reveal("st-anna", six.names, survivors)
    kept = check_revealed(with_false(six, "st-anna", survivors, dealer=dealer, secret=secret), record, six.federation)
    if secret == MASK_KEY:
        assert (kept.self_masks, kept.mask_keys) == (honest.self_masks, {})
    else:
        assert kept.self_masks == {name: share for name, share in honest.self_masks.items() if name != dealer}
        assert kept.mask_keys == honest.mask_keys
    assert check_revealed(honest, record, six.federation) == honest


def test_true_shares_in_the_wrong_place_are_dropped(six):
    survivors = six.names
    record = six.record(six.names, survivors)
    answer = six.reveal(BANK, six.names, survivors)
    swapped = {**answer.self_masks, PEER: answer.self_masks["banque-août"], "banque-août": answer.self_masks[PEER]}
    kept = check_revealed(six.resign(answer, record, self_masks=swapped), record, six.federation)
    assert set(kept.self_masks) == set(six.names) - {PEER, "banque-août"}
    others = six.reveal(PEER, six.names, survivors)  # another holder's shares as one's own
    copied = six.resign(answer, record, self_masks=others.self_masks)
    kept = check_revealed(copied, record, six.federation)
    assert kept.self_masks == {}


@FALSE
def test_false_shares_of_as_many_as_the_threshold_spares_do_no_harm(six, key, masked, dealer, secret):
    vanished = (BANK,) if secret == MASK_KEY else ()
    survivors = without(six.names, *vanished)
    record = six.record(six.names, survivors)
    spare = len(survivors) - six.graph.threshold
    assert spare == (1 if vanished else 2)
    for liars in combinations(survivors, spare):
        revealed = answers(six, survivors)
        for liar in liars:
            false = with_false(six, liar, survivors, dealer=dealer, secret=secret)
            revealed[liar] = check_revealed(false, record, six.federation)
        check_unmasked(six, key, masked, survivors, revealed, record)


@FALSE
def test_one_false_share_more_gives_the_round_up_and_leaves_the_sum_as_it_was(six, masked, dealer, secret):
    vanished = (BANK,) if secret == MASK_KEY else ()
    survivors = without(six.names, *vanished)
    record = six.record(six.names, survivors)
    aggregate = fold(six, masked[1], survivors)
    before = content(aggregate)
    for liars in combinations(survivors, len(survivors) - six.graph.threshold + 1):
        revealed = answers(six, survivors)
        for liar in liars:
            false = with_false(six, liar, survivors, dealer=dealer, secret=secret)
            revealed[liar] = check_revealed(false, record, six.federation)
        with pytest.raises(
            CohortTooSmall, match=f"round 1: 3 sites revealed a true share of '{secret}' of site '{dealer}', wanted 4"
        ):
            unmask_sum(aggregate, revealed, record, six.federation)
        assert content(aggregate) == before


# --- dealers that deal falsely


def redealt(played, dealer, secrets):
    """The round in which ``dealer`` dealt shares of these secrets; the coordinator and all holders take them."""
    dealt, own = deal_shares(secrets, played.keys, played.federation, played.graph, identity=SIX[dealer])
    check_dealt(dealt, played.federation, played.graph, dealer=dealer)
    held = {name: dict(shares) for name, shares in played.held.items()}
    held[dealer][dealer] = own
    for name in played.graph.neighbours[dealer]:
        held[name][dealer] = open_box(
            dealt.boxes[name], played.secrets[name], played.keys[dealer], played.federation, receiver=played.keys[name]
        )
    return replace(played, dealt={**played.dealt, dealer: dealt}, held=held)


def check_that_the_dealer_is_named(played, masked, survivors, *, dealer):
    aggregate = fold(played, masked[1], survivors)
    before = content(aggregate)
    record = played.record(played.names, survivors)
    with pytest.raises(Malformed, match=f"round 1: site '{dealer}'"):
        unmask_sum(aggregate, answers(played, survivors), record, played.federation)
    assert content(aggregate) == before


@pytest.mark.parametrize("vanished", [(), (BANK,)])
def test_a_dealer_whose_shares_make_no_secret_is_named(six, masked, monkeypatch, vanished):
    # One degree too many: every share is as committed, any four of them give something else.
    monkeypatch.setattr(deal, "split", lambda seed, threshold, holders: split(seed, threshold=5, holders=holders))
    false = redealt(six, BANK, six.secrets[BANK])
    check_that_the_dealer_is_named(false, masked, without(six.names, *vanished), dealer=BANK)


@pytest.mark.parametrize("vanished", [(), (BANK,)])
def test_a_dealer_that_shares_out_another_secret_than_it_commits_to_is_named(six, masked, monkeypatch, vanished):
    monkeypatch.setattr(
        deal, "split", lambda seed, threshold, holders: split(flip(seed, 0), threshold=threshold, holders=holders)
    )
    false = redealt(six, BANK, six.secrets[BANK])
    check_that_the_dealer_is_named(false, masked, without(six.names, *vanished), dealer=BANK)


def test_a_dealer_that_vanishes_and_shared_out_another_mask_key_than_it_announced_is_named(six, masked):
    # Otherwise the sum would be garbage, and sites would suspect the coordinator.
    other = msgspec.structs.replace(six.secrets[BANK], mask_seed=draw_secrets().mask_seed)
    check_that_the_dealer_is_named(redealt(six, BANK, other), masked, without(six.names, BANK), dealer=BANK)


# --- answers that are refused whole


@pytest.fixture(scope="module")
def partly(six):
    """All but one survived: what the others may give of it is a share of its mask key."""
    return without(six.names, BANK)


def refuse(six, survivors, answer, error, match):
    with pytest.raises(error, match=match):
        check_revealed(answer, six.record(six.names, survivors), six.federation)


def test_both_kinds_of_shares_at_once_are_refused(six, partly):
    record = six.record(six.names, partly)
    answer = six.reveal(PEER, six.names, partly)
    held = six.held[PEER]
    both = {
        "of one that survived": {"mask_keys": {**answer.mask_keys, HOSPITAL: held[HOSPITAL].shares[MASK_KEY]}},
        "of one that vanished": {
            "self_masks": {**answer.self_masks, BANK: held[BANK].shares[SELF_MASK]},
        },
    }
    for change in both.values():
        refuse(six, partly, six.resign(answer, record, **change), Malformed, "other shares than it was asked for")


def test_shares_left_out_or_of_strangers_are_refused(six, partly):
    record = six.record(six.names, partly)
    answer = six.reveal(PEER, six.names, partly)
    wrong = [
        {"self_masks": {name: shares for name, shares in answer.self_masks.items() if name != HOSPITAL}},
        {"mask_keys": {}},
        {"self_masks": {}, "mask_keys": {}},
        {"self_masks": {**answer.self_masks, "nobody": bytes(16)}},
        {"mask_keys": {**answer.mask_keys, "nobody": bytes(16)}},
    ]
    for change in wrong:
        refuse(six, partly, six.resign(answer, record, **change), Malformed, f"site '{PEER}' revealed other shares")


def test_an_answer_that_is_altered_or_not_signed_by_its_site_is_refused(six, partly):
    answer = six.reveal(PEER, six.names, partly)
    altered = [
        msgspec.structs.replace(answer, signature=bytes(64)),
        msgspec.structs.replace(answer, site=HOSPITAL),
        msgspec.structs.replace(answer, mask_keys={BANK: flip(answer.mask_keys[BANK], 0)}),
        msgspec.structs.replace(answer, self_masks={**answer.self_masks, HOSPITAL: bytes(16)}),
        msgspec.structs.replace(answer, signature=six.reveal(HOSPITAL, six.names, partly).signature),
    ]
    for each in altered:
        refuse(six, partly, each, WrongKey, "signature does not verify")
    refuse(six, partly, msgspec.structs.replace(answer, site="nobody"), WrongKey, "not on the roster")


def test_an_answer_to_other_survivors_participants_or_another_run_is_refused(six, partly):
    refuse(six, six.names, six.reveal(PEER, six.names, partly), WrongKey, "signature does not verify")
    refuse(six, partly, six.reveal(PEER, six.names, six.names), WrongKey, "signature does not verify")
    fewer = six.reveal(PEER, partly, partly)
    refuse(six, partly, fewer, WrongKey, "signature does not verify")
    elsewhere = federate(six.federation.plan, SIX, run="试运行-2")
    with pytest.raises(WrongKey, match="signature does not verify"):
        check_revealed(six.reveal(PEER, six.names, partly), six.record(six.names, partly), elsewhere)


def test_an_answer_from_a_site_that_was_not_asked_is_refused(six, partly, plan):
    record = six.record(six.names, partly)
    late = six.resign(six.reveal(PEER, six.names, partly), record, site=BANK)  # it vanished
    refuse(six, partly, late, Malformed, f"site '{BANK}' revealed shares of round 1 and was not asked")
    # On the roster, but not on the key list of the round: it holds nobody's shares.
    identities = {**SIX, **dict(list(make_identities(7).items())[6:])}
    seven = federate(plan, identities)
    (stranger,) = set(identities) - set(SIX)
    played = replace(six, federation=seven, identities=identities)
    record = played.record(six.names, partly)
    empty = msgspec.structs.replace(six.reveal(PEER, six.names, partly), site=stranger, self_masks={}, mask_keys={})
    with pytest.raises(Malformed, match=f"site '{stranger}' revealed shares of round 1 and was not asked"):
        check_revealed(played.resign(empty, record), record, seven)
