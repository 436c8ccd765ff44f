import msgspec
import pytest
from example_messages import DIGESTS, REFUSED, REPLIES, REQUESTS, RUN, SIGNATURE, UPDATE, packed, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseek.errors import Malformed, TooLarge
from fedseek.he.ciphertext import ScopedCiphertexts
from fedseek.messages import (
    MASK_KEY,
    SELF_MASK,
    SharesDealt,
    decode_reply,
    decode_request,
    digest_message,
    encode_message,
    release_message,
    reply_limit,
)
from fedseek.secagg.graph import choose_graph

ALL = [(decode_request, message) for message in REQUESTS] + [(decode_reply, message) for message in REPLIES]
NAMES = [type(message).__name__ for _, message in ALL]
each_message = pytest.mark.parametrize(("decode", "message"), ALL, ids=NAMES)


def refused(decode, data: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        decode(data)
    assert f"message of {len(data)} bytes" in caught.value.message
    return caught.value.message


@each_message
def test_every_message_comes_back_as_it_was(decode, message):
    assert decode(encode_message(message)) == message


@each_message
def test_the_wire_names_type_version_and_run(decode, message):
    document = plain(message)
    assert (document["type"], document["version"], document["run"]) == (type(message).__name__, 1, RUN)


@each_message
def test_an_unknown_field_is_refused_by_name(decode, message):
    assert "`extra`" in refused(decode, packed({**plain(message), "extra": 1}))


@each_message
def test_each_missing_field_is_refused_by_name(decode, message):
    for name in plain(message).keys() - {"type", "version"}:
        without = {key: value for key, value in plain(message).items() if key != name}
        assert f"`{name}`" in refused(decode, packed(without))


@each_message
def test_each_field_of_another_type_is_refused_where_it_is(decode, message):
    for name in plain(message).keys() - {"type"}:
        assert f"$.{name}" in refused(decode, packed({**plain(message), name: 1.5}))


@each_message
@pytest.mark.parametrize("version", [0, 2, -1, 2**70, "1", None, True])
def test_another_version_is_refused_whole(decode, message, version):
    if version == 2**70:
        data = encode_message(message).replace(b"\xa7version\x01", b"\xa7version\xcf" + b"\xff" * 8)
    else:
        data = packed({**plain(message), "version": version})
    assert "$.version" in refused(decode, data)


@each_message
@pytest.mark.parametrize("tag", ["", "PlanOffers", "planoffer", "Aggregate", None, 3, ["PlanOffer"]])
def test_another_tag_is_refused(decode, message, tag):
    refused(decode, packed({**plain(message), "type": tag}))
    refused(decode, packed({key: value for key, value in plain(message).items() if key != "type"}))


def test_a_reply_is_no_request_and_a_request_is_no_reply():
    for message in REPLIES:
        refused(decode_request, encode_message(message))
    for message in REQUESTS:
        refused(decode_reply, encode_message(message))


@each_message
def test_every_truncation_is_refused(decode, message):
    data = encode_message(message)
    for end in range(len(data)):
        refused(decode, data[:end])


@each_message
def test_trailing_bytes_are_refused(decode, message):
    data = encode_message(message)
    for more in (b"\0", b"\xc0", data):
        assert "trailing" in refused(decode, data + more)


@each_message
def test_a_message_over_the_limit_is_too_large_before_it_is_read(decode, message):
    data = encode_message(message)
    assert decode(data, limit=len(data)) == message
    with pytest.raises(TooLarge, match=f"got {len(data)} bytes, wanted at most {len(data) - 1}"):
        decode(data, limit=len(data) - 1)
    with pytest.raises(TooLarge):
        decode(b"\xff" * 11, limit=10)


def test_bytes_that_are_no_utf8_where_text_is_wanted_are_malformed():
    data = encode_message(REFUSED)
    for found, put in (("PlanRefused", b"\xff"), ("rule", b"\xff"), ("type", b"\xc3"), ("试运行", b"\xd5\xcb")):
        old = found.encode()
        refused(decode_reply, data.replace(old, put + old[len(put) :]))


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x81\xa4type", b"\x82\xa4type\xa7Refused\xa3run"])
@pytest.mark.parametrize("decode", [decode_request, decode_reply])
def test_deep_nesting_is_malformed_and_no_recursion_error(decode, opening):
    refused(decode, opening * 100_000)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    refused(decode_request, data)
    refused(decode_reply, data)


wire_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_value_in_any_field_is_refused_or_is_a_message(data):
    decode, message = data.draw(st.sampled_from(ALL))
    document = plain(message)
    document[data.draw(st.sampled_from(sorted(document)))] = data.draw(wire_values)
    try:
        decoded = decode(packed(document))
    except Malformed:
        return
    assert decode(encode_message(decoded)) == decoded


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_a_message_with_bytes_flipped_is_refused_or_is_a_message(data):
    decode, message = data.draw(st.sampled_from(ALL))
    spoiled = bytearray(encode_message(message))
    for _ in range(data.draw(st.integers(1, 3))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(spoiled))
    except Malformed:
        return
    assert decode(encode_message(decoded)) == decoded


def test_the_limit_of_a_reply_leaves_room_for_its_ciphertexts_and_little_more():
    update = tuple(ScopedCiphertexts(scope, (b"c" * 32_000,) * 10) for scope in ("global", "kind/bank"))
    reply = msgspec.structs.replace(UPDATE, update=update)
    data = encode_message(reply)
    assert decode_reply(data, limit=reply_limit(20, 32_000)) == reply
    assert reply_limit(20, 32_000) < len(data) + (5 << 20)


def test_the_limit_of_a_reply_leaves_room_for_shares_in_the_largest_cohort():
    degree = choose_graph(1024, colluders=10, dropout_fraction=0.5).degree
    assert degree == 1023  # no sparse graph withstands that
    names = [f"{number:064}" for number in range(degree + 1)]
    digests = {MASK_KEY: b"1" * 32, SELF_MASK: b"2" * 32}
    dealt = SharesDealt(
        round=3,
        boxes=dict.fromkeys(names[1:], b"b" * 400),  # nonce, tag, two shares and the names of their secrets
        share_digests=dict.fromkeys(names, digests),
        secret_digests=digests,
        signature=SIGNATURE,
    )
    reply = msgspec.structs.replace(UPDATE, shares=dealt, update=())
    assert decode_reply(encode_message(reply), limit=reply_limit(0, 0)) == reply


def test_what_is_signed_changes_with_run_round_scope_digest_and_statement():
    signed = [
        digest_message(RUN, 1, DIGESTS),
        digest_message(RUN, 2, DIGESTS),
        digest_message("other", 1, DIGESTS),
        digest_message(RUN, 1, {"global": DIGESTS["global"]}),
        digest_message(RUN, 1, {"global": DIGESTS["kind/bank"], "kind/bank": DIGESTS["global"]}),
        release_message(RUN, DIGESTS, b"{}"),
        release_message(RUN, DIGESTS, b"{} "),
        release_message("other", DIGESTS, b"{}"),
        release_message(RUN, {"global": DIGESTS["global"]}, b"{}"),
    ]
    assert len(set(signed)) == len(signed)
    assert digest_message(RUN, 1, dict(reversed(DIGESTS.items()))) == signed[0]
