import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.secagg.shamir import MAX_HOLDERS, combine, split

SECRET = bytes(range(16))
IRREDUCIBLE = 2**128 + 2**7 + 2**2 + 2 + 1


def times(a: int, b: int) -> int:
    """Product in GF(2^128), bit by bit."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        b >>= 1
        a <<= 1
        if a >> 128:
            a ^= IRREDUCIBLE
    return product


@settings(deadline=None)
@given(st.binary(min_size=16, max_size=16), st.integers(2, 9), st.integers(0, 4), st.randoms())
def test_any_threshold_of_the_shares_rebuilds_the_secret(secret, threshold, spare, random):
    shares = split(secret, threshold=threshold, holders=threshold + spare)
    assert [len(share) for share in shares] == [16] * (threshold + spare)
    chosen = random.sample(range(threshold + spare), threshold)
    assert combine({position: shares[position] for position in chosen}, threshold=threshold) == secret


@pytest.mark.parametrize("secret", [bytes(16), b"\xff" * 16, bytes(15) + b"\x01", b"\x01" + bytes(15)])
def test_every_pair_and_triple_of_four(secret):
    for threshold in (2, 3):
        shares = split(secret, threshold=threshold, holders=4)
        for chosen in itertools.combinations(range(4), threshold):
            assert combine({position: shares[position] for position in chosen}, threshold=threshold) == secret


def test_a_share_is_the_polynomial_at_its_position_plus_one():
    first, second, third = (int.from_bytes(share) for share in split(SECRET, threshold=2, holders=3))
    slope = first ^ int.from_bytes(SECRET)  # the line is secret + slope * x; x = 1 at position 0
    assert second == int.from_bytes(SECRET) ^ times(slope, 2)
    assert third == int.from_bytes(SECRET) ^ times(slope, 3)


def test_fewer_shares_fit_every_secret_equally():
    # To each other secret there is exactly one line through the share that is known: nothing is ruled out.
    share = int.from_bytes(split(SECRET, threshold=2, holders=2)[0])
    for secret in (SECRET, bytes(16), b"\xff" * 16):
        other_share = int.from_bytes(secret) ^ times(share ^ int.from_bytes(secret), 2)
        assert combine({0: share.to_bytes(16), 1: other_share.to_bytes(16)}, threshold=2) == secret


def test_every_split_is_fresh():
    splits = {split(SECRET, threshold=2, holders=2) for _ in range(50)}
    assert len({share for shares in splits for share in shares}) == 100


def test_exactly_the_lowest_positions_are_used():
    shares = dict(enumerate(split(SECRET, threshold=3, holders=6)))
    backwards = dict(reversed(shares.items()))
    spoilt = backwards | dict.fromkeys((3, 4, 5), b"\x00" * 16)
    assert combine(backwards, threshold=3) == SECRET
    assert combine(spoilt, threshold=3) == SECRET


def test_an_altered_share_gives_another_secret_without_an_error():
    shares = dict(enumerate(split(SECRET, threshold=3, holders=3)))
    shares[1] = bytes([shares[1][0] ^ 1]) + shares[1][1:]
    assert combine(shares, threshold=3) != SECRET


def test_a_lower_threshold_gives_another_secret():
    shares = dict(enumerate(split(SECRET, threshold=4, holders=4)))
    assert combine(shares, threshold=3) != SECRET


def test_as_many_holders_as_there_may_be():
    shares = split(SECRET, threshold=2, holders=MAX_HOLDERS)
    assert combine({0: shares[0], MAX_HOLDERS - 1: shares[-1]}, threshold=2) == SECRET


@pytest.mark.parametrize("length", [0, 15, 17, 32])
def test_other_lengths_are_refused_and_not_shown(length):
    with pytest.raises(ValueError, match=f"secret of {length} bytes; wanted 16") as caught:
        split(b"\xa7" * length, threshold=2, holders=3)
    assert "a7" not in str(caught.value)
    shares = dict(enumerate(split(SECRET, threshold=2, holders=3)))
    with pytest.raises(ValueError, match=f"position 2 of {length} bytes"):  # also where it would not be used
        combine(shares | {2: bytes(length)}, threshold=2)


@pytest.mark.parametrize(("threshold", "holders"), [(1, 3), (0, 3), (-1, 3), (4, 3), (2, 1025), (1025, 1025)])
def test_numbers_out_of_range_are_refused(threshold, holders):
    with pytest.raises(ValueError, match="wanted"):
        split(SECRET, threshold=threshold, holders=holders)


@pytest.mark.parametrize("threshold", [0, 1, 1025])
def test_combine_refuses_a_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match="threshold"):
        combine(dict.fromkeys(range(3), SECRET), threshold=threshold)


def test_too_few_shares_are_refused():
    shares = dict(enumerate(split(SECRET, threshold=3, holders=3)[:2]))
    with pytest.raises(ValueError, match="got 2 shares; wanted at least 3"):
        combine(shares, threshold=3)


@pytest.mark.parametrize("position", [-1, 1024])  # -1 would be the point 0, where the secret is
def test_positions_out_of_range_are_refused(position):
    shares = dict(enumerate(split(SECRET, threshold=2, holders=2)))
    with pytest.raises(ValueError, match="position"):
        combine(shares | {position: SECRET}, threshold=2)
