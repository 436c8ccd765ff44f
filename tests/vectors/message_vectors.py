"""Vectors of the wire: each message class once, and what must be refused in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fixed import bytes_for, splice

from fedseek.errors import FedseekError
from fedseek.he.ciphertext import ScopedCiphertexts, ScopedSum
from fedseek.messages import (
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
    decode_reply,
    decode_request,
    encode_message,
)

RUN, SITE, PEER = "试运行-1", "仁济医院", "harbour-bank"
SIGNATURE = bytes_for("signature", 64)


def round_keys(site: str, number: int) -> RoundKeys:
    return RoundKeys(
        site=site,
        round=number,
        mask_key=bytes_for(f"{site}/{number}/mask", 32),
        share_key=bytes_for(f"{site}/{number}/share", 32),
        signature=SIGNATURE,
    )


def messages() -> dict[str, list[Any]]:
    """Each class once, by who reads it. The bytes in them are of the right length and no more."""
    dealt = SharesDealt(
        round=2,
        boxes={PEER: b"box"},
        share_digests={holder: {"mask-key": bytes(32), "self-mask": b"\1" * 32} for holder in (SITE, PEER)},
        secret_digests={"mask-key": bytes(32)},
        signature=SIGNATURE,
    )
    down = AggregateDown(round=1, epoch=0, survivors=(0, 2), sums=(ScopedSum("global", 2, (b"sum", b"")),))
    nothing = AggregateDown(round=2, epoch=0, survivors=(), sums=())
    group_key = GroupKeySealed(epoch=2**32 - 1, envelopes={SITE: b"sealed", PEER: b""})
    digests = {"global": bytes_for("digest", 32)}
    return {
        "request": [
            PlanOffer(run=RUN, round=1, plan="{计划}".encode(), roster=b"\x91", make_key=True, continues=None),
            PlanOffer(
                run=RUN,
                round=3,
                plan=b"{}",
                roster=b"\x91",
                make_key=False,
                continues=Continuation(run="lost", round=2),
            ),
            KeyRequest(run=RUN, epoch=1),
            ShareRequest(run=RUN, round=2, listed=(0, 1, 1023), keys=(round_keys(PEER, 2),)),
            RoundRequest(
                run=RUN,
                round=3,
                previous=(down, nothing),
                epoch=1,
                envelopes={0: b"sealed", 300: b"again"},
                participants=(0, 2),
                boxes={PEER: b"box"},
                next_listed=(0, 1),
                next_keys=(round_keys(PEER, 4),),
            ),
            UnmaskRequest(run=RUN, round=10_003, survivors=(0, 2), presence={PEER: SIGNATURE}),
            ReleaseRequest(run=RUN, previous=(), metrics=down, envelopes={}, send_adapter=False),
        ],
        "reply": [
            PlanAdmitted(
                run=RUN,
                site=SITE,
                round=1,
                model_sha256="ab" * 32,
                num_values={"global": 2**40},
                ciphertexts={"global": 3},
                signature=SIGNATURE,
                keys=(round_keys(SITE, 1), round_keys(SITE, 2)),
                group_key=None,
                contributors=(0, 2),
            ),
            KeysSealed(run=RUN, site=SITE, group_key=group_key),
            SharesSealed(run=RUN, site=SITE, shares=dealt),
            UpdateReply(
                run=RUN,
                site=SITE,
                round=1,
                epoch=0,
                digests=digests,
                signature=SIGNATURE,
                presence=SIGNATURE,
                update=(ScopedCiphertexts("global", (b"c" * 300,)),),
                shares=dealt,
                keys=None,
            ),
            SharesRevealed(
                run=RUN,
                site=SITE,
                round=1,
                self_masks={SITE: bytes(16)},
                mask_keys={PEER: b"\2" * 16},
                signature=SIGNATURE,
            ),
            ReleaseApproved(
                run=RUN,
                site=SITE,
                digests=digests,
                statement=b"{}",
                signature=SIGNATURE,
                adapter={"adapter_config.json": b"{}"},
            ),
            Refused(run=RUN, site=SITE, code="PlanRefused", rule="拒绝：delta 太大"),
        ],
    }


def decoded_as(reader: str, data: bytes) -> str:
    """The class that a party reads, or the error."""
    decode: Callable[..., Any] = decode_request if reader == "request" else decode_reply
    try:
        return type(decode(data)).__name__
    except FedseekError as error:
        return f"refused: {error.code}"


def message_vectors() -> dict[str, Any]:
    """All of ``messages.json``. What is refused is written as a change of a valid message (``splice``)."""
    valid, refused = [], []
    encoded = {type(message).__name__: encode_message(message) for found in messages().values() for message in found}

    def refuse(name: str, reader: str, base: str, altered: bytes) -> None:
        case = {"name": name, "reader": reader, "base": base, "splice": splice(encoded[base], altered)}
        refused.append({**case, "read": decoded_as(reader, altered)})

    for reader, found in messages().items():
        for message in found:
            name = type(message).__name__
            data = encoded[name]
            valid.append({"name": name, "reader": reader, "bytes": data.hex(), "read": decoded_as(reader, data)})
            for what, altered in broken(data).items():
                refuse(f"{name}, {what}", reader, name, altered)
            refuse(f"{name}, to the other side", "reply" if reader == "request" else "request", name, data)
    for name, (reader, document) in bounds().items():
        refuse(name, reader, name.split(",")[0], msgspec.msgpack.encode(document))
    for what, data in {
        "nothing": b"",
        "a number": b"\x07",
        "an unused byte": b"\xc1",
        "a claim": b"\xdf\xff\xff\xff\xff",
    }.items():
        refuse(what, "request", "KeyRequest", data)
    return {"source": "fedseek/messages.py", "valid": valid, "refused": refused}


def broken(data: bytes) -> dict[str, bytes]:
    """Variants that every message has."""
    document = msgspec.msgpack.decode(data)
    last = next(reversed(document))
    encode = msgspec.msgpack.encode
    return {
        "cut by one byte": data[:-1],
        "cut in the middle": data[: len(data) // 2],
        "followed by a byte": data + b"\0",
        "an unknown field": encode({**document, "extra": 1}),
        "version 2": encode({**document, "version": 2}),
        "no such type": encode({**document, "type": "Update"}),
        "no type": encode({key: value for key, value in document.items() if key != "type"}),
        "its last field missing": encode({key: value for key, value in document.items() if key != last}),
        "its last field of another type": encode({**document, last: 1.5}),
        "an empty run": encode({**document, "run": ""}),
        "a run of 129 characters": encode({**document, "run": "运" * 129}),
        "a run that is not UTF-8": data.replace(RUN.encode(), b"\xff" + RUN.encode()[1:]),
    }


def bounds() -> dict[str, tuple[str, dict[str, Any]]]:
    """Numbers, lengths and lists just beyond what the wire takes."""
    by_name = {
        type(message).__name__: (reader, msgspec.msgpack.decode(encode_message(message), strict=False))
        for reader, found in messages().items()
        for message in found
    }

    def change(name: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        reader, document = by_name[name]
        return reader, {**document, **changes}

    keys = msgspec.msgpack.decode(msgspec.msgpack.encode(round_keys(PEER, 2)))
    return {
        "ShareRequest, round 0": change("ShareRequest", round=0),
        "ShareRequest, round 10,004": change("ShareRequest", round=10_004),
        "ShareRequest, position 1024": change("ShareRequest", listed=[1024]),
        "ShareRequest, position -1": change("ShareRequest", listed=[-1]),
        "ShareRequest, 1025 positions": change("ShareRequest", listed=[0] * 1025),
        "ShareRequest, a key of 31 bytes": change("ShareRequest", keys=[{**keys, "mask_key": bytes(31)}]),
        "ShareRequest, a signature of 65 bytes": change("ShareRequest", keys=[{**keys, "signature": bytes(65)}]),
        "ShareRequest, an unknown field inside": change("ShareRequest", keys=[{**keys, "extra": 1}]),
        "ShareRequest, a site of 65 characters": change("ShareRequest", keys=[{**keys, "site": "行" * 65}]),
        "KeyRequest, epoch 2^32": change("KeyRequest", epoch=2**32),
        "KeyRequest, epoch -1": change("KeyRequest", epoch=-1),
        "KeyRequest, an epoch that is a number in a text": change("KeyRequest", epoch="1"),
        "RoundRequest, a box of 4097 bytes": change("RoundRequest", boxes={PEER: bytes(4097)}),
        "RoundRequest, an envelope of a text epoch": change("RoundRequest", envelopes={"a": b""}),
        "UnmaskRequest, a presence of 63 bytes": change("UnmaskRequest", presence={PEER: bytes(63)}),
        "ReleaseRequest, a flag that is a number": change("ReleaseRequest", send_adapter=1),
        "PlanAdmitted, one set of keys": change("PlanAdmitted", keys=[keys]),
        "PlanAdmitted, three sets of keys": change("PlanAdmitted", keys=[keys] * 3),
        "PlanAdmitted, a count of 2^40 + 1": change("PlanAdmitted", num_values={"global": 2**40 + 1}),
        "PlanAdmitted, a digest of 63 digits": change("PlanAdmitted", model_sha256="a" * 63),
        "SharesRevealed, a share of 15 bytes": change("SharesRevealed", mask_keys={PEER: bytes(15)}),
        "SharesRevealed, a share that is a text": change("SharesRevealed", mask_keys={PEER: "a" * 16}),
        "SharesRevealed, shares by scope": change("SharesRevealed", self_masks={SITE: {"global": bytes(16)}}),
        "SharesSealed, a secret of 17 characters": change(
            "SharesSealed", shares={**by_name["SharesSealed"][1]["shares"], "secret_digests": {"x" * 17: bytes(32)}}
        ),
        "UpdateReply, a scope of 81 characters": change("UpdateReply", digests={"a" * 81: bytes(32)}),
        "UpdateReply, a digest of 31 bytes": change("UpdateReply", digests={"global": bytes(31)}),
        "UpdateReply, no presence": change("UpdateReply", presence=None),
        "Refused, a rule of 201 characters": change("Refused", rule="则" * 201),
        "Refused, a code of 65 characters": change("Refused", code="x" * 65),
    }
