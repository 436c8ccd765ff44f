"""Shares: a seed of 16 bytes split so that any ``threshold`` holders rebuild it and fewer learn nothing.

Shamir 1979 (CACM 22, "How to share a secret"), over GF(2^128) with the polynomial x^128 + x^7 + x^2 + x + 1, as
PyCryptodome implements it (its own index rule, not that of the ``ssss`` program). Bonawitz et al. 2017 (CCS, "Practical
Secure Aggregation"), section 3, and Bell et al. 2020 (CCS) share the seeds of masks this way.

Fewer than ``threshold`` shares say nothing about the secret, whatever computing power (perfect secrecy).

What Shamir does not do: notice a wrong share. One altered share among those used gives another secret, without an
error. Whoever combines must check the result against the commitment its dealer published (fedseek/unmask.py).

PyCryptodome computes in Python integers: neither the time nor the memory of a process that splits or combines hides
the secret from somebody who shares its machine.
"""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

SECRET_BYTES = 16
MIN_THRESHOLD = 2  # a threshold of one hands the secret to every holder
MAX_HOLDERS = 1024


def split(secret: bytes, *, threshold: int, holders: int) -> tuple[bytes, ...]:
    """Split ``secret`` with fresh randomness from the operating system; run by its dealer.

    Args:
        secret: 16 bytes.
        threshold: shares that rebuild it.
        holders: shares made; 2 <= threshold <= holders <= 1024.

    Returns:
        One share of 16 bytes for each holder; the one at position p is the polynomial's value at p + 1 (its value at
        0 is the secret).

    Raises:
        ValueError: a length or a number is out of range.
    """
    _check_length("secret", secret)
    _check_threshold(threshold)
    if not threshold <= holders <= MAX_HOLDERS:
        raise ValueError(f"shamir: got {holders} holders; wanted {threshold} (the threshold) to {MAX_HOLDERS}")
    # Shares come in the order of their indices, 1 to holders.
    return tuple(bytes(share) for _, share in Shamir.split(threshold, holders, secret, ssss=False))


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """Rebuild a secret from the shares at the ``threshold`` lowest positions; further shares are not looked at.

    Args:
        shares: from a holder's position, 0 to 1023, to its share, 16 bytes.
        threshold: as given to ``split``.

    Returns:
        The secret, 16 bytes; 16 other bytes if a share used is wrong or the threshold is another (see above).

    Raises:
        ValueError: too few shares, or a length or a number is out of range.
    """
    _check_threshold(threshold)
    if len(shares) < threshold:
        raise ValueError(f"shamir: got {len(shares)} shares; wanted at least {threshold} (the threshold)")
    for position, share in shares.items():
        if not 0 <= position < MAX_HOLDERS:
            raise ValueError(f"shamir: got a share at position {position}; wanted 0 to {MAX_HOLDERS - 1}")
        _check_length(f"share at position {position}", share)
    used = [(position + 1, shares[position]) for position in sorted(shares)[:threshold]]
    return bytes(Shamir.combine(used, ssss=False))


def _check_length(what: str, value: bytes) -> None:
    if len(value) != SECRET_BYTES:  # its length, never the value
        raise ValueError(f"shamir: got a {what} of {len(value)} bytes; wanted {SECRET_BYTES}")


def _check_threshold(threshold: int) -> None:
    if not MIN_THRESHOLD <= threshold <= MAX_HOLDERS:
        raise ValueError(f"shamir: got the threshold {threshold}; wanted {MIN_THRESHOLD} to {MAX_HOLDERS}")
