"""Reads the test vectors without any code of FedSeek: a second implementation, written from the docstrings.

    python tests/vectors/reader.py

Needs Python 3.11 and ``cryptography`` (AES, HKDF, X25519, Ed25519, HPKE). Everything else stands here in plain Python:
MessagePack, the rules of the wire (``wire.py``), GF(2^128), streams, graphs, tags, masks. It is slow and never sees a
secret that matters.

Each ``check_*`` takes the content of one file and raises ``Mismatch`` where the vector is not what it computes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when Python isolates itself from the script's folder

from plain import (
    Mismatch,
    Refusal,
    combine,
    expect,
    expect_case,
    graph_shape,
    join,
    mac,
    neighbours,
    pad,
    read_roster,
    require,
    roster_digest,
    sha256,
    spliced,
    stream,
    verify,
)
from round_reader import check_round
from wire import BadBytes, message_type, pack, unpack

FIRST = 24  # slots of a stream that a vector shows; the digest covers all


def check_stream(document: dict[str, Any]) -> int:
    for case in document["stream"]:

        def compute(case: dict[str, Any] = case) -> dict[str, Any]:
            seed, purpose = bytes.fromhex(case["seed"]), bytes.fromhex(case["purpose"])
            got = stream(seed, purpose, case["count"], case["modulus"])
            digest = sha256(b"".join(slot.to_bytes(8, "little") for slot in got)).hex()
            return {"first": got[:FIRST], "sha256": digest}

        expect_case(case, compute)
    return len(document["stream"])


def check_graph(document: dict[str, Any]) -> int:
    for case in document["neighbours"]:
        seed = bytes.fromhex(case["seed"])
        expect_case(case, lambda c=case, s=seed: {"neighbours": neighbours(c["num_sites"], c["degree"], s)})
    for case in document["params"]:
        expect_case(case, lambda c=case: graph_shape(c["num_sites"], c["colluders"], c["dropout"]))
    return len(document["neighbours"]) + len(document["params"])


def check_shamir(document: dict[str, Any]) -> int:
    for case in document["combine"]:
        shares = {place: bytes.fromhex(share) for place, share in case["shares"]}
        expect_case(case, lambda c=case, s=shares: {"secret": combine(s, c["threshold"]).hex()})
    return len(document["combine"])


def check_tag(document: dict[str, Any]) -> int:
    for case in document["mac"]:
        key = bytes.fromhex(case["key"])
        expect_case(case, lambda c=case, k=key: {"tags": mac(c["slots"], k, c["modulus"])})
    for case in document["long_mac"]:
        modulus = 2**52 - 1
        slots = stream(bytes.fromhex(case["seed"]), b"vector", 5000, modulus)
        expect(case["name"], mac(slots, bytes.fromhex(case["key"]), modulus), case["tags"])
    for case in document["pad"]:
        key = bytes.fromhex(case["key"])
        expect_case(case, lambda c=case, k=key: {"pads": pad(k, c["label"], c["modulus"])})
    return sum(len(document[part]) for part in ("mac", "long_mac", "pad"))


def check_sealed(document: dict[str, Any]) -> int:
    me = unpack(bytes.fromhex(document["receiver"]))
    entries = {entry["name"]: entry for entry in read_roster(bytes.fromhex(document["roster"]))}
    digest = roster_digest(bytes.fromhex(document["roster"]))
    key = MLKEM768X25519PrivateKey(
        MLKEM768PrivateKey.from_seed_bytes(me["mlkem_seed"]), X25519PrivateKey.from_private_bytes(me["x25519_key"])
    )
    context = b"fedseek/sealed-key/v1"

    def opened(case: dict[str, Any]) -> dict[str, Any]:
        sealed = unpack(spliced(bytes.fromhex(document["envelope"]), case["splice"]))
        addressed = (sealed["run"], sealed["epoch"], sealed["receiver"], sealed["roster_digest"])
        require(addressed == (case["run"], case["epoch"], me["name"], digest), "WrongKey")
        fields = (case["run"].encode(), case["epoch"].to_bytes(4, "big"), sealed["sender"].encode())
        bound = join(context, *fields, me["name"].encode(), digest)
        sender = entries[sealed["sender"]]
        verify(sender["signing_key"], context, join(bound, sealed["ciphertext"]), sealed["signature"])
        suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
        return {"secret": suite.decrypt(sealed["ciphertext"], key, info=bound).hex()}

    for case in document["sealed"]:
        expect_case(case, lambda c=case: opened(c))
    return len(document["sealed"])


def check_messages(document: dict[str, Any]) -> int:
    bases = {}
    for case in document["valid"]:
        data = bases[case["name"]] = bytes.fromhex(case["bytes"])
        expect(case["name"], message_type(data, case["reader"]), case["read"])
        expect(f"{case['name']}, written again", pack(unpack(data)), data)
    for case in document["refused"]:
        data = spliced(bases[case["base"]], case["splice"])
        try:
            read = message_type(data, case["reader"])
        except BadBytes:
            read = "refused: Malformed"
        expect(case["name"], read, case["read"])
    return len(document["valid"]) + len(document["refused"])


CHECKS: dict[str, Callable[[dict[str, Any]], int]] = {
    "stream.json": check_stream,
    "graph.json": check_graph,
    "shamir.json": check_shamir,
    "tag.json": check_tag,
    "sealed.json": check_sealed,
    "round.json": check_round,
    "messages.json": check_messages,
}


def check_file(path: Path) -> int:
    """Check one file; returns how many cases it has."""
    try:
        return CHECKS[path.name](json.loads(path.read_text("utf-8")))
    except Refusal as refusal:
        raise Mismatch(f"{path.name}: a valid vector is refused as {refusal}") from None
    except (LookupError, ValueError, TypeError, AttributeError, InvalidTag, BadBytes) as error:
        raise Mismatch(f"{path.name}: a vector cannot be read: {error!r}") from error


if __name__ == "__main__":
    for name in CHECKS:
        print(f"{name}: {check_file(Path(__file__).parent / name)} cases")  # noqa: T201
