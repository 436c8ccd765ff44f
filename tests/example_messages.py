"""One message of each type, and of the parts they have in common; shared by the tests of ``fedseek.messages``."""

import msgspec

from fedseek.he.ciphertext import ScopedCiphertexts, ScopedSum
from fedseek.messages import (
    MASK_KEY,
    SELF_MASK,
    AggregateDown,
    Continuation,
    GroupKeySealed,
    KeyRequest,
    KeysSealed,
    PlanAdmitted,
    PlanOffer,
    Refused,
    ReleaseApproved,
    ReleaseRequest,
    RoundKeys,
    RoundRequest,
    ShareRequest,
    SharesDealt,
    SharesRevealed,
    SharesSealed,
    UnmaskRequest,
    UpdateReply,
    encode_message,
)

RUN, SITE, PEER, SIGNATURE = "试运行-1", "仁济医院", "harbour-bank", b"\x05" * 64
DIGESTS = {"global": b"\x07" * 32, "kind/bank": b"\x08" * 32}
SUMS = (ScopedSum("global", 4, (b"\x01" * 40, b"\x02" * 40)), ScopedSum("kind/bank", 2, (b"",)))
DOWN = AggregateDown(round=1, epoch=0, survivors=(0, 2, 1023), sums=SUMS)
GIVEN_UP = AggregateDown(round=2, epoch=0, survivors=(), sums=())
KEYS = RoundKeys(site=SITE, round=10_001, mask_key=b"m" * 32, share_key=b"s" * 32, signature=SIGNATURE)
DEALT = SharesDealt(
    round=3,
    boxes={PEER: b"b" * 4096},
    share_digests={PEER: {MASK_KEY: b"1" * 32, SELF_MASK: b"2" * 32}, SITE: {MASK_KEY: b"3" * 32}},
    secret_digests={MASK_KEY: b"4" * 32, SELF_MASK: b"5" * 32},
    signature=SIGNATURE,
)
SEALED = GroupKeySealed(epoch=2**32 - 1, envelopes={SITE: b"sealed", PEER: b""})

OFFER = PlanOffer(run=RUN, round=1, plan="{计划}".encode(), roster=b"\x90", make_key=True, continues=None)
CONTINUES = Continuation(run="丢失的运行", round=0)
KEY = KeyRequest(run=RUN, epoch=1)
SHARE = ShareRequest(run=RUN, round=3, listed=(0, 1, 2), keys=(KEYS,))
ROUND = RoundRequest(
    run=RUN,
    round=3,
    previous=(DOWN, GIVEN_UP),
    epoch=1,
    envelopes={1: b"sealed"},
    participants=(0, 1),
    boxes={PEER: b"box"},
    next_listed=(0, 1, 2),
    next_keys=(KEYS, KEYS),
)
CLOSING = msgspec.structs.replace(ROUND, round=10_001, envelopes={}, next_listed=(), next_keys=())
UNMASK = UnmaskRequest(run=RUN, round=3, survivors=(0, 1), presence={PEER: SIGNATURE})
RELEASE = ReleaseRequest(run=RUN, previous=(), metrics=DOWN, envelopes={0: b"sealed"}, send_adapter=True)
CONTINUING = msgspec.structs.replace(OFFER, round=3, make_key=False, continues=CONTINUES)
REQUESTS = [OFFER, CONTINUING, KEY, SHARE, ROUND, CLOSING, UNMASK, RELEASE]

ADMITTED = PlanAdmitted(
    run=RUN,
    site=SITE,
    round=1,
    model_sha256="ab" * 32,
    num_values={"global": 2**40},
    ciphertexts={"global": 3},
    signature=SIGNATURE,
    keys=(KEYS, KEYS),
    group_key=SEALED,
    contributors=(0, 1023),
)
KEYS_SEALED = KeysSealed(run=RUN, site=SITE, group_key=SEALED)
SHARES_SEALED = SharesSealed(run=RUN, site=SITE, shares=DEALT)
UPDATE = UpdateReply(
    run=RUN,
    site=SITE,
    round=3,
    epoch=0,
    digests=DIGESTS,
    signature=SIGNATURE,
    presence=SIGNATURE,
    update=(ScopedCiphertexts("global", (b"c" * 100,)),),
    shares=DEALT,
    keys=KEYS,
)
REVEALED = SharesRevealed(
    run=RUN,
    site=SITE,
    round=3,
    self_masks={PEER: b"s" * 16, SITE: b"t" * 16},
    mask_keys={"st-anna": b"m" * 16},
    signature=SIGNATURE,
)
APPROVED = ReleaseApproved(
    run=RUN,
    site=SITE,
    digests=DIGESTS,
    statement=b"{}",
    signature=SIGNATURE,
    adapter={"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * 9},
)
REFUSED = Refused(run=RUN, site=SITE, code="PlanRefused", rule="拒绝：delta 太大")
REPLIES = [
    ADMITTED,
    msgspec.structs.replace(ADMITTED, group_key=None),
    KEYS_SEALED,
    SHARES_SEALED,
    UPDATE,
    msgspec.structs.replace(UPDATE, round=10_001, shares=None, keys=None),
    REVEALED,
    APPROVED,
    REFUSED,
]


def plain(message) -> dict:
    """The message as the plain map that is on the wire."""
    return msgspec.msgpack.decode(encode_message(message))


def packed(document: object) -> bytes:
    return msgspec.msgpack.encode(document)


def plain_of(struct, **changes) -> dict:
    """A part of a message as the plain map that is on the wire, with some of its fields changed."""
    return msgspec.to_builtins(struct, builtin_types=(bytes,)) | changes
