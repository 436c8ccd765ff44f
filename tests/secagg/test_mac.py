import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.secagg.mac import MAX_MAC_MODULUS, NUM_TAGS, mac, pad
from fedseek.secagg.stream import expand

KEY = bytes(range(32))
PRIME = 281474976768001  # the plain modulus of 13-bit values and 8 sites
LARGEST_PRIME = 2**52 - 47


def plain_mac(slots, key, modulus):
    keys = [expand(key, b"fedseek/mac/v1\0" + bytes([i]), len(slots), modulus).tolist() for i in (0, 1)]
    return tuple(sum(k * s for k, s in zip(row, slots, strict=True)) % modulus for row in keys)


def vector(count, modulus, seed=0):
    return np.random.default_rng(seed).integers(0, modulus, size=count, dtype=np.uint64)


@given(
    st.integers(0, 9000),
    st.sampled_from([2, 97, PRIME, LARGEST_PRIME]),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**32),
)
def test_mac_is_the_inner_product_with_the_key_stream(count, modulus, key, seed):
    slots = vector(count, modulus, seed)
    assert mac(slots, key, modulus) == plain_mac(slots.tolist(), key, modulus)


@pytest.mark.parametrize("count", [4095, 4096, 4097, 32768, 32769, 100_001])
def test_mac_is_exact_for_the_largest_slots_at_every_seam(count):
    slots = np.full(count, MAX_MAC_MODULUS - 1, dtype=np.uint64)
    assert mac(slots, KEY, MAX_MAC_MODULUS) == plain_mac(slots.tolist(), KEY, MAX_MAC_MODULUS)


def test_sums_of_the_largest_limbs_do_not_overflow():
    from fedseek.secagg.mac import _inner_product

    largest = np.full(9000, MAX_MAC_MODULUS, dtype=np.uint64)
    assert _inner_product(largest, largest) == 9000 * MAX_MAC_MODULUS**2


@given(st.integers(1, 6000), st.integers(0, 2**32), st.integers(2, 8))
def test_tag_of_the_sum_is_the_sum_of_the_tags(count, seed, num_sites):
    updates = [vector(count, PRIME, seed + site) for site in range(num_sites)]
    total = np.array([sum(column) % PRIME for column in zip(*(u.tolist() for u in updates), strict=True)], np.uint64)
    tags = [mac(update, KEY, PRIME) for update in updates]
    assert mac(total, KEY, PRIME) == tuple(sum(tag[i] for tag in tags) % PRIME for i in range(NUM_TAGS))


@given(st.integers(0, 999), st.integers(1, PRIME - 1))
def test_any_single_change_breaks_both_tags(place, change):
    slots = vector(1000, PRIME)
    altered = slots.copy()
    altered[place] = (int(slots[place]) + change) % PRIME
    before, after = mac(slots, KEY, PRIME), mac(altered, KEY, PRIME)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_swapping_two_slots_breaks_the_tag():
    slots = vector(1000, PRIME)
    swapped = slots.copy()
    swapped[[3, 700]] = slots[[700, 3]]
    assert mac(slots, KEY, PRIME) != mac(swapped, KEY, PRIME)


def test_a_forgery_passes_as_often_as_stated():
    # t = 5, so that luck is frequent: a fixed alteration should fit one tag in 1/5 of keys and both in 1/25.
    before, after = np.array([1, 2, 3], dtype=np.uint64), np.array([4, 2, 0], dtype=np.uint64)
    shift = (2, 1)
    fits = np.zeros(3, dtype=int)
    for number in range(5000):
        key = number.to_bytes(32)
        passed = [(t + e) % 5 == u for t, e, u in zip(mac(before, key, 5), shift, mac(after, key, 5), strict=True)]
        fits += [passed[0], passed[1], all(passed)]
    assert fits / 5000 == pytest.approx([0.2, 0.2, 0.04], abs=0.02)


def test_the_two_tags_and_two_keys_are_independent():
    slots = vector(1000, PRIME)
    tags = {*mac(slots, KEY, PRIME), *mac(slots, bytes(32), PRIME)}
    assert len(tags) == 4


def test_pads_follow_their_definition_and_tell_sites_apart():
    labels = ["北岸银行".encode(), b"harbour-bank", b"", b"\0"]
    pads = [pad(KEY, label, PRIME) for label in labels]
    for label, (first, second) in zip(labels, pads, strict=True):
        assert [first, second] == expand(KEY, b"fedseek/mac-pad/v1\0" + label, 2, PRIME).tolist()
    assert len({number for both in pads for number in both}) == 8
    assert pad(bytes(32), labels[0], PRIME) != pads[0]


def test_a_padded_sum_fits_only_the_sites_that_are_in_it():
    updates = {label: vector(50, 2**20, seed) for seed, label in enumerate([b"a", b"b", b"c"])}

    def padded(label):
        return [(t + p) % PRIME for t, p in zip(mac(updates[label], KEY, PRIME), pad(KEY, label, PRIME), strict=True)]

    def fits(sent, claimed):
        tag = [sum(padded(label)[i] for label in sent) % PRIME for i in range(NUM_TAGS)]
        pads = [sum(pad(KEY, label, PRIME)[i] for label in claimed) for i in range(NUM_TAGS)]
        wanted = mac(sum(updates[label] for label in sent), KEY, PRIME)
        return all((w + p) % PRIME == t for w, p, t in zip(wanted, pads, tag, strict=True))

    assert fits([b"a", b"b", b"c"], [b"a", b"b", b"c"])
    assert not fits([b"a", b"b"], [b"a", b"b", b"c"])
    assert not fits([b"a", b"b", b"b"], [b"a", b"b", b"c"])
    assert not fits([b"a", b"b"], [b"a", b"c"])


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_keys_of_other_lengths_are_refused_and_not_shown(length):
    with pytest.raises(ValueError, match=f"key of {length} bytes; wanted 32") as caught:
        mac(vector(3, PRIME), b"\xa7" * length, PRIME)
    assert "a7" not in str(caught.value)
    with pytest.raises(ValueError, match=f"key of {length} bytes"):
        pad(bytes(length), b"a", PRIME)


@pytest.mark.parametrize("modulus", [0, 1, 2**52, 2**61])
def test_moduli_out_of_range_are_refused(modulus):
    with pytest.raises(ValueError, match="modulus"):
        mac(np.zeros(3, dtype=np.uint64), KEY, modulus)
    with pytest.raises(ValueError, match="modulus"):
        pad(KEY, b"a", modulus)


@pytest.mark.parametrize(
    "slots",
    [
        np.zeros(3, dtype=np.int64),
        np.zeros((3, 1), dtype=np.uint64),
        np.array([0, PRIME], dtype=np.uint64),
        np.array([2**64 - 1], dtype=np.uint64),
    ],
)
def test_slots_that_are_not_reduced_are_refused(slots):
    with pytest.raises(ValueError, match="slots"):
        mac(slots, KEY, PRIME)
