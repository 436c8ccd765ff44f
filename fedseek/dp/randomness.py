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
import weakref
from typing import Never

import numpy as np
from randomgen import AESCounter

_KEY_BYTES = 16


class SecretBits(AESCounter):  # type: ignore[misc]  # randomgen is untyped
    """AES in counter mode under a key of the operating system's; takes no seed."""

    def __init__(self) -> None:
        super().__init__(key=_fresh_key())
        _ALIVE.add(self)

    def rekey(self) -> None:
        """Go on under a fresh key, from the beginning of its stream."""
        fresh: AESCounter = SecretBits()
        self.state = fresh.state

    def __reduce__(self) -> Never:
        raise TypeError("SecretBits is not copied or pickled: the copy would repeat the stream")


_ALIVE: weakref.WeakSet[SecretBits] = weakref.WeakSet()


def secret_generator() -> np.random.Generator:
    """A generator under a fresh key from the operating system.

    There is deliberately no argument: no seed of a plan, of torch or of numpy can reach it, and two calls never give
    the same stream. Neither do the two halves of a process that forks.
    """
    return np.random.Generator(SecretBits())


def is_secret(generator: np.random.Generator) -> bool:
    """Whether a generator was made by :func:`secret_generator`."""
    return isinstance(generator.bit_generator, SecretBits)


def _fresh_key() -> int:
    return int.from_bytes(secrets.token_bytes(_KEY_BYTES), "little")


def _rekey_all() -> None:
    for bits in list(_ALIVE):
        bits.rekey()


os.register_at_fork(after_in_child=_rekey_all)
