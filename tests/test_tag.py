import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_round import federate, make_identities

from fedseek.errors import Tampered
from fedseek.he.keys import SecretKey
from fedseek.secagg.stream import expand
from fedseek.tag import add_tags, check_tags, tag_key

SITES = make_identities(4)
NAMES = tuple(sorted(SITES))
T = 17592186175489  # 2^44 < t, prime
KEY = bytes(range(32))
SIZE = 40


@pytest.fixture(scope="module")
def federation(tiny_plan):
    return federate(tiny_plan(), SITES)


@pytest.fixture(scope="module")
def group_key(federation):
    return SecretKey.generate(federation.plan.packing.params)


def update(number, size=SIZE):
    slots = np.random.default_rng(number).integers(0, T, size, dtype=np.uint64)
    slots[:2] = 0
    return slots


def tagged(name, *, key=KEY, slots=None):
    return add_tags(update(NAMES.index(name)) if slots is None else slots, key, site=name, modulus=T)


def total(*vectors):
    return (sum(each.astype(object) for each in vectors) % T).astype(np.uint64)


SUM = total(*(tagged(name) for name in NAMES))


def check(slots, *, key=KEY, survivors=NAMES):
    check_tags(slots, key, survivors=survivors, modulus=T, what="sum of 'global', round 3")


def refuse(slots, **arguments):
    before = slots.copy()
    with pytest.raises(Tampered, match="sum of 'global', round 3: its tags are not those of the"):
        check(slots, **arguments)
    assert (slots == before).all()


# --- what fits


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_the_sum_of_exactly_the_announced_sites_fits(names):
    survivors = sorted(names)
    summed = total(*(tagged(name) for name in survivors))
    check(summed, survivors=survivors)
    check(summed, survivors=list(reversed(survivors)))
    assert (summed[2:] == total(*(update(NAMES.index(name)) for name in survivors))[2:]).all()


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, T - 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_tags_are_inner_products_and_pads_by_big_integers(contents):
    slots = [np.array([0, 0, *content], dtype=np.uint64) for content in contents]
    names = NAMES[: len(slots)]
    summed = total(*(tagged(name, slots=each) for name, each in zip(names, slots, strict=True)))
    for place in range(2):
        secret = expand(KEY, b"fedseek/mac/v1\0" + bytes([place]), 5, T).tolist()
        wanted = sum(k * x for each in slots for k, x in zip(secret, each.tolist(), strict=True))
        wanted += sum(int(expand(KEY, b"fedseek/mac-pad/v1\0" + name.encode(), 2, T)[place]) for name in names)
        assert int(summed[place]) == wanted % T
    check(summed, survivors=names)


def test_the_largest_slots_fit_as_well():
    full = np.full(SIZE, T - 1, dtype=np.uint64)
    full[:2] = 0
    check(total(*(tagged(name, slots=full) for name in NAMES)))


def test_tags_leave_the_update_as_it_is_and_are_the_same_each_time():
    slots = update(0)
    kept = slots.copy()
    first, second = (add_tags(slots, KEY, site=NAMES[0], modulus=T) for _ in range(2))
    assert (slots == kept).all()
    assert (first == second).all()
    assert (first[2:] == slots[2:]).all()
    assert first[:2].all()


def test_an_update_of_zeros_is_told_apart_by_site():
    zeros = np.zeros(SIZE, dtype=np.uint64)
    tags = {tuple(add_tags(zeros, KEY, site=name, modulus=T)[:2].tolist()) for name in NAMES}
    assert len(tags) == len(NAMES)


@pytest.mark.parametrize("place", [0, 1])
def test_slots_whose_tag_places_are_taken_are_refused(place):
    slots = update(0)
    slots[place] = 1
    with pytest.raises(ValueError, match="wanted zeros"):
        add_tags(slots, KEY, site=NAMES[0], modulus=T)


# --- what does not fit


def test_any_flipped_bit_is_found():
    for place in range(SIZE):
        for bit in range(44):
            altered = SUM.copy()
            altered[place] ^= np.uint64(1 << bit)
            if altered[place] < T:
                refuse(altered)


@given(st.integers(0, SIZE - 1), st.integers(1, T - 1))
def test_anything_added_to_a_slot_is_found(place, added):
    altered = SUM.copy()
    altered[place] = (int(altered[place]) + added) % T
    refuse(altered)


@given(st.lists(st.integers(0, T - 1), min_size=SIZE, max_size=SIZE).filter(any))
def test_anything_added_to_all_slots_is_found(added):
    refuse(total(SUM, np.array(added, dtype=np.uint64)))


@given(st.integers(2, T - 1) | st.just(0))
def test_a_scaled_sum_is_found(factor):
    refuse((SUM.astype(object) * factor % T).astype(np.uint64))


@pytest.mark.parametrize("gone", NAMES)
def test_an_update_left_out_is_found_and_so_is_a_survivor_left_unannounced(gone):
    left = [name for name in NAMES if name != gone]
    refuse(total(*(tagged(name) for name in left)))
    refuse(SUM, survivors=left)
    check(total(*(tagged(name) for name in left)), survivors=left)


@pytest.mark.parametrize("twice", NAMES)
def test_an_update_added_twice_is_found(twice):
    refuse(total(SUM, tagged(twice)))
    other = next(name for name in NAMES if name != twice)
    refuse(total(*(tagged(twice if name == other else name) for name in NAMES)))  # in place of another


def test_one_sites_update_under_anothers_name_is_found():
    first, second = NAMES[:2]
    refuse(tagged(first), survivors=[second])
    refuse(total(tagged(first), tagged(second)), survivors=[first, NAMES[2]])


def test_swapped_slots_and_swapped_tags_are_found():
    for left, right in ((0, 1), (2, 3), (2, SIZE - 1), (0, 2)):
        altered = SUM.copy()
        altered[[left, right]] = altered[[right, left]]
        refuse(altered)


def test_slots_moved_by_whole_ciphertexts_are_found():
    refuse(np.roll(SUM, SIZE // 2))
    refuse(np.concatenate([SUM, update(9)]))
    refuse(SUM[:-1])


def test_zeros_are_the_sum_of_nobodys_updates():
    refuse(np.zeros(SIZE, dtype=np.uint64))


def test_an_update_from_elsewhere_is_found(federation, group_key, tiny_plan):
    others = {**SITES, "st-anna": make_identities(4)["st-anna"]}
    key = tag_key(group_key, federation, 3, "global")
    elsewhere = {
        "round": tag_key(group_key, federation, 2, "global"),
        "scope": tag_key(group_key, federation, 3, "kind/bank"),
        "run": tag_key(group_key, federate(federation.plan, SITES, run="试运行-2"), 3, "global"),
        "plan": tag_key(group_key, federate(tiny_plan(seed=1), SITES), 3, "global"),
        "roster": tag_key(group_key, federate(federation.plan, others), 3, "global"),
        "epoch": tag_key(SecretKey.generate(federation.plan.packing.params), federation, 3, "global"),
    }
    assert len({key, *elsewhere.values()}) == 7
    honest = [tagged(name, key=key) for name in NAMES]
    check(total(*honest), key=key)
    for other in elsewhere.values():
        refuse(total(*(tagged(name, key=other) for name in NAMES)), key=key)  # a whole sum replayed
        refuse(total(*honest[1:], tagged(NAMES[0], key=other)), key=key)  # one update replayed


def test_a_refusal_names_the_sites_announced_but_no_slot():
    altered = SUM.copy()
    altered[5] ^= np.uint64(1)
    many = [f"site-{number}" for number in range(9)]
    for survivors, words in (
        (NAMES, "4 sites announced"),
        (many, "9 sites announced (site-0, site-1, site-2, site-3,"),
    ):
        with pytest.raises(Tampered) as caught:
            check(altered, survivors=survivors)
        assert words in caught.value.message
        assert "the sum is not applied" in caught.value.hint
        assert not any(str(slot) in str(caught.value) for slot in altered.tolist())
    assert "site-5" not in caught.value.message
