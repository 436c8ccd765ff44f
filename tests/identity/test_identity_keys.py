import copy
import dataclasses
import pickle

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedseek.errors import Malformed
from fedseek.identity import keys
from fedseek.identity.keys import SiteIdentity


def secret_bytes(identity: SiteIdentity) -> list[bytes]:
    raw = (Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return [
        identity.signing_key.private_bytes(*raw),
        identity.mlkem_key.private_bytes_raw(),
        identity.x25519_key.private_bytes(*raw),
    ]


def test_every_identity_is_fresh():
    one, two = SiteIdentity.generate("中国银行", "bank"), SiteIdentity.generate("中国银行", "bank")
    assert not set(secret_bytes(one)) & set(secret_bytes(two))
    assert one.public() != two.public()


def test_public_entry_is_stable_and_holds_no_secret():
    identity = SiteIdentity.generate("华西医院", "hospital")
    entry = identity.public()
    assert entry == identity.public()
    assert (entry.name, entry.kind) == ("华西医院", "hospital")
    published = entry.signing_key + entry.sealing_key
    assert not any(secret in published for secret in secret_bytes(identity))


def test_printing_shows_name_and_fingerprint_but_no_key():
    identity = SiteIdentity.generate("华西医院", "hospital")
    for text in (repr(identity), str(identity), f"{identity}", f"{[identity]}"):
        assert "华西医院" in text
        assert identity.public().fingerprint() in text
        assert "redacted" in text
        for secret in secret_bytes(identity):
            assert secret.hex() not in text
            assert repr(secret) not in text
            assert "PrivateKey object" not in text


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_pickling_and_copying_are_refused(duplicate):
    with pytest.raises(TypeError):
        duplicate(SiteIdentity.generate("a", "bank"))


def test_fields_cannot_be_replaced():
    identity = SiteIdentity.generate("a", "bank")
    with pytest.raises(dataclasses.FrozenInstanceError):
        identity.name = "b"


@pytest.mark.parametrize(("name", "kind"), [("", "bank"), ("a", ""), ("a\u200b", "bank")])
def test_names_a_roster_would_refuse_are_refused_at_once(name, kind):
    with pytest.raises(Malformed):
        SiteIdentity.generate(name, kind)


def test_an_identity_comes_back_from_its_bytes_and_does_the_same():
    identity = SiteIdentity.generate("华西医院", "hospital")
    again = SiteIdentity.from_bytes(identity.to_bytes())
    assert again.public() == identity.public()
    assert secret_bytes(again) == secret_bytes(identity)
    assert again.to_bytes() == identity.to_bytes()
    assert again.signing_key.sign(b"m") == identity.signing_key.sign(b"m")


def form(**changes) -> bytes:
    identity = SiteIdentity.generate("a", "bank")
    return msgspec.msgpack.encode(msgspec.msgpack.decode(identity.to_bytes()) | changes)


def test_the_form_the_next_test_breaks_is_right_unbroken():
    assert SiteIdentity.from_bytes(form()).name == "a"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        form()[:-1],
        form() + b"\x00",
        form(version=2),
        form(name=""),
        form(name="a\u200b"),
        form(kind="a/b"),
        form(name=b"\xff"),
        form(signing_key=bytes(31)),
        form(mlkem_seed=bytes(63)),
        form(x25519_key=bytes(33)),
        form(x25519_key="x" * 32),
        form(more=1),
        msgspec.msgpack.encode(dict(reversed(msgspec.msgpack.decode(form()).items()))),
    ],
    ids=lambda data: f"{len(data)}-bytes",
)
def test_bytes_that_are_not_one_identity_are_refused_without_quoting_them(data):
    with pytest.raises(Malformed) as caught:
        SiteIdentity.from_bytes(data)
    assert caught.value.__cause__ is None
    assert len(str(caught.value)) < 100


def test_the_form_in_between_does_not_print_keys():
    identity = SiteIdentity.generate("a", "bank")
    between = msgspec.msgpack.decode(identity.to_bytes(), type=keys._IdentityForm)
    assert repr(between) == "<identity of 'a' as bytes, redacted>"
    assert list(between.__rich_repr__()) == [("name", "a")]
