import struct
import subprocess
import sys

import numpy as np
import pytest
from tenseal import sealapi

from fedseek.errors import Malformed
from fedseek.he import sealfile
from fedseek.he.ciphertext import (
    CiphertextForm,
    add_in_place,
    load_ciphertext,
    save_ciphertext,
    seal_context,
    subtract_in_place,
    subtract_slots,
)
from fedseek.he.keys import SecretKey, decrypt_slots, encrypt_slots
from fedseek.he.packing import choose_packing

PARAMS = choose_packing(13, 8).params
KEY = SecretKey.generate(PARAMS)
SLOTS = np.random.default_rng(3).integers(0, 2**48, size=4096, dtype=np.uint64)
(FRESH,) = encrypt_slots(KEY, SLOTS)
SUMMED = save_ciphertext(load_ciphertext(PARAMS, FRESH, form=CiphertextForm.FRESH))


def with_announced_size(data):
    """The same bytes under a SEAL header that announces their number, as an attacker would write it."""
    return data[:8] + struct.pack("<Q", len(data)) + data[16:]


def zstd_bomb(content_size):
    """A few bytes that inflate to gigabytes: many run-length blocks of 128 KiB each."""
    frame = b"\x28\xb5\x2f\xfd\x60" + (content_size - 256).to_bytes(2, "little")
    block = (((1 << 17) << 3) | (1 << 1)).to_bytes(3, "little") + b"\x00"
    return with_announced_size(FRESH[:16] + frame + block * 5000)


BAD = {
    "empty": b"",
    "short": FRESH[:10],
    "truncated": FRESH[:-5],
    "truncated, size rewritten": with_announced_size(FRESH[:-5]),
    "trailing bytes": FRESH + b"\x00",
    "trailing bytes, size rewritten": with_announced_size(FRESH + b"\x00\x00"),
    "not SEAL": b"PK\x03\x04" + FRESH[4:],
    "other compression": FRESH[:5] + b"\x01" + FRESH[6:],
    "other version": FRESH[:3] + b"\x03" + FRESH[4:],
    "not zstd": FRESH[:16] + b"\x00" + FRESH[17:],
    "other content size": FRESH[:21] + b"\x00\x00" + FRESH[23:],
    "compression bomb": zstd_bomb(32946),
    "a secret key": KEY.to_bytes(),
    "the other form": SUMMED,
    "far too long": FRESH * 100,
}


@pytest.mark.parametrize("name", BAD)
def test_foreign_bytes_are_refused(name):
    with pytest.raises(Malformed):
        load_ciphertext(PARAMS, BAD[name], form=CiphertextForm.FRESH)


def test_seal_alone_would_have_taken_trailing_bytes():
    # The reason for open_frame: if SEAL ever refuses these itself, this test says that the guard may go.
    context = seal_context(PARAMS)
    sealfile.load_object(sealapi.Ciphertext(context), [BAD["trailing bytes, size rewritten"]], context=context)


def test_fresh_form_is_refused_where_a_sum_is_wanted():
    with pytest.raises(Malformed, match="content"):
        load_ciphertext(PARAMS, FRESH, form=CiphertextForm.SUMMED)


def test_ciphertext_of_other_parameters_is_refused():
    other = choose_packing(8, 64).params
    assert other != PARAMS
    (foreign,) = encrypt_slots(SecretKey.generate(other), SLOTS % other.plain_modulus)
    with pytest.raises(Malformed, match="other parameters"):
        load_ciphertext(PARAMS, foreign, form=CiphertextForm.FRESH)


def test_flipped_bytes_never_crash_the_reader():
    rng = np.random.default_rng(11)
    for position in rng.integers(0, len(FRESH), size=200):
        data = bytearray(FRESH)
        data[position] ^= 1 << int(rng.integers(8))
        try:
            load_ciphertext(PARAMS, bytes(data), form=CiphertextForm.FRESH)
        except Malformed:
            continue


def test_transparent_ciphertext_is_refused():
    context = seal_context(PARAMS)
    zero = sealapi.Ciphertext(context)
    zero.resize(context, context.first_parms_id(), 2)
    with pytest.raises(Malformed, match="hides nothing"):
        load_ciphertext(PARAMS, save_ciphertext(zero), form=CiphertextForm.SUMMED)


def test_save_and_load_keep_the_content():
    again = save_ciphertext(load_ciphertext(PARAMS, SUMMED, form=CiphertextForm.SUMMED))
    assert again == SUMMED
    assert (decrypt_slots(KEY, [again]) == SLOTS).all()


def test_many_are_read_and_written_through_one_place_and_leave_nothing_to_each_other():
    with sealfile.scratch() as through:
        for _ in range(2):  # a summed one is longer: what is left of it lies behind the fresh one
            summed = load_ciphertext(PARAMS, SUMMED, form=CiphertextForm.SUMMED, through=through)
            fresh = load_ciphertext(PARAMS, FRESH, form=CiphertextForm.FRESH, through=through)
            assert save_ciphertext(fresh, through) == save_ciphertext(summed, through) == SUMMED
        for data in (FRESH[:-1], SUMMED[:-1], FRESH + b"\0", b""):
            for form in CiphertextForm:
                with pytest.raises(Malformed):
                    load_ciphertext(PARAMS, data, form=form, through=through)


def test_subtraction_undoes_addition_bit_for_bit():
    (other,) = encrypt_slots(KEY, SLOTS[::-1].copy())
    running = load_ciphertext(PARAMS, FRESH, form=CiphertextForm.FRESH)
    addend = load_ciphertext(PARAMS, other, form=CiphertextForm.FRESH)
    add_in_place(PARAMS, running, addend)
    expected = (SLOTS + SLOTS[::-1]) % np.uint64(PARAMS.plain_modulus)
    assert (decrypt_slots(KEY, [save_ciphertext(running)]) == expected).all()
    subtract_in_place(PARAMS, running, addend)
    assert save_ciphertext(running) == SUMMED


def decrypted(running):
    return decrypt_slots(KEY, [save_ciphertext(running)])


def test_known_slots_are_subtracted_modulo_t_under_encryption():
    known = np.random.default_rng(4).integers(0, PARAMS.plain_modulus, size=4096, dtype=np.uint64)  # many above SLOTS
    running = load_ciphertext(PARAMS, FRESH, form=CiphertextForm.FRESH)
    before = save_ciphertext(running)
    subtract_slots(PARAMS, running, known)
    t = PARAMS.plain_modulus
    assert decrypted(running).tolist() == [(a - b) % t for a, b in zip(SLOTS.tolist(), known.tolist(), strict=True)]
    assert save_ciphertext(running) != before


def test_zeros_subtracted_leave_the_ciphertext_as_it_is():
    running = load_ciphertext(PARAMS, FRESH, form=CiphertextForm.FRESH)
    subtract_slots(PARAMS, running, np.zeros(4096, dtype=np.uint64))
    assert save_ciphertext(running) == SUMMED


def test_known_slots_come_off_the_largest_sum_of_the_plan_exactly():
    # The noise budget counts one plaintext subtracted from max_sites updates; masked slots are anywhere below t.
    t, rng = PARAMS.plain_modulus, np.random.default_rng(5)
    addends = rng.integers(0, t, size=(8, 4096), dtype=np.uint64)
    known = rng.integers(0, t, size=4096, dtype=np.uint64)
    running, *others = (
        load_ciphertext(PARAMS, encrypt_slots(KEY, slots)[0], form=CiphertextForm.FRESH) for slots in addends
    )
    for other in others:
        add_in_place(PARAMS, running, other)
    subtract_slots(PARAMS, running, known)
    expected = (addends.sum(axis=0) + np.uint64(t) - known) % np.uint64(t)  # 9 numbers below 2^48: no overflow
    assert (decrypted(running) == expected).all()


def test_what_does_not_fit_the_slots_is_not_subtracted():
    running = load_ciphertext(PARAMS, FRESH, form=CiphertextForm.FRESH)
    with pytest.raises(ValueError):
        subtract_slots(PARAMS, running, np.zeros(4097, dtype=np.uint64))
    assert save_ciphertext(running) == SUMMED


def test_without_anonymous_memory_a_private_directory_is_used_and_removed(monkeypatch, tmp_path):
    monkeypatch.delattr("os.memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ciphertext = load_ciphertext(PARAMS, FRESH, form=CiphertextForm.FRESH)
    assert save_ciphertext(ciphertext) == SUMMED
    assert list(tmp_path.iterdir()) == []


def test_public_side_imports_neither_the_key_module_nor_torch():
    code = (
        "import sys, fedseek.aggregate, fedseek.encode, fedseek.he.packing;"
        "print([m for m in ('fedseek.he.keys', 'torch', 'opacus', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
