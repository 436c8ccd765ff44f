"""The private half of one site: a key to sign with and a key to open sealed envelopes with.

Nothing here is written to a file, printed or sent. Python cannot promise to wipe a key from memory; it lives as long
as the process that made it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, SupportsIndex

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedseek.identity.roster import RosterEntry, check_name


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
