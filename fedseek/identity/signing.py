"""Who said this, and for what: Ed25519 signatures (RFC 8032) with a context.

The context keeps purposes apart: a signature made under one context never verifies under another, whatever the
message. Every context of the project stands here, so that two purposes cannot pick the same one.

Ed25519 is not post-quantum. A signature must hold on the day it is checked, while a sealed key must hold for as long
as the recording is kept; so only ``sealing`` is hybrid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedseek.errors import WrongKey

if TYPE_CHECKING:  # verifying needs no private key, so a coordinator never loads the module that defines one
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedseek.identity.keys import SiteIdentity
    from fedseek.identity.roster import RosterEntry

CONTEXT_SEALED_KEY: Final = b"fedseek/sealed-key/v1"
CONTEXT_PLAN: Final = b"fedseek/plan-admitted/v1"
CONTEXT_ADAPTER: Final = b"fedseek/adapter-digest/v1"
CONTEXT_RELEASE: Final = b"fedseek/release-approved/v1"
CONTEXT_ROUND_KEYS: Final = b"fedseek/round-keys/v1"
CONTEXT_SHARES: Final = b"fedseek/shares-dealt/v1"
CONTEXT_PRESENCE: Final = b"fedseek/round-participants/v1"
CONTEXT_UNMASK: Final = b"fedseek/shares-revealed/v1"
CONTEXT_ROSTER: Final = b"fedseek/signed-roster/v1"
CONTEXT_JOIN_REQUEST: Final = b"fedseek/join-request/v1"
CONTEXT_JOIN_FILE: Final = b"fedseek/join-file/v1"
CONTEXT_RENEWAL: Final = b"fedseek/renewal/v1"
CONTEXT_AUDIT: Final = b"fedseek/audit-line/v1"
CONTEXT_AUDIT_HEAD: Final = b"fedseek/audit-head/v1"
CONTEXT_HEADS_SEEN: Final = b"fedseek/audit-heads-seen/v1"
CONTEXT_APPROVAL: Final = b"fedseek/plan-approved-by-person/v1"
CONTEXT_RELEASE_APPROVAL: Final = b"fedseek/release-approved-by-person/v1"

SIGNATURE_BYTES = 64
_SIGNED_PREFIX = b"fedseek/signed/v1"


def sign(identity: SiteIdentity, context: bytes, message: bytes) -> bytes:
    """Sign ``message`` for the purpose ``context``; run by a site.

    Args:
        identity: who signs.
        context: one of the ``CONTEXT_*`` constants above.
        message: any length, signed as it stands.

    Returns:
        The signature, 64 bytes; the same input gives the same bytes.
    """
    return sign_with(identity.signing_key, context, message)


def verify(entry: RosterEntry, context: bytes, message: bytes, signature: bytes) -> None:
    """Check that the site of ``entry`` signed ``message`` for the purpose ``context``; run by anybody.

    Raises:
        WrongKey: it did not: another signer, another purpose, another message, or no signature at all.
    """
    verify_with(entry.signing_key, context, message, signature, who=f"site {entry.name!r}")


def sign_with(key: Ed25519PrivateKey, context: bytes, message: bytes) -> bytes:
    """As :func:`sign`, with a key that is no site's: the roster authority's, the coordinator's, a person's."""
    return key.sign(_signed_bytes(context, message))


def verify_with(public_key: bytes, context: bytes, message: bytes, signature: bytes, *, who: str) -> None:
    """As :func:`verify`, against a public key of 32 bytes; ``who`` names its owner in the error.

    Raises:
        WrongKey: the owner of the key did not sign this for this purpose.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _signed_bytes(context, message))
    except (InvalidSignature, ValueError) as error:  # ValueError: not a point on the curve, or not 64 bytes
        raise WrongKey(
            f"signature does not verify with the key of {who} for {context.decode(errors='replace')!r}",
            hint="the message was altered, signed by another key, or signed for another purpose",
        ) from error


def join_fields(*fields: bytes) -> bytes:
    """Concatenate so that no two different tuples give the same bytes: each field after its length, 8 bytes."""
    return b"".join(len(field).to_bytes(8, "big") + field for field in fields)


def _signed_bytes(context: bytes, message: bytes) -> bytes:
    return join_fields(_SIGNED_PREFIX, context, message)
