import os

import msgspec
import pytest

from fedseek.errors import Malformed, WrongKey
from fedseek.identity import sealing
from fedseek.identity.keys import SiteIdentity
from fedseek.identity.roster import Roster
from fedseek.identity.sealing import SEAL_OVERHEAD_BYTES, SealedKey, open_sealed, seal
from fedseek.identity.signing import CONTEXT_SEALED_KEY, join_fields, sign

RUN = "联邦-2026"
SECRET = bytes(range(256)) * 130  # as long as a serialised BFV secret key at N = 4096, about 33 kB
BANK = SiteIdentity.generate("中国银行", "bank")
HOSPITAL = SiteIdentity.generate("华西医院", "hospital")
THIRD = SiteIdentity.generate("third", "bank")
ROSTER = Roster.of([site.public() for site in (BANK, HOSPITAL, THIRD)])


def sealed_to_hospital(**changes) -> SealedKey:
    arguments = {"sender": BANK, "receiver": HOSPITAL.public(), "roster": ROSTER, "run": RUN, "epoch": 3}
    return seal(SECRET, **(arguments | changes))


def open_at_hospital(sealed: SealedKey, **changes) -> bytes:
    return open_sealed(sealed, **({"receiver": HOSPITAL, "roster": ROSTER, "run": RUN, "epoch": 3} | changes))


def resigned(sealed: SealedKey, sender: SiteIdentity) -> SealedKey:
    """The envelope with a signature that is right for what it now says, as a cheating site could make it."""
    bound = sealing._bound_fields(
        run=sealed.run, epoch=sealed.epoch, sender=sealed.sender, receiver=sealed.receiver, digest=sealed.roster_digest
    )
    signature = sign(sender, CONTEXT_SEALED_KEY, join_fields(bound, sealed.ciphertext))
    return msgspec.structs.replace(sealed, signature=signature)


@pytest.mark.parametrize("size", [1, 33_000, sealing.MAX_SECRET_BYTES])
def test_what_is_sealed_opens_after_a_trip_as_bytes(size):
    secret = os.urandom(size)
    wire = msgspec.msgpack.encode(
        seal(secret, sender=BANK, receiver=HOSPITAL.public(), roster=ROSTER, run=RUN, epoch=3)
    )
    sealed = msgspec.msgpack.decode(wire, type=SealedKey)
    assert len(sealed.ciphertext) == size + SEAL_OVERHEAD_BYTES
    assert open_at_hospital(sealed) == secret


def test_the_envelope_holds_no_stretch_of_the_secret_and_is_never_the_same_twice():
    secret = os.urandom(33_000)
    one, two = (
        seal(secret, sender=BANK, receiver=HOSPITAL.public(), roster=ROSTER, run=RUN, epoch=3) for _ in range(2)
    )
    assert one.ciphertext != two.ciphertext
    wire = msgspec.msgpack.encode(one)
    assert not any(secret[start : start + 16] in wire for start in range(0, len(secret) - 16, 16))


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


SEALED = sealed_to_hospital()
TAMPERED = {
    "run": {"run": "联邦-2027"},
    "epoch": {"epoch": 4},
    "sender": {"sender": "third"},
    "sender unknown": {"sender": "mallory"},
    "receiver": {"receiver": "third"},
    "roster digest": {"roster_digest": bytes(32)},
    "encapsulated ML-KEM key": {"ciphertext": flip(SEALED.ciphertext, 0)},
    "encapsulated X25519 key": {"ciphertext": flip(SEALED.ciphertext, 1100)},
    "encrypted secret": {"ciphertext": flip(SEALED.ciphertext, 5000)},
    "authentication tag": {"ciphertext": flip(SEALED.ciphertext, len(SEALED.ciphertext) - 1)},
    "cut short": {"ciphertext": SEALED.ciphertext[:-1]},
    "signature": {"signature": flip(SEALED.signature, 10)},
}


def test_every_field_is_tampered_with_below():
    assert {field for change in TAMPERED.values() for field in change} == set(SealedKey.__struct_fields__)


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_tampered_envelope_is_refused(change):
    with pytest.raises(WrongKey):
        open_at_hospital(msgspec.structs.replace(SEALED, **change))


CHEATS = {name: change for name, change in TAMPERED.items() if name not in ("signature", "sender unknown", "sender")}


@pytest.mark.parametrize("change", CHEATS.values(), ids=CHEATS.keys())
def test_a_tampered_envelope_is_refused_even_when_its_sender_signs_it_again(change):
    with pytest.raises(WrongKey):
        open_at_hospital(resigned(msgspec.structs.replace(SEALED, **change), BANK))


def test_a_site_cannot_pass_on_anothers_envelope_as_its_own():
    stolen = resigned(msgspec.structs.replace(SEALED, sender="third"), THIRD)
    with pytest.raises(WrongKey, match="does not open"):  # the sender is bound into HPKE's info as well
        open_at_hospital(stolen)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"run": "other"}, "for run"), ({"epoch": 4}, "for epoch 3, wanted 4"), ({"receiver": THIRD}, "for receiver")],
    ids=["run", "epoch", "receiver"],
)
def test_an_envelope_is_no_good_elsewhere_and_the_refusal_says_why(change, said):
    with pytest.raises(WrongKey, match=said):
        open_at_hospital(SEALED, **change)


def test_only_the_receivers_private_key_opens_it():
    impostor = SiteIdentity.generate(HOSPITAL.name, HOSPITAL.kind)  # same name, other keys, same roster
    with pytest.raises(WrongKey, match="fingerprint"):
        open_at_hospital(SEALED, receiver=impostor)


def test_a_man_in_the_middle_who_swaps_the_receivers_keys_is_caught_by_the_honest_receiver():
    mallory = SiteIdentity.generate(HOSPITAL.name, HOSPITAL.kind)
    false_roster = Roster.of([BANK.public(), mallory.public(), THIRD.public()])
    # A sender that never compared rosters is fooled: this is why people compare fingerprints first.
    fooled = sealed_to_hospital(receiver=mallory.public(), roster=false_roster)
    assert open_sealed(fooled, receiver=mallory, roster=false_roster, run=RUN, epoch=3) == SECRET
    # A sender that holds the true roster refuses the swapped keys ...
    with pytest.raises(WrongKey, match="compare fingerprints"):
        sealed_to_hospital(receiver=mallory.public())
    # ... and the honest receiver refuses what was sealed under the false roster, however it is dressed up.
    with pytest.raises(WrongKey, match="roster digest"):
        open_at_hospital(fooled)
    with pytest.raises(WrongKey, match="does not verify"):
        open_at_hospital(msgspec.structs.replace(fooled, roster_digest=ROSTER.digest()))


def test_a_man_in_the_middle_cannot_seal_in_anothers_name():
    mallory = SiteIdentity.generate(BANK.name, BANK.kind)
    with pytest.raises(WrongKey, match="fingerprint"):
        sealed_to_hospital(sender=mallory)
    false_roster = Roster.of([mallory.public(), HOSPITAL.public(), THIRD.public()])
    forged = sealed_to_hospital(sender=mallory, roster=false_roster)
    with pytest.raises(WrongKey, match="does not verify"):
        open_at_hospital(msgspec.structs.replace(forged, roster_digest=ROSTER.digest()))


@pytest.mark.parametrize(
    "sealing_key",
    [b"\xff" * 1216, HOSPITAL.public().sealing_key[:1184] + bytes(32)],
    ids=["no ML-KEM key", "X25519 point of low order"],
)
def test_a_sealing_key_that_is_no_key_is_refused(sealing_key):
    broken = msgspec.structs.replace(HOSPITAL.public(), sealing_key=sealing_key)
    with pytest.raises(WrongKey, match="not a valid"):
        sealed_to_hospital(receiver=broken, roster=Roster.of([BANK.public(), broken]))


@pytest.mark.parametrize(
    ("secret", "change"),
    [
        (b"", {}),
        (bytes(sealing.MAX_SECRET_BYTES + 1), {}),
        (b"x", {"run": ""}),
        (b"x", {"run": "r" * 129}),
        (b"x", {"epoch": -1}),
        (b"x", {"epoch": 2**32}),
    ],
    ids=["no secret", "large secret", "no run", "long run", "negative epoch", "large epoch"],
)
def test_out_of_bounds_arguments_are_refused(secret, change):
    arguments = {"sender": BANK, "receiver": HOSPITAL.public(), "roster": ROSTER, "run": RUN, "epoch": 0}
    with pytest.raises(Malformed):
        seal(secret, **(arguments | change))


@pytest.mark.parametrize(
    "change",
    [
        {"run": "r" * 129},
        {"epoch": -1},
        {"epoch": "3"},
        {"sender": ""},
        {"receiver": "r" * 65},
        {"roster_digest": bytes(31)},
        {"ciphertext": bytes(SEAL_OVERHEAD_BYTES)},
        {"ciphertext": bytes(SEAL_OVERHEAD_BYTES + sealing.MAX_SECRET_BYTES + 1)},
        {"signature": bytes(65)},
        {"comment": "unknown field"},
    ],
    ids=lambda change: ",".join(
        f"{key} {len(value) if isinstance(value, bytes) else value!r:.9}" for key, value in change.items()
    ),
)
def test_decoding_an_envelope_is_strict_and_bounded(change):
    fields = msgspec.structs.asdict(SEALED) | change
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=SealedKey)
