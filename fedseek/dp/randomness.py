"""Secret randomness: a block cipher in counter mode, keyed by the operating system.

The generators that numpy and torch ship are statistical: 624 outputs of the Mersenne Twister give away all that follow.
Both the noise and the choice of records must stay unknown to whoever sees the updates, so both come from AES-128 in
counter mode (NIST SP 800-38A, section 6.5) under a fresh key.

A process that forks would go on with the same key in both halves, and the noise of one could be subtracted from the
other's: in the child, every generator gets a key of its own before any code of ours runs there.
"""

from __future__ import annotations

import os
import secrets
import struct
import weakref
from typing import Never, Self

import numpy as np
from randomgen import AESCounter

from fedseek.errors import Malformed

_KEY_BYTES = 16
_WORD_BYTES, _BUFFERED_BYTES = 8, 64  # the cipher runs four blocks ahead
_PLACE = struct.Struct("<16sQ?I")  # key, 64-bit words drawn, whether half a word is kept back, and which
PLACE_BYTES = _PLACE.size
"""Of `SecretBits.place`."""


class SecretBits(AESCounter):  # type: ignore[misc]  # randomgen is untyped
    """AES in counter mode under a key of the operating system's; takes no seed."""

    def __init__(self) -> None:
        super().__init__(key=_fresh_key())
        _ALIVE.add(self)

    def rekey(self) -> None:
        """Go on under a fresh key, from the beginning of its stream."""
        fresh: AESCounter = SecretBits()
        self.state = fresh.state

    def place(self) -> bytes:
        """Key and place in the stream, `PLACE_BYTES`: **all that is secret about it**, to go on after a crash.

        For the choice of records alone, and only inside a sealed checkpoint; never for noise. A crash must not change
        who is drawn: if it came from the records (one that is too long for the memory, say) and the step were drawn
        anew, records that crash a step would be drawn less often than the accountant assumes. Noise is the other way
        round: a step that is done again must have fresh noise, and nobody saw the step that was lost.
        """
        state = self.state
        buffered, offset = state["s"]["counter"], state["s"]["offset"]
        # the buffer ends at block counter[0]; of it, offset bytes were handed out
        drawn = int(buffered[0]) * 2 + (offset - _BUFFERED_BYTES) // _WORD_BYTES
        key = state["s"]["seed"][:2].astype("<u8").tobytes()
        return _PLACE.pack(key, drawn, bool(state["has_uint32"]), state["uinteger"])

    @classmethod
    def at(cls, place: bytes) -> Self:
        """Go on where another process was killed. Two that go on from one place repeat each other.

        Raises:
            Malformed: it is not what `place` gave.
        """
        if len(place) != PLACE_BYTES:
            raise Malformed(f"place in a secret stream: got {len(place)} bytes, wanted {PLACE_BYTES}")
        key, drawn, keeps_half, half = _PLACE.unpack(place)
        bits, source = cls(), AESCounter(key=int.from_bytes(key, "little"))
        source.advance(drawn)
        bits.state = {**bits.state, "s": source.state["s"], "has_uint32": int(keeps_half), "uinteger": half}
        return bits

    def __reduce__(self) -> Never:
        raise TypeError("SecretBits is not copied or pickled: the copy would repeat the stream")


_ALIVE: weakref.WeakSet[SecretBits] = weakref.WeakSet()


def secret_generator() -> np.random.Generator:
    """A generator under a fresh key from the operating system.

    There is deliberately no argument: no seed of a plan, of torch or of numpy can reach it, and two calls never give
    the same stream. Neither do the two halves of a process that forks.
    """
    return np.random.Generator(SecretBits())


def place_of(generator: np.random.Generator) -> bytes:
    """Key and place of a generator that :func:`secret_generator` made: see `SecretBits.place`."""
    bits = generator.bit_generator
    if not isinstance(bits, SecretBits):
        raise TypeError("the place of a statistical generator was asked for, wanted one of secret_generator")
    return bits.place()


def generator_at(place: bytes) -> np.random.Generator:
    """The generator that `place_of` was asked about, in a process that goes on in place of a killed one.

    Raises:
        Malformed: it is not what `place_of` gave.
    """
    return np.random.Generator(SecretBits.at(place))


def is_secret(generator: np.random.Generator) -> bool:
    """Whether a generator was made by :func:`secret_generator`."""
    return isinstance(generator.bit_generator, SecretBits)


def _fresh_key() -> int:
    return int.from_bytes(secrets.token_bytes(_KEY_BYTES), "little")


def _rekey_all() -> None:
    for bits in list(_ALIVE):
        bits.rekey()


os.register_at_fork(after_in_child=_rekey_all)
