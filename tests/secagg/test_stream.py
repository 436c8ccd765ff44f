import hashlib
import hmac
import tracemalloc

import numpy as np
import pytest
from Crypto.Cipher import AES
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedseek.secagg import stream
from fedseek.secagg.stream import MAX_MODULUS, add_stream, expand

SEED = bytes(range(16))
PRIME = 281474976768001  # the plain modulus of 13-bit values and 8 sites
REJECTING = 3 * 2**60 + 1  # five of them fit into 2^64: one word in sixteen is skipped

seeds = st.one_of(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))
moduli = st.one_of(st.integers(2, 300), st.integers(2, MAX_MODULUS), st.sampled_from([2**61, MAX_MODULUS, PRIME]))


def plain_expand(seed: bytes, purpose: bytes, count: int, modulus: int) -> list[int]:
    """The definition in the docstring again: RFC 5869 by hand, another AES, Python integers."""
    pseudorandom_key = hmac.digest(bytes(32), seed, hashlib.sha256)
    key = hmac.digest(pseudorandom_key, b"fedseek/stream/v1\x00" + purpose + b"\x01", hashlib.sha256)
    cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0)
    limit = 2**64 // modulus * modulus
    slots: list[int] = []
    while len(slots) < count:
        word = int.from_bytes(cipher.encrypt(bytes(8)), "little")
        if word < limit:
            slots.append(word % modulus)
    return slots


@pytest.mark.parametrize(
    ("seed", "purpose", "modulus", "wanted"),
    [
        (SEED, b"mask", PRIME, [266655919722568, 50768414169887, 34515087829772, 65280569254314]),
        (
            bytes(32),
            "北岸银行".encode(),
            REJECTING,
            [2681172659174809759, 2954440676251033817, 2906108496595205178, 1265313801775571880],
        ),
    ],
)
def test_known_answers(seed, purpose, modulus, wanted):
    assert plain_expand(seed, purpose, len(wanted), modulus) == wanted
    assert expand(seed, purpose, len(wanted), modulus).tolist() == wanted


@given(seeds, st.binary(max_size=40), st.integers(0, 200), moduli)
def test_expand_follows_its_definition(seed, purpose, count, modulus):
    slots = expand(seed, purpose, count, modulus)
    assert slots.dtype == np.uint64
    assert slots.shape == (count,)
    assert slots.tolist() == plain_expand(seed, purpose, count, modulus)


def test_the_definition_holds_across_pieces():
    count = 2 * stream._CHUNK_WORDS + 77
    assert expand(SEED, b"", count, REJECTING).tolist() == plain_expand(SEED, b"", count, REJECTING)


@given(st.integers(0, 70_000), st.integers(0, 70_000), st.sampled_from([3, PRIME, REJECTING]))
def test_a_longer_stream_begins_with_the_shorter_one(first, second, modulus):
    short, long = sorted((first, second))
    assert (expand(SEED, b"x", long, modulus)[:short] == expand(SEED, b"x", short, modulus)).all()


def test_words_past_the_last_whole_block_of_residues_are_skipped():
    limit = 2**64 // REJECTING * REJECTING
    pieces = [[0, limit - 1, limit], [2**64 - 1, 5], [limit + 1, REJECTING, 7, 8]]
    taken = stream._reduced((np.array(piece, dtype=np.uint64) for piece in pieces), 5, REJECTING)
    assert [int(slot) for chunk in taken for slot in chunk] == [0, REJECTING - 1, 5, 0, 7]


def test_no_word_is_skipped_where_the_modulus_divides_them_all():
    pieces = iter([np.array([2**64 - 1, 2**61, 3], dtype=np.uint64)])
    assert np.concatenate(list(stream._reduced(pieces, 3, 2**61))).tolist() == [2**61 - 1, 0, 3]


def test_slots_are_uniform_where_plain_reduction_is_not():
    def p_value(slots):
        return chisquare(np.histogram(slots.astype(float), bins=12, range=(0, REJECTING))[0]).pvalue

    words = next(stream.words(SEED, b"x"))
    assert p_value(expand(SEED, b"x", words.size, REJECTING)) > 1e-3
    assert p_value(words % np.uint64(REJECTING)) < 1e-9


def test_slots_are_uniform_modulo_a_small_number():
    counts = np.bincount(expand(SEED, b"x", 100_000, 97).astype(int), minlength=97)
    assert chisquare(counts).pvalue > 1e-3


def test_another_seed_or_purpose_gives_another_stream():
    streams = [
        expand(seed, purpose, 1000, PRIME)
        for seed in (SEED, bytes(16), bytes(32))
        for purpose in (b"", b"a", b"b", b"a\0", b"ab")
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert np.count_nonzero(one == other) <= 1


@given(seeds, st.integers(0, 5000), moduli, st.integers(0, 2**32), st.booleans())
def test_adding_is_addition_modulo_and_is_undone(seed, count, modulus, numpy_seed, subtract):
    before = np.random.default_rng(numpy_seed).integers(0, modulus, size=count, dtype=np.uint64)
    total = before.copy()
    add_stream(total, seed, b"p", modulus, subtract=subtract)
    sign = -1 if subtract else 1
    mask = expand(seed, b"p", count, modulus).tolist()
    assert total.tolist() == [(a + sign * b) % modulus for a, b in zip(before.tolist(), mask, strict=True)]
    add_stream(total, seed, b"p", modulus, subtract=not subtract)
    assert (total == before).all()


@pytest.mark.parametrize("modulus", [2, MAX_MODULUS])
@pytest.mark.parametrize("subtract", [True, False])
def test_the_largest_slots_do_not_overflow(modulus, subtract):
    total = np.full(100_000, modulus - 1, dtype=np.uint64)
    add_stream(total, SEED, b"p", modulus, subtract=subtract)
    mask = expand(SEED, b"p", total.size, modulus).tolist()
    sign = -1 if subtract else 1
    assert total.tolist() == [(modulus - 1 + sign * slot) % modulus for slot in mask]


def test_pairwise_masks_of_three_sites_vanish_in_the_sum():
    totals = [np.full(70_000, site, dtype=np.uint64) for site in (1, 2, 3)]
    for i in range(3):
        for j in range(i):
            seed = bytes([i, j]) * 8
            add_stream(totals[i], seed, b"pair", PRIME)
            add_stream(totals[j], seed, b"pair", PRIME, subtract=True)
    assert not any((total == site).all() for total, site in zip(totals, (1, 2, 3), strict=True))
    assert (sum(totals) % np.uint64(PRIME) == 6).all()


def test_adding_needs_no_memory_that_grows_with_the_update():
    total = np.zeros(2_000_000, dtype=np.uint64)
    add_stream(total[:1], SEED, b"p", PRIME)
    tracemalloc.start()
    try:
        add_stream(total, SEED, b"p", PRIME, subtract=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**21 < total.nbytes / 4


@pytest.mark.parametrize("length", [0, 15, 17, 31, 33, 64])
def test_seeds_of_other_lengths_are_refused_and_not_shown(length):
    with pytest.raises(ValueError, match=f"got a seed of {length} bytes; wanted 16 or 32") as caught:
        expand(b"\xa7" * length, b"", 1, PRIME)
    assert "a7" not in str(caught.value)


@pytest.mark.parametrize("modulus", [-1, 0, 1, MAX_MODULUS + 1, 2**64])
def test_moduli_out_of_range_are_refused(modulus):
    with pytest.raises(ValueError, match="modulus"):
        expand(SEED, b"", 1, modulus)
    with pytest.raises(ValueError, match="modulus"):
        add_stream(np.zeros(1, dtype=np.uint64), SEED, b"", modulus)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count of -1"):
        expand(SEED, b"", -1, PRIME)


@pytest.mark.parametrize(
    "total",
    [
        np.zeros(3, dtype=np.int64),
        np.zeros(3, dtype=np.float64),
        np.zeros((1, 3), dtype=np.uint64),
        np.array([0, PRIME, 0], dtype=np.uint64),
    ],
)
def test_totals_that_are_no_reduced_slots_are_refused_untouched(total):
    before = total.copy()
    with pytest.raises(ValueError, match="wanted"):
        add_stream(total, SEED, b"", PRIME)
    assert (total == before).all()
