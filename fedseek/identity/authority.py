"""Who admits sites: a certificate authority for the coordinator's TLS, and the key that signs rosters.

Both keys lie in one folder, which may be kept on a stick and plugged in to admit, renew or revoke a site; a coordinator
that serves needs neither. Under a passphrase, they are sealed with scrypt (RFC 7914) in front of PKCS #8: the 2048
rounds of PBKDF2 that the library gives PKCS #8 by itself are too few for a passphrase.

The CA is EC P-256, good for ten years, and signs servers only (path length 0). Server certificates live 90 days.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, SupportsIndex

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedseek.errors import CustodyError, InvalidConfig, Malformed, WrongKey
from fedseek.identity.enrolment import check_ca
from fedseek.identity.forms import DAY_SECONDS
from fedseek.identity.secret_files import read_secret_file, refusing, write_secret_file
from fedseek.identity.signed_roster import authority_digest

CA_DAYS: Final = 3650
CERTIFICATE_DAYS: Final = 90
MIN_PASSPHRASE_CHARS: Final = 12
CA_FILE, CA_KEY_FILE, ROSTER_KEY_FILE, SALT_FILE = "ca.pem", "ca.key", "roster.key", "salt"

_SKEW_SECONDS: Final = 3600  # a site's clock may be behind
_SALT_BYTES: Final = 16
_MAX_KEY_FILE_BYTES: Final = 16 << 10
_MAX_COMMON_NAME_BYTES: Final = 64  # X.520
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**17, 8, 1  # as for a site's storage key: 128 MiB a guess
_DNS_NAME: Final = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")

PrivateKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Authority:
    """The authority's private keys; ``repr`` shows the public fingerprint only, pickling and copying are refused.

    Attributes:
        ca: certificate of the CA, in PEM.
        ca_key: signs server certificates.
        roster_key: signs rosters and join files.
    """

    ca: bytes
    ca_key: ec.EllipticCurvePrivateKey
    roster_key: Ed25519PrivateKey

    @property
    def public_key(self) -> bytes:
        """Of the roster key, 32 bytes: what sites check rosters with."""
        return self.roster_key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"<Authority, fingerprint {authority_digest(self.public_key).hex()}, keys redacted>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("Authority holds private keys and is not pickled or copied")


def create_authority(folder: Path, *, name: str, now: float, passphrase: str | None = None) -> Authority:
    """Make both keys and the CA certificate, and write them to ``folder``, a new one of mode 0700.

    Args:
        folder: its parent exists.
        name: of the consortium; in the certificate.
        now: Unix time in seconds.
        passphrase: at least 12 characters; None: the files are protected by their mode alone.

    Raises:
        CustodyError: the folder exists or cannot be written, or the passphrase is too short.
    """
    salt = os.urandom(_SALT_BYTES)
    secret = None if passphrase is None else _stretched(passphrase, salt)
    with refusing(folder, "made"):
        folder.mkdir(mode=0o700)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    authority = Authority(_ca_certificate(ca_key, name, now), ca_key, Ed25519PrivateKey.generate())
    if secret is not None:
        write_secret_file(folder / SALT_FILE, salt)
    write_private_key(folder / CA_KEY_FILE, authority.ca_key, secret)
    write_private_key(folder / ROSTER_KEY_FILE, authority.roster_key, secret)
    write_secret_file(folder / CA_FILE, authority.ca)
    return authority


def load_authority(folder: Path, *, passphrase: str | None = None) -> Authority:
    """Read what ``create_authority`` wrote.

    Raises:
        CustodyError: a file is missing or open to others, or the passphrase is missing.
        WrongKey: wrong passphrase, or a key that is not the certificate's.
        Malformed: a file is none of ours.
    """
    secret = None
    if (folder / SALT_FILE).exists():
        if passphrase is None:
            raise CustodyError(
                f"the authority's keys in {folder} are under a passphrase, got none",
                hint="give --passphrase-file or FEDSEEK_PASSPHRASE",
            )
        secret = _stretched(passphrase, read_secret_file(folder / SALT_FILE, limit=_SALT_BYTES))
    ca = read_secret_file(folder / CA_FILE, limit=_MAX_KEY_FILE_BYTES)
    check_ca(ca)
    ca_key = read_private_key(folder / CA_KEY_FILE, secret)
    roster_key = read_private_key(folder / ROSTER_KEY_FILE, secret)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or not isinstance(roster_key, Ed25519PrivateKey):
        raise Malformed(f"{folder}: got keys of another kind, wanted P-256 in {CA_KEY_FILE}, Ed25519 in the other")
    if x509.load_pem_x509_certificate(ca).public_key() != ca_key.public_key():
        raise WrongKey(f"{folder}: {CA_KEY_FILE} is not the key of {CA_FILE}")
    return Authority(ca, ca_key, roster_key)


def issue_certificate(
    authority: Authority, hosts: Sequence[str], *, now: float, days: int = CERTIFICATE_DAYS
) -> tuple[bytes, bytes]:
    """A certificate for a TLS server under these DNS names and IP addresses, with a fresh P-256 key.

    Returns:
        Certificate and private key, both in PEM; the key is secret and has no passphrase.

    Raises:
        InvalidConfig: a host is neither name nor address, or there is none, or the CA ends before.
    """
    names = [_subject_name(host) for host in hosts]
    if not names or days < 1:
        raise InvalidConfig(
            [f"got {len(names)} hosts and {days} days, wanted one of each at least"], source="certificate"
        )
    ca = x509.load_pem_x509_certificate(authority.ca)
    if _moment(now + days * DAY_SECONDS) > ca.not_valid_after_utc:
        raise InvalidConfig([f"{days} days are longer than the CA lives"], source="certificate")
    key = ec.generate_private_key(ec.SECP256R1())
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(_name(hosts[0]), ca.subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(key_id, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.ca_key.public_key()), critical=False
        )
        .sign(authority.ca_key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM), _private_pem(key, None)


def certificate_days_left(pem: bytes, now: float) -> int:
    """Whole days until the first certificate in ``pem`` ends; negative once it has.

    Raises:
        Malformed: there is none.
    """
    return _days(_certificate(pem).not_valid_after_utc.timestamp() - now)


def certificate_days_old(pem: bytes, now: float) -> int:
    """Whole days since the first certificate in ``pem`` was made.

    Raises:
        Malformed: there is none.
    """
    return _days(now - _certificate(pem).not_valid_before_utc.timestamp() - _SKEW_SECONDS)


def write_private_key(path: Path, key: PrivateKey, secret: bytes | None = None) -> None:
    """Write the key as PKCS #8 in PEM, mode 0600, encrypted under ``secret`` if there is one.

    Raises:
        CustodyError: it cannot be written.
    """
    write_secret_file(path, _private_pem(key, secret))


def read_private_key(path: Path, secret: bytes | None = None) -> PrivateKey:
    """Read a key that ``write_private_key`` wrote.

    Raises:
        CustodyError: missing, or open to others.
        WrongKey: it does not open with this secret, or is not of a kind of ours.
    """
    data = read_secret_file(path, limit=_MAX_KEY_FILE_BYTES)
    try:
        key = load_pem_private_key(data, secret)
    except (ValueError, TypeError):  # the library's text could quote
        raise WrongKey(
            f"{path} does not open: wrong passphrase, or not a private key in PEM",
            hint="try the passphrase it was made with",
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | Ed25519PrivateKey):
        raise WrongKey(f"{path}: got a {type(key).__name__}, wanted an elliptic curve or Ed25519 key")
    return key


def _private_pem(key: PrivateKey, secret: bytes | None) -> bytes:
    encryption = NoEncryption() if secret is None else BestAvailableEncryption(secret)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def _stretched(passphrase: str, salt: bytes) -> bytes:
    """What the files are encrypted under: scrypt of the passphrase, in hexadecimal."""
    text = unicodedata.normalize("NFC", passphrase)  # keyboards differ in how they compose the same letter
    if len(text) < MIN_PASSPHRASE_CHARS:
        raise CustodyError(f"passphrase has {len(text)} characters, wanted at least {MIN_PASSPHRASE_CHARS}")
    try:
        secret = text.encode()
    except UnicodeEncodeError:  # its own text would quote the passphrase
        raise CustodyError("passphrase is not valid Unicode text", hint="is the terminal set to UTF-8?") from None
    return Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P).derive(secret).hex().encode()


def _ca_certificate(key: ec.EllipticCurvePrivateKey, name: str, now: float) -> bytes:
    subject = _name(f"CA of {name}")  # no host has this name
    certificate = (
        _builder(subject, subject, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: float, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now - _SKEW_SECONDS))
        .not_valid_after(_moment(now + days * DAY_SECONDS))
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    purposes = {
        "digital_signature": False,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    return x509.KeyUsage(**{**purposes, **allowed})


def _name(text: str) -> x509.Name:
    """Only for people to read, so it may be cut: TLS goes by the alternative names, sites by the CA file."""
    short = text.encode()[:_MAX_COMMON_NAME_BYTES].decode(errors="ignore")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, short)])


def _subject_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        name = host.lower() if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if len(name) > 253 or not _DNS_NAME.fullmatch(name):
        raise InvalidConfig([f"{host!r} is neither a DNS name nor an IP address"], source="certificate")
    return x509.DNSName(name)


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise Malformed(f"{len(pem)} bytes hold no certificate in PEM") from None


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def _days(seconds: float) -> int:
    return int(seconds // DAY_SECONDS)
