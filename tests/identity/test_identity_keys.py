import copy
import dataclasses
import pickle

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedseek.errors import Malformed
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
