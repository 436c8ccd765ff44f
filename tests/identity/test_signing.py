import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseek.errors import WrongKey
from fedseek.identity import signing
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.signing import CONTEXT_ADAPTER, CONTEXT_PLAN, join_fields, sign, verify

MESSAGE = "计划摘要".encode()


def test_a_signature_verifies_with_the_entry_of_its_signer():
    site = SiteIdentity.generate("中国银行", "bank")
    signature = sign(site, CONTEXT_PLAN, MESSAGE)
    assert len(signature) == signing.SIGNATURE_BYTES
    verify(site.public(), CONTEXT_PLAN, MESSAGE, signature)


def test_another_signer_context_message_or_signature_is_refused():
    site, other = SiteIdentity.generate("中国银行", "bank"), SiteIdentity.generate("b", "bank")
    signature = sign(site, CONTEXT_PLAN, MESSAGE)
    flipped = signature[:-1] + bytes([signature[-1] ^ 1])
    for entry, context, message, shown in (
        (other.public(), CONTEXT_PLAN, MESSAGE, signature),
        (site.public(), CONTEXT_ADAPTER, MESSAGE, signature),
        (site.public(), CONTEXT_PLAN, MESSAGE + b"x", signature),
        (site.public(), CONTEXT_PLAN, MESSAGE, flipped),
        (site.public(), CONTEXT_PLAN, MESSAGE, b""),
        (site.public(), CONTEXT_PLAN, MESSAGE, signature + b"\0"),
    ):
        with pytest.raises(WrongKey, match="does not verify"):
            verify(entry, context, message, shown)


def test_a_key_that_is_no_point_on_the_curve_is_a_wrong_key():
    site = SiteIdentity.generate("a", "bank")
    entry = msgspec.structs.replace(site.public(), signing_key=b"\x02" + bytes(31))
    with pytest.raises(WrongKey):
        verify(entry, CONTEXT_PLAN, MESSAGE, sign(site, CONTEXT_PLAN, MESSAGE))


def test_bytes_do_not_move_between_context_and_message():
    site = SiteIdentity.generate("a", "bank")
    with pytest.raises(WrongKey):
        verify(site.public(), b"plan", b"-v1 digest", sign(site, b"plan-v1", b" digest"))


def test_every_context_is_distinct():
    contexts = [value for name, value in vars(signing).items() if name.startswith("CONTEXT_")]
    assert len(contexts) == len(set(contexts)) >= 2


@given(st.lists(st.binary(max_size=12), max_size=4), st.lists(st.binary(max_size=12), max_size=4))
def test_joined_fields_are_equal_only_for_equal_fields(first, second):
    assert (join_fields(*first) == join_fields(*second)) == (first == second)
