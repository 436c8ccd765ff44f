"""Writes the test vectors: ``python tests/vectors/make_vectors.py`` gives the same bytes again, or the protocol changed.

Every secret is a hash of its label. Where the library draws randomness (Shamir polynomials, nonces), it is given a
stream with a fixed start for as long as a vector is made. HPKE draws inside its own library: that one envelope is kept
from the file, as long as it opens. ``reader.py`` reads the vectors back without any code of ours.

Whoever changes the protocol on purpose runs this, reads the difference, and raises the version in the domain strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fixed import bytes_for, fixed_randomness, result, site
from message_vectors import message_vectors
from refused_vectors import refused_vectors, sealed_cases
from round_vectors import play, round_vectors

from fedseek.identity.roster import Roster
from fedseek.identity.sealing import SealedKey, open_sealed, seal
from fedseek.secagg.graph import choose_graph, neighbours
from fedseek.secagg.mac import mac, pad
from fedseek.secagg.shamir import combine, split
from fedseek.secagg.stream import Slots, expand

FOLDER = Path(__file__).resolve().parent
T45 = 35_184_372_121_601  # the plain modulus of 13-bit values and four sites


def stream_vectors() -> dict[str, Any]:
    seed, long_seed = bytes_for("stream").hex(), bytes_for("stream", 32).hex()
    often_skipped = 2**64 // 5 + 1  # a fifth of the words falls in the incomplete block
    asked = [
        ("slots of a plan", seed, b"self", T45, 8),
        ("another purpose", seed, b"pair", T45, 8),
        ("a purpose with a name in Chinese", seed, "掩码".encode(), T45, 4),
        ("an empty purpose", seed, b"", T45, 4),
        ("a seed of 32 bytes", long_seed, b"self", T45, 4),
        ("words are skipped", seed, b"skip", often_skipped, 24),
        ("the largest modulus", seed, b"large", 2**62 - 1, 4),
        ("the smallest modulus", seed, b"small", 2, 16),
        ("more than one piece of key stream, words skipped", seed, b"long", often_skipped, 40_000),
        ("nothing", seed, b"none", T45, 0),
        ("a seed of 15 bytes", seed[2:], b"self", T45, 4),
        ("modulus 1", seed, b"self", 1, 4),
        ("modulus 2^62", seed, b"self", 2**62, 4),
        ("a negative count", seed, b"self", T45, -1),
    ]

    def case(name: str, seed: str, purpose: bytes, modulus: int, count: int) -> dict[str, Any]:
        def slots() -> dict[str, Any]:
            got = expand(bytes.fromhex(seed), purpose, count, modulus)
            digest = hashlib.sha256(got.astype("<u8").tobytes()).hexdigest()
            return {"first": got[:24].tolist(), "sha256": digest}

        inputs = {"name": name, "seed": seed, "purpose": purpose.hex(), "modulus": modulus, "count": count}
        return {**inputs, **result(slots)}

    return {"source": "fedseek/secagg/stream.py", "stream": [case(*each) for each in asked]}


def graph_vectors() -> dict[str, Any]:
    def drawn(num_sites: int, degree: int, label: str) -> dict[str, Any]:
        seed = bytes_for(label, 32)
        inputs = {"name": label, "num_sites": num_sites, "degree": degree, "seed": seed.hex()}
        return {
            **inputs,
            **result(lambda: {"neighbours": [list(each) for each in neighbours(num_sites, degree, seed)]}),
        }

    def chosen(num_sites: int, colluders: int, dropout: float) -> dict[str, Any]:
        def shape() -> dict[str, Any]:
            params = choose_graph(num_sites, colluders=colluders, dropout_fraction=dropout)
            return {"degree": params.degree, "threshold": params.threshold, "min_survivors": params.min_survivors}

        name = f"{num_sites} sites, {colluders} colluders, {dropout} drop out"
        return {"name": name, "num_sites": num_sites, "colluders": colluders, "dropout": str(dropout), **result(shape)}

    drawn_for = [(2, 1), (5, 4), (5, 2), (12, 4), (40, 10), (7, 3), (7, 8), (1, 0), (1025, 2)]
    chosen_for = [(2, 0, 0.1), (3, 1, 0.1), (4, 1, 0.1), (10, 3, 0.5), (20, 1, 0.1), (60, 2, 0.1), (128, 1, 0.05)]
    refused = [(3, 2, 0.1), (0, 0, 0.1), (1025, 1, 0.1), (4, -1, 0.1), (4, 1, 1.0)]
    return {
        "source": "fedseek/secagg/graph.py",
        "neighbours": [drawn(n, k, f"graph of {n} sites, degree {k}") for n, k in drawn_for],
        "params": [chosen(*each) for each in chosen_for + refused],
    }


def shamir_vectors() -> dict[str, Any]:
    secret = bytes_for("shamir")
    with fixed_randomness("shamir"):
        shares = dict(enumerate(split(secret, threshold=3, holders=5)))
        many = dict(enumerate(split(bytes(16), threshold=12, holders=20)))
    altered = {**shares, 1: bytes_for("another share")}
    asked = [
        ("all holders", shares, 3),
        ("the last three", {place: shares[place] for place in (2, 3, 4)}, 3),
        ("the fourth is not looked at", {**shares, 3: bytes_for("another share")}, 3),
        ("an altered share gives another secret", altered, 3),
        ("a lower threshold gives another secret", shares, 2),
        ("a secret of zeros, 20 holders", many, 12),
        ("the highest place", {0: shares[0], 1: shares[1], 1023: bytes_for("far")}, 3),
        ("too few", {0: shares[0], 4: shares[4]}, 3),
        ("a share of 15 bytes", {**shares, 0: shares[0][1:]}, 3),
        ("a place beyond the last", {**shares, 1024: bytes(16)}, 3),
        ("a threshold of one", shares, 1),
    ]

    def case(name: str, given: Mapping[int, bytes], threshold: int) -> dict[str, Any]:
        inputs = {
            "name": name,
            "threshold": threshold,
            "shares": [[place, share.hex()] for place, share in sorted(given.items())],
        }
        return {**inputs, **result(lambda: {"secret": combine(given, threshold=threshold).hex()})}

    return {"source": "fedseek/secagg/shamir.py", "combine": [case(*each) for each in asked]}


def tag_vectors() -> dict[str, Any]:
    key = bytes_for("mac", 32)
    slots = expand(bytes_for("slots"), b"vector", 12, T45)
    edge = np.array([T45 - 1, 0, 1, T45 - 1], dtype=np.uint64)

    def maced(name: str, slots: Slots, key: bytes, modulus: int) -> dict[str, Any]:
        inputs = {"name": name, "slots": slots.tolist(), "key": key.hex(), "modulus": modulus}
        return {**inputs, **result(lambda: {"tags": list(mac(slots, key, modulus))})}

    def padded(label: str, key: bytes, modulus: int) -> dict[str, Any]:
        inputs = {"name": f"pad of {label!r}", "key": key.hex(), "label": label, "modulus": modulus}
        return {**inputs, **result(lambda: {"pads": list(pad(key, label.encode(), modulus))})}

    long = expand(bytes_for("slots"), b"vector", 5000, (1 << 52) - 1)
    far = mac(long, key, (1 << 52) - 1)
    return {
        "source": "fedseek/secagg/mac.py",
        "mac": [
            maced("twelve slots", slots, key, T45),
            maced("the largest and the smallest slots", edge, key, T45),
            maced("zeros", np.zeros(3, dtype=np.uint64), key, T45),
            maced("nothing", np.zeros(0, dtype=np.uint64), key, T45),
            maced("a slot that is not reduced", np.array([T45], dtype=np.uint64), key, T45),
            maced("a key of 31 bytes", slots, key[1:], T45),
            maced("a modulus of more than 52 bits", slots, key, 1 << 52),
        ],
        "long_mac": [
            {
                "name": "5000 slots of the stream 'vector', modulus 2^52 - 1",
                "seed": bytes_for("slots").hex(),
                "key": key.hex(),
                "tags": list(far),
            }
        ],
        "pad": [padded("北岸银行", key, T45), padded("harbour-bank", key, T45), padded("short key", key[:16], T45)],
    }


def sealed_vectors(kept: Mapping[str, Any] | None) -> dict[str, Any]:
    """HPKE draws its own randomness: an envelope that still opens is kept."""
    sender, receiver = site("北岸银行", "bank"), site("仁济医院", "hospital")
    roster = Roster.of([sender.public(), receiver.public()])
    where: dict[str, Any] = {"run": "试运行-1", "epoch": 7}
    secret = bytes_for("group key", 48)
    envelope: bytes | None = None
    if kept is not None:
        envelope = bytes.fromhex(kept["envelope"])
        sealed = msgspec.msgpack.decode(envelope, type=SealedKey)
        if open_sealed(sealed, receiver=receiver, roster=roster, **where) != secret:
            envelope = None
    if envelope is None:
        envelope = msgspec.msgpack.encode(
            seal(secret, sender=sender, receiver=receiver.public(), roster=roster, **where)
        )
    return sealed_cases(envelope, secret, receiver, roster, where)


def dump(document: Mapping[str, Any]) -> str:
    """JSON with one case a line, so that a difference shows what changed."""

    def compact(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in document.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {compact(each)}" for each in value)
            lines.append(f" {compact(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def make_all(folder: Path = FOLDER) -> dict[str, str]:
    """Every file by name, as it should be."""
    sealed = folder / "sealed.json"
    kept = json.loads(sealed.read_text("utf-8")) if sealed.exists() else None
    played = play()
    documents = {
        "stream.json": stream_vectors(),
        "graph.json": graph_vectors(),
        "shamir.json": shamir_vectors(),
        "tag.json": tag_vectors(),
        "sealed.json": sealed_vectors(kept),
        "round.json": {**round_vectors(played), "refused": refused_vectors(played)},
        "messages.json": message_vectors(),
    }
    return {name: dump(document) for name, document in documents.items()}


if __name__ == "__main__":
    for name, text in make_all().items():
        (FOLDER / name).write_text(text, "utf-8")
