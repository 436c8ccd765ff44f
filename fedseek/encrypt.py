"""Encrypt: encoded slots become ciphertexts under the group key. Run by a site, after encode."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.he.keys import SecretKey, encrypt_slots


def encrypt_update(key: SecretKey, encoded: Mapping[str, npt.NDArray[np.uint64]]) -> tuple[ScopedCiphertexts, ...]:
    """Encrypt one site's update.

    Encryption is randomised: two calls give two different ciphertexts of the same update. A caller that must
    answer a repeated request keeps the first result and sends those bytes again.

    Args:
        key: the group key.
        encoded: slots by scope, from ``fedseek.encode.encode_update``.

    Returns:
        One entry a scope, in the order of ``encoded``.

    Raises:
        ValueError: a slot does not fit the plain modulus.
    """
    return tuple(
        ScopedCiphertexts(scope=scope, ciphertexts=tuple(map(memoryview, encrypt_slots(key, slots))))
        for scope, slots in encoded.items()
    )
