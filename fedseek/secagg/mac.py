"""Tags: two numbers that fit a vector of slots, and add up as vectors do.

Agrawal & Boneh 2009 (ACNS, "Homomorphic MACs: MAC-based integrity for network coding"). Sites share a key;
the tag of x is, for i = 0 and 1, the inner product of x with a secret vector k_i, modulo t. Inner products are linear,
so the sum of all tags is the tag of the sum, and whoever adds needs no key.

Guarantee: let t be prime, and let somebody without the key alter the sum by d and tag i by e_i. The altered tag fits
if the inner product of k_i and d is e_i. For d != 0 that has probability 1/t over k_i, whatever d and e_i are, so both
tags fit with probability 1/t^2; for d = 0 and an e_i != 0 never. (Plus the chance of telling AES-256-CTR from random.)
It is a guarantee for ``NUM_TAGS`` tags of one key that the other party has not seen: tags travel encrypted, and every
round has a key of its own. It is none against a site, which has the key.

A tag alone fits any part of the cohort as well as the whole. So each site adds its own ``pad`` to its tag: the tag of
a sum then fits only with the pads of exactly the sites in it, and dropping one or adding one twice shows.

>>> x, y = np.array([1, 2], dtype=np.uint64), np.array([3, 4], dtype=np.uint64)
>>> tags = zip(mac(x, bytes(32), 97), mac(y, bytes(32), 97))
>>> mac(x + y, bytes(32), 97) == tuple((first + second) % 97 for first, second in tags)
True
"""

from __future__ import annotations

from typing import Final

import numpy as np

from fedseek.secagg.stream import Slots, check_slots, chunks, expand

NUM_TAGS = 2
MAC_KEY_BYTES = 32

# Two limbs of 26 bits. A product of limbs is then below 2^52 and a sum of 2^12 of them below 2^64.
MAX_MAC_MODULUS = (1 << 52) - 1
_LIMB_BITS = 26
_LIMB_MASK = np.uint64((1 << _LIMB_BITS) - 1)
_ROW = 1 << 12

_PURPOSE_MAC: Final = b"fedseek/mac/v1\0"
_PURPOSE_PAD: Final = b"fedseek/mac-pad/v1\0"


def mac(slots: Slots, key: bytes, modulus: int) -> tuple[int, int]:
    """The two tags of ``slots``: sum over j of k_i[j] * slots[j] modulo ``modulus``, for i = 0 and 1.

    k_i is the stream (fedseek/secagg/stream.py) of ``key`` for the purpose "fedseek/mac/v1" 00 i. Memory does not grow
    with the length of ``slots``.

    Args:
        slots: shape (n,), every entry below ``modulus``.
        key: 32 bytes, one for each round, known to sites alone.
        modulus: t, a prime below 2^52; that it is prime is the caller's part (``HeParams`` makes sure).

    Returns:
        Two numbers in [0, modulus).

    Raises:
        ValueError: a length or a number is out of range, or a slot is not reduced.
    """
    _check_key(key, modulus)
    check_slots(slots, modulus)
    return _tag(slots, key, modulus, 0), _tag(slots, key, modulus, 1)


def pad(key: bytes, label: bytes, modulus: int) -> tuple[int, int]:
    """The two numbers that the site called ``label`` adds to its tags.

    Args:
        key: as given to ``mac``.
        label: names the site; no two sites of a round have the same.
        modulus: as given to ``mac``.

    Returns:
        Two numbers in [0, modulus): the first two slots of the stream for "fedseek/mac-pad/v1" 00 label.

    Raises:
        ValueError: a length or a number is out of range.
    """
    _check_key(key, modulus)
    first, second = expand(key, _PURPOSE_PAD + label, NUM_TAGS, modulus).tolist()
    return first, second


def _tag(slots: Slots, key: bytes, modulus: int, number: int) -> int:
    tag = start = 0
    for piece in chunks(key, _PURPOSE_MAC + bytes([number]), slots.size, modulus):
        tag += _inner_product(piece, slots[start : start + piece.size])
        start += piece.size
    return tag % modulus


def _inner_product(left: Slots, right: Slots) -> int:
    """Exact, for entries below 2^52: (a + A 2^26)(b + B 2^26) = ab + (aB + Ab) 2^26 + AB 2^52, row by row."""
    total = 0
    shift = np.uint64(_LIMB_BITS)
    for start in range(0, left.size, _ROW):
        x, y = left[start : start + _ROW], right[start : start + _ROW]
        x_low, x_high, y_low, y_high = x & _LIMB_MASK, x >> shift, y & _LIMB_MASK, y >> shift
        middle = int(x_low @ y_high) + int(x_high @ y_low)  # Python integers: both together may pass 2^64
        total += int(x_low @ y_low) + (middle << _LIMB_BITS) + (int(x_high @ y_high) << 2 * _LIMB_BITS)
    return total


def _check_key(key: bytes, modulus: int) -> None:
    if len(key) != MAC_KEY_BYTES:  # its length, never the key
        raise ValueError(f"mac: got a key of {len(key)} bytes; wanted {MAC_KEY_BYTES}")
    if not 2 <= modulus <= MAX_MAC_MODULUS:
        raise ValueError(f"mac: got the modulus {modulus}; wanted 2 to 2^52 - 1")
