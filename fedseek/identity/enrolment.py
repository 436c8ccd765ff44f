"""How a site gets into a consortium and renews its keys, as files that people and daemons pass on.

    site: JoinRequest --> people compare its fingerprint --> authority: SignedRoster, in a JoinFile --> site
    site: Renewal, signed with the old keys --> authority: the next SignedRoster --> every site

Nothing in any of them is secret. What the signatures prove is said at each ``parse_`` and ``check_`` function; that
the first keys are whose they are said to be is proved by people alone, who compare fingerprints over another channel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from msgspec.structs import replace

from fedseek.errors import Malformed, WrongKey
from fedseek.identity.forms import Form, Moment, PublicKey, Signature, parse_form, sign_form
from fedseek.identity.roster import RosterEntry, check_name
from fedseek.identity.signed_roster import MAX_SIGNED_ROSTER_BYTES, SignedRoster, parse_signed_roster
from fedseek.identity.signing import (
    CONTEXT_JOIN_FILE,
    CONTEXT_JOIN_REQUEST,
    CONTEXT_RENEWAL,
    sign,
    verify,
    verify_with,
)

if TYPE_CHECKING:  # a coordinator never loads the module that defines a site's private keys
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedseek.identity.keys import SiteIdentity

MAX_REQUEST_BYTES: Final = 16 << 10
MAX_RENEWAL_BYTES: Final = 32 << 10
MAX_JOIN_FILE_BYTES: Final = 6 << 20  # a roster in base64
MAX_NODE_KEY_BYTES: Final = 512
MAX_CA_BYTES: Final = 8 << 10
_ADDRESS: Final = re.compile(r"(?P<host>[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):(?P<port>[0-9]{1,5})")


class JoinRequest(Form, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a site asks to be admitted with.

    Attributes:
        version: of this form.
        entry: its name, kind and public keys.
        node_key: PEM of the P-256 public key that its courier authenticates with.
        made_at: Unix time in seconds.
        signature: by the key in ``entry``, so that nobody asks with another's key.
    """

    version: Literal[1]
    entry: RosterEntry
    node_key: Annotated[bytes, msgspec.Meta(max_length=MAX_NODE_KEY_BYTES)]
    made_at: Moment
    signature: Signature


class JoinFile(Form, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that a site needs to take part; the same for every site. Nothing in it is secret.

    Attributes:
        version: of this form.
        consortium: its name.
        coordinator: HOST:PORT to dial.
        ca: PEM of the certificate authority of that address.
        authority: Ed25519 public key of the roster authority; people compare ``authority_digest`` of it.
        coordinator_key: Ed25519 public key that signs the coordinator's audit chain.
        roster: the bytes of a :class:`SignedRoster`.
        signature: of the roster authority over all of the above.
    """

    version: Literal[1]
    consortium: str
    coordinator: Annotated[str, msgspec.Meta(max_length=300)]
    ca: Annotated[bytes, msgspec.Meta(max_length=MAX_CA_BYTES)]
    authority: PublicKey
    coordinator_key: PublicKey
    roster: Annotated[bytes, msgspec.Meta(max_length=MAX_SIGNED_ROSTER_BYTES)]
    signature: Signature

    def signed_roster(self) -> SignedRoster:
        """The roster in it, checked against the authority in it.

        Raises:
            TooLarge, Malformed, WrongKey: as ``parse_signed_roster`` says.
        """
        return parse_signed_roster(self.roster, authority=self.authority)


class Renewal(Form, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """New keys for a site that is on the roster.

    Attributes:
        version: of this form.
        request: of the same name and kind, with the new keys.
        signature: by the key that is on the roster now.
    """

    version: Literal[1]
    request: JoinRequest
    signature: Signature


@dataclass(frozen=True, slots=True)
class Age:
    """How old a key or certificate is, in whole days; ``days_left`` is negative once it has expired, None if never."""

    what: str
    days_old: int
    days_left: int | None


# -------------------------------------------------------------------------------------------------- a site's own files
def make_request(identity: SiteIdentity, node_key: bytes, now: int) -> JoinRequest:
    """Ask to be admitted with these keys; run by a site.

    Args:
        identity: its private keys; only signs.
        node_key: PEM of its courier's public key.
        now: Unix time in seconds.
    """
    check_node_key(node_key)
    unsigned = JoinRequest(version=1, entry=identity.public(), node_key=node_key, made_at=now, signature=b"")
    return replace(unsigned, signature=sign(identity, CONTEXT_JOIN_REQUEST, unsigned.signed_content()))


def parse_request(data: bytes) -> JoinRequest:
    """A request whose maker holds the keys in it. That these are the site's is for people to find out.

    Raises:
        TooLarge, Malformed: it is no request in this form.
        WrongKey: not signed by the key in it.
    """
    request = parse_form(data, JoinRequest, limit=MAX_REQUEST_BYTES)
    check_request(request)
    return request


def check_request(request: JoinRequest) -> None:
    """Check the proof of possession and the node key.

    Raises:
        WrongKey, Malformed: one of them is not as it should be.
    """
    verify(request.entry, CONTEXT_JOIN_REQUEST, request.signed_content(), request.signature)
    check_node_key(request.node_key)


def make_renewal(identity: SiteIdentity, request: JoinRequest) -> Renewal:
    """Vouch with the keys on the roster for those in ``request``; run by a site."""
    unsigned = Renewal(version=1, request=request, signature=b"")
    return replace(unsigned, signature=sign(identity, CONTEXT_RENEWAL, unsigned.signed_content()))


def parse_renewal(data: bytes) -> Renewal:
    """A renewal whose new keys are their maker's. Whether the old ones vouch: :func:`check_renewal`.

    Raises:
        TooLarge, Malformed, WrongKey: as :func:`parse_request`.
    """
    renewal = parse_form(data, Renewal, limit=MAX_RENEWAL_BYTES)
    check_request(renewal.request)
    return renewal


def check_renewal(renewal: Renewal, held: RosterEntry) -> None:
    """Whether the site of ``held`` asks for the new keys itself. An old renewal does not pass twice.

    Raises:
        WrongKey: another name or kind, keys that are not new, or not signed with the keys on the roster.
        Malformed: as :func:`check_request`.
    """
    check_request(renewal.request)
    verify(held, CONTEXT_RENEWAL, renewal.signed_content(), renewal.signature)
    entry = renewal.request.entry
    if (entry.name, entry.kind) != (held.name, held.kind):
        raise WrongKey(f"got a renewal of {entry.name!r} ({entry.kind}), wanted {held.name!r} ({held.kind})")
    if entry.signing_key == held.signing_key or entry.sealing_key == held.sealing_key:
        raise WrongKey(f"renewal of {held.name!r} keeps an old key, wanted two new ones")


def check_node_key(pem: bytes) -> None:
    """Refuse what is not one P-256 public key in PEM, to the byte as Flower compares it.

    Raises:
        Malformed: it is not.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise Malformed(f"node key of {len(pem)} bytes is no public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Malformed("node key is of another kind, wanted an elliptic curve key on P-256")
    if key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != pem:
        raise Malformed("node key has more in its file than the key, or is not in the usual form")


# ---------------------------------------------------------------------------------------------------------- join files
def make_join_file(
    key: Ed25519PrivateKey, *, coordinator: str, ca: bytes, coordinator_key: bytes, roster: SignedRoster
) -> JoinFile:
    """Sign what a site needs to take part; run by the authority."""
    unsigned = JoinFile(
        version=1,
        consortium=roster.consortium,
        coordinator=coordinator,
        ca=ca,
        authority=key.public_key().public_bytes_raw(),
        coordinator_key=coordinator_key,
        roster=roster.to_bytes(),
        signature=b"",
    )
    return sign_form(unsigned, key, CONTEXT_JOIN_FILE)


def parse_join_file(data: bytes) -> JoinFile:
    """A join file in which everything, roster included, is signed by the authority that it names itself.

    It proves nothing before people have compared ``authority_digest(join.authority)`` over another channel.

    Raises:
        TooLarge, Malformed: it is no join file in this form.
        WrongKey: something in it was not signed by that authority.
    """
    join = parse_form(data, JoinFile, limit=MAX_JOIN_FILE_BYTES)
    verify_with(join.authority, CONTEXT_JOIN_FILE, join.signed_content(), join.signature, who="the roster authority")
    check_name("consortium name", join.consortium)
    split_address(join.coordinator)
    check_ca(join.ca)
    roster = join.signed_roster()
    if roster.consortium != join.consortium:
        raise Malformed(f"join file of {join.consortium!r} holds a roster of {roster.consortium!r}")
    return join


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address stands in brackets, which are taken off.

    Raises:
        Malformed: it is not of this form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise Malformed(
            f"address {address!r} is not HOST:PORT", hint="such as fl.example.org:9443 or [2001:db8::1]:9443"
        )
    return match["host"].strip("[]"), int(match["port"])


def check_ca(pem: bytes) -> None:
    """Refuse what is not the certificate of one certificate authority, in PEM.

    Raises:
        Malformed: it is not.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise Malformed(f"CA certificate of {len(pem)} bytes cannot be used ({type(error).__name__})") from None
    if not is_ca or certificate.public_bytes(Encoding.PEM) != pem:
        raise Malformed("CA file is not the certificate of a CA, or holds more than one")
