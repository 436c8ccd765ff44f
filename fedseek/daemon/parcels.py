"""What the two daemons carry around each message of the protocol: rosters, audit heads, where a site stands.

    coordinator -> site   ParcelDown   message, plan to come, roster, heads of all records
    site -> coordinator   ParcelUp     message, its word on the plan to come, where it stands, its head, countersignature

A message is sent again to the byte, and a site journals it as such; what is around it is of the moment. So the message
travels as bytes inside, untouched. The rules are those of ``fedseek/messages.py``: strict, bounded, versioned.
Cost: one copy of the message to encode and one to decode; of 200 MB that is about 0.1 s each.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec

from fedseek.daemon.audit_lines import MAX_HEADS, AuditHead
from fedseek.errors import Malformed, TooLarge
from fedseek.messages import MAX_MESSAGE_BYTES, Digest, Document, RunId, Signature, SiteName, Standing

PARCEL_VERSION: Final = 1
MAX_WRAPPING_BYTES: Final = 16 << 20  # notice and roster of at most 4 MiB each, 2 x 1025 heads, as many signatures
MAX_PARCEL_BYTES: Final = MAX_MESSAGE_BYTES + MAX_WRAPPING_BYTES
MAX_RULE_CHARS: Final = 200

Version = Annotated[int, msgspec.Meta(ge=PARCEL_VERSION, le=PARCEL_VERSION)]
Message = Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_BYTES)]
Heads = Annotated[tuple[AuditHead, ...], msgspec.Meta(max_length=MAX_HEADS)]
_P = TypeVar("_P")


class ParcelDown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to a site.

    Attributes:
        message: an encoded request of ``fedseek/messages.py``; None: this parcel only carries what is around one.
        notice: canonical plan of a run to come, so that people at the site can approve it in time.
        run: that the message or the notice is of; None between runs.
        roster: the signed roster as JSON, if the site's is not the newest.
        heads: of all audit records, as the coordinator noted them; the site countersigns them.
        seen: the list of heads of an earlier parcel.
        countersignatures: by name, of that list.
    """

    version: Version = PARCEL_VERSION
    message: Message | None = None
    notice: Document | None = None
    run: RunId | None = None
    roster: Document | None = None
    heads: Heads = ()
    seen: Heads = ()
    countersignatures: Annotated[dict[SiteName, Signature], msgspec.Meta(max_length=MAX_HEADS)] = {}


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A site's word on the plan it was given notice of. ``rule`` names what decided; never a text that names data."""

    status: Literal["ready", "waiting", "refused"]
    rule: Annotated[str, msgspec.Meta(max_length=MAX_RULE_CHARS)] = ""


class ParcelUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """A site to the coordinator.

    Attributes:
        site: who sends it.
        message: an encoded reply of ``fedseek/messages.py``; None if it was not asked for one.
        roster_digest: of the roster that the site goes by.
        verdict: on the plan it was given notice of.
        standing: asked for by a coordinator that has to find out.
        head: of the site's audit record.
        countersignature: of the heads in the parcel that this one answers.
        renewal: a request for a new certificate or key, as the site's renewal file has it.
    """

    version: Version = PARCEL_VERSION
    site: SiteName
    message: Message | None = None
    roster_digest: Digest
    verdict: Verdict | None = None
    standing: Standing | None = None
    head: AuditHead | None = None
    countersignature: Signature | None = None
    renewal: Annotated[bytes, msgspec.Meta(max_length=64 << 10)] | None = None


_DOWN: Final[msgspec.msgpack.Decoder[ParcelDown]] = msgspec.msgpack.Decoder(ParcelDown)
_UP: Final[msgspec.msgpack.Decoder[ParcelUp]] = msgspec.msgpack.Decoder(ParcelUp)


def encode_parcel(parcel: ParcelDown | ParcelUp) -> bytes:
    """The bytes of a parcel."""
    return msgspec.msgpack.encode(parcel)


def decode_parcel_down(data: bytes, *, limit: int = MAX_PARCEL_BYTES) -> ParcelDown:
    """Parse what a coordinator sent; run by a site.

    Args:
        data: of a stranger.
        limit: bytes; what the plan's messages may have, and ``MAX_WRAPPING_BYTES``.

    Raises:
        TooLarge: longer than that; found before anything is parsed.
        Malformed: anything else that is wrong.
    """
    return _decode(_DOWN, data, limit)


def decode_parcel_up(data: bytes, *, limit: int = MAX_PARCEL_BYTES) -> ParcelUp:
    """Parse what a site sent; run by the coordinator. As :func:`decode_parcel_down`."""
    return _decode(_UP, data, limit)


def _decode(decoder: msgspec.msgpack.Decoder[_P], data: bytes, limit: int) -> _P:
    if len(data) > limit:
        raise TooLarge(f"parcel: got {len(data)} bytes, wanted at most {limit}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the last two through
        raise Malformed(f"parcel of {len(data)} bytes refused: {error}") from None
