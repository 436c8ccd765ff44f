"""Streams: a short secret seed expanded to slots, uniform modulo t. Masks and MAC keys are made of them.

Bonawitz et al. 2017 (CCS, "Practical Secure Aggregation"), section 3, and Bell et al. 2020 (CCS, "Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead"), section 2: a pseudorandom generator turns a seed that two
sites share into a mask as long as the update.

Definition, normative (another reader must get the same slots)::

    key    = HKDF-SHA256(ikm = seed, salt = none, info = "fedseek/stream/v1" 00 || purpose, length = 32)    RFC 5869
    stream = AES-256-CTR(key, initial counter block = 16 zero bytes), applied to zero bytes        NIST SP 800-38A, 6.5
    words  = stream read as unsigned 64-bit integers, little-endian
    a word >= floor(2^64 / modulus) * modulus is skipped; of every other, word mod modulus is the next slot

Skipping makes slots exactly uniform: with the last, incomplete block of residues kept, small slots would be likelier.
The counter may start at zero because a key is used for one stream: a caller never gives two streams the same seed and
the same purpose.

>>> expand(bytes(16), b"example", 3, 97).tolist()
[77, 44, 60]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Slots = npt.NDArray[np.uint64]

# 128 bits: X25519, which agrees on the pairwise seeds, is no stronger.
SEED_BYTES = 16
# A round's MAC key comes as a whole SHA-256 output.
LONG_SEED_BYTES = 32

# Two reduced slots and a modulus add up below 2^64.
MAX_MODULUS = (1 << 62) - 1

_INFO = b"fedseek/stream/v1\0"
_KEY_BYTES = 32
_COUNTER_START = bytes(16)

# 256 KiB of key stream at a time: stays in the second-level cache, and bounds the memory of every function here.
_CHUNK_WORDS = 1 << 15
_ZEROS = bytes(8 * _CHUNK_WORDS)


def expand(seed: bytes, purpose: bytes, count: int, modulus: int) -> Slots:
    """The first ``count`` slots of a stream.

    Args:
        seed: 16 or 32 bytes, secret (or public, where only agreement matters).
        purpose: what the slots are for; streams of two purposes are independent.
        count: slots wanted, at least 0.
        modulus: slots are below it; in [2, 2^62).

    Returns:
        Slots, shape (count,), uniform in [0, modulus). A longer stream begins with the shorter one.

    Raises:
        ValueError: an argument is out of range.
    """
    slots = np.empty(max(count, 0), dtype=np.uint64)
    start = 0
    for chunk in chunks(seed, purpose, count, modulus):
        slots[start : start + chunk.size] = chunk
        start += chunk.size
    return slots


def add_stream(total: Slots, seed: bytes, purpose: bytes, modulus: int, *, subtract: bool = False) -> None:
    """Add a stream to ``total``, or take it away, in place and modulo ``modulus``.

    Needs about 1 MiB whatever the length of ``total``. What one call adds, the same call with ``subtract`` takes away.

    Args:
        total: shape (n,), every entry below ``modulus``; altered.
        seed: as in ``expand``.
        purpose: as in ``expand``.
        modulus: as in ``expand``.
        subtract: take the stream away.

    Raises:
        ValueError: an argument is out of range, or ``total`` is not reduced; ``total`` is then as it was.
    """
    wrap = np.uint64(check_slots(total, modulus))
    start = 0
    for chunk in chunks(seed, purpose, total.size, modulus):
        part = total[start : start + chunk.size]
        part += wrap - chunk if subtract else chunk
        np.subtract(part, wrap, out=part, where=part >= wrap)  # the sum of two reduced slots is below 2 * modulus
        start += chunk.size


def chunks(seed: bytes, purpose: bytes, count: int, modulus: int) -> Iterator[Slots]:
    """The slots of ``expand`` piece by piece, for whoever wants no more than a piece in memory.

    Where a piece ends is not part of the definition.

    Raises:
        ValueError: an argument is out of range.
    """
    if count < 0:
        raise ValueError(f"stream: got a count of {count}; wanted 0 or more")
    return _reduced(words(seed, purpose), count, check_modulus(modulus))


def words(seed: bytes, purpose: bytes) -> Iterator[Slots]:
    """The 64-bit words of a stream before reduction, without end, in pieces.

    Raises:
        ValueError: the seed is not 16 or 32 bytes long.
    """
    if len(seed) not in (SEED_BYTES, LONG_SEED_BYTES):  # its length, never the seed
        raise ValueError(f"stream: got a seed of {len(seed)} bytes; wanted {SEED_BYTES} or {LONG_SEED_BYTES}")
    key = HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=_INFO + purpose).derive(seed)
    return _counter_words(key)


def check_modulus(modulus: int) -> int:
    """``modulus`` itself; ValueError unless it is in [2, 2^62)."""
    if not 2 <= modulus <= MAX_MODULUS:
        raise ValueError(f"stream: got the modulus {modulus}; wanted 2 to 2^62 - 1")
    return modulus


def check_slots(slots: Slots, modulus: int) -> int:
    """``modulus`` itself; ValueError unless it is in range and ``slots`` is a vector of uint64 below it."""
    check_modulus(modulus)
    if slots.ndim != 1 or slots.dtype != np.uint64:
        raise ValueError(f"slots: got {slots.dtype} of shape {slots.shape}; wanted uint64 of shape (n,)")
    if slots.size and int(slots.max()) >= modulus:  # which slot, or its value, is nobody's business
        raise ValueError(f"slots: got a slot that is not reduced; wanted all below the modulus {modulus}")
    return modulus


def _counter_words(key: bytes) -> Iterator[Slots]:
    encryptor = Cipher(algorithms.AES(key), modes.CTR(_COUNTER_START)).encryptor()
    while True:
        yield np.frombuffer(encryptor.update(_ZEROS), dtype="<u8")


def _reduced(pieces: Iterator[Slots], count: int, modulus: int) -> Iterator[Slots]:
    """Skip, reduce, and stop after ``count`` slots."""
    highest = np.uint64((1 << 64) // modulus * modulus - 1)  # the limit itself may be 2^64, which no word can hold
    while count > 0:
        piece = next(pieces)
        kept = piece <= highest
        if not kept.all():
            piece = piece[kept]
        chunk = np.remainder(piece[:count], np.uint64(modulus))
        count -= chunk.size
        yield chunk
