"""Secret randomness: a block cipher in counter mode, keyed by the operating system.

The generators that numpy and torch ship are statistical: 624 outputs of the Mersenne Twister give away all that follow.
Both the noise and the choice of records must stay unknown to whoever sees the updates, so both come from AES-128 in
counter mode (NIST SP 800-38A, section 6.5) under a fresh key.
"""

from __future__ import annotations

import secrets

import numpy as np
from randomgen import AESCounter

_KEY_BYTES = 16


def secret_generator() -> np.random.Generator:
    """A generator under a fresh key from the operating system.

    There is deliberately no argument: no seed of a plan, of torch or of numpy can reach it, and two calls never give
    the same stream.
    """
    key = int.from_bytes(secrets.token_bytes(_KEY_BYTES), "little")
    return np.random.Generator(AESCounter(key=key))
