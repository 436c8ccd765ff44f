import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.daemon import parcels
from fedseek.daemon.audit_lines import AuditHead
from fedseek.daemon.parcels import (
    ParcelDown,
    ParcelUp,
    Verdict,
    decode_parcel_down,
    decode_parcel_up,
    encode_parcel,
)
from fedseek.errors import FedseekError, Malformed, TooLarge
from fedseek.messages import Standing


def head(name: str = "仁济医院", number: int = 7) -> AuditHead:
    return AuditHead(name=name, number=number, digest=bytes(32), at=1_795_373_365_123, signature=bytes(64))


DOWN = ParcelDown(
    message=b"request",
    notice=b'{"plan":"\xe8\xaf\x95"}',
    run="试运行/1",
    roster=b"{}",
    heads=(head(), head("coordinator")),
    seen=(head("a"),),
    countersignatures={"北岸银行": bytes(64)},
)
UP = ParcelUp(
    site="北岸银行",
    message=b"reply",
    roster_digest=bytes(32),
    verdict=Verdict(status="waiting", rule="两人批准"),
    standing=Standing(
        site="北岸银行",
        runs=("试运行/2", "试运行/1"),
        plan_digest="0" * 64,
        roster_digest=bytes(32),
        adapters={1: {"bank": bytes(32)}, 2: {"bank": bytes(32)}},
        contributors={1: ("北岸银行", "仁济医院"), 2: ("北岸银行",)},
    ),
    head=head(),
    countersignature=bytes(64),
    renewal=b"csr",
)
SMALL_DOWN, SMALL_UP = ParcelDown(run="r"), ParcelUp(site="s", roster_digest=bytes(32))


@pytest.mark.parametrize("parcel", [DOWN, SMALL_DOWN])
def test_a_parcel_down_comes_out_as_it_went_in(parcel):
    assert decode_parcel_down(encode_parcel(parcel)) == parcel


@pytest.mark.parametrize("parcel", [UP, SMALL_UP])
def test_a_parcel_up_comes_out_as_it_went_in(parcel):
    assert decode_parcel_up(encode_parcel(parcel)) == parcel


def test_an_empty_message_is_not_none():
    assert decode_parcel_down(encode_parcel(ParcelDown(run="r", message=b""))).message == b""


def altered(parcel: ParcelDown | ParcelUp, **changes: object) -> bytes:
    """As a stranger would make it: nothing is checked on the way."""
    return msgspec.msgpack.encode({"type": type(parcel).__name__, **msgspec.structs.asdict(parcel), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": "1"},
        {"type": "ParcelUp"},
        {"run": ""},
        {"run": "r" * 129},
        {"message": "text"},
        {"notice": bytes((4 << 20) + 1)},
        {"roster": bytes((4 << 20) + 1)},
        {"heads": [head(f"n{n}") for n in range(1026)]},
        {"seen": [head(f"n{n}") for n in range(1026)]},
        {"heads": [{**msgspec.structs.asdict(head()), "more": 1}]},
        {"heads": [{**msgspec.structs.asdict(head()), "digest": bytes(31)}]},
        {"heads": [{**msgspec.structs.asdict(head()), "number": 0}]},
        {"heads": [{**msgspec.structs.asdict(head()), "name": " "}]},
        {"heads": [{**msgspec.structs.asdict(head()), "signature": bytes(65)}]},
        {"countersignatures": {"a": bytes(63)}},
        {"countersignatures": {"": bytes(64)}},
        {"countersignatures": {f"n{n}": bytes(64) for n in range(1026)}},
        {"more": None},
    ],
)
def test_a_parcel_down_out_of_bounds_is_refused(changes):
    assert decode_parcel_down(altered(DOWN)) == DOWN
    with pytest.raises(Malformed):
        decode_parcel_down(altered(DOWN, **changes))


STANDING = msgspec.structs.asdict(UP.standing)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 0},
        {"type": "ParcelDown"},
        {"site": ""},
        {"site": "s" * 65},
        {"roster_digest": bytes(31)},
        {"roster_digest": None},
        {"verdict": {"status": "maybe", "rule": ""}},
        {"verdict": {"status": "ready", "rule": "x" * 201}},
        {"verdict": {"status": "ready", "rule": "", "why": ""}},
        {"standing": {**STANDING, "runs": ()}},
        {"standing": {**STANDING, "runs": ("r" * 129,)}},
        {"standing": {**STANDING, "adapters": {number: {} for number in (1, 2, 3)}}},
        {"standing": {**STANDING, "adapters": {1: {"a": bytes(33)}}}},
        {"standing": {**STANDING, "contributors": {1: ("",)}}},
        {"standing": {**STANDING, "more": 1}},
        {"head": {}},
        {"countersignature": bytes(63)},
        {"renewal": bytes((64 << 10) + 1)},
        {"more": 1},
    ],
)
def test_a_parcel_up_out_of_bounds_is_refused(changes):
    assert decode_parcel_up(altered(UP)) == UP
    with pytest.raises(Malformed):
        decode_parcel_up(altered(UP, **changes))


def test_a_parcel_that_is_too_large_is_refused_before_it_is_parsed():
    for decode in (decode_parcel_down, decode_parcel_up):
        with pytest.raises(TooLarge, match="got 100 bytes, wanted at most 99"):
            decode(b"x" * 100, limit=99)


def test_the_largest_wrapping_fits_its_bound():
    full = [head("北" * 61 + f"{n:03}", 2**53 - 1) for n in range(1000)] + [head(f"n{n}") for n in range(25)]
    parcel = ParcelDown(
        run="试" * 128,
        notice=bytes(4 << 20),
        roster=bytes(4 << 20),
        heads=tuple(full),
        seen=tuple(full),
        countersignatures={each.name: bytes(64) for each in full},
    )
    data = encode_parcel(parcel)
    assert len(data) < parcels.MAX_WRAPPING_BYTES
    assert decode_parcel_down(data) == parcel


def test_a_large_message_is_copied_once_each_way():
    message = bytes(50 << 20)
    tracemalloc.start()
    try:
        data = encode_parcel(ParcelDown(run="r", message=message))
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 1.6 * len(message), "one copy, in a buffer that grows by half"
        tracemalloc.reset_peak()
        decoded = decode_parcel_down(data)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 2.6 * len(message), "the encoded parcel, and one copy"
    finally:
        tracemalloc.stop()
    assert decoded.message == message


@settings(max_examples=300)
@given(data=st.data())
def test_altered_bytes_are_taken_or_refused_in_our_words(data):
    content = bytearray(encode_parcel(data.draw(st.sampled_from([DOWN, UP]))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    for decode in (decode_parcel_down, decode_parcel_up):
        try:
            assert isinstance(decode(bytes(content)), ParcelDown | ParcelUp)
        except FedseekError:
            continue


@given(data=st.binary(max_size=100).filter(lambda data: data != b"\x80"))  # an empty map is an empty parcel
def test_bytes_of_a_stranger_are_refused(data):
    for decode in (decode_parcel_down, decode_parcel_up):
        with pytest.raises(Malformed):
            decode(data)


def test_depth_without_end_is_refused():
    with pytest.raises(Malformed):
        decode_parcel_up(b"\x91" * 100_000)
