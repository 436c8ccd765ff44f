"""The coordinator's gate, as a site's courier meets it: with what it proves itself, what it takes, what it says.

The coordinator is not trusted. Its answers are bounded before they are read and are not unpacked; a redirect is not
followed, for it would let the coordinator send requests to any address inside the institution; TLS is 1.3, with the one
authority that the join file names. What goes wrong is told in one line that says what to do.
"""

from __future__ import annotations

import enum
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedseek.errors import NotAdmitted, TooLarge, Unreachable
from fedseek.identity.secret_files import read_secret_file

HTTP_SECONDS: Final = 30.0
CHUNK_BYTES: Final = 5 << 20  # Flower's FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
LARGEST_ANSWER: Final = CHUNK_BYTES + (64 << 10)  # bytes
LARGEST_KEY_FILE: Final = 1 << 14  # bytes
_ANOTHER_SERVER: Final = "does a fleet gate of the same release listen there?"
_CERTIFICATE_HINTS: Final = {
    9: "it is not valid yet: is this machine's clock right?",
    10: "the coordinator has to renew it; or this machine's clock is wrong",
    62: "dial the name that the certificate carries",
    64: "dial the address that the certificate carries",
}


class Failure(enum.Enum):
    """All that the coordinator is told in place of an answer: which of these it is, and this text."""

    REFUSED = "the site refused the message"
    AWAY = "the site service is away"
    WRONG_BUNDLE = "the site runs no such bundle"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a courier dials with.

    Attributes:
        address: HOST:PORT of the gate.
        authority: PEM of the authority that the gate's certificate must be from.
        key: the node key that the gate knows this site by.
    """

    address: str
    authority: bytes = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)


def guarded_http(authority: ssl.SSLContext) -> httpx.Client:
    """A connection to the gate.

    Raises, in use:
        TooLarge: an answer is longer than any of ours, packed, or does not say how long it is. It is not read.
    """
    authority.minimum_version = ssl.TLSVersion.TLSv1_3
    return httpx.Client(
        verify=authority,
        timeout=HTTP_SECONDS,
        follow_redirects=False,
        headers={"accept-encoding": "identity"},
        event_hooks={"response": [_check_answer]},
    )


def _check_answer(response: httpx.Response) -> None:
    """Called when the head of an answer is there, and its body not."""
    length = response.headers.get("content-length", "")
    if "content-encoding" in response.headers or not (length.isascii() and length.isdigit()):
        raise TooLarge("coordinator: got an answer that is packed or of unknown length")
    if len(length) > 12 or int(length) > LARGEST_ANSWER:
        raise TooLarge(f"coordinator: got an answer of {length[:12]} bytes, wanted at most {LARGEST_ANSWER}")


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node key (OpenSSH form, no passphrase, mode 0600).

    Raises:
        CustodyError: it cannot be read, or others could read it.
        NotAdmitted: it is not one.
    """
    try:
        key = load_ssh_private_key(read_secret_file(path, limit=LARGEST_KEY_FILE), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise NotAdmitted(f"{path}: no readable node key ({type(error).__name__})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise NotAdmitted(f"{path}: got a key of another kind, wanted an elliptic curve key in OpenSSH form")
    return key


def load_authority(path: Path) -> bytes:
    """Read the certificate of the authority that the gate's certificate must be from.

    Raises:
        NotAdmitted: there is none in the file.
    """
    try:
        pem = path.read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise NotAdmitted(
            f"{path}: no readable certificate ({type(error).__name__})", hint="take the authority from the join file"
        ) from error
    return pem


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Tell what fails in the block as one of ours.

    Raises:
        Unreachable: nobody there, or no TLS with this authority; says which.
        NotAdmitted: the gate's own words why.
    """
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _refused(address, error.response) from error
    except httpx.TransportError as error:
        text, hint = _why_unreachable(error)
        raise Unreachable(f"{address}: {text}", hint=hint) from error
    except (ValueError, httpx.InvalidURL) as error:
        raise NotAdmitted(f"{address}: no answer that a fleet gate gives", hint=_ANOTHER_SERVER) from error


def _refused(address: str, response: httpx.Response) -> NotAdmitted:
    if response.status_code != httpx.codes.UNAUTHORIZED:
        return NotAdmitted(f"{address}: HTTP {response.status_code}", hint=_ANOTHER_SERVER)
    text = "".join(sign if sign.isprintable() else "?" for sign in response.text[:200])
    hint = "set this machine's clock" if "clock" in text else "compare the node key with the coordinator's roster"
    return NotAdmitted(f"{address}: {text}", hint=hint)


def _why_unreachable(error: httpx.TransportError) -> tuple[str, str]:
    """What happened, and what to do about it. OpenSSL tells the reasons apart by number."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        hint = _CERTIFICATE_HINTS.get(
            cause.verify_code, "is this the join file's authority, and really the coordinator?"
        )
        return f"its certificate is refused: {cause.verify_message}", hint
    if cause is not None:
        return "it does not speak TLS 1.3", "is this the fleet gate's port?"
    return str(error) or type(error).__name__, "does the coordinator run, and may this site dial out? It is tried again"
