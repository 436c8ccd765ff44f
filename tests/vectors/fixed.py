"""What makes test vectors repeatable: secrets that are hashes of their labels, and randomness with a fixed start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgspec

from fedseek.errors import FedseekError
from fedseek.identity.keys import SiteIdentity


def bytes_for(label: str, length: int = 16) -> bytes:
    """The fixed bytes that stand for a secret in the vectors."""
    return hashlib.shake_256(b"fedseek/test-vectors/v1\0" + label.encode()).digest(length)


def site(name: str, kind: str) -> SiteIdentity:
    """An identity whose private keys follow from its name."""
    form = {
        "version": 1,
        "name": name,
        "kind": kind,
        "signing_key": bytes_for(f"{name}/signing", 32),
        "mlkem_seed": bytes_for(f"{name}/mlkem", 64),
        "x25519_key": bytes_for(f"{name}/x25519", 32),
    }
    return SiteIdentity.from_bytes(msgspec.msgpack.encode(form))


@contextmanager
def fixed_randomness(label: str) -> Iterator[None]:
    """``os.urandom`` and PyCryptodome draw from a stream that begins the same every time."""
    drawn = 0

    def draw(count: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return bytes_for(f"{label}/{drawn}", count)

    with mock.patch("os.urandom", draw), mock.patch("Crypto.Protocol.SecretSharing.rng", draw):
        yield


def result(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a call gives, or how it refuses."""
    try:
        return call()
    except (ValueError, FedseekError) as error:
        return {"refused": type(error).__name__}


def splice(base: bytes, altered: bytes) -> list[Any]:
    """``altered`` as [start, end, hex]: what replaces ``base[start:end]``. Keeps the files small."""
    start = 0
    while start < min(len(base), len(altered)) and base[start] == altered[start]:
        start += 1
    tail = 0
    while tail < min(len(base), len(altered)) - start and base[-1 - tail] == altered[-1 - tail]:
        tail += 1
    return [start, len(base) - tail, altered[start : len(altered) - tail].hex()]
