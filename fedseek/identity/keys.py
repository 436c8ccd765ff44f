"""The private half of one site: a key to sign with and a key to open sealed envelopes with.

Nothing here is printed or sent, nor written to a file but sealed (see ``vault``). Python cannot promise to wipe a key
from memory; it lives as long as the process that made it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NoReturn, SupportsIndex

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedseek.errors import Malformed
from fedseek.identity.roster import MAX_NAME_CHARS, RosterEntry, check_name

# name and kind of at most four bytes a character, 128 bytes of keys, the names of the fields
MAX_IDENTITY_BYTES: Final = 2 * 4 * MAX_NAME_CHARS + 128 + 128


class _IdentityForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The identity as bytes: MessagePack of this, in its one canonical form."""

    version: Literal[1] = 1
    name: str
    kind: str
    signing_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]  # RFC 8032 private key
    mlkem_seed: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]  # FIPS 203, algorithm 16: d, then z
    x25519_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]  # RFC 7748 scalar

    def __repr__(self) -> str:  # msgspec's own shows every field
        return f"<identity of {self.name!r} as bytes, redacted>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # msgspec's own, which rich tracebacks use, too
        return [("name", self.name)]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SiteIdentity:
    """A site's secret keys; make one with ``SiteIdentity.generate``.

    ``repr`` shows the public fingerprint only, and pickling or copying is refused.

    Attributes:
        name: the site's name.
        kind: what sort of institution it is.
        signing_key: Ed25519 private key (RFC 8032).
        mlkem_key: ML-KEM-768 half of the sealing key (FIPS 203).
        x25519_key: X25519 half of the sealing key (RFC 7748).
    """

    name: str
    kind: str
    signing_key: Ed25519PrivateKey
    mlkem_key: MLKEM768PrivateKey
    x25519_key: X25519PrivateKey

    @classmethod
    def generate(cls, name: str, kind: str) -> SiteIdentity:
        """A fresh identity, from the operating system's entropy.

        Raises:
            Malformed: the name or the kind is not one a roster takes.
        """
        check_name("site name", name)
        check_name("site kind", kind)
        return cls(
            name=name,
            kind=kind,
            signing_key=Ed25519PrivateKey.generate(),
            mlkem_key=MLKEM768PrivateKey.generate(),
            x25519_key=X25519PrivateKey.generate(),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> SiteIdentity:
        """Read an identity written by ``to_bytes``.

        Raises:
            Malformed: the bytes are not exactly one identity; the message quotes none of them.
        """
        try:
            form = msgspec.msgpack.decode(data, type=_IdentityForm)
        except (msgspec.MsgspecError, UnicodeDecodeError):  # msgspec lets the second one through
            raise Malformed(f"{len(data)} bytes are not a site identity of version 1") from None
        if msgspec.msgpack.encode(form) != data:
            raise Malformed("site identity is not in canonical form")
        check_name("site name", form.name)
        check_name("site kind", form.kind)
        return cls(
            name=form.name,
            kind=form.kind,
            signing_key=Ed25519PrivateKey.from_private_bytes(form.signing_key),
            mlkem_key=MLKEM768PrivateKey.from_seed_bytes(form.mlkem_seed),
            x25519_key=X25519PrivateKey.from_private_bytes(form.x25519_key),
        )

    def to_bytes(self) -> bytes:
        """The private keys themselves: secret. At most ``MAX_IDENTITY_BYTES``; to be sealed before it is stored."""
        return msgspec.msgpack.encode(
            _IdentityForm(
                name=self.name,
                kind=self.kind,
                signing_key=self.signing_key.private_bytes_raw(),
                mlkem_seed=self.mlkem_key.private_bytes_raw(),
                x25519_key=self.x25519_key.private_bytes_raw(),
            )
        )

    def public(self) -> RosterEntry:
        """What everybody may know about this site: its roster entry."""
        raw = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return RosterEntry(
            name=self.name,
            kind=self.kind,
            signing_key=self.signing_key.public_key().public_bytes(*raw),
            sealing_key=self.mlkem_key.public_key().public_bytes(*raw)
            + self.x25519_key.public_key().public_bytes(*raw),
        )

    def __repr__(self) -> str:
        return f"<SiteIdentity {self.name!r} ({self.kind}), fingerprint {self.public().fingerprint()}, keys redacted>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("SiteIdentity holds private keys and is not pickled or copied")
