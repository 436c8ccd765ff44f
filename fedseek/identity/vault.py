"""Secrets at rest: what a site keeps on its disk, sealed under one key that its operator holds.

AES-256-GCM (NIST SP 800-38D) under a 32-byte storage key. The key comes from a key file, or from a passphrase through
scrypt (RFC 7914). Every sealed secret is bound to a purpose, so that one kind of file cannot be passed off as another.

What this does not do: whoever holds the storage key and may write the file can put an older copy in place of a newer
one, and nothing in the file tells. Nor does it protect a running process: the keys are in its memory.
"""

from __future__ import annotations

import os
import unicodedata
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn, SupportsIndex

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedseek.errors import CustodyError, Malformed, TooLarge, WrongKey
from fedseek.identity.keys import MAX_IDENTITY_BYTES, SiteIdentity
from fedseek.identity.secret_files import (
    open_private,
    read_at_most,
    read_secret_file,
    refusing,
    sync_folder,
    write_secret_file,
    write_through,
)
from fedseek.identity.signing import join_fields

STORAGE_KEY_BYTES: Final = 32
SALT_BYTES: Final = 16
MIN_PASSPHRASE_CHARS: Final = 12
AT_REST_OVERHEAD_BYTES: Final = 4 + 12 + 16  # header, nonce, tag
MAX_AT_REST_BYTES: Final = (2 << 30) - 64  # sealed, it still fits the 2**31 - 1 bytes that the AES-GCM call takes

_HEADER: Final = b"FSK1"
_NONCE_BYTES: Final = 12
_DOMAIN: Final = b"fedseek/at-rest/v1"
_IDENTITY_PURPOSE: Final = "site-identity"
_MAX_IDENTITY_FILE_BYTES: Final = MAX_IDENTITY_BYTES + AT_REST_OVERHEAD_BYTES + 256
# 128 MiB and some tenths of a second a guess: the first of the scrypt settings in OWASP's Password Storage Cheat Sheet
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**17, 8, 1


class StorageKey:
    """The key that a site's files are sealed under; ``repr`` is redacted, pickling and copying are refused.

    Make one with ``from_passphrase``, ``create_key_file``, ``from_key_file`` or ``generate``. It may seal 2**32 times:
    up to there random nonces collide with a chance below 2**-32 (NIST SP 800-38D, section 8.3).
    """

    __slots__ = ("_key", "_salt")

    def __init__(self, key: bytes, *, salt: bytes | None = None) -> None:
        if len(key) != STORAGE_KEY_BYTES:
            raise ValueError(f"storage key has {len(key)} bytes, wanted {STORAGE_KEY_BYTES}")
        self._key = key
        self._salt = salt

    @classmethod
    def generate(cls) -> StorageKey:
        """A fresh key in memory only, for tests and simulations: what it seals is lost with the process."""
        return cls(os.urandom(STORAGE_KEY_BYTES))

    @classmethod
    def from_passphrase(cls, passphrase: str, *, salt: bytes) -> StorageKey:
        """Derive the key with scrypt: n = 2**17, r = 8, p = 1, on the passphrase in Unicode form NFC as UTF-8.

        Args:
            passphrase: at least 12 characters.
            salt: 16 bytes: from ``new_salt`` the first time, then as stored; ``unlock`` looks it up.

        Raises:
            CustodyError: the passphrase is too short, or is not text.

        Cost: 128 MiB and some tenths of a second.
        """
        if len(salt) != SALT_BYTES:
            raise ValueError(f"salt has {len(salt)} bytes, wanted {SALT_BYTES}")
        scrypt = Scrypt(salt=salt, length=STORAGE_KEY_BYTES, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P)
        return cls(scrypt.derive(_passphrase_bytes(passphrase)), salt=salt)

    @classmethod
    def create_key_file(cls, path: Path) -> StorageKey:
        """Write 32 random bytes to a new file of mode 0600, on the disk when this returns.

        Raises:
            CustodyError: the file exists (it is left as it is), or cannot be written.
        """
        key = os.urandom(STORAGE_KEY_BYTES)
        with refusing(path, "written"), ExitStack() as undo:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            undo.callback(path.unlink, missing_ok=True)
            write_through(descriptor, key)
            sync_folder(path.parent)
            undo.pop_all()
        return cls(key)

    @classmethod
    def from_key_file(cls, path: Path) -> StorageKey:
        """Read a key that ``create_key_file`` wrote.

        Raises:
            CustodyError: not a plain file, a symbolic link, open to group or others, or not of 32 bytes.
        """
        with open_private(path) as descriptor:
            size = os.fstat(descriptor).st_size
            key = read_at_most(descriptor, STORAGE_KEY_BYTES)
        if size != STORAGE_KEY_BYTES or len(key) != STORAGE_KEY_BYTES:
            raise CustodyError(
                f"key file {path}: got {size} bytes, wanted {STORAGE_KEY_BYTES}", hint="is this the right file?"
            )
        return cls(key)

    @property
    def salt(self) -> bytes | None:
        """The public salt of a key that came from a passphrase, 16 bytes; None for any other."""
        return self._salt

    def __repr__(self) -> str:
        return "StorageKey(<redacted>)"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a StorageKey is never pickled or copied")


def new_salt() -> bytes:
    """A fresh salt for ``StorageKey.from_passphrase``, 16 bytes from the operating system's entropy."""
    return os.urandom(SALT_BYTES)


def seal_at_rest(key: StorageKey, secret: bytes, *, purpose: str) -> bytes:
    """Seal ``secret`` for this disk: header, random nonce, ciphertext and tag; 32 bytes longer than the secret.

    Args:
        key: the storage key.
        secret: at most 2 GiB less 64 bytes.
        purpose: what it is; the same text opens it. It is authenticated, not stored.

    Raises:
        TooLarge: the secret is out of bounds.
    """
    return b"".join(seal_in_parts(key, secret, purpose=purpose))


def seal_in_parts(key: StorageKey, secret: bytes, *, purpose: str) -> tuple[bytes, bytes]:
    """As ``seal_at_rest``, header and nonce apart from the rest: to join them takes a copy of a large secret."""
    if len(secret) > MAX_AT_REST_BYTES:
        raise TooLarge(f"secret to seal at rest: got {len(secret)} bytes, wanted at most {MAX_AT_REST_BYTES}")
    nonce = os.urandom(_NONCE_BYTES)
    return _HEADER + nonce, AESGCM(key._key).encrypt(nonce, secret, _bound(purpose))


def open_at_rest(key: StorageKey, data: bytes, *, purpose: str) -> bytes:
    """Open what ``seal_at_rest`` sealed for the same purpose.

    Raises:
        Malformed: not in this form at all.
        WrongKey: sealed under another key or for another purpose, or altered; which of them cannot be told.
    """
    if not AT_REST_OVERHEAD_BYTES <= len(data) <= MAX_AT_REST_BYTES + AT_REST_OVERHEAD_BYTES:
        raise Malformed(f"sealed {purpose}: got {len(data)} bytes, wanted at least {AT_REST_OVERHEAD_BYTES}")
    if not data.startswith(_HEADER):
        raise Malformed(f"sealed {purpose}: does not begin with {_HEADER!r}", hint="is this the right file?")
    start = len(_HEADER) + _NONCE_BYTES
    try:
        return AESGCM(key._key).decrypt(data[len(_HEADER) : start], memoryview(data)[start:], _bound(purpose))
    except InvalidTag:
        raise WrongKey(
            f"sealed {purpose} does not open: wrong passphrase or key file, or it was altered",
            hint="try the passphrase or key file that this site was set up with",
        ) from None


class IdentityFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A site's identity as it lies on its disk, in MessagePack.

    Attributes:
        version: of this form.
        salt: of the passphrase, in the clear as salts are; None if a key file is asked for.
        sealed: the identity, sealed at rest.
    """

    version: Literal[1] = 1
    salt: Annotated[bytes, msgspec.Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)] | None
    sealed: Annotated[bytes, msgspec.Meta(max_length=MAX_IDENTITY_BYTES + AT_REST_OVERHEAD_BYTES)]


def save_identity(identity: SiteIdentity, path: Path, key: StorageKey, *, replace: bool = False) -> None:
    """Write the identity to ``path``, sealed; all or nothing, as ``write_secret_file`` does.

    Args:
        identity: the site's private keys.
        path: where to.
        key: the storage key; the salt of one from a passphrase is stored beside the sealed keys.
        replace: overwrite the file that is there, as when the passphrase changes.

    Raises:
        CustodyError: there is a file already and ``replace`` is not set, or it cannot be written.
    """
    if not replace and os.path.lexists(path):
        raise CustodyError(
            f"{path} exists; wanted a new file", hint="it may hold the only copy of a site's keys: move it first"
        )
    sealed = seal_at_rest(key, identity.to_bytes(), purpose=_IDENTITY_PURPOSE)
    write_secret_file(path, msgspec.msgpack.encode(IdentityFile(salt=key.salt, sealed=sealed)))


def load_identity(path: Path, key: StorageKey) -> SiteIdentity:
    """Read an identity that ``save_identity`` wrote under this very key; ``unlock`` finds the key itself.

    Raises:
        CustodyError: the file cannot be read, or others may open it.
        Malformed, TooLarge: not such a file.
        WrongKey: wrong passphrase or key file, or the file was altered.
    """
    return _open_identity(_read_identity_file(path), key)


def unlock(
    path: Path, *, passphrase: str | None = None, key_file: Path | None = None
) -> tuple[SiteIdentity, StorageKey]:
    """Read an identity with the passphrase or the key file it was sealed with, whichever of the two it was.

    Returns:
        The identity, and the storage key for the site's other files.

    Raises:
        CustodyError, Malformed, TooLarge: as ``load_identity`` and ``StorageKey`` say.
        WrongKey: wrong passphrase or key file, one instead of the other, or the file was altered.
    """
    stored = _read_identity_file(path)
    if passphrase is not None and key_file is None:
        if stored.salt is None:
            raise WrongKey(f"{path} was sealed with a key file, got a passphrase", hint="give the key file")
        key = StorageKey.from_passphrase(passphrase, salt=stored.salt)
    elif key_file is not None and passphrase is None:
        if stored.salt is not None:
            raise WrongKey(f"{path} was sealed with a passphrase, got a key file", hint="give the passphrase")
        key = StorageKey.from_key_file(key_file)
    else:
        raise ValueError("unlock takes a passphrase or a key file, one of the two")
    return _open_identity(stored, key), key


def _read_identity_file(path: Path) -> IdentityFile:
    data = read_secret_file(path, limit=_MAX_IDENTITY_FILE_BYTES)
    try:
        return msgspec.msgpack.decode(data, type=IdentityFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # msgspec lets the second one through
        raise Malformed(f"{path} is not the file of a site identity: {error}") from None


def _open_identity(stored: IdentityFile, key: StorageKey) -> SiteIdentity:
    return SiteIdentity.from_bytes(open_at_rest(key, stored.sealed, purpose=_IDENTITY_PURPOSE))


def _bound(purpose: str) -> bytes:
    return join_fields(_DOMAIN, purpose.encode())


def _passphrase_bytes(passphrase: str) -> bytes:
    # NFC: keyboards differ in how they compose the same letter
    text = unicodedata.normalize("NFC", passphrase)
    if len(text) < MIN_PASSPHRASE_CHARS:
        raise CustodyError(f"passphrase has {len(text)} characters, wanted at least {MIN_PASSPHRASE_CHARS}")
    try:
        return text.encode()
    except UnicodeEncodeError:  # its own text would quote the passphrase
        raise CustodyError("passphrase is not valid Unicode text", hint="is the terminal set to UTF-8?") from None
