"""Bounds of every field on the wire: each is tried one step beyond."""

import msgspec
import pytest
from example_messages import (
    ADMITTED,
    APPROVED,
    CONTINUES,
    CONTINUING,
    DEALT,
    DOWN,
    GIVEN_UP,
    KEY,
    KEYS,
    KEYS_SEALED,
    OFFER,
    PEER,
    REFUSED,
    RELEASE,
    REPLIES,
    REQUESTS,
    REVEALED,
    ROUND,
    SEALED,
    SHARE,
    SHARES_SEALED,
    SIGNATURE,
    SITE,
    UNMASK,
    UPDATE,
    packed,
    plain,
    plain_of,
)

from fedseek.errors import Malformed
from fedseek.messages import (
    MASK_KEY,
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

MANY = 1025
TEXT, NOTHING, LONG_NAME, LONG_SCOPE, LONG_SECRET = "x", "", "医" * 65, "x" * 81, "密" * 17
BAD_POSITIONS = [[-1], [1024], list(range(MANY)), ["0"], [True], 3]
BAD_ROUNDS = [0, -1, 10_004, "1", True]
BAD_EPOCHS = [-1, 2**32, "0"]
BAD_KEYS = [b"k" * 31, b"k" * 33, "k" * 32]
BAD_SIGNATURES = [b"\x05" * 63, b"\x05" * 65, "x" * 64, None]

BOUNDS = {
    RoundKeys: (
        KEYS,
        {
            "site": [NOTHING, LONG_NAME],
            "round": BAD_ROUNDS,
            "mask_key": BAD_KEYS,
            "share_key": BAD_KEYS,
            "signature": BAD_SIGNATURES,
        },
        lambda part: {**plain(SHARE), "keys": [part]},
    ),
    SharesDealt: (
        DEALT,
        {
            "round": BAD_ROUNDS,
            "boxes": [{PEER: b"b" * 4097}, {NOTHING: b""}, {PEER: TEXT}, {f"{n}": b"" for n in range(MANY)}],
            "share_digests": [
                {PEER: {MASK_KEY: b"1" * 31}},
                {PEER: {NOTHING: b"1" * 32}},
                {PEER: {LONG_SECRET: b"1" * 32}},
                {LONG_NAME: {}},
                {f"{n}": {} for n in range(MANY)},
            ],
            "secret_digests": [{MASK_KEY: b"1" * 33}, {NOTHING: b"1" * 32}, {LONG_SECRET: b"1" * 32}],
            "signature": BAD_SIGNATURES,
        },
        lambda part: {**plain(SHARES_SEALED), "shares": part},
    ),
    AggregateDown: (
        DOWN,
        {
            "round": BAD_ROUNDS,
            "epoch": BAD_EPOCHS,
            "survivors": BAD_POSITIONS,
            "sums": [
                [{"scope": "global", "ciphertexts": []}],
                [{"scope": "global", "contributors": 3, "ciphertexts": [TEXT]}],
                [{"scope": "global", "contributors": 3, "ciphertexts": [], "more": 1}],
            ],
        },
        lambda part: {**plain(RELEASE), "metrics": part},
    ),
    GroupKeySealed: (
        SEALED,
        {
            "epoch": BAD_EPOCHS,
            "envelopes": [
                {SITE: b"x" * ((4 << 20) + 1)},
                {SITE: TEXT},
                {NOTHING: b""},
                {LONG_NAME: b""},
                {f"{n}": b"" for n in range(MANY)},
            ],
        },
        lambda part: {**plain(KEYS_SEALED), "group_key": part},
    ),
    PlanOffer: (
        OFFER,
        {
            "run": [NOTHING, "x" * 129],
            "round": BAD_ROUNDS,
            "plan": [b"x" * ((4 << 20) + 1), TEXT],
            "roster": [b"x" * ((4 << 20) + 1), TEXT],
            "make_key": [1, None, "true"],
            "continues": [{}, {"run": "a"}, [], "a", 1],
        },
        dict,
    ),
    Continuation: (
        CONTINUES,
        {"run": [NOTHING, "x" * 129, None], "round": [-1, 10_004, "1", None]},
        lambda part: {**plain(CONTINUING), "continues": part},
    ),
    KeyRequest: (KEY, {"run": [NOTHING, "x" * 129], "epoch": BAD_EPOCHS}, dict),
    ShareRequest: (
        SHARE,
        {"round": BAD_ROUNDS, "listed": BAD_POSITIONS, "keys": [[plain_of(KEYS)] * MANY, plain_of(KEYS), [None]]},
        dict,
    ),
    RoundRequest: (
        ROUND,
        {
            "round": BAD_ROUNDS,
            "previous": [[plain_of(GIVEN_UP)] * 10_002, [None], plain_of(DOWN)],
            "epoch": BAD_EPOCHS,
            "envelopes": [{-1: b""}, {2**32: b""}, {"0": b""}, {0: TEXT}, {0: b"x" * ((4 << 20) + 1)}],
            "participants": BAD_POSITIONS,
            "boxes": [{PEER: b"b" * 4097}, {NOTHING: b""}, {f"{n}": b"" for n in range(MANY)}],
            "next_listed": BAD_POSITIONS,
            "next_keys": [[plain_of(KEYS)] * MANY, plain_of(KEYS)],
        },
        dict,
    ),
    UnmaskRequest: (
        UNMASK,
        {
            "round": BAD_ROUNDS,
            "survivors": BAD_POSITIONS,
            "presence": [{PEER: b"\x05" * 63}, {NOTHING: SIGNATURE}, {f"{n}": SIGNATURE for n in range(MANY)}],
        },
        dict,
    ),
    ReleaseRequest: (
        RELEASE,
        {
            "previous": [[plain_of(GIVEN_UP)] * 10_002, [None]],
            "metrics": [None, [plain_of(DOWN)]],
            "envelopes": [{-1: b""}, {2**32: b""}, {0: TEXT}],
            "send_adapter": [0, None],
        },
        dict,
    ),
    PlanAdmitted: (
        ADMITTED,
        {
            "site": [NOTHING, LONG_NAME],
            "round": BAD_ROUNDS,
            "model_sha256": ["ab", "ab" * 33],
            "num_values": [{"global": -1}, {"global": 2**40 + 1}, {NOTHING: 1}],
            "ciphertexts": [{"global": -1}, {NOTHING: 1}, {LONG_SCOPE: 1}],
            "signature": BAD_SIGNATURES,
            "keys": [[plain_of(KEYS)], [plain_of(KEYS)] * 3, [None, None]],
            "group_key": [{}, b""],
            "contributors": BAD_POSITIONS,
        },
        dict,
    ),
    UpdateReply: (
        UPDATE,
        {
            "site": [NOTHING, LONG_NAME],
            "round": BAD_ROUNDS,
            "epoch": BAD_EPOCHS,
            "digests": [{"global": b"\x07" * 31}, {"global": "07" * 16}, {NOTHING: b"\x07" * 32}],
            "signature": BAD_SIGNATURES,
            "presence": BAD_SIGNATURES,
            "update": [[["global", []]], [{"scope": "global", "ciphertexts": [TEXT]}], [{"scope": "global"}]],
            "shares": [{}, [plain_of(DEALT)]],
            "keys": [{}, [plain_of(KEYS)]],
        },
        dict,
    ),
    SharesRevealed: (
        REVEALED,
        {
            "round": BAD_ROUNDS,
            "self_masks": [
                {PEER: b"s" * 15},
                {PEER: b"s" * 17},
                {PEER: {}},
                {PEER: {"global": b"s" * 16}},  # one for each scope, as no site deals them
                {NOTHING: b"s" * 16},
                {LONG_NAME: b"s" * 16},
                {f"{n}": b"s" * 16 for n in range(MANY)},
            ],
            "mask_keys": [{PEER: b"m" * 15}, {PEER: b"m" * 17}, {PEER: {}}, {f"{n}": b"m" * 16 for n in range(MANY)}],
            "signature": BAD_SIGNATURES,
        },
        dict,
    ),
    ReleaseApproved: (APPROVED, {"statement": [b"x" * ((4 << 20) + 1)], "adapter": [{"a": TEXT}, [b""]]}, dict),
    Refused: (REFUSED, {"code": ["x" * 65], "rule": ["x" * 201], "site": [NOTHING]}, dict),
}
OUT_OF_BOUNDS = [
    (struct, field, number)
    for struct, (_, fields, _) in BOUNDS.items()
    for field, values in fields.items()
    for number in range(len(values))
]


def refused(decode, data: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        decode(data)
    assert f"message of {len(data)} bytes" in caught.value.message
    return caught.value.message


def decoder_of(document: dict):
    return decode_request if document["type"] in {type(message).__name__ for message in REQUESTS} else decode_reply


@pytest.mark.parametrize(
    ("struct", "field", "number"), OUT_OF_BOUNDS, ids=[f"{s.__name__}.{f}-{n}" for s, f, n in OUT_OF_BOUNDS]
)
def test_a_field_out_of_its_bounds_is_refused(struct, field, number):
    good, fields, around = BOUNDS[struct]
    whole = plain_of(good) if around is not dict else plain(good)
    decode = decoder_of(around(whole))
    decode(packed(around(whole)))  # it is this field that is wrong below
    assert f".{field}" in refused(decode, packed(around(whole | {field: fields[field][number]})))


@pytest.mark.parametrize("struct", [RoundKeys, SharesDealt, AggregateDown, GroupKeySealed, Continuation])
def test_parts_of_messages_take_no_unknown_field_and_miss_none(struct):
    good, _, around = BOUNDS[struct]
    decode = decoder_of(around(plain_of(good)))
    assert "`extra`" in refused(decode, packed(around(plain_of(good, extra=1))))
    for name in plain_of(good):
        without = {key: value for key, value in plain_of(good).items() if key != name}
        assert f"`{name}`" in refused(decode, packed(around(without)))


def test_each_message_and_each_part_of_one_has_its_bounds_tried():
    types = {type(message) for message in (*REQUESTS, *REPLIES)}
    parts = {RoundKeys, SharesDealt, AggregateDown, GroupKeySealed, Continuation}
    assert types | parts == {*BOUNDS, KeysSealed, SharesSealed}


def test_the_largest_round_is_the_closing_round_of_the_longest_plan_and_its_neighbours():
    for number in (1, 10_001, 10_003):  # keys are made for two rounds ahead
        assert decode_reply(encode_message(msgspec.structs.replace(UPDATE, round=number))).round == number
