import copy
import hmac
import pickle
import struct

import numpy as np
import pytest

from fedseek.errors import Malformed, WrongKey
from fedseek.he.ciphertext import CiphertextForm, add_in_place, load_ciphertext, save_ciphertext
from fedseek.he.keys import SecretKey, decrypt_slots, encrypt_slots
from fedseek.he.packing import choose_packing

PARAMS = choose_packing(13, 8).params
KEY = SecretKey.generate(PARAMS)


def add_up(*updates):
    """Add updates of one ciphertext each, as the coordinator does."""
    loaded = [load_ciphertext(PARAMS, data, form=CiphertextForm.FRESH) for data in updates]
    for addend in loaded[1:]:
        add_in_place(PARAMS, loaded[0], addend)
    return save_ciphertext(loaded[0])


@pytest.mark.parametrize("num_slots", [1, 4095, 4096, 4097, 9000])
def test_decrypt_undoes_encrypt_and_fills_up_with_zeros(num_slots):
    slots = np.random.default_rng(num_slots).integers(0, PARAMS.plain_modulus, size=num_slots, dtype=np.uint64)
    decrypted = decrypt_slots(KEY, [add_up(data) for data in encrypt_slots(KEY, slots)])
    assert decrypted.size % 4096 == 0
    assert (decrypted[:num_slots] == slots).all()
    assert not decrypted[num_slots:].any()


def test_largest_sum_of_the_plan_is_exact_through_seal():
    slots = np.full(4096, PARAMS.plain_modulus - 1, dtype=np.uint64)  # wraps around t seven times
    total = add_up(*(encrypt_slots(KEY, slots)[0] for _ in range(8)))
    assert (decrypt_slots(KEY, [total]) == PARAMS.plain_modulus - 8).all()


def test_seeded_ciphertext_is_at_most_eight_bytes_a_slot():
    slots = np.random.default_rng(0).integers(0, PARAMS.plain_modulus, size=4096, dtype=np.uint64)
    (data,) = encrypt_slots(KEY, slots)
    assert len(data) <= 8 * 4096


def test_two_encryptions_of_the_same_slots_differ():
    slots = np.arange(4096, dtype=np.uint64)
    assert encrypt_slots(KEY, slots) != encrypt_slots(KEY, slots)


def test_slot_beyond_the_plain_modulus_is_refused():
    with pytest.raises(ValueError, match="plain modulus"):
        encrypt_slots(KEY, np.array([PARAMS.plain_modulus], dtype=np.uint64))


def test_wrong_key_is_refused_not_decrypted_to_garbage():
    sums = [add_up(data) for data in encrypt_slots(KEY, np.arange(8192, dtype=np.uint64))]
    with pytest.raises(WrongKey, match="noise budget"):
        decrypt_slots(SecretKey.generate(PARAMS), sums)


def test_sum_over_two_keys_is_refused_by_both_holders():
    other = SecretKey.generate(PARAMS)
    slots = np.arange(4096, dtype=np.uint64)
    mixed = add_up(*encrypt_slots(KEY, slots), *encrypt_slots(other, slots))
    for key in (KEY, other):
        with pytest.raises(WrongKey):
            decrypt_slots(key, [mixed])


def test_one_bad_ciphertext_in_the_last_place_is_noticed():
    good = [add_up(data) for data in encrypt_slots(KEY, np.arange(8192, dtype=np.uint64))]
    (alien,) = encrypt_slots(SecretKey.generate(PARAMS), np.arange(4096, dtype=np.uint64))
    with pytest.raises(WrongKey):
        decrypt_slots(KEY, [*good, add_up(alien)])


def test_key_survives_bytes():
    again = SecretKey.from_bytes(PARAMS, KEY.to_bytes())
    slots = np.arange(4096, dtype=np.uint64)
    assert (decrypt_slots(again, [add_up(*encrypt_slots(KEY, slots))]) == slots).all()
    assert again.fingerprint() == KEY.fingerprint()


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\x00", lambda d: b"", lambda d: d[:16] + d[20:]])
def test_bytes_that_are_no_key_are_refused(change):
    with pytest.raises(Malformed):
        SecretKey.from_bytes(PARAMS, change(KEY.to_bytes()))


def test_key_of_other_parameters_is_refused():
    other = choose_packing(8, 64).params
    with pytest.raises(Malformed, match="other parameters"):
        SecretKey.from_bytes(other, KEY.to_bytes())


def test_fingerprint_tells_keys_apart_and_is_short():
    names = {SecretKey.generate(PARAMS).fingerprint() for _ in range(4)}
    assert len(names) == 4
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in names)


def test_derived_keys_depend_on_key_and_purpose_alone():
    purposes = [b"", b"a", b"b", b"a\0", "标签".encode()]
    other = SecretKey.generate(PARAMS)
    derived = [key.derive(purpose) for key in (KEY, other) for purpose in purposes]
    assert len(set(derived)) == len(derived)
    assert {len(key) for key in derived} == {32}
    again = SecretKey.from_bytes(PARAMS, KEY.to_bytes())
    assert [again.derive(purpose) for purpose in purposes] == derived[: len(purposes)]


def test_derived_key_is_hkdf_of_parameters_and_coefficients():
    # By RFC 5869 from its own two HMACs: another reader of the definition must get the same key.
    coefficients = [KEY._seal_key.data().data(place) for place in range(PARAMS.poly_modulus_degree)]
    content = f"4096,(58,),{PARAMS.plain_modulus}\0".encode() + struct.pack("<4096Q", *coefficients)
    extracted = hmac.digest(b"fedseek/he/derive/v1", content, "sha256")
    assert KEY.derive(b"purpose") == hmac.digest(extracted, b"purpose\x01", "sha256")


def test_derived_key_has_no_stretch_of_the_key_and_not_its_public_name():
    derived = KEY.derive(b"purpose")
    assert not any(derived[start : start + 4] in KEY.to_bytes() for start in range(29))
    assert KEY.fingerprint() not in derived.hex()


def test_key_shows_itself_nowhere():
    assert repr(KEY) == str(KEY) == "SecretKey(<redacted>)"
    assert f"{[KEY]}" == "[SecretKey(<redacted>)]"


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_key_is_never_pickled_or_copied(duplicate):
    with pytest.raises(TypeError, match="never pickled"):
        duplicate(KEY)
