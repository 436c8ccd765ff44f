"""The wire in plain Python, for ``reader.py``: MessagePack, and what each message must look like.

Nothing of FedSeek is imported; the tables below are the specification a second time. MessagePack:
https://github.com/msgpack/msgpack/blob/master/spec.md, without floats of 32 bits, timestamps and extensions, which no
message has.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

Rule = Callable[[Any], None]


class BadBytes(Exception):
    """Not MessagePack, or not a message."""


def wanted(condition: bool) -> None:
    if not condition:
        raise BadBytes


# MessagePack


def unpack(data: bytes) -> Any:
    """The one value that ``data`` is."""
    value, end = _value(data, 0)
    wanted(end == len(data))
    return value


def _take(data: bytes, at: int, count: int) -> bytes:
    wanted(at + count <= len(data))
    return data[at : at + count]


def _number(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(_take(data, at, count), "big")


def _value(data: bytes, at: int) -> tuple[Any, int]:
    head = _number(data, at, 1)
    at += 1
    if head < 0x80 or head >= 0xE0:
        return (head if head < 0x80 else head - 256), at
    if head < 0x90:
        return _map(data, at, head & 15)
    if head < 0xA0:
        return _array(data, at, head & 15)
    if head < 0xC0:
        return _text(data, at, head & 31)
    constants = {0xC0: None, 0xC2: False, 0xC3: True}
    if head in constants:
        return constants[head], at
    if head == 0xCB:
        return struct.unpack(">d", _take(data, at, 8))[0], at + 8
    if 0xCC <= head <= 0xD3:
        width = 1 << (head - 0xCC & 3)
        return int.from_bytes(_take(data, at, width), "big", signed=head >= 0xD0), at + width
    with_length: dict[int, tuple[int, Callable[[bytes, int, int], tuple[Any, int]]]] = {
        **{0xC4 + power: (1 << power, _bytes) for power in range(3)},
        **{0xD9 + power: (1 << power, _text) for power in range(3)},
        **{0xDC + power: (2 << power, _array) for power in range(2)},
        **{0xDE + power: (2 << power, _map) for power in range(2)},
    }
    wanted(head in with_length)
    width, read = with_length[head]
    return read(data, at + width, _number(data, at, width))


def _bytes(data: bytes, at: int, count: int) -> tuple[bytes, int]:
    return _take(data, at, count), at + count


def _text(data: bytes, at: int, count: int) -> tuple[str, int]:
    try:
        return _take(data, at, count).decode(), at + count
    except UnicodeDecodeError:
        raise BadBytes from None


def _array(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    found = []
    for _ in range(count):
        value, at = _value(data, at)
        found.append(value)
    return found, at


def _map(data: bytes, at: int, count: int) -> tuple[dict[Any, Any], int]:
    found = {}
    for _ in range(count):
        key, at = _value(data, at)
        wanted(isinstance(key, str | int))
        found[key], at = _value(data, at)
    return found, at


def pack(value: Any) -> bytes:
    """The shortest form of a value."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return _pack_number(value)
    if isinstance(value, bytes):
        return _head(len(value), (None, 0, 0xC4, 0xC5, 0xC6)) + value
    if isinstance(value, str):
        return _head(len(value.encode()), (0xA0, 32, 0xD9, 0xDA, 0xDB)) + value.encode()
    if isinstance(value, list):
        return _head(len(value), (0x90, 16, None, 0xDC, 0xDD)) + b"".join(map(pack, value))
    items = (part for item in value.items() for part in item)
    return _head(len(value), (0x80, 16, None, 0xDE, 0xDF)) + b"".join(map(pack, items))


def _head(length: int, codes: tuple[int | None, int, int | None, int, int]) -> bytes:
    small, below, one, two, four = codes
    if small is not None and length < below:
        return bytes([small | length])
    if one is not None and length < 1 << 8:
        return bytes([one, length])
    return bytes([two]) + length.to_bytes(2, "big") if length < 1 << 16 else bytes([four]) + length.to_bytes(4, "big")


def _pack_number(value: int) -> bytes:
    if value < 128:
        wanted(value >= 0)
        return bytes([value])
    width = next(power for power in range(4) if value < 1 << (8 << power))
    return bytes([0xCC + width]) + value.to_bytes(1 << width, "big")


# Rules


def number(low: int, high: int | None = None) -> Rule:
    def check(value: Any) -> None:
        wanted(type(value) is int and value >= low and (high is None or value <= high))

    return check


def text(low: int, high: int | None = None) -> Rule:
    def check(value: Any) -> None:
        wanted(isinstance(value, str) and len(value) >= low and (high is None or len(value) <= high))

    return check


def raw(low: int, high: int | None = None) -> Rule:
    def check(value: Any) -> None:
        wanted(isinstance(value, bytes) and len(value) >= low and (high is None or len(value) <= high))

    return check


def flag(value: Any) -> None:
    wanted(isinstance(value, bool))


def many(rule: Rule, low: int = 0, high: int | None = None) -> Rule:
    def check(value: Any) -> None:
        wanted(isinstance(value, list) and low <= len(value) and (high is None or len(value) <= high))
        for each in value:
            rule(each)

    return check


def table(key_rule: Rule, rule: Rule, high: int | None = None) -> Rule:
    def check(value: Any) -> None:
        wanted(isinstance(value, dict) and (high is None or len(value) <= high))
        for key, each in value.items():
            key_rule(key)
            rule(each)

    return check


def maybe(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def record(**fields: Rule) -> Rule:
    """All of these fields and no other."""

    def check(value: Any) -> None:
        wanted(isinstance(value, dict) and set(value) == set(fields))
        for name, rule in fields.items():
            rule(value[name])

    return check


SITES = 1024
RUN, SITE, SCOPE, SECRET = text(1, 128), text(1, 64), text(1, 80), text(1, 16)
DIGEST, SIGNATURE, SHARE, BOX = raw(32, 32), raw(64, 64), raw(16, 16), raw(0, 4096)
ROUND, COUNT, EPOCH, DOCUMENT = number(1, 10_003), number(0, 2**40), number(0, 2**32 - 1), raw(0, 4 << 20)
POSITIONS = many(number(0, SITES - 1), high=SITES)

ROUND_KEYS = record(site=SITE, round=ROUND, mask_key=DIGEST, share_key=DIGEST, signature=SIGNATURE)
DEALT = record(
    round=ROUND,
    boxes=table(SITE, BOX, SITES),
    share_digests=table(SITE, table(SECRET, DIGEST), SITES),
    secret_digests=table(SECRET, DIGEST),
    signature=SIGNATURE,
)
SUM = record(scope=text(0), contributors=lambda value: wanted(type(value) is int), ciphertexts=many(raw(0)))
DOWN = record(round=ROUND, epoch=EPOCH, survivors=POSITIONS, sums=many(SUM))
CONTINUATION = record(run=RUN, round=number(0, 10_003))
GROUP_KEY = record(epoch=EPOCH, envelopes=table(SITE, DOCUMENT, SITES))
UPDATE = many(record(scope=text(0), ciphertexts=many(raw(0))))
KEY_LIST, ENVELOPES, PREVIOUS = many(ROUND_KEYS, high=SITES), table(EPOCH, DOCUMENT), many(DOWN, high=10_001)
DIGESTS = table(SCOPE, DIGEST)

REQUESTS: dict[str, dict[str, Rule]] = {
    "PlanOffer": {
        "round": ROUND,
        "plan": DOCUMENT,
        "roster": DOCUMENT,
        "make_key": flag,
        "continues": maybe(CONTINUATION),
    },
    "KeyRequest": {"epoch": EPOCH},
    "ShareRequest": {"round": ROUND, "listed": POSITIONS, "keys": KEY_LIST},
    "RoundRequest": {
        "round": ROUND,
        "previous": PREVIOUS,
        "epoch": EPOCH,
        "envelopes": ENVELOPES,
        "participants": POSITIONS,
        "boxes": table(SITE, BOX, SITES),
        "next_listed": POSITIONS,
        "next_keys": KEY_LIST,
    },
    "UnmaskRequest": {"round": ROUND, "survivors": POSITIONS, "presence": table(SITE, SIGNATURE, SITES)},
    "ReleaseRequest": {"previous": PREVIOUS, "metrics": DOWN, "envelopes": ENVELOPES, "send_adapter": flag},
}
REPLIES: dict[str, dict[str, Rule]] = {
    "PlanAdmitted": {
        "round": ROUND,
        "model_sha256": text(64, 64),
        "num_values": table(SCOPE, COUNT),
        "ciphertexts": table(SCOPE, COUNT),
        "signature": SIGNATURE,
        "keys": many(ROUND_KEYS, 2, 2),
        "group_key": maybe(GROUP_KEY),
        "contributors": POSITIONS,
    },
    "KeysSealed": {"group_key": GROUP_KEY},
    "SharesSealed": {"shares": DEALT},
    "UpdateReply": {
        "round": ROUND,
        "epoch": EPOCH,
        "digests": DIGESTS,
        "signature": SIGNATURE,
        "presence": SIGNATURE,
        "update": UPDATE,
        "shares": maybe(DEALT),
        "keys": maybe(ROUND_KEYS),
    },
    "SharesRevealed": {
        "round": ROUND,
        "self_masks": table(SITE, SHARE, SITES),
        "mask_keys": table(SITE, SHARE, SITES),
        "signature": SIGNATURE,
    },
    "ReleaseApproved": {
        "digests": DIGESTS,
        "statement": DOCUMENT,
        "signature": SIGNATURE,
        "adapter": table(text(0), raw(0, 1 << 30)),
    },
    "Refused": {"code": text(0, 64), "rule": text(0, 200)},
}


def message_type(data: bytes, reader: str) -> str:
    """The type of the message that this reader ("request" for a site, "reply" for the coordinator) takes it for.

    Raises:
        BadBytes: it takes it for none.
    """
    message = unpack(data)
    known = REQUESTS if reader == "request" else REPLIES
    wanted(isinstance(message, dict) and isinstance(message.get("type"), str) and message["type"] in known)
    fields = {"run": RUN, **({} if reader == "request" else {"site": SITE}), **known[message["type"]]}
    content = {name: value for name, value in message.items() if name != "type"}
    record(version=number(1, 1), **fields)(content)
    return str(message["type"])
