"""Handing a secret to one site through a courier that must neither read nor alter it.

HPKE in base mode (RFC 9180) with the hybrid KEM MLKEM768-X25519, so that traffic recorded today stays closed while
either ML-KEM or X25519 holds, and an Ed25519 signature of the sender over the whole envelope, because base mode does
not say who sealed. Run, epoch, sender, receiver and roster digest are bound twice: into HPKE's key schedule through
``info`` (RFC 9180, section 5.1) and into the signature. An envelope moved to another run, epoch, site or roster is
refused, and the refusal says which of them it was.

What this does not do: the sender seals to the keys on its own roster. If that roster is false, the secret goes to
whoever made it so. Rosters are therefore compared first (see ``roster``).
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite

from fedseek.errors import Malformed, WrongKey
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import DIGEST_BYTES, MAX_NAME_CHARS, Roster, RosterEntry
from fedseek.identity.signing import CONTEXT_SEALED_KEY, SIGNATURE_BYTES, join_fields, sign, verify

MAX_SECRET_BYTES = 2 << 20  # a BFV secret key at N = 16384 with nine primes is about 1.2 MB
MAX_RUN_CHARS = 128
MAX_EPOCH = 2**32 - 1
SEAL_OVERHEAD_BYTES = 1120 + 16  # encapsulated key of MLKEM768-X25519, then the AEAD tag

_MLKEM_PUBLIC_BYTES = 1184
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class SealedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A secret sealed by one site to one other, as it travels through the coordinator.

    The courier sees who, to whom, when and how long; nothing of the secret. Bounds hold when it is decoded.

    Attributes:
        run: the run that the secret is for.
        epoch: which group key of the run, counted from 0.
        sender: name of the site that sealed and signed.
        receiver: name of the only site that can open it.
        roster_digest: the roster both must hold, 32 bytes.
        ciphertext: HPKE encapsulated key and ciphertext, ``len(secret) + 1136`` bytes.
        signature: the sender's Ed25519 signature over all of the above, 64 bytes.
    """

    run: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_RUN_CHARS)]
    epoch: Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]
    sender: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    receiver: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    roster_digest: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    ciphertext: Annotated[
        bytes, msgspec.Meta(min_length=SEAL_OVERHEAD_BYTES + 1, max_length=SEAL_OVERHEAD_BYTES + MAX_SECRET_BYTES)
    ]
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


def seal(
    secret: bytes, *, sender: SiteIdentity, receiver: RosterEntry, roster: Roster, run: str, epoch: int
) -> SealedKey:
    """Seal ``secret`` so that only ``receiver`` opens it; run by the site that made the secret.

    Args:
        secret: 1 byte to 2 MiB.
        sender: who seals; must be on the roster with these keys.
        receiver: for whom; must be on the roster with these keys.
        roster: the roster as the sender knows it.
        run: the run that the secret is for, 1 to 128 characters.
        epoch: which group key of the run.

    Raises:
        WrongKey: sender or receiver is not on the roster with these keys, or the receiver's key is no key.
        Malformed: the secret, the run or the epoch is out of bounds.
    """
    _check_bounds(secret, run, epoch)
    roster.require(sender.public())
    roster.require(receiver)
    bound = _bound_fields(run=run, epoch=epoch, sender=sender.name, receiver=receiver.name, digest=roster.digest())
    try:
        ciphertext = _SUITE.encrypt(secret, _hpke_public_key(receiver), info=bound)
    except ValueError as error:  # a key of the right length that is not a key of this KEM, or of low order
        raise WrongKey(f"sealing key of site {receiver.name!r} is not a valid MLKEM768-X25519 key") from error
    return SealedKey(
        run=run,
        epoch=epoch,
        sender=sender.name,
        receiver=receiver.name,
        roster_digest=roster.digest(),
        ciphertext=ciphertext,
        signature=sign(sender, CONTEXT_SEALED_KEY, join_fields(bound, ciphertext)),
    )


def open_sealed(sealed: SealedKey, *, receiver: SiteIdentity, roster: Roster, run: str, epoch: int) -> bytes:
    """Open an envelope that was sealed to ``receiver`` for this run, epoch and roster; run by the receiving site.

    Args:
        sealed: as it came from the coordinator; nothing in it is trusted.
        receiver: who opens.
        roster: the roster as the receiver knows it.
        run: the run that the receiver is in.
        epoch: the epoch that the receiver expects.

    Returns:
        The secret.

    Raises:
        WrongKey: meant for another run, epoch, site or roster, not signed by the sender it names, or altered.
    """
    _check_addressed(sealed, receiver=receiver.name, digest=roster.digest(), run=run, epoch=epoch)
    roster.require(receiver.public())
    bound = _bound_fields(run=run, epoch=epoch, sender=sealed.sender, receiver=receiver.name, digest=roster.digest())
    sender = roster.entry(sealed.sender)
    verify(sender, CONTEXT_SEALED_KEY, join_fields(bound, sealed.ciphertext), sealed.signature)
    try:
        return _SUITE.decrypt(sealed.ciphertext, _hpke_private_key(receiver), info=bound)
    except InvalidTag as error:
        raise WrongKey(
            f"envelope from site {sealed.sender!r} is signed but does not open with the key of {receiver.name!r}",
            hint="it was sealed to another key",
        ) from error


def _check_bounds(secret: bytes, run: str, epoch: int) -> None:
    if not 1 <= len(secret) <= MAX_SECRET_BYTES:
        raise Malformed(f"secret to seal has {len(secret)} bytes, wanted 1 to {MAX_SECRET_BYTES}")
    if not 1 <= len(run) <= MAX_RUN_CHARS:
        raise Malformed(f"run name has {len(run)} characters, wanted 1 to {MAX_RUN_CHARS}")
    if not 0 <= epoch <= MAX_EPOCH:
        raise Malformed(f"epoch is {epoch}, wanted 0 to {MAX_EPOCH}")


def _check_addressed(sealed: SealedKey, *, receiver: str, digest: bytes, run: str, epoch: int) -> None:
    checks = (
        ("run", sealed.run, run),
        ("epoch", sealed.epoch, epoch),
        ("receiver", sealed.receiver, receiver),
        ("roster digest", sealed.roster_digest.hex(), digest.hex()),
    )
    for what, got, wanted in checks:
        if got != wanted:
            raise WrongKey(f"envelope from site {sealed.sender!r} is for {what} {got!r}, wanted {wanted!r}")


def _bound_fields(*, run: str, epoch: int, sender: str, receiver: str, digest: bytes) -> bytes:
    return join_fields(
        CONTEXT_SEALED_KEY, run.encode(), epoch.to_bytes(4, "big"), sender.encode(), receiver.encode(), digest
    )


def _hpke_public_key(entry: RosterEntry) -> MLKEM768X25519PublicKey:
    mlkem, x25519 = entry.sealing_key[:_MLKEM_PUBLIC_BYTES], entry.sealing_key[_MLKEM_PUBLIC_BYTES:]
    return MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(mlkem), X25519PublicKey.from_public_bytes(x25519)
    )


def _hpke_private_key(identity: SiteIdentity) -> MLKEM768X25519PrivateKey:
    return MLKEM768X25519PrivateKey(identity.mlkem_key, identity.x25519_key)
