import msgspec
import numpy as np
import pytest

from fedseek.aggregate import agg_finish, agg_init, agg_update, merge
from fedseek.encrypt import encrypt_update
from fedseek.errors import CohortTooSmall, Malformed
from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.he.keys import SecretKey, decrypt_slots
from fedseek.he.packing import choose_packing

PACKING = choose_packing(13, 4)
PARAMS = PACKING.params
KEY = SecretKey.generate(PARAMS)
EXPECTED = {"global": 2, "bank": 1}
RNG = np.random.default_rng(2)
SLOTS = [
    {
        "global": RNG.integers(0, 2**43, size=8000, dtype=np.uint64),
        "bank": RNG.integers(0, 2**43, size=100, dtype=np.uint64),
    }
    for _ in range(4)
]
UPDATES = [encrypt_update(KEY, slots) for slots in SLOTS]


def fold(updates):
    aggregate = agg_init(PARAMS, EXPECTED, max_sites=PACKING.max_sites)
    for update in updates:
        agg_update(aggregate, update)
    return aggregate


def total(scope, sites):
    return sum(SLOTS[site][scope] for site in sites)


def decrypted(sums):
    return {each.scope: decrypt_slots(KEY, each.ciphertexts) for each in sums}


def test_sum_of_all_sites_is_the_exact_integer_sum():
    sums = agg_finish(fold(UPDATES), min_sites=2)
    assert [(each.scope, each.contributors) for each in sums] == [("global", 4), ("bank", 4)]
    for scope, slots in decrypted(sums).items():
        expected = total(scope, range(4))
        assert (slots[: expected.size] == expected).all()


def test_each_scope_is_summed_only_over_its_members():
    only_global = [each for each in UPDATES[1] if each.scope == "global"]
    sums = agg_finish(fold([UPDATES[0], only_global]), min_sites=1)
    assert {each.scope: each.contributors for each in sums} == {"global": 2, "bank": 1}
    assert (decrypted(sums)["bank"][:100] == SLOTS[0]["bank"]).all()
    assert (decrypted(sums)["global"][:8000] == total("global", (0, 1))).all()


def scoped(scope, *ciphertexts):
    return ScopedCiphertexts(scope=scope, ciphertexts=ciphertexts)


def bad_updates():
    first, second = UPDATES[3][0].ciphertexts
    (bank,) = UPDATES[3][1].ciphertexts
    other = SecretKey.generate(choose_packing(8, 64).params)
    (foreign,) = encrypt_update(other, {"bank": np.zeros(5, dtype=np.uint64)})[0].ciphertexts
    return {
        "nothing": (),
        "unknown scope": (scoped("hospital", bank),),
        "repeated scope": (scoped("bank", bank), scoped("bank", bank)),
        "too few": (scoped("global", first),),
        "too many": (scoped("global", first, second, bank),),
        "truncated at the end": (scoped("global", first, second[:-1]), scoped("bank", bank)),
        "garbage in the last scope": (scoped("global", first, second), scoped("bank", b"\x00" * 32000)),
        "other parameters": (scoped("global", first, second), scoped("bank", foreign)),
    }


BAD = bad_updates()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("sites_before", [0, 2])
def test_bad_update_leaves_the_sum_as_it_was(name, sites_before):
    aggregate = fold(UPDATES[:sites_before])
    before = agg_finish(aggregate, min_sites=0)
    with pytest.raises(Malformed):
        agg_update(aggregate, BAD[name])
    assert agg_finish(aggregate, min_sites=0) == before  # bit for bit
    agg_update(aggregate, UPDATES[3])
    assert agg_finish(aggregate, min_sites=0) == agg_finish(fold([*UPDATES[:sites_before], UPDATES[3]]), min_sites=0)


def test_more_sites_than_the_digits_have_room_for_are_refused():
    aggregate = fold(UPDATES)
    before = agg_finish(aggregate, min_sites=0)
    with pytest.raises(Malformed, match="holds 4 sites"):
        agg_update(aggregate, UPDATES[0])
    assert agg_finish(aggregate, min_sites=0) == before


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_merge_equals_the_sequential_fold(cut):
    left, right = fold(UPDATES[:cut]), fold(UPDATES[cut:])
    merge(left, right)
    assert agg_finish(left, min_sites=0) == agg_finish(fold(UPDATES), min_sites=0)
    assert set(right.contributors.values()) == {0}  # used up: it cannot be counted twice


def test_merge_beyond_the_room_changes_nothing():
    left, right = fold(UPDATES[:3]), fold(UPDATES[2:])
    before = agg_finish(left, min_sites=0)
    with pytest.raises(Malformed, match="got 2 more"):
        merge(left, right)
    assert agg_finish(left, min_sites=0) == before


def test_merge_of_different_plans_is_refused():
    with pytest.raises(ValueError, match="different plans"):
        merge(fold([]), agg_init(PARAMS, {"global": 3}, max_sites=4))


def test_sum_of_too_few_sites_is_not_handed_out():
    only_global = [each for each in UPDATES[1] if each.scope == "global"]
    aggregate = fold([UPDATES[0], only_global])
    with pytest.raises(CohortTooSmall, match="'bank': 1 sites"):
        agg_finish(aggregate, min_sites=2)


def test_only_the_scopes_asked_for_are_written_out_and_counted():
    only_global = [each for each in UPDATES[1] if each.scope == "global"]
    aggregate = fold([UPDATES[0], only_global])
    (sum_of_global,) = agg_finish(aggregate, min_sites=2, scopes=("global",))  # "bank" with one site is not looked at
    assert (sum_of_global.scope, sum_of_global.contributors) == ("global", 2)
    assert agg_finish(aggregate, min_sites=2, scopes=()) == ()
    with pytest.raises(CohortTooSmall, match="'bank': 1 sites"):
        agg_finish(aggregate, min_sites=2, scopes=("bank",))


def test_scopes_are_written_in_the_plans_order_whatever_order_is_asked_for():
    assert agg_finish(fold(UPDATES), min_sites=2, scopes=("bank", "global")) == agg_finish(fold(UPDATES), min_sites=2)


def test_the_sum_is_kept_as_it_is_written_out_and_is_in_memory_once():
    aggregate = fold(UPDATES)
    for each in agg_finish(aggregate, min_sites=2):
        assert all(written is kept for written, kept in zip(each.ciphertexts, aggregate.sums[each.scope], strict=True))


def test_a_message_read_is_added_from_where_it_is():
    message = msgspec.msgpack.encode(UPDATES[0])
    read = msgspec.msgpack.decode(message, type=tuple[ScopedCiphertexts, ...])
    assert all(data.obj is message for scoped in read for data in scoped.ciphertexts)
    assert agg_finish(fold([read]), min_sites=1) == agg_finish(fold(UPDATES[:1]), min_sites=1)
