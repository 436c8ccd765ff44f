"""The sites' secret key: the only module that can encrypt or decrypt. The coordinator must never import it.

Encryption is symmetric BFV with a seeded second polynomial: a site holds the group key anyway, and symmetric
ciphertexts are half the bytes and carry less noise than public-key ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from tenseal import sealapi

from fedseek.errors import WrongKey
from fedseek.he.ciphertext import CiphertextForm, load_ciphertext, seal_context
from fedseek.he.params import HeParams
from fedseek.he.sealfile import load_object, open_frame, save_object, scratch

_FINGERPRINT_DOMAIN = b"fedseek/he/secret-key-fingerprint/v1\x00"
_FINGERPRINT_BYTES = 16
_DERIVE_DOMAIN = b"fedseek/he/derive/v1"
# Content of a SEAL 4 secret key besides its N coefficients of 8 bytes.
_KEY_FIELDS = 72
_KEY_COEFFICIENTS_AT, _KEY_ARRAY_FIELDS = 48, 24


class SecretKey:
    """A BFV secret key, made by ``generate`` or ``from_bytes``; ``repr`` is redacted, pickling and copying refused."""

    __slots__ = ("_params", "_seal_key")

    def __init__(self, params: HeParams, seal_key: Any) -> None:
        self._params = params
        self._seal_key = seal_key

    @classmethod
    def generate(cls, params: HeParams) -> SecretKey:
        """Draw a new key: ternary coefficients from the operating system's randomness (SEAL)."""
        return cls(params, sealapi.KeyGenerator(seal_context(params)).secret_key())

    @classmethod
    def from_bytes(cls, params: HeParams, data: bytes) -> SecretKey:
        """Read a key written by ``to_bytes``.

        Raises:
            Malformed: the bytes are not exactly one secret key for ``params``.
        """
        polynomial = 8 * params.poly_modulus_degree
        opened = open_frame(
            data, content_size=polynomial + _KEY_FIELDS, inner={_KEY_COEFFICIENTS_AT: polynomial + _KEY_ARRAY_FIELDS}
        )
        context = seal_context(params)
        seal_key = sealapi.SecretKey()
        load_object(seal_key, opened, context=context)
        return cls(params, seal_key)

    @property
    def params(self) -> HeParams:
        """The parameters the key belongs to."""
        return self._params

    def to_bytes(self) -> bytes:
        """The key itself: secret. About 32 KB; seal it before it leaves the process."""
        return save_object(self._seal_key)

    def fingerprint(self) -> str:
        """A short public name of the key, 32 hexadecimal digits.

        Guarantee: SHA-256 of more than 6000 bits of secret randomness under its own domain, cut to 128 bits: it tells
        two keys apart and reveals nothing that helps to find one. It does not depend on how the key was serialised.
        """
        return hashlib.sha256(_FINGERPRINT_DOMAIN + self._content()).digest()[:_FINGERPRINT_BYTES].hex()

    def derive(self, purpose: bytes) -> bytes:
        """A key for ``purpose`` that only holders of this key can know, 32 bytes (HKDF, RFC 5869).

        Guarantee: keys of different purposes tell nothing about each other or about this key.
        """
        return HKDF(algorithm=hashes.SHA256(), length=32, salt=_DERIVE_DOMAIN, info=purpose).derive(self._content())

    def _content(self) -> bytes:
        """Parameters and coefficients: the same bytes however the key was serialised."""
        polynomial = self._seal_key.data()
        degree = self._params.poly_modulus_degree
        coefficients = np.array([polynomial.data(i) for i in range(degree)], dtype="<u8")
        name = f"{degree},{self._params.coeff_mod_bit_sizes},{self._params.plain_modulus}\x00".encode()
        return name + coefficients.tobytes()

    def __repr__(self) -> str:
        return "SecretKey(<redacted>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretKey is never pickled or copied; use to_bytes() and seal the result")


def encrypt_slots(key: SecretKey, slots: npt.NDArray[np.uint64]) -> list[bytes]:
    """Encrypt slots. Run by a site.

    Args:
        key: the group key.
        slots: shape (n,), each below the plain modulus; the last ciphertext is filled up with zeros.

    Returns:
        ceil(n / 4096) fresh ciphertexts.

    Raises:
        ValueError: a slot does not fit the plain modulus.

    Cost: about 7.8 bytes and 0.1 microseconds a slot, plus 0.05 to pass it to SEAL.
    """
    params = key.params
    if slots.size and int(slots.max()) >= params.plain_modulus:
        raise ValueError(f"slots: got {int(slots.max())}; wanted less than the plain modulus {params.plain_modulus}")
    context = seal_context(params)
    encoder = sealapi.BatchEncoder(context)
    encryptor = sealapi.Encryptor(context, key._seal_key)
    plaintext = sealapi.Plaintext()
    ciphertexts = []
    with scratch() as through:
        for start in range(0, slots.size, params.slot_count):
            encoder.encode(slots[start : start + params.slot_count].tolist(), plaintext)  # SEAL zero-fills
            ciphertexts.append(save_object(encryptor.encrypt_symmetric(plaintext), through))
    return ciphertexts


def decrypt_slots(key: SecretKey, ciphertexts: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Decrypt summed ciphertexts. Run by a site.

    Guarantee: BFV decrypts under a wrong key to plausible garbage without an error, but the noise it then sees fills
    the whole modulus. So each ciphertext's noise budget is checked, and nothing is returned unless all are positive.

    Args:
        key: the group key.
        ciphertexts: in slot order, of the summed form.

    Returns:
        Slots, shape (4096 * len(ciphertexts),).

    Raises:
        Malformed: a ciphertext does not parse.
        WrongKey: a ciphertext was made under another key, under several keys, or summed over too many sites.

    Cost: about 0.15 microseconds a slot to parse, 0.02 for the check, 0.25 to decrypt and read.
    """
    params = key.params
    context = seal_context(params)
    encoder = sealapi.BatchEncoder(context)
    decryptor = sealapi.Decryptor(context, key._seal_key)
    plaintext = sealapi.Plaintext()
    slots = np.empty((len(ciphertexts), params.slot_count), dtype=np.uint64)
    with scratch() as through:
        for row, data in zip(slots, ciphertexts, strict=True):
            ciphertext = load_ciphertext(params, data, form=CiphertextForm.SUMMED, through=through)
            if decryptor.invariant_noise_budget(ciphertext) == 0:
                raise WrongKey(
                    "ciphertext: no noise budget left under this key; wanted at least 1 bit",
                    hint="the sum was made under another epoch's key, or over more sites than the plan allows",
                )
            decryptor.decrypt(ciphertext, plaintext)
            row[:] = encoder.decode_uint64(plaintext)
    return slots.reshape(-1)
