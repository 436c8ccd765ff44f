"""The wire: what the coordinator asks and what a site answers, as strict, bounded, versioned MessagePack.

    coordinator asks          site answers
    PlanOffer                 PlanAdmitted       its round keys for two rounds; from one site, the sealed group key
    KeyRequest                KeysSealed         (one site: a new group key, sealed to each)
    ShareRequest              SharesSealed       Shamir shares of its secrets for a round, sealed to each holder
    RoundRequest              UpdateReply        exchange A: last sum down, new update up, shares and keys to come
    UnmaskRequest             SharesRevealed     exchange B: for each peer one of two shares
    ReleaseRequest            ReleaseApproved
    any of them               Refused            a code and a rule; never a text that could name data

Every message names its run. Decoding checks the size first, then types, bounds and unknown fields; a message of
another version or kind is refused whole. What is inside a ciphertext is checked by the one who decrypts it. Sites are
named by their position on the roster where many of them are listed.
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
# the two secrets that a site shares out
MASK_KEY: Final = "mask-key"
SELF_MASK: Final = "self-mask"

RunId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
SiteName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Scope = Annotated[str, msgspec.Meta(min_length=1, max_length=80)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Round = Annotated[int, msgspec.Meta(ge=1, le=10_003)]  # of training at most 10,000, then the closing round
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
PublicKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Share = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Box = Annotated[bytes, msgspec.Meta(max_length=4096)]
Position = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SITES)]
Positions = Annotated[tuple[Position, ...], msgspec.Meta(max_length=MAX_SITES)]
Secret = Annotated[str, msgspec.Meta(min_length=1, max_length=16)]  # MASK_KEY or SELF_MASK
Document = Annotated[bytes, msgspec.Meta(max_length=4 << 20)]
AppliedRound = Annotated[int, msgspec.Meta(ge=0, le=10_003)]  # 0: before the first
_Digests = Annotated[dict[Scope, Digest], msgspec.Meta(max_length=256)]
_Sites = Annotated[tuple[SiteName, ...], msgspec.Meta(max_length=MAX_SITES)]
Version = Annotated[int, msgspec.Meta(ge=WIRE_VERSION, le=WIRE_VERSION)]


class RoundKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A site's two X25519 public keys for one round, signed by its identity together with run, plan and roster."""

    site: SiteName
    round: Round
    mask_key: PublicKey
    share_key: PublicKey
    signature: Signature


class SharesDealt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One site's secrets of a round, shared out: a sealed box for each holder, and what shows a false share.

    Attributes:
        boxes: by holder; the dealer's own shares stay at home.
        share_digests: by holder (the dealer too) and secret: hash commitments to the shares.
        secret_digests: by secret: hash commitments to the seeds themselves.
        signature: of the dealer, over all of it.
    """

    round: Round
    boxes: Annotated[dict[SiteName, Box], msgspec.Meta(max_length=MAX_SITES)]
    share_digests: Annotated[dict[SiteName, dict[Secret, Digest]], msgspec.Meta(max_length=MAX_SITES)]
    secret_digests: dict[Secret, Digest]
    signature: Signature


class AggregateDown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a round ended: who is in it, and their sum, still encrypted, for the scopes of the receiving site.

    No survivors: the round was given up, nothing was added. A head of whose sites one vanished has no sum.
    """

    round: Round
    epoch: Epoch
    survivors: Positions
    sums: tuple[ScopedSum, ...]


class GroupKeySealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The group key of an epoch: one envelope for each site of the roster, opaque to the coordinator."""

    epoch: Epoch
    envelopes: Annotated[dict[SiteName, Document], msgspec.Meta(max_length=MAX_SITES)]


class Continuation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a run goes on from: the adapter of another run, of the same plan and roster, after ``round``.

    Round 0 is the adapter before the first. What sites spent in the other run stays spent.
    """

    run: RunId
    round: AppliedRound


class Standing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a site could go on from, should a coordinator be lost with its disk.

    It travels beside messages (``fedseek/daemon/parcels.py``).

    Attributes:
        runs: the run it is in, and those that this one goes on from; newest first.
        plan_digest: hex SHA-256 of the canonical plan.
        roster_digest: SHA-256 of the roster.
        adapters: by round, digests of the shared tensors it holds after that round; one round or two.
        contributors: by round, sites whose updates are in that adapter, by name, in roster order.
    """

    site: SiteName
    runs: Annotated[tuple[RunId, ...], msgspec.Meta(min_length=1, max_length=32)]
    plan_digest: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    roster_digest: Digest
    adapters: Annotated[dict[AppliedRound, _Digests], msgspec.Meta(min_length=1, max_length=2)]
    contributors: Annotated[dict[AppliedRound, _Sites], msgspec.Meta(min_length=1, max_length=2)]


class PlanOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to a site: will you run this plan with these sites, from ``round`` on? Also asked of a site that
    was away. ``make_key``: and make the group key of epoch 0. ``continues``: from what another run came to.
    """

    version: Version = WIRE_VERSION
    run: RunId
    round: Round
    plan: Document
    roster: Document
    make_key: bool
    continues: Continuation | None


class KeyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to one site: make the group key of this epoch and seal it to each site of the roster."""

    version: Version = WIRE_VERSION
    run: RunId
    epoch: Epoch


class ShareRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to a site that enters at ``round``: the key list of that round. Deal your shares.

    ``listed`` are all sites on the key list; ``keys`` those of the receiver's neighbours and of its kind.
    """

    version: Version = WIRE_VERSION
    run: RunId
    round: Round
    listed: Positions
    keys: Annotated[tuple[RoundKeys, ...], msgspec.Meta(max_length=MAX_SITES)]


class RoundRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to every participant: apply the last sum, train, send an update.

    After the plan's last round comes one more, the closing round: nothing is trained, the final metrics are sent.

    Attributes:
        previous: every round since the last one this site applied; usually one.
        epoch: of the group key to encrypt under.
        envelopes: by epoch, the group keys this site has not got yet, sealed to it.
        participants: sites that dealt shares for this round: whom to mask with.
        boxes: by dealer, the shares sealed to this site.
        next_listed, next_keys: the key list of the next round, as in a ShareRequest; empty when there is none.
    """

    version: Version = WIRE_VERSION
    run: RunId
    round: Round
    previous: Annotated[tuple[AggregateDown, ...], msgspec.Meta(max_length=10_001)]
    epoch: Epoch
    envelopes: dict[Epoch, Document]
    participants: Positions
    boxes: Annotated[dict[SiteName, Box], msgspec.Meta(max_length=MAX_SITES)]
    next_listed: Positions
    next_keys: Annotated[tuple[RoundKeys, ...], msgspec.Meta(max_length=MAX_SITES)]


class UnmaskRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to every survivor: these sites' updates arrived; reveal one share for each of your neighbours.

    ``presence`` holds, of each neighbour that survived, its signature over what it masked with and started from.
    """

    version: Version = WIRE_VERSION
    run: RunId
    round: Round
    survivors: Positions
    presence: Annotated[dict[SiteName, Signature], msgspec.Meta(max_length=MAX_SITES)]


class ReleaseRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Coordinator to every site: here is what you have not applied yet; release the adapter.

    ``metrics`` is the closing round: its survivors and the sum of the final metrics.
    """

    version: Version = WIRE_VERSION
    run: RunId
    previous: Annotated[tuple[AggregateDown, ...], msgspec.Meta(max_length=10_001)]
    metrics: AggregateDown
    envelopes: dict[Epoch, Document]
    send_adapter: bool


class PlanAdmitted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """The site runs the plan. Signed over run, plan digest and roster digest; keys for ``round`` and the one after.

    ``contributors``: sites whose updates are in the adapter that it holds. A run that goes on from another knows from
    this who has to approve the release.
    """

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    round: Round
    model_sha256: Annotated[str, msgspec.Meta(min_length=64, max_length=64)]
    num_values: dict[Scope, Count]
    ciphertexts: dict[Scope, Count]
    signature: Signature
    keys: tuple[RoundKeys, RoundKeys]
    group_key: GroupKeySealed | None
    contributors: Positions


class KeysSealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """A new group key, sealed to each site."""

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    group_key: GroupKeySealed


class SharesSealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """The site's shares for the round it enters at."""

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    shares: SharesDealt


class UpdateReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """A site's masked and encrypted update, and what the coming rounds need of it.

    Attributes:
        digests: of the tensors it started the round from, signed by ``signature``.
        presence: signature over the participants it masked with, the epoch, and the digest of the adapter.
        shares: for the next round; none in the closing round.
        keys: for the round after that; none when there is no such round.
    """

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    round: Round
    epoch: Epoch
    digests: dict[Scope, Digest]
    signature: Signature
    presence: Signature
    update: tuple[ScopedCiphertexts, ...]
    shares: SharesDealt | None
    keys: RoundKeys | None


class SharesRevealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """For each neighbour that survived, a share of its self mask; for each that did not, one of its mask key.

    Signed over run, round, participants and the survivors it answered for.
    """

    version: Version = WIRE_VERSION
    run: RunId
    site: SiteName
    round: Round
    self_masks: Annotated[dict[SiteName, Share], msgspec.Meta(max_length=MAX_SITES)]
    mask_keys: Annotated[dict[SiteName, Share], msgspec.Meta(max_length=MAX_SITES)]
    signature: Signature


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


Request = PlanOffer | KeyRequest | ShareRequest | RoundRequest | UnmaskRequest | ReleaseRequest
Reply = PlanAdmitted | KeysSealed | SharesSealed | UpdateReply | SharesRevealed | ReleaseApproved | Refused
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
