"""Signed rosters, requests and join files for tests, made by an authority of their own."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedseek.identity.forms import DAY_SECONDS
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signed_roster import Member, SignedRoster, make_signed_roster

NOW = 1_800_000_000
CONSORTIUM = "华东联合"


def node_public_key(curve: ec.EllipticCurve | None = None) -> bytes:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def member(identity: SiteIdentity, *, at: int = NOW, days: int = 90) -> Member:
    return Member(identity.public(), at, at + days * DAY_SECONDS)


def signed_roster(
    key: Ed25519PrivateKey,
    *identities: SiteIdentity,
    after: SignedRoster | None = None,
    number: int | None = None,
    consortium: str = CONSORTIUM,
    at: int = NOW,
) -> SignedRoster:
    following = 0 if after is None else after.number + 1
    return make_signed_roster(
        key,
        consortium=consortium,
        number=following if number is None else number,
        members=[member(identity, at=at) for identity in identities],
        issued_at=at,
        previous=bytes(32) if after is None else after.digest(),
    )
