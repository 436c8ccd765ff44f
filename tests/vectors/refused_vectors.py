"""What of a round must be refused, and an envelope with what must not be taken in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fixed import bytes_for, result, splice
from round_vectors import ADAPTER, EPOCH, NUMBER, Played, asked_for, plain

from fedseek.cohort import RoundGraph, presence_message
from fedseek.deal import (
    _box_key,
    _dealt_message,
    check_dealt,
    check_keys,
    mask_private_key,
    open_box,
    pairwise_seed,
)
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.sealing import SealedKey, open_sealed
from fedseek.identity.signing import (
    CONTEXT_PLAN,
    CONTEXT_PRESENCE,
    CONTEXT_ROUND_KEYS,
    CONTEXT_SHARES,
    CONTEXT_UNMASK,
    sign,
    verify,
)
from fedseek.messages import SharesDealt, SharesRevealed
from fedseek.reveal import reveal_shares, revealed_message
from fedseek.unmask import RoundRecord, check_revealed


def refused_vectors(played: Played) -> list[dict[str, Any]]:
    """What must not be taken, and the error that says so."""
    return [*refused_keys(played), *refused_dealt(played), *refused_boxes(played), *refused_endings(played)]


def flipped(data: bytes, place: int = -1) -> bytes:
    altered = bytearray(data)
    altered[place] ^= 1
    return bytes(altered)


def tried(name: str, what: str, inputs: dict[str, Any], call: Callable[[], object]) -> dict[str, Any]:
    def never() -> dict[str, Any]:
        call()
        raise AssertionError(f"{name}: not refused")

    return {"name": name, "what": what, **inputs, **result(never)}


def refused_keys(played: Played) -> list[dict[str, Any]]:
    federation, keys = played.federation, played.keys["北岸银行"]
    replace = msgspec.structs.replace
    signed = [keys.site.encode(), keys.mask_key, bytes(32)]
    low = replace(
        keys,
        share_key=bytes(32),
        signature=sign(played.identities["北岸银行"], CONTEXT_ROUND_KEYS, federation.bind_round(NUMBER, *signed)),
    )
    altered = [
        ("round keys, a share key of low order and signed", low, NUMBER),
        ("round keys, signature altered", replace(keys, signature=flipped(keys.signature)), NUMBER),
        ("round keys, key altered", replace(keys, mask_key=flipped(keys.mask_key)), NUMBER),
        ("round keys, the two keys swapped", replace(keys, mask_key=keys.share_key, share_key=keys.mask_key), NUMBER),
        ("round keys under another site's name", replace(keys, site="harbour-bank"), NUMBER),
        ("round keys of a site that is not on the roster", replace(keys, site="north-bank"), NUMBER),
        ("round keys of another round", keys, NUMBER + 1),
        ("round keys with the number changed", replace(keys, round=NUMBER + 1), NUMBER + 1),
        (
            "round keys signed for another purpose",
            replace(keys, signature=sign(played.identities["北岸银行"], CONTEXT_PLAN, federation.bind())),
            NUMBER,
        ),
    ]
    cases = [
        tried(
            name, "keys", {"keys": plain(each), "wanted": number}, lambda e=each, n=number: check_keys(e, federation, n)
        )
        for name, each, number in altered
    ]
    private = mask_private_key(played.secrets["harbour-bank"].mask_seed)
    for point in (bytes(32), (1).to_bytes(32, "little"), (2**255 - 19).to_bytes(32, "little")):
        low = replace(keys, mask_key=point)
        cases.append(
            tried(
                f"a mask key of low order: {point.hex()[:4]}...",
                "pair",
                {"site": "harbour-bank", "keys": plain(low)},
                lambda low=low: pairwise_seed(private, low, federation, me="harbour-bank"),
            )
        )
    return cases


def refused_dealt(played: Played) -> list[dict[str, Any]]:
    federation, dealer = played.federation, "北岸银行"
    dealt = played.dealt[dealer]
    replace = msgspec.structs.replace
    swapped = dict(zip(dealt.boxes, reversed(dealt.boxes.values()), strict=True))
    digests = {holder: {**each} for holder, each in dealt.share_digests.items()}
    digests["harbour-bank"]["self-mask"] = flipped(digests["harbour-bank"]["self-mask"])

    def signed(**changes: Any) -> SharesDealt:
        """By a dealer that breaks the rules and signs it."""
        new = replace(dealt, **changes)
        message = _dealt_message(federation, dealer, new.round, new.boxes, new.share_digests, new.secret_digests)
        return replace(new, signature=sign(played.identities[dealer], CONTEXT_SHARES, message))

    less = {holder: box for holder, box in dealt.boxes.items() if holder != "harbour-bank"}
    altered = [
        ("shares, two boxes swapped", replace(dealt, boxes=swapped)),
        ("shares, a digest altered", replace(dealt, share_digests=digests)),
        ("shares, signature altered", replace(dealt, signature=flipped(dealt.signature, 0))),
        ("shares of another round", signed(round=NUMBER + 1)),
        ("shares, a box left out by the dealer", signed(boxes=less)),
        ("shares, a box too many", signed(boxes={**dealt.boxes, dealer: b"box"})),
        ("shares, a secret left out by the dealer", signed(secret_digests={"mask-key": bytes(32)})),
    ]
    return [
        tried(
            name,
            "dealt",
            {"dealer": dealer, "dealt": plain(each)},
            lambda e=each: check_dealt(e, federation, played.graph, dealer=dealer),
        )
        for name, each in altered
    ]


def refused_boxes(played: Played) -> list[dict[str, Any]]:
    federation, dealer, holder = played.federation, "北岸银行", "仁济医院"
    box = played.dealt[dealer].boxes[holder]

    def sealed(content: bytes) -> bytes:
        key, bound = _box_key(
            played.secrets[dealer], played.keys[holder], federation, NUMBER, sender=dealer, receiver=holder
        )
        nonce = bytes_for("nonce", 12)
        return nonce + AESGCM(key).encrypt(nonce, content, bound)

    shares = played.held[holder][dealer].shares
    altered = [
        ("a box with a bit flipped", flipped(box)),
        ("a box with a bit of its nonce flipped", flipped(box, 0)),
        ("a box cut short", box[:-1]),
        ("a box of 5 bytes", box[:5]),
        ("an empty box", b""),
        ("the box of another holder", played.dealt[dealer].boxes["harbour-bank"]),
        ("the box of another dealer", played.dealt["harbour-bank"].boxes[holder]),
        ("a box that holds no message", sealed(b"\xc1")),
        ("a box that lacks a share", sealed(msgspec.msgpack.encode({"shares": {"self-mask": bytes(16)}}))),
        (
            "a box with a share of 15 bytes",
            sealed(msgspec.msgpack.encode({"shares": {**shares, "self-mask": bytes(15)}})),
        ),
        ("a box with a field too many", sealed(msgspec.msgpack.encode({"shares": shares, "more": 1}))),
    ]
    return [
        tried(
            name,
            "box",
            {"dealer": dealer, "receiver": holder, "box": each.hex()},
            lambda e=each: open_box(
                e, played.secrets[holder], played.keys[dealer], federation, receiver=played.keys[holder]
            ),
        )
        for name, each in altered
    ]


def refused_endings(played: Played) -> list[dict[str, Any]]:
    """Presence and revealed shares that do not belong to the list of survivors."""
    federation, names, me = played.federation, played.federation.roster.names, "harbour-bank"
    record = RoundRecord(played.graph, played.keys, played.dealt, participants=names, survivors=names)
    revealed = reveal_shares(
        asked_for(played, names),
        played.held[me],
        federation,
        played.graph,
        participants=names,
        vouched=presence_message(federation, played.graph, names, epoch=EPOCH, digest=ADAPTER),
        identity=played.identities[me],
    )
    replace = msgspec.structs.replace

    def signed(**changes: Any) -> SharesRevealed:
        new = replace(revealed, **changes)
        message = revealed_message(federation, NUMBER, names, names, new.self_masks, new.mask_keys)
        return replace(new, signature=sign(played.identities[me], CONTEXT_UNMASK, message))

    both = {"仁济医院": played.held[me]["仁济医院"].shares["mask-key"]}
    less = {dealer: shares for dealer, shares in revealed.self_masks.items() if dealer != "北岸银行"}
    altered = [
        ("revealed for other survivors", revealed, ["harbour-bank", "仁济医院"]),
        ("revealed, signature altered", replace(revealed, signature=flipped(revealed.signature)), names),
        (
            "revealed, a share altered",
            replace(revealed, self_masks={**revealed.self_masks, me: bytes(16)}),
            names,
        ),
        ("revealed under another site's name", replace(revealed, site="北岸银行"), names),
        ("revealed, both halves of one site", signed(mask_keys=both), names),
        ("revealed, a neighbour left out", signed(self_masks=less), names),
    ]
    cases = [
        tried(
            name,
            "revealed",
            {"survivors": list(survivors), "revealed": plain(each)},
            lambda e=each, s=survivors: check_revealed(e, with_survivors(record, s), federation),
        )
        for name, each, survivors in altered
    ]
    presence = asked_for(played, names).presence
    right: dict[str, Any] = {"graph": played.graph, "participants": names, "epoch": EPOCH, "digest": ADAPTER}

    def vouched(**changes: Any) -> bytes:
        message = presence_message(federation, **{**right, **changes})
        return sign(played.identities["北岸银行"], CONTEXT_PRESENCE, message)

    false = [
        ("presence, signature altered", "北岸银行", flipped(presence["北岸银行"])),
        ("presence of another site", "北岸银行", presence["仁济医院"]),
        ("presence for other participants", "北岸银行", vouched(participants=names[:2])),
        ("presence for another key list", "北岸银行", vouched(graph=replace_listed(played.graph, names[:2]))),
        ("presence for another epoch", "北岸银行", vouched(epoch=EPOCH + 1)),
        ("presence for another adapter", "北岸银行", vouched(digest=bytes(32))),
        ("presence, no signature", "北岸银行", b""),
    ]
    message = presence_message(federation, **right)
    cases += [
        tried(
            name,
            "presence",
            {"site": who, "signature": signature.hex()},
            lambda w=who, s=signature: verify(federation.roster.entry(w), CONTEXT_PRESENCE, message, s),
        )
        for name, who, signature in false
    ]
    return cases


def replace_listed(graph: RoundGraph, listed: Sequence[str]) -> RoundGraph:
    return dataclasses.replace(graph, listed=tuple(listed))


def with_survivors(record: RoundRecord, survivors: Sequence[str]) -> RoundRecord:
    return RoundRecord(record.graph, record.keys, record.dealt, record.participants, survivors)


def sealed_cases(
    envelope: bytes, secret: bytes, receiver: SiteIdentity, roster: Roster, where: Mapping[str, Any]
) -> dict[str, Any]:
    """The envelope, and what is refused in its place."""
    sealed = msgspec.msgpack.decode(envelope, type=SealedKey)
    replace = msgspec.structs.replace
    altered = [
        ("an envelope for this site", sealed, {}),
        ("ciphertext altered", replace(sealed, ciphertext=flipped(sealed.ciphertext)), {}),
        ("signature altered", replace(sealed, signature=flipped(sealed.signature)), {}),
        ("said to come from the receiver", replace(sealed, sender=receiver.name), {}),
        ("for another site", replace(sealed, receiver=sealed.sender), {}),
        ("opened for another run", sealed, {"run": "试运行-2"}),
        ("opened for another epoch", sealed, {"epoch": 8}),
        ("run changed to fit", replace(sealed, run="试运行-2"), {"run": "试运行-2"}),
        ("epoch changed to fit", replace(sealed, epoch=8), {"epoch": 8}),
        ("roster digest altered", replace(sealed, roster_digest=flipped(sealed.roster_digest)), {}),
    ]
    cases = []
    for name, each, other in altered:
        place = {**where, **other}

        def opened(each: SealedKey = each, place: Mapping[str, Any] = place) -> dict[str, Any]:
            return {"secret": open_sealed(each, receiver=receiver, roster=roster, **place).hex()}

        cases.append(
            {"name": name, "splice": splice(envelope, msgspec.msgpack.encode(each)), **place, **result(opened)}
        )
    return {
        "source": "fedseek/identity/sealing.py",
        "envelope": envelope.hex(),
        "receiver": receiver.to_bytes().hex(),
        "roster": roster.canonical_bytes().hex(),
        "sealed": cases,
    }
