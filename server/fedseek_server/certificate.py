"""The coordinator's TLS certificate: is it usable, and is the one that sites see the newest one on the disk?"""

from __future__ import annotations

import asyncio
import datetime
import logging
import ssl
from pathlib import Path
from typing import Final

from cryptography import x509

from fedseek.errors import CustodyError, Expired, WrongKey
from fedseek.identity.secret_files import open_private

LARGEST_FILE: Final = 64 << 10  # bytes; a chain of three has about 3 KiB
LOOK_SECONDS: Final = 1.0  # between two looks at the files

_log = logging.getLogger(__name__)


def check_certificate(path: Path, now: datetime.datetime) -> datetime.datetime:
    """When the certificate in this PEM file, the first of its chain, ends.

    Raises:
        CustodyError: the file cannot be read.
        WrongKey: there is no certificate in it.
        Expired: its time is over, or has not come.
    """
    try:
        with path.open("rb") as file:
            found = x509.load_pem_x509_certificate(file.read(LARGEST_FILE))
    except OSError as error:
        raise CustodyError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WrongKey(f"{path}: got no readable certificate, wanted one in PEM form") from error
    begin, end = found.not_valid_before_utc, found.not_valid_after_utc
    if now > end:
        days = (now - end).days
        raise Expired(
            f"{path}: the certificate expired on {end:%Y-%m-%d %H:%M} UTC, {days} days ago",
            hint="renew it; no site has to do anything if the same authority signs the new one",
        )
    if now < begin:
        raise Expired(
            f"{path}: the certificate begins on {begin:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC here",
            hint="is this machine's clock right?",
        )
    return end


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """A context that shows this certificate. TLS 1.3 only, for both ends are ours.

    No session is resumed: after a renewal every new connection checks the new certificate.

    Raises:
        CustodyError: a file cannot be read, or the key is open to group or others.
        WrongKey: the key is not the certificate's, or has a passphrase.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    _load(context, certificate, key)
    return context


def renew(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Have a context in use show what is in the files now, from its next connection on.

    Raises:
        FedseekError: as :func:`check_certificate` and :func:`server_context`; the context is as it was.
    """
    check_certificate(certificate, datetime.datetime.now(datetime.UTC))
    server_context(certificate, key)  # on trial: a pair that does not match would spoil the context in use
    _load(context, certificate, key)


async def keep_fresh(context: ssl.SSLContext, certificate: Path, key: Path, *, every: float = LOOK_SECONDS) -> None:
    """:func:`renew` when a file has changed; until then, and while the files are not a pair, the old one is shown.

    Never returns: cancel it.
    """
    shown = _stamp(certificate, key)
    refused: tuple[object, ...] = ()
    while True:
        await asyncio.sleep(every)
        found = _stamp(certificate, key)
        if found in (shown, refused):
            continue
        try:
            renew(context, certificate, key)
        except CustodyError as error:
            _log.warning("the TLS certificate stays the old one: %s", error)
            refused = found
        else:
            _log.warning("a new TLS certificate is shown from now on")
            shown, refused = found, ()


def _load(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    with open_private(key):
        pass
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        raise WrongKey(
            f"{certificate} and {key}: {error.reason or 'no certificate and its key'}",
            hint="the two files must be a certificate and its own key, in PEM form, without a passphrase",
        ) from error
    except OSError as error:
        raise CustodyError(f"{certificate} cannot be read: {error.strerror}") from error


def _no_passphrase() -> str:
    """OpenSSL would ask for one at the terminal."""
    return ""


def _stamp(*paths: Path) -> tuple[object, ...]:
    """Differs when a file is another, or another version. A missing one is a version too."""
    stamp: list[object] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            stamp.append(None)
        else:
            stamp.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(stamp)
