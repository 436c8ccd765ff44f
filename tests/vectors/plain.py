"""The protocol's formulas in plain Python, for ``reader.py``: written from the docstrings, without code of FedSeek."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from wire import pack, unpack


class Mismatch(Exception):
    """A vector is not what this reader computes."""


class Refusal(Exception):
    """This reader refuses, by the name that FedSeek gives the error."""


def expect(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise Mismatch(f"{what}: computed {str(got)[:200]}, the vector says {str(wanted)[:200]}")


def expect_case(case: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> None:
    """Compare what a case says, outputs or refusal, with what is computed."""
    try:
        got = compute()
    except Refusal as refusal:
        expect(case["name"], f"refused: {refusal}", f"refused: {case.get('refused')}")
        return
    expect(case["name"], "not refused", f"refused: {case['refused']}" if "refused" in case else "not refused")
    for key, value in got.items():
        expect(f"{case['name']}, {key}", value, case[key])


def require(condition: bool, error: str) -> None:
    if not condition:
        raise Refusal(error)


def join(*fields: bytes) -> bytes:
    return b"".join(len(each).to_bytes(8, "big") + each for each in fields)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def hkdf(secret: bytes, info: bytes, length: int, salt: bytes | None = None) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret)


def spliced(base: bytes, change: list[Any]) -> bytes:
    start, end, inserted = change
    return base[:start] + bytes.fromhex(inserted) + base[end:]


def flat(digests: dict[str, str]) -> list[bytes]:
    return [part for name in sorted(digests) for part in (name.encode(), bytes.fromhex(digests[name]))]


def words(seed: bytes, purpose: bytes) -> Iterator[int]:
    require(len(seed) in (16, 32), "ValueError")
    key = hkdf(seed, b"fedseek/stream/v1\0" + purpose, 32)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    while True:
        block = encryptor.update(bytes(4096))
        yield from (int.from_bytes(block[at : at + 8], "little") for at in range(0, len(block), 8))


def stream(seed: bytes, purpose: bytes, count: int, modulus: int) -> list[int]:
    require(2 <= modulus < 2**62 and count >= 0, "ValueError")
    limit = 2**64 // modulus * modulus
    kept = (word % modulus for word in words(seed, purpose) if word < limit)
    return [next(kept) for _ in range(count)] if count else []


def neighbours(num_sites: int, degree: int, seed: bytes) -> list[list[int]]:
    complete = degree == num_sites - 1
    require(2 <= num_sites <= 1024, "ValueError")
    require(complete or (degree % 2 == 0 and 2 <= degree < num_sites - 1), "ValueError")
    if complete:
        return [[other for other in range(num_sites) if other != one] for one in range(num_sites)]
    circle, drawn = list(range(num_sites)), words(seed, b"fedseek/graph/v1")
    for place in range(num_sites - 1, 0, -1):
        limit = 2**64 // (place + 1) * (place + 1)
        other = next(word for word in drawn if word < limit) % (place + 1)
        circle[place], circle[other] = circle[other], circle[place]
    around: dict[int, list[int]] = {}
    for place, position in enumerate(circle):
        near = [circle[(place + step) % num_sites] for step in range(-degree // 2, degree // 2 + 1) if step]
        around[position] = sorted(near)
    return [around[position] for position in range(num_sites)]


def chance_of_more(population: int, marked: int, draws: int, than: int) -> Fraction:
    """P[more than ``than`` of the ``marked`` are among ``draws`` of ``population``]."""
    ways = sum(
        math.comb(marked, count) * math.comb(population - marked, draws - count)
        for count in range(than + 1, min(marked, draws) + 1)
    )
    return Fraction(ways, math.comb(population, draws))


def graph_shape(num_sites: int, colluders: int, dropout: str) -> dict[str, int]:
    """The conditions in the docstrings of ``choose_graph`` and its module, word by word."""
    fraction = Fraction(dropout)
    require(1 <= num_sites <= 1024 and colluders >= 0 and 0 <= fraction < 1, "ValueError")
    require(num_sites - colluders >= 2, "InvalidPlan")
    dropouts, others = math.floor(fraction * num_sites), num_sites - 1

    def too_many_colluders(degree: int, than: int) -> bool:
        return num_sites * chance_of_more(others, colluders, degree, than) > Fraction(1, 2**80)

    def too_many_missing(degree: int, than: int) -> bool:
        stays = (num_sites - dropouts) * chance_of_more(others, dropouts, degree, than)
        leaves = dropouts * chance_of_more(others, dropouts - 1, degree, than - 1) if dropouts else 0
        return stays + leaves > Fraction(1, 2**30)

    for degree in range(2, others, 2) if num_sites > 20 else ():
        half, holders = degree // 2, degree + 1
        c = next(count for count in range(holders + 1) if not too_many_colluders(degree, count))
        e = next(count for count in range(holders + 1) if not too_many_missing(degree, count))
        t = holders - e
        if 2 * t > holders + c and (half - c) * (t - c) > 3 * half * e - e * (e - 1) - c * e:
            return {"degree": degree, "threshold": t, "min_survivors": num_sites - dropouts}
    threshold = (num_sites + colluders) // 2 + 1
    return {"degree": others, "threshold": threshold, "min_survivors": threshold}


def round_graph(bound: bytes, number: int, positions: list[int], shape: dict[str, int]) -> list[list[int]]:
    """Neighbours of each listed site, as positions on the roster."""
    listed = b"".join(position.to_bytes(2, "big") for position in positions)
    seed = sha256(b"fedseek/round-graph/v1" + bound + join(number.to_bytes(4, "big"), listed))
    return [[positions[near] for near in around] for around in neighbours(len(positions), shape["degree"], seed)]


def times(left: int, right: int) -> int:
    """A product in GF(2^128), modulo x^128 + x^7 + x^2 + x + 1."""
    product = 0
    for bit in range(128):
        if right >> bit & 1:
            product ^= left << bit
    for bit in range(product.bit_length() - 1, 127, -1):
        if product >> bit & 1:
            product ^= (1 << 128 | 0x87) << (bit - 128)
    return product


def inverse(element: int) -> int:
    """element^(2^128 - 2)."""
    result, square = 1, element
    for _ in range(127):
        square = times(square, square)
        result = times(result, square)
    return result


def combine(shares: dict[int, bytes], threshold: int) -> bytes:
    """Lagrange at 0. The holder at place p has the value at p + 1; elements are written big-endian."""
    require(2 <= threshold <= 1024 and len(shares) >= threshold, "ValueError")
    require(all(0 <= place < 1024 and len(share) == 16 for place, share in shares.items()), "ValueError")
    points = [(place + 1, int.from_bytes(shares[place], "big")) for place in sorted(shares)[:threshold]]
    secret = 0
    for x, y in points:
        above = below = 1
        for other, _ in points:
            if other != x:
                above, below = times(above, other), times(below, x ^ other)
        secret ^= times(y, times(above, inverse(below)))
    return secret.to_bytes(16, "big")


def mac(slots: list[int], key: bytes, modulus: int) -> list[int]:
    require(len(key) == 32 and 2 <= modulus < 2**52 and all(slot < modulus for slot in slots), "ValueError")
    vectors = [stream(key, b"fedseek/mac/v1\0" + bytes([i]), len(slots), modulus) for i in (0, 1)]
    return [sum(a * b for a, b in zip(vector, slots, strict=True)) % modulus for vector in vectors]


def pad(key: bytes, label: str, modulus: int) -> list[int]:
    require(len(key) == 32, "ValueError")
    return stream(key, b"fedseek/mac-pad/v1\0" + label.encode(), 2, modulus)


def tags(slots: list[int], key: bytes, sites: list[str], modulus: int) -> list[int]:
    """Of slots that several sites tagged: the first two slots hold the tags and count as zero."""
    parts = [mac([0, 0, *slots[2:]], key, modulus), *(pad(key, name, modulus) for name in sites)]
    return [sum(each) % modulus for each in zip(*parts, strict=True)]


def agree(private_key: bytes, public_key: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private_key).exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:
        raise Refusal("WrongKey") from None


def mask_private_key(seed: bytes) -> bytes:
    return hkdf(seed, b"fedseek/mask-key/v1", 32)


def public_of(private_key: bytes) -> str:
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw().hex()


def signed_bytes(context: bytes, message: bytes) -> bytes:
    return join(b"fedseek/signed/v1", context, message)


def verify(public_key: bytes, context: bytes, message: bytes, signature: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signed_bytes(context, message))
    except (InvalidSignature, ValueError):
        raise Refusal("WrongKey") from None


def read_roster(data: bytes) -> list[dict[str, Any]]:
    roster = unpack(data)
    expect("roster, canonical bytes", pack(roster), data)
    names = [entry["name"] for entry in roster["entries"]]
    expect("roster, order of names", names, sorted(names))
    return list(roster["entries"])


def roster_digest(data: bytes) -> bytes:
    return sha256(b"fedseek/roster/v1" + data)
