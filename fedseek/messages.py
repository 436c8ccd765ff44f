"""The wire: what the coordinator asks and what a site answers, as strict, bounded, versioned MessagePack.

    coordinator asks          site answers
    PlanOffer                 PlanAdmitted
    KeyRequest                KeysSealed              (one site: makes the group key, seals it to each)
    RoundRequest              UpdateReply             (exchange A of a round: last sum down, new update up)
    CloseRequest              UpdateReply             (last sum down, held-back metrics up, encrypted)
    ReleaseRequest            ReleaseApproved
    any of them               Refused                 (a code and a rule; never a text that could name data)

Every message names its run. Decoding checks the size first, then types, bounds and unknown fields; a message of
another version or kind is refused whole. What is inside a ciphertext is checked by the one who decrypts it.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from fedseek.errors import Malformed, TooLarge
from fedseek.he.ciphertext import ScopedCiphertexts, ScopedSum
from fedseek.identity.signing import join_fields

WIRE_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 2 << 30
MAX_SITES: Final = 1024

RunId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
SiteName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Scope = Annotated[str, msgspec.Meta(min_length=1, max_length=80)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Round = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Document = Annotated[bytes, msgspec.Meta(max_length=4 << 20)]
Version = Annotated[int, msgspec.Meta(ge=WIRE_VERSION, le=WIRE_VERSION)]


class PlanOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to every site: will you run this plan with these sites?"""

    version: Version = WIRE_VERSION
    run: RunId
    plan: Document
    roster: Document


class KeyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to one site: make the group key of this epoch and seal it to each site of the roster."""

    version: Version = WIRE_VERSION
    run: RunId
    epoch: Count


class AggregateDown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sum of a round, still encrypted, for the scopes of the receiving site."""

    round: Round
    sums: tuple[ScopedSum, ...]


class RoundRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to every site: apply the last sum, train, send an update. Round 1 carries the sealed group key."""

    version: Version = WIRE_VERSION
    run: RunId
    round: Round
    envelope: Document | None = None
    previous: AggregateDown | None = None


class CloseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to every site: apply the last sum; send the metrics of the final adapter, encrypted."""

    version: Version = WIRE_VERSION
    run: RunId
    round: Round
    previous: AggregateDown


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to every site: here is the sum of the final metrics; release the adapter."""

    version: Version = WIRE_VERSION
    run: RunId
    metrics: AggregateDown
    send_adapter: bool


class PlanAdmitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """The site runs the plan. Signed over run, plan digest and roster digest."""

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    model_sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    num_values: dict[Scope, Count]
    ciphertexts: dict[Scope, Count]
    signature: Signature


class KeysSealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """One envelope for each site; opaque to the coordinator."""

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    epoch: Count
    envelopes: Annotated[dict[SiteName, Document], msgspec.Meta(max_length=MAX_SITES)]


class UpdateReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """A site's encrypted update of ``round``, and signed digests of the tensors it started the round from."""

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    round: Round
    digests: dict[Scope, Digest]
    signature: Signature
    update: tuple[ScopedCiphertexts, ...]


class ReleaseApproved(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """A site's signed word on the release: digests of the tensors, its privacy statement, and the adapter if asked."""

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    digests: dict[Scope, Digest]
    statement: Document
    signature: Signature
    adapter: dict[str, Annotated[bytes, msgspec.Meta(max_length=1 << 30)]]


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """No, and by which rule. The code is the name of an error class; details stay in the site's log."""

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    code: Annotated[str, msgspec.Meta(max_length=64)]
    rule: Annotated[str, msgspec.Meta(max_length=200)]


Request = PlanOffer | KeyRequest | RoundRequest | CloseRequest | ReleaseRequest
Reply = PlanAdmitted | KeysSealed | UpdateReply | ReleaseApproved | Refused
_M = TypeVar("_M")

_REQUESTS: Final[msgspec.msgpack.Decoder[Request]] = msgspec.msgpack.Decoder(Request)
_REPLIES: Final[msgspec.msgpack.Decoder[Reply]] = msgspec.msgpack.Decoder(Reply)


def encode_message(message: Request | Reply) -> bytes:
    """The bytes of a message."""
    return msgspec.msgpack.encode(message)


def decode_request(data: bytes, *, limit: int = MAX_MESSAGE_BYTES) -> Request:
    """Parse what a coordinator sent; run by a site. Raises ``TooLarge`` or ``Malformed``."""
    return _decode(_REQUESTS, data, limit)


def decode_reply(data: bytes, *, limit: int = MAX_MESSAGE_BYTES) -> Reply:
    """Parse what a site sent; run by the coordinator. Raises ``TooLarge`` or ``Malformed``."""
    return _decode(_REPLIES, data, limit)


def _decode(decoder: msgspec.msgpack.Decoder[_M], data: bytes, limit: int) -> _M:
    if len(data) > limit:
        raise TooLarge(f"message: got {len(data)} bytes, wanted at most {limit}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the last two through
        raise Malformed(f"message of {len(data)} bytes refused: {error}") from None


def reply_limit(ciphertexts: int, ciphertext_bytes: int) -> int:
    """Largest reply a site of this plan has reason to send; bytes. 4 MiB stands for everything but ciphertexts."""
    return (4 << 20) + ciphertexts * (ciphertext_bytes + 64)


def digest_message(run: str, number: int, digests: dict[str, bytes]) -> bytes:
    """What a site signs about the tensors it holds in a round."""
    fields = [part for scope in sorted(digests) for part in (scope.encode(), digests[scope])]
    return join_fields(run.encode(), number.to_bytes(4, "big"), *fields)


def release_message(run: str, digests: dict[str, bytes], statement: bytes) -> bytes:
    """What a site signs when it approves a release."""
    fields = [part for scope in sorted(digests) for part in (scope.encode(), digests[scope])]
    return join_fields(run.encode(), statement, *fields)
