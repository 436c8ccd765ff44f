"""Forms: what enrolment writes to files, signed or not, in JSON that people can read, with bytes in base64.

What is signed is not the text but the MessagePack of the form with an empty signature, so spaces and line ends do not
matter. Every form is bounded before it is read, and parsed strictly; no field may be missing or unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import msgspec
from msgspec.structs import replace

from fedseek.errors import Malformed, TooLarge
from fedseek.identity.roster import DIGEST_BYTES, SIGNING_PUBLIC_KEY_BYTES
from fedseek.identity.signing import SIGNATURE_BYTES, sign_with

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

DAY_SECONDS: Final = 86_400

Moment = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]  # Unix time in seconds
PublicKey = Annotated[bytes, msgspec.Meta(min_length=SIGNING_PUBLIC_KEY_BYTES, max_length=SIGNING_PUBLIC_KEY_BYTES)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all of them can do; one that is signed has a field ``signature``, the last."""

    def to_bytes(self) -> bytes:
        """The form as a file: JSON, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def signed_content(self) -> bytes:
        """What is signed: the MessagePack of the form, all fields in their order, with an empty signature."""
        return msgspec.msgpack.encode(replace(self, signature=b""))


FormT = TypeVar("FormT", bound=Form)


def parse_form(data: bytes, kind: type[FormT], *, limit: int) -> FormT:
    """Read a form; whoever calls checks its signature.

    Raises:
        TooLarge: it has more than ``limit`` bytes.
        Malformed: it does not parse.
    """
    if len(data) > limit:
        raise TooLarge(f"{kind.__name__}: got {len(data)} bytes, wanted at most {limit}")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the latter two through
        raise Malformed(f"{kind.__name__} of {len(data)} bytes does not parse: {str(error)[:200]}") from None


def sign_form(form: FormT, key: Ed25519PrivateKey, context: bytes) -> FormT:
    """The form with the signature of ``key`` in it."""
    return replace(form, signature=sign_with(key, context, form.signed_content()))
